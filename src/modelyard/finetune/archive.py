"""A zip archive as a stream: its length is known before its first byte, and no byte of it is kept.

Files are stored, not compressed (weights do not shrink), in the order of their names and with one date for all, so that
the same files are the same archive. A file is read once, so that its checksum follows its data (a data descriptor);
archives and files beyond 4 GiB are Zip64. Follows PKWARE's APPNOTE 6.3.10, sections 4.3 to 4.5.

Not by a library: of those that stream, zipstream-ng dates what it writes itself, so that the same files are another
archive each time, and stream-zip wants each checksum before the data, which is reading everything twice.
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK = 1024 * 1024
#: What 32 and 16 bits cannot say is said by the larger fields of Zip64.
MOST_32 = 0xFFFF_FFFF
MOST_16 = 0xFFFF
#: The first day that a zip archive knows.
DATE, TIME = (1 << 5) | 1, 0
#: Sizes and checksum follow the data; names are UTF-8.
FLAGS = 0x0008 | 0x0800
MADE_ON_UNIX = 3 << 8
REGULAR_FILE = 0o100644 << 16
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")


@dataclass(frozen=True)
class Entry:
    """A file of the archive: under which name, its size in bytes, and where it is, or what is in it."""

    name: str
    size: int
    content: Path | bytes

    @property
    def is_large(self) -> bool:
        """True if its size needs Zip64."""
        return self.size >= MOST_32

    @property
    def version(self) -> int:
        """The version of the format that a reader must know."""
        return 45 if self.is_large else 20


class FileChanged(Exception):
    """A file is no longer what it was when its size was taken: what was sent of the archive is no archive."""


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
    offset = sum(_length_of(entry) for entry in entries)
    position, directory = 0, 0
    for entry in entries:
        directory += len(_central(entry, 0, position))
        position += _length_of(entry)
    return offset + directory + len(_end(len(entries), offset, directory))


def blocks(entries: Sequence[Entry]) -> Generator[bytes]:
    """Yield the archive. Blocks on the disk; close it when it is not read to its end.

    Raises:
        FileChanged: a file has another size by now, or is gone.
    """
    offset, directory = 0, bytearray()
    for entry in entries:
        yield _local(entry)
        checksum = yield from _data(entry)
        yield _descriptor(entry, checksum)
        directory += _central(entry, checksum, offset)
        offset += _length_of(entry)
    yield bytes(directory) + _end(len(entries), offset, len(directory))


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


def _data(entry: Entry) -> Generator[bytes, None, int]:
    if isinstance(entry.content, bytes):
        yield entry.content
        return zlib.crc32(entry.content)
    checksum, left = 0, entry.size
    try:
        with entry.content.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                left -= len(block)
                if left < 0:
                    break
                checksum = zlib.crc32(block, checksum)
                yield block
    except FileNotFoundError:
        raise FileChanged(f"{entry.name} is gone") from None
    if left:
        raise FileChanged(f"{entry.name} has changed")
    return checksum


def _local(entry: Entry) -> bytes:
    name = entry.name.encode()
    extra = struct.pack("<2H2Q", 1, 16, 0, 0) if entry.is_large else b""
    size = MOST_32 if entry.is_large else 0
    header = (b"PK\x03\x04", entry.version, FLAGS, 0, TIME, DATE, 0, size, size, len(name), len(extra))
    return _LOCAL.pack(*header) + name + extra


def _descriptor(entry: Entry, checksum: int) -> bytes:
    return struct.pack("<4sI2Q" if entry.is_large else "<4s3I", b"PK\x07\x08", checksum, entry.size, entry.size)


def _length_of(entry: Entry) -> int:
    return len(_local(entry)) + entry.size + len(_descriptor(entry, 0))


def _central(entry: Entry, checksum: int, offset: int) -> bytes:
    name = entry.name.encode()
    large = [entry.size, entry.size] if entry.is_large else []
    if offset >= MOST_32:
        large.append(offset)
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    size = MOST_32 if entry.is_large else entry.size
    version = max(entry.version, 45 if large else 0)
    header = (
        b"PK\x01\x02", MADE_ON_UNIX | version, version, FLAGS, 0, TIME, DATE, checksum, size, size, len(name),
        len(extra), 0, 0, 0, REGULAR_FILE, min(offset, MOST_32),
    )  # fmt: skip
    return _CENTRAL.pack(*header) + name + extra


def _end(count: int, offset: int, size: int) -> bytes:
    """Return what closes an archive of so many files, whose directory of `size` bytes begins at `offset`."""
    end = (b"PK\x05\x06", 0, 0, min(count, MOST_16), min(count, MOST_16), min(size, MOST_32), min(offset, MOST_32), 0)
    if count < MOST_16 and size < MOST_32 and offset < MOST_32:
        return _END.pack(*end)
    rest = _END_64.size - 12
    whole = _END_64.pack(b"PK\x06\x06", rest, MADE_ON_UNIX | 45, 45, 0, 0, count, count, size, offset)
    return whole + _LOCATOR.pack(b"PK\x06\x07", 0, offset + size, 1) + _END.pack(*end)
