"""Uploads of a large dataset with real curl: `python -m benchmarks.datasets [--mb N] [--rounds N] [--write]`.

Each round copies the file (to the disk, as an upload is) and uploads it to the real server on local storage, where it
is hashed, validated and stored; meanwhile somebody else asks the server something all the time. Prints MB/s, the ratio
to the copy of the same round, the server's peak memory above idle, and the longest wait of the other one. The goals are
200 MB/s, 80 MB and 50 ms. Two files: rows of some 2 kB, as conversations are, and short ones of 600 bytes.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

MB = 1_000_000
GOALS = "The goals are 200 MB/s, 80 MB above idle and 50 ms."
ROWS = {"rows of 2 kB": 230, "rows of 600 bytes": 60}
ASK_EVERY_S = 0.002


@dataclass
class Round:
    """One upload and one copy of the same file."""

    upload_mb_s: float
    copy_mb_s: float
    above_idle_mb: float
    cpu_s_per_gb: float
    waits_ms: list[float] = field(default_factory=list)


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


def memory_mb(pid: int, which: str) -> float:
    """Return a figure of a process's memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{which}:")) * 1024 / MB


def cpu_s(pid: int) -> float:
    """Return the processor time of a process in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Asker(threading.Thread):
    """Asks the server all the time, on one connection, and notes how long each answer took."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.waits_ms: list[float] = []
        self._port = port
        self._over = threading.Event()

    def run(self) -> None:
        """Ask until it is over."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        while not self._over.wait(ASK_EVERY_S):
            began = time.perf_counter()
            connection.request("GET", "/api/v1/datasets/")
            connection.getresponse().read()
            self.waits_ms.append((time.perf_counter() - began) * 1000)
        connection.close()

    def end(self) -> list[float]:
        """Stop, and return the waits in milliseconds."""
        self._over.set()
        self.join()
        return self.waits_ms


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
    Path(f"/proc/{pid}/clear_refs").write_text("5", "ascii")  # the peak begins anew
    idle, used_s = memory_mb(pid, "VmRSS"), cpu_s(pid)
    asker = Asker(port)
    asker.start()
    began = time.perf_counter()
    url = f"http://127.0.0.1:{port}/api/v1/datasets/upload/"
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", "-F", f"file=@{file}", url],
        capture_output=True, check=False,
    )  # fmt: skip
    took = time.perf_counter() - began
    waits = asker.end()
    used_s = cpu_s(pid) - used_s
    assert done.returncode == 0, (done.stderr, done.stdout[:1000])
    above = memory_mb(pid, "VmHWM") - idle
    request(port, "DELETE", f"/api/v1/datasets/{json.loads(done.stdout)['id']}")
    size_mb = file.stat().st_size / MB
    return Round(size_mb / took, copy_mb_s, above, used_s / size_mb * 1000, waits)


def measure(size_mb: int, rounds: int) -> dict[str, list[Round]]:
    """Measure both files, alternating copies and uploads."""
    found: dict[str, list[Round]] = {}
    with tempfile.TemporaryDirectory(prefix="modelyard-bench-") as folder:
        for name, words in ROWS.items():
            file = Path(folder, "train.jsonl")
            make(file, size_mb * MB, words)
            with served(Path(folder, "data")) as (port, pid):
                uploaded(file, port, pid, 1.0)  # imports and caches
                found[name] = [
                    uploaded(file, port, pid, copied_mb_s(file, Path(folder, "copy"))) for _ in range(rounds)
                ]
    return found


def table(found: dict[str, list[Round]], size_mb: int) -> list[str]:
    """Return the figures as Markdown."""
    lines = [
        f"A file of {size_mb} MB, uploaded with curl, hashed, validated and stored in a local folder. {GOALS}",
        "",
        "| | MB/s validated | a plain copy, MB/s | ratio | processor time per GB | peak memory above idle "
        "| longest wait of another | median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rounds in found.items():
        ratio = statistics.median(one.upload_mb_s / one.copy_mb_s for one in rounds)
        waits = [wait for one in rounds for wait in one.waits_ms]
        lines.append(
            f"| {name} | {statistics.median(one.upload_mb_s for one in rounds):.0f} "
            f"| {statistics.median(one.copy_mb_s for one in rounds):.0f} | {ratio:.2f} "
            f"| {statistics.median(one.cpu_s_per_gb for one in rounds):.1f} s "
            f"| {max(one.above_idle_mb for one in rounds):.0f} MB "
            f"| {max(waits):.0f} ms | {statistics.median(waits):.1f} ms |"
        )
    return lines


def main() -> None:
    """Measure, print and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mb", type=int, default=1000, help="size of the file in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    options = parser.parse_args()
    lines = table(measure(options.mb, options.rounds), options.mb)
    print("\n".join(lines))
    if options.write:
        report.write(Path(__file__).with_name("RESULTS.md"), "Datasets", lines)


if __name__ == "__main__":
    main()
