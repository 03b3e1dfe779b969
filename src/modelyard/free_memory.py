"""Memory that could still be taken on this machine, or in the container that this process runs in."""

from __future__ import annotations

from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Return how many bytes are free or could be freed at once; 0 where the system does not tell. Reads files."""
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
