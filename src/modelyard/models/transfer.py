"""Fetching one file: resumed where it broke off, hashed as it flows, put in place only when it is what was announced.

A `Source` (the hub, a folder) lists files and opens one at an offset. `fetch` appends to a `.part` file with nothing
buffered in the process, so that a kill loses nothing and needs no cleaning up; the next run goes on from its
size. Files lie under the name of their digest: a repository that moved on meanwhile shares what has not changed.
Wrong content is fetched once more, then refused. Runs in the download child only; blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from modelyard.errors import JobFailure
from modelyard.paths import below
from modelyard.retry import Backoff, retry_blocking

TRIES = 3
BACKOFF = Backoff(first_s=0.5, longest_s=4.0)
BLOCK = 1024 * 1024
REPORT_EVERY_S = 0.2
NETWORK_HINT = "Check the network, the proxy and HF_ENDPOINT, then add the model again: it goes on where it stopped."

T = TypeVar("T")


class TryAgain(JobFailure):
    """A failure that may pass by itself: the network, a server that is down or busy."""


class TooLong(Exception):
    """More bytes arrived than were announced."""


@dataclass(frozen=True)
class SourceFile:
    """A file that a source offers. `digest` is `sha256:...` or git's blob id, `git:...`; None if nobody knows it."""

    path: str
    size: int
    digest: str | None
    #: What the source itself needs to open it.
    handle: Any = None


class Source(Protocol):
    """Where files come from. Every method blocks, and raises `JobFailure` (`TryAgain` if that may help)."""

    def resolve(self, revision: str) -> tuple[str, list[str]]:
        """Return the commit of a revision, and the names of its files."""

    def describe(self, path: str) -> SourceFile:
        """Return size and digest of a file of the commit that was resolved."""

    def open(self, file: SourceFile, offset: int) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """Open a file at an offset; return where its bytes really start (0 if it cannot start there), and the bytes."""


class Progress:
    """Progress for the server: a JSON line `{"phase", "done", "total", "checked"}` for each change, at most 5 a second.

    `checked` are bytes that were read again to hash them: a long check is no stall.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"phase": "start", "done": 0, "total": 0, "checked": 0}
        self._written_at = 0.0

    def update(self, *, phase: str | None = None, total: int | None = None, done: int = 0, checked: int = 0) -> None:
        """Add to `done` and `checked`; set phase and total."""
        with self._lock:
            self._state["done"] += done
            self._state["checked"] += checked
            important = phase is not None or total is not None
            if phase is not None:
                self._state["phase"] = phase
            if total is not None:
                self._state["total"] = total
            now = time.monotonic()
            if important or now - self._written_at >= REPORT_EVERY_S:
                self._written_at = now
                os.write(self._file, json.dumps(self._state).encode() + b"\n")


def patiently(call: Callable[[], T]) -> T:
    """Return what `call` returns, trying again after a `TryAgain` with growing pauses."""
    return retry_blocking(call, TryAgain, BACKOFF, tries=TRIES)


def blob_name(file: SourceFile, commit: str) -> str:
    """Return the name under which a file waits: that of its content, where that is known."""
    return (file.digest or f"{commit}:{hashlib.sha256(file.path.encode()).hexdigest()}").replace(":", "-")


def present_bytes(file: SourceFile, commit: str, folder: Path) -> int:
    """Return how much of the file is on disk already."""
    blob = below(folder, blob_name(file, commit))
    for path in (blob, blob.with_name(blob.name + ".part")):
        if path.exists():
            return min(path.stat().st_size, file.size)
    return 0


def fetch(source: Source, file: SourceFile, commit: str, folder: Path, progress: Progress) -> Path:
    """Bring the file into the folder and return its path; at once if it is there.

    Raises:
        JobFailure: `hash_mismatch`, or what the source says.
        OSError: the disk is full, or fails.
    """
    blob = below(folder, blob_name(file, commit))
    if blob.exists() and blob.stat().st_size == file.size:
        progress.update(done=file.size)
        return blob
    part = blob.with_name(blob.name + ".part")
    for last_chance in (False, True):
        try:
            if _fill(source, file, part, progress):
                os.rename(part, blob)
                return blob
        except TooLong:
            pass
        progress.update(done=-min(part.stat().st_size, file.size))
        part.unlink()
        if last_chance:
            break
    raise JobFailure(
        "hash_mismatch",
        f"{file.path} arrived twice with content other than announced ({file.digest or f'{file.size} bytes'}).",
        "A proxy or a mirror may be serving damaged files: check HF_ENDPOINT and the network, then add it again.",
    )


def take_over(place: Path, file: SourceFile, commit: str, folder: Path, progress: Progress) -> None:
    """Save fetching a file that another folder holds already, where its content is as announced."""
    blob = below(folder, blob_name(file, commit))
    if blob.exists() or file.digest is None or not place.is_file() or place.stat().st_size != file.size:
        return
    hasher = _hasher(file)
    _feed(hasher, place, progress)
    if _is_right(file, hasher):
        os.link(place, blob)


def digest_of(path: Path, progress: Progress) -> str:
    """Return the `sha256:` digest of a file on disk."""
    hasher = hashlib.sha256()
    _feed(hasher, path, progress)
    return f"sha256:{hasher.hexdigest()}"


def _fill(source: Source, file: SourceFile, part: Path, progress: Progress) -> bool:
    """Complete the part file; return whether its content is right."""
    # Unbuffered: whatever arrived is on disk (in the kernel's hands) when this process is killed.
    with open(part, "ab", buffering=0) as out:
        offset = out.seek(0, os.SEEK_END)
        if offset > file.size:
            out.truncate(0)
            offset = 0
        hasher = _hasher(file)
        _feed(hasher, part, progress)
        progress.update(done=offset)
        failures = 0
        while offset < file.size:
            before = offset
            try:
                with source.open(file, offset) as (start, blocks):
                    if start != offset:
                        out.truncate(0)
                        hasher = _hasher(file)
                        progress.update(done=-offset)
                        before = offset = 0
                    for block in blocks:
                        out.write(block)
                        hasher.update(block)
                        offset += len(block)
                        progress.update(done=len(block))
                        if offset > file.size:
                            raise TooLong
            except TryAgain:
                failures = 1 if offset > before else failures + 1
                if failures > TRIES:
                    raise
                time.sleep(BACKOFF.pause_s(failures))
            else:
                # An answer that ended early without an error counts as a failure: else this could go on for ever.
                failures = failures + 1 if offset == before else 0
                if failures > TRIES:
                    raise TryAgain(
                        "connection_lost", f"{file.path} broke off at byte {offset} of {file.size}.", NETWORK_HINT
                    )
        os.fsync(out.fileno())
    return _is_right(file, hasher)


def _is_right(file: SourceFile, hasher: Any) -> bool:
    return file.digest is None or file.digest.partition(":")[2] == hasher.hexdigest()


def _hasher(file: SourceFile) -> Any:
    if file.digest is not None and file.digest.startswith("git:"):
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.sha256()


def _feed(hasher: Any, path: Path, progress: Progress) -> None:
    with open(path, "rb") as content:
        while block := content.read(BLOCK):
            hasher.update(block)
            progress.update(checked=len(block))
