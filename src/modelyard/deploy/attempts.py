"""Attempts: each start of a deployment's engine has a folder `attempt-N` in its job's folder, and a part of its log.

The newest attempt is the one that may live. The job's one log holds all of them, each under a line that says which
command was run, so that a failure can be read after the next attempt began. All functions block on the disk.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from modelyard.db import utcnow

HEAD = "=== attempt "
TAIL_BYTES = 256 * 1024


def newest(job_folder: Path) -> Path | None:
    """Return the folder of the newest attempt, or None if there was none."""
    attempts = sorted(job_folder.glob("attempt-*"), key=_number)
    return attempts[-1] if attempts else None


def following(job_folder: Path) -> tuple[int, Path]:
    """Return number and folder of the next attempt; the folder is not made."""
    last = newest(job_folder)
    number = 1 + (_number(last) if last else 0)
    return number, job_folder / f"attempt-{number}"


def _number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def begin_log(log: Path, number: int, argv: Sequence[str]) -> None:
    """Head an attempt in the job's log with its command, as one could type it."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{HEAD}{number}, {utcnow():%Y-%m-%d %H:%M:%S} UTC: {shlex.join(argv)}\n")


def newest_log(log: Path) -> str:
    """Return what the newest attempt wrote, at most its last 256 KiB; an absent log is empty."""
    with suppress(OSError), log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - TAIL_BYTES))
        return file.read().decode("utf-8", "replace").rpartition(HEAD)[2]
    return ""
