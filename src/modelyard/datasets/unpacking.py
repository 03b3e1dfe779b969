"""Unpacks gzip and zstd as a stream: bounded pieces out of whatever comes in, and a word on what is damaged.

A few bytes can stand for gigabytes: no step makes more than some MiB, and all of it together is counted. Archives
that follow one another, as `cat a.gz b.gz` makes them, are one file, as they are for gunzip.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from modelyard.datasets.recognition import FileKind
from modelyard.errors import InvalidDataset

PIECE_BYTES = 256 * 1024
#: A block of zstd of four bytes can stand for 128 KiB: this much input is 16 MiB at most.
_ZSTD_INPUT_BYTES = 512
#: As much of what went before as an archive may refer to: what zstd itself takes without being asked.
_ZSTD_WINDOW_BYTES = 128 * 1024 * 1024


def unpacked(kind: FileKind, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what is in an archive of gzip or zstd, in pieces of 16 MiB at most.

    Raises:
        InvalidDataset: it is damaged or ends early.
    """
    return _gunzipped(blocks) if kind is FileKind.GZIP else _unzstd(blocks)


def _damaged(kind: FileKind, why: str) -> InvalidDataset:
    return InvalidDataset(
        f"The {kind} archive {why}: make it anew, and see that it is sent whole.", code="archive_damaged"
    )


def _gunzipped(blocks: Iterator[bytes]) -> Iterator[bytes]:
    stream = zlib.decompressobj(wbits=31)
    has_begun = False
    for block in blocks:
        while block:
            if stream.eof:
                block = block.lstrip(b"\0")  # some writers fill the last block of a tape
                if not block:
                    break
                stream, has_begun = zlib.decompressobj(wbits=31), False
            try:
                piece = stream.decompress(block, PIECE_BYTES)
            except zlib.error as error:
                raise _damaged(FileKind.GZIP, f"is damaged ({error})") from None
            has_begun = True
            block = stream.unused_data if stream.eof else stream.unconsumed_tail
            if piece:
                yield piece
    while has_begun and not stream.eof:
        piece = stream.decompress(b"", PIECE_BYTES)
        if not piece:
            raise _damaged(FileKind.GZIP, "ends early: the rest of it is missing")
        yield piece


def _unzstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard  # here: only who has such a file loads it

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    stream = decompressor.decompressobj()
    has_begun = False
    for block in blocks:
        at = 0
        while at < len(block):
            if stream.eof:
                stream, has_begun = decompressor.decompressobj(), False
            given = block[at : at + _ZSTD_INPUT_BYTES]
            try:
                piece = stream.decompress(given)
            except zstandard.ZstdError as error:
                if "memory" in str(error):
                    raise _damaged(FileKind.ZSTD, "needs more than 128 MiB to unpack (--long or --ultra)") from None
                raise _damaged(FileKind.ZSTD, f"is damaged ({error})") from None
            has_begun = True
            at += len(given) - len(stream.unused_data)
            if piece:
                yield piece
    if has_begun and not stream.eof:
        raise _damaged(FileKind.ZSTD, "ends early: the rest of it is missing")
