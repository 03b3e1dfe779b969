"""Attempts: each start of a deployment's engine has a folder `attempt-N` in its job's folder, and a part of its log.

The newest attempt is the one that may live. The job's one log holds all of them, each under a line that says which
command was run, so that a failure can be read after the next attempt began. All functions block on the disk.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from modelyard.db import utcnow
from modelyard.processes import Outcome, outcome_of

HEAD = "=== attempt "
_TIME = "%Y-%m-%d %H:%M:%S"
_HEAD_LINE = re.compile(rb"=== attempt (\d{1,9}), (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC: ([^\n]*)\n?")
TAIL_BYTES = 256 * 1024
BLOCK_BYTES = 1024 * 1024
#: The longest head line that is read whole: a command has some thousand bytes.
HEAD_BYTES = 64 * 1024
#: The most of one attempt's log that one answer carries.
LOG_LIMIT = 8 * 1024 * 1024


@dataclass(frozen=True)
class Attempt:
    """One start. `start` and `end` are where its lines lie in the job's log, in bytes.

    `outcome` is None while the engine runs, or where nobody saw how it ended.
    """

    number: int
    started_at: datetime
    command: str
    start: int
    end: int
    outcome: Outcome | None


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
        file.write(f"{HEAD}{number}, {utcnow():{_TIME}} UTC: {shlex.join(argv)}\n")


def newest_log(log: Path) -> str:
    """Return what the newest attempt wrote, at most its last 256 KiB; an absent log is empty."""
    with suppress(OSError), log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - TAIL_BYTES))
        return file.read().decode("utf-8", "replace").rpartition(HEAD)[2]
    return ""


def listing(job_folder: Path, log: Path) -> list[Attempt]:
    """Return the attempts that the job's log has, the first first."""
    found: list[Attempt] = []
    heads, size = _heads(log)
    for number, started, command, start, end in heads:
        if number != len(found) + 1:
            continue  # an engine that wrote such a line: attempts are counted
        if found:
            found[-1] = _ended(found[-1], start)
        moment = datetime.strptime(started, _TIME).replace(tzinfo=UTC)
        outcome = outcome_of(job_folder / f"attempt-{number}")
        found.append(Attempt(number, moment, command, end, size, outcome))
    return found


def _heads(log: Path) -> tuple[list[tuple[int, str, str, int, int]], int]:
    """Return number, time, command, start and end of each head line, and the size of the log.

    A log may have gigabytes: it is read in blocks, between which the server's other threads work.
    """
    heads, size, rest, wanted = [], 0, b"", HEAD.encode()
    with suppress(FileNotFoundError), log.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            text, begin = rest + block, size - len(rest)
            size += len(block)
            at = -1
            while (at := text.find(wanted, at + 1)) >= 0:
                if at + HEAD_BYTES > len(text) and len(block) == BLOCK_BYTES:
                    break  # its line may go on in the next block
                is_first = at == 0 and begin == 0
                head = _HEAD_LINE.match(text, at, at + HEAD_BYTES) if is_first or text[at - 1 : at] == b"\n" else None
                if head is not None:
                    words = (int(head[1]), head[2].decode(), head[3].decode("utf-8", "replace"))
                    heads.append((*words, begin + head.start(), begin + head.end()))
            # One byte before it tells whether it begins a line.
            rest = text[max(0, (at if at >= 0 else len(text) - len(wanted)) - 1) :]
    return heads, size


def _ended(attempt: Attempt, end: int) -> Attempt:
    return Attempt(attempt.number, attempt.started_at, attempt.command, attempt.start, end, attempt.outcome)


def log_of(log: Path, attempt: Attempt, limit: int = LOG_LIMIT) -> str:
    """Return what an attempt wrote, at most its last `limit` bytes."""
    with suppress(FileNotFoundError), log.open("rb") as file:
        start = max(attempt.start, attempt.end - limit)
        file.seek(start)
        data = file.read(attempt.end - start)
        if start > attempt.start:
            data = data.partition(b"\n")[2] or data
        return data.decode("utf-8", "replace")
    return ""
