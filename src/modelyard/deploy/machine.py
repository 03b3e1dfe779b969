"""What this machine has for an engine: GPUs or not, processors, free memory. Reads files, starts nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GIB = 1024**3


@dataclass(frozen=True)
class Machine:
    """A machine as an engine sees it. `cpus` are the processors that this server may use; memory is in bytes."""

    has_gpu: bool
    cpus: tuple[int, ...]
    memory_available_bytes: int


def this_machine(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Machine:
    """Look at the machine now."""
    return Machine(
        has_gpu=(proc / "driver/nvidia/version").exists(),
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        memory_available_bytes=_memory_available(proc, cgroup),
    )


def _memory_available(proc: Path, cgroup: Path) -> int:
    available = 0
    for line in (proc / "meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    # A container's limit is what counts inside it; page cache that could be dropped is not in use.
    try:
        limit = (cgroup / "memory.max").read_text("ascii").strip()
        used = int((cgroup / "memory.current").read_text("ascii"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text("ascii").splitlines())
    except (OSError, ValueError):
        return available
    if limit == "max":
        return available
    return min(available, max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
