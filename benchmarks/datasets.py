"""Uploads of a large dataset with real curl: `python -m benchmarks.datasets [--mb N] [--rounds N] [--write]`.

Each round copies the file (to the disk, as an upload is) and uploads it to the real server on local storage, where it
is hashed, validated and stored; meanwhile somebody else asks the server something 50 times a second, and did so before,
when nothing was uploaded. Prints MB/s, the ratio to the copy of the same round, processor time and peak memory above
idle of the server together with the child that validates, and the longest wait of the other one. The goals are
200 MB/s, 80 MB and 50 ms. Two files: rows of some 2 kB, as conversations are, and short ones of 600 bytes. A second
table has what each stage costs alone, in processor time, which says more than the clock on a machine that is not idle.
A third one has files of other kinds, which a child makes JSONL: `--kinds-mb` of rows as CSV, a JSON array, in gzip.

Some two seconds after a file of 1 GB is gone, the kernel of a virtual machine may give its memory back to the host
(free page reporting), and programs whose memory is near run at a tenth of their speed for that long. Where the kernel
counts that, waits that it met are said apart: they come from the deletion of what the round before has left.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import hashlib
import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from modelyard.datasets.multipart import FormFile
from modelyard.datasets.validation import Validation
from modelyard.datasets.validator import READ_BYTES

MB = 1_000_000
GOALS = "The goals are 200 MB/s, 80 MB above idle and 50 ms."
ROWS = {"rows of 2 kB": 230, "rows of 600 bytes": 60}
ASK_EVERY_S = 0.02
IDLE_S = 3.0
MEMORY_EVERY_S = 0.02
#: What the kernel has given back so far, if it counts that; waits that end or begin so soon before or after met it.
GIVEN_BACK = Path("/sys/module/page_reporting/parameters/reported_kib")
LOOK_EVERY_S, AROUND_S = 0.005, 0.05
#: What a server takes from a socket at once.
RECEIVED_BYTES = 250_000
BOUNDARY = "------------------------5f0b02c75b57"


@dataclass
class Round:
    """One upload and one copy of the same file."""

    upload_mb_s: float
    copy_mb_s: float
    above_idle_mb: float
    server_s_per_gb: float
    child_s_per_gb: float
    waits: list[Wait] = field(default_factory=list)


@dataclass(frozen=True)
class Wait:
    """How long somebody else waited, and whether the kernel gave memory back meanwhile."""

    ms: float
    met_giving_back: bool = False


def make(path: Path, size_bytes: int, words: int) -> None:
    """Write a file of different rows whose answers have so many words."""
    chance = random.Random(words)
    known = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 10))) for _ in range(5000)]
    bodies = [
        json.dumps(
            {
                "messages": [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": "NUMBER " + " ".join(chance.choices(known, k=words // 3))},
                    {"role": "assistant", "content": " ".join(chance.choices(known, k=words))},
                ]
            }
        ).encode()
        for _ in range(2000)
    ]
    written = number = 0
    with path.open("wb") as file:
        while written < size_bytes:
            body = bodies[number % len(bodies)]
            written += file.write(body.replace(b"NUMBER", b"%d" % number, 1) + b"\n")
            number += 1


@contextmanager
def served(data_dir: Path) -> Iterator[tuple[int, int]]:
    """Run the server; yield its port and process id."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODELYARD_")}
    environment |= {"MODELYARD_DATA_DIR": str(data_dir), "MODELYARD_PORT": "0", "MODELYARD_LOG_LEVEL": "warning"}
    command = [sys.executable, "-m", "modelyard", "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=data_dir.parent) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            port = int(line.partition("http://")[2].partition(" ")[0].rpartition(":")[2])
            request(port, "GET", "/health")
            time.sleep(1.0)
            yield port, process.pid
        finally:
            process.terminate()


def request(port: int, method: str, path: str) -> None:
    """Ask the server something."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    answer.read()
    connection.close()


def memory_mb(pid: int) -> float:
    """Return the memory of the server and its validators in MB; what they share counts twice."""
    total = 0
    for process in (pid, *validators_of(pid)):
        try:
            status = Path(f"/proc/{process}/status").read_text("ascii")
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")), 0)
    return total * 1024 / MB


def validators_of(pid: int) -> list[int]:
    """Return the children of the server that validate."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            for child in map(int, (task / "children").read_text("ascii").split()):
                # Until it runs its own program, a child is the server once more, with all its memory.
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"modelyard.datasets.validator" in command or b"modelyard.datasets.converter" in command:
                    found.append(child)
        except OSError:
            continue
    return found


def cpu_s(pid: int) -> tuple[float, float]:
    """Return the processor time of a process, and of its children that have ended, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    user, system, of_children, system_of_children = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[11:15])
    return user + system, of_children + system_of_children


class Memory(threading.Thread):
    """Looks at the memory of a process and its children all the time."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0
        self._pid = pid
        self._over = threading.Event()

    def run(self) -> None:
        """Look until it is over."""
        while not self._over.wait(MEMORY_EVERY_S):
            self.peak_mb = max(self.peak_mb, memory_mb(self._pid))

    def end(self) -> float:
        """Stop, and return the peak in MB."""
        self._over.set()
        self.join()
        return self.peak_mb


class GivingBack(threading.Thread):
    """Looks all the time whether the kernel gives memory back to a host, and notes when."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._seen: list[float] = []
        self._over = threading.Event()

    def run(self) -> None:
        """Look until it is over; once where nothing is counted."""
        before = self._count()
        while before is not None and not self._over.wait(LOOK_EVERY_S):
            now = self._count()
            if now != before:
                self._seen.append(time.perf_counter())
            before = now

    def end(self) -> list[float]:
        """Stop, and return the moments."""
        self._over.set()
        self.join()
        return self._seen

    @staticmethod
    def _count() -> int | None:
        try:
            return int(GIVEN_BACK.read_text("ascii"))
        except (OSError, ValueError):
            return None


class Asker(threading.Thread):
    """Asks the server all the time, on one connection, and notes when each answer was waited for."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._asked: list[tuple[float, float]] = []
        self._port = port
        self._over = threading.Event()

    def run(self) -> None:
        """Ask until it is over."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        while not self._over.wait(ASK_EVERY_S):
            began = time.perf_counter()
            connection.request("GET", "/api/v1/datasets/")
            connection.getresponse().read()
            self._asked.append((began, time.perf_counter()))
        connection.close()

    def end(self, given_back: Sequence[float] = ()) -> list[Wait]:
        """Stop, and return the waits, given the moments at which memory was given back."""
        self._over.set()
        self.join()
        return [
            Wait((ended - began) * 1000, any(began - AROUND_S <= at <= ended + AROUND_S for at in given_back))
            for began, ended in self._asked
        ]


def copied_mb_s(file: Path, target: Path) -> float:
    """Copy the file to the disk and return how fast that was."""
    began = time.perf_counter()
    with file.open("rb") as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1024 * 1024)
        sink.flush()
        os.fsync(sink.fileno())
    took = time.perf_counter() - began
    target.unlink()
    return file.stat().st_size / MB / took


def uploaded(file: Path, port: int, pid: int, copy_mb_s: float) -> Round:
    """Upload the file and delete the dataset again."""
    idle_mb, (server_s, child_s) = memory_mb(pid), cpu_s(pid)
    memory, asker, giving_back = Memory(pid), Asker(port), GivingBack()
    for thread in (memory, giving_back, asker):
        thread.start()
    began = time.perf_counter()
    url = f"http://127.0.0.1:{port}/api/v1/datasets/upload/"
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", "-F", f"file=@{file}", url],
        capture_output=True, check=False,
    )  # fmt: skip
    took = time.perf_counter() - began
    time.sleep(AROUND_S)
    waits, peak_mb = asker.end(giving_back.end()), memory.end()
    assert done.returncode == 0, (done.stderr, done.stdout[:1000])
    gb = file.stat().st_size / MB / 1000
    server_s, child_s = (now - before for now, before in zip(cpu_s(pid), (server_s, child_s), strict=True))
    request(port, "DELETE", f"/api/v1/datasets/{json.loads(done.stdout)['id']}")
    return Round(gb * 1000 / took, copy_mb_s, peak_mb - idle_mb, server_s / gb, child_s / gb, waits)


def waits_when_idle(port: int) -> list[Wait]:
    """Ask for a while with nothing else going on; return the waits."""
    asker = Asker(port)
    asker.start()
    time.sleep(IDLE_S)
    return asker.end()


def stages(file: Path) -> dict[str, float]:
    """Return the processor time that each stage takes alone, in seconds per GB."""
    data = file.read_bytes()
    gb = len(data) / MB / 1000

    def parse() -> None:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="train.jsonl"\r\n\r\n'

        async def body() -> AsyncIterator[bytes]:
            yield head.encode()
            for start in range(0, len(data), RECEIVED_BYTES):
                yield data[start : start + RECEIVED_BYTES]
            yield f"\r\n--{BOUNDARY}--\r\n".encode()

        async def read() -> None:
            form = FormFile(f"multipart/form-data; boundary={BOUNDARY}", body())
            await form.open()
            async for _ in form.chunks():
                pass

        asyncio.run(read())

    def digest() -> None:
        found = hashlib.sha256()
        for start in range(0, len(data), 1024 * 1024):
            found.update(data[start : start + 1024 * 1024])

    def write() -> None:
        with file.with_name("written").open("wb", buffering=0) as sink:
            for start in range(0, len(data), 1024 * 1024):
                sink.write(data[start : start + 1024 * 1024])
        file.with_name("written").unlink()

    def validate() -> None:
        validation = Validation(16 * 1024 * 1024)
        for start in range(0, len(data), READ_BYTES):
            validation.feed(data[start : start + READ_BYTES])
        validation.finish()
        validation.close()

    return {step.__name__: _processor_s(step) / gb for step in (parse, digest, write, validate)}


def _processor_s(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@dataclass
class Found:
    """All rounds with one file, the waits before them, and what the stages cost."""

    rounds: list[Round]
    idle_waits: list[Wait]
    stages: dict[str, float]


def measure(size_mb: int, rounds: int) -> dict[str, Found]:
    """Measure both files, alternating copies and uploads."""
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory(prefix="modelyard-bench-") as folder:
        for name, words in ROWS.items():
            file = Path(folder, "train.jsonl")
            make(file, size_mb * MB, words)
            with served(Path(folder, "data")) as (port, pid):
                uploaded(file, port, pid, 1.0)  # imports and caches
                idle = waits_when_idle(port)
                done = [uploaded(file, port, pid, copied_mb_s(file, Path(folder, "copy"))) for _ in range(rounds)]
            found[name] = Found(done, idle, stages(file))
    return found


def make_kinds(folder: Path, size_bytes: int) -> dict[str, Path]:
    """Write the same questions and answers as JSONL, as a table, as an array, and in gzip."""
    chance = random.Random(3)
    known = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 10))) for _ in range(5000)]
    rows, length = [], 0
    while length < size_bytes:
        rows.append(
            {"prompt": " ".join(chance.choices(known, k=60)), "completion": " ".join(chance.choices(known, k=200))}
        )
        length += sum(map(len, rows[-1].values())) + len('{"prompt": "", "completion": ""}')
    files = {kind: folder / f"train.{kind}" for kind in ("jsonl", "csv", "json", "jsonl.gz")}
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    files["json"].write_text(json.dumps(rows, indent=2), "utf-8")
    with files["csv"].open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink, quoting=csv.QUOTE_ALL)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    files["jsonl.gz"].write_bytes(gzip.compress(files["jsonl"].read_bytes(), 6))
    return files


def measure_kinds(size_mb: int, rounds: int) -> dict[str, list[Round]]:
    """Upload the same rows in each kind of file; MB/s and seconds for each GB are of the JSONL that they become."""
    with tempfile.TemporaryDirectory(prefix="modelyard-bench-") as folder:
        files = make_kinds(Path(folder), size_mb * MB)
        with served(Path(folder, "data")) as (port, pid):
            uploaded(files["jsonl"], port, pid, 1.0)  # imports and caches
            found: dict[str, list[Round]] = {}
            for kind, file in files.items():
                scale = files["jsonl"].stat().st_size / file.stat().st_size
                for _ in range(rounds):
                    one = uploaded(file, port, pid, 1.0)
                    one.upload_mb_s *= scale
                    one.server_s_per_gb /= scale
                    one.child_s_per_gb /= scale
                    found.setdefault(kind, []).append(one)
    return found


def table_of_kinds(found: dict[str, list[Round]], size_mb: int) -> list[str]:
    """Return the figures of other kinds of files as Markdown."""
    lines = [
        "",
        f"The same rows in files of other kinds, made JSONL while they arrive; {size_mb} MB, and MB/s, as JSONL:",
        "",
        "| | MB/s | processor time per GB: server | child | peak memory above idle | longest wait of another |",
        "|---|---|---|---|---|---|",
    ]
    for kind, rounds in found.items():
        lines.append(
            f"| {kind} | {statistics.median(each.upload_mb_s for each in rounds):.0f} "
            f"| {statistics.median(each.server_s_per_gb for each in rounds):.1f} s "
            f"| {statistics.median(each.child_s_per_gb for each in rounds):.1f} s "
            f"| {max(each.above_idle_mb for each in rounds):.0f} MB "
            f"| {longest([wait for each in rounds for wait in each.waits])} |"
        )
    return lines


def table(found: dict[str, Found], size_mb: int) -> list[str]:
    """Return the figures as Markdown."""
    lines = [
        f"A file of {size_mb} MB, uploaded with curl, hashed, validated and stored in a local folder. {GOALS}",
        "",
        "| | MB/s validated | a plain copy, MB/s | ratio | processor time per GB: server | child "
        "| peak memory above idle | longest wait of another | median | longest when idle |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        rounds = one.rounds
        ratio = statistics.median(each.upload_mb_s / each.copy_mb_s for each in rounds)
        waits = [wait for each in rounds for wait in each.waits]
        lines.append(
            f"| {name} | {statistics.median(each.upload_mb_s for each in rounds):.0f} "
            f"| {statistics.median(each.copy_mb_s for each in rounds):.0f} | {ratio:.2f} "
            f"| {statistics.median(each.server_s_per_gb for each in rounds):.1f} s "
            f"| {statistics.median(each.child_s_per_gb for each in rounds):.1f} s "
            f"| {max(each.above_idle_mb for each in rounds):.0f} MB "
            f"| {longest(waits)} | {statistics.median(wait.ms for wait in waits):.1f} ms "
            f"| {longest(one.idle_waits)} |"
        )
    names = list(next(iter(found.values())).stages)
    lines += [
        "",
        "Processor time of each stage alone, in seconds per GB:",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for name, one in found.items():
        lines.append(f"| {name} | {' | '.join(f'{one.stages[stage]:.2f}' for stage in names)} |")
    return lines


def longest(waits: Sequence[Wait]) -> str:
    """Return the longest wait, and that of all which met no giving back of memory where that is another."""
    others, met = ([wait.ms for wait in waits if wait.met_giving_back is it] for it in (False, True))
    if not met or max(met) <= max(others, default=0.0):
        return f"{max(others):.0f} ms"
    return f"{max(others, default=0.0):.0f} ms, and {max(met):.0f} ms while the machine gave memory back to its host"


def main() -> None:
    """Measure, print and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mb", type=int, default=1000, help="size of the file in MB")
    parser.add_argument("--kinds-mb", type=int, default=100, help="size of the files of other kinds as JSONL, in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    options = parser.parse_args()
    lines = table(measure(options.mb, options.rounds), options.mb)
    lines += table_of_kinds(measure_kinds(options.kinds_mb, options.rounds), options.kinds_mb)
    print("\n".join(lines))
    if options.write:
        report.write(Path(__file__).with_name("RESULTS.md"), "Datasets", lines)


if __name__ == "__main__":
    main()
