"""A zip archive as a stream: its length is known before its first byte, and no byte of it is kept.

Files are stored, not compressed (weights do not shrink), in the order of their names and with one date for all, so that
the same files are the same archive. `zipfile` writes the format: a file is read once, so that its checksum follows its
data, and archives and files beyond 2 GiB are Zip64. Only the length of what it will write is calculated here.
"""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK = 1024 * 1024
#: From here on `zipfile` writes the larger fields of Zip64 into its directory.
ZIP64_LIMIT = (1 << 31) - 1
#: From here on they are asked for beside the data, too: far below where `zipfile` would begin to by itself.
LARGE = 1 << 30
#: Lengths in bytes, without and with the fields of Zip64: what is around a file, its entry, and the end of all.
LOCAL, LOCAL_64, CENTRAL, END, END_64 = 30 + 16, 30 + 20 + 24, 46, 22, 76
MOST_FILES = (1 << 16) - 1
#: The first day that a zip archive knows.
DATE = (1980, 1, 1, 0, 0, 0)
REGULAR_FILE = 0o100644 << 16


@dataclass(frozen=True)
class Entry:
    """A file of the archive: under which name, its size in bytes, and where it is, or what is in it."""

    name: str
    size: int
    content: Path | bytes

    @property
    def is_large(self) -> bool:
        """True if its size takes the fields of Zip64."""
        return self.size > LARGE


class FileChanged(Exception):
    """A file is no longer what it was when its size was taken: what was sent of the archive is no archive."""


class _Sink(io.RawIOBase):
    """Holds what `zipfile` has written since the last look. It can tell and seek nothing, as a connection."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def writable(self) -> bool:
        """Return that it takes bytes."""
        return True

    def write(self, block: bytes) -> int:  # type: ignore[override]  # zipfile writes nothing but bytes
        """Take a block."""
        self._blocks.append(block)
        return len(block)

    def taken(self) -> list[bytes]:
        """Return what was written, and forget it."""
        blocks, self._blocks = self._blocks, []
        return blocks


def files_below(folder: Path) -> list[Entry]:
    """Return the files of a folder and of those in it, by name; hidden ones and links are left out. Blocks."""
    return [
        Entry(path.relative_to(folder).as_posix(), path.stat().st_size, path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.is_symlink()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def length(entries: Sequence[Entry]) -> int:
    """Return the length of the archive in bytes."""
    offset = directory = 0
    for entry in entries:
        name = len(entry.name.encode())
        large = 2 * (entry.size > ZIP64_LIMIT) + (offset > ZIP64_LIMIT)
        directory += CENTRAL + name + (4 + 8 * large if large else 0)
        offset += (LOCAL_64 if entry.is_large else LOCAL) + name + entry.size
    is_large = len(entries) > MOST_FILES or offset > ZIP64_LIMIT or directory > ZIP64_LIMIT
    return offset + directory + (END_64 if is_large else 0) + END


def blocks(entries: Sequence[Entry]) -> Generator[bytes]:
    """Yield the archive. Blocks on the disk; close it when it is not read to its end.

    Raises:
        FileChanged: a file has another size by now, or is gone.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for entry in entries:
            described = zipfile.ZipInfo(entry.name, DATE)
            described.file_size, described.external_attr = entry.size, REGULAR_FILE
            with archive.open(described, "w", force_zip64=entry.is_large) as out:
                for block in _content(entry):
                    out.write(block)
                    yield from sink.taken()
    yield from sink.taken()


async def stream(entries: Sequence[Entry]) -> AsyncGenerator[bytes]:
    """Yield the archive, read in threads. Raises what `blocks` does."""
    found = blocks(entries)
    try:
        while True:
            reading = asyncio.ensure_future(asyncio.to_thread(next, found, None))
            try:
                block = await asyncio.shield(reading)
            except asyncio.CancelledError:
                # A generator that a thread is in cannot be closed.
                await asyncio.wait({reading})
                raise
            if block is None:
                return
            yield block
    finally:
        found.close()


def _content(entry: Entry) -> Generator[bytes]:
    if isinstance(entry.content, bytes):
        yield entry.content
        return
    left = entry.size
    try:
        with entry.content.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                left -= len(block)
                if left < 0:
                    break
                yield block
    except FileNotFoundError:
        raise FileChanged(f"{entry.name} is gone") from None
    if left:
        raise FileChanged(f"{entry.name} has changed")
