"""How soon the server answers and how much memory it takes idle: `python -m benchmarks.startup [--starts N]`.

Each start is a new process on the same data folder; the first one makes the database too. Prints the best and the
median time from the start of the process to the first answer on /health, what of it was processor time, and the
memory (resident set) a while later. The goals are 1.0 s and 120 MB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report

GOAL_S = 1.0
GOAL_MB = 120.0
IDLE_S = 1.0
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Start:
    """One start: seconds to the first answer and of processor time until then, memory in MB (10^6 bytes)."""

    answered_s: float
    cpu_s: float
    memory_mb: float


def measure(data_dir: Path, idle_s: float = IDLE_S) -> Start:
    """Start the server once, wait for its first answer, and end it."""
    # As installed with its bytecode; nothing else of this process's settings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODELYARD_")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment |= {"MODELYARD_DATA_DIR": str(data_dir), "MODELYARD_PORT": "0"}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "modelyard", "serve"], stdout=subprocess.PIPE, env=environment, cwd=data_dir.parent
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            address = line.partition("http://")[2].partition(" ")[0]
            with urllib.request.urlopen(f"http://{address}/health", timeout=PATIENCE_S) as answer:
                answer.read()
            answered_s = time.perf_counter() - began
            fields = Path(f"/proc/{process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            time.sleep(idle_s)
            status = Path(f"/proc/{process.pid}/status").read_text("ascii")
            resident_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
            return Start(answered_s, cpu_s, resident_kib * 1024 / 1e6)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def main() -> None:
    """Measure and print; the exit status says whether the goals were reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        starts = [measure(Path(folder, "data")) for _ in range(arguments.starts)]
    answered = [start.answered_s for start in starts]
    print(f"first answer   best {min(answered):.2f} s   median {statistics.median(answered):.2f} s   goal {GOAL_S:g} s")
    print(f"processor      median {statistics.median(start.cpu_s for start in starts):.2f} s")
    memory = max(start.memory_mb for start in starts)
    print(f"memory idle    most {memory:.0f} MB   goal {GOAL_MB:g} MB")
    if arguments.write:
        lines = [
            f"{arguments.starts} starts one after the other, bytecode compiled, SQLite in a folder.",
            "",
            "|  | measured | goal |",
            "|---|---|---|",
            f"| start to first answer, median | {statistics.median(answered):.2f} s | {GOAL_S:g} s |",
            f"| start to first answer, best | {min(answered):.2f} s |  |",
            f"| of it processor time | median {statistics.median(start.cpu_s for start in starts):.2f} s |  |",
            f"| memory idle (resident), the most | {memory:.0f} MB | {GOAL_MB:g} MB |",
        ]
        report.write(Path(__file__).with_name("RESULTS.md"), "Server start", lines)
    if min(answered) > GOAL_S or memory > GOAL_MB:
        raise SystemExit("a goal was missed")


if __name__ == "__main__":
    main()
