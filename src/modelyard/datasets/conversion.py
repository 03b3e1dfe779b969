"""Converts an upload on its way into the storage: a child makes JSONL of it and validates that, `converter`.

Two streams go on at once: what arrives goes into the child, and its JSONL comes out. Either may end first: the client
may go away, or the child may know enough to refuse the file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import aclosing, suppress
from typing import Any

import msgspec

from modelyard.datasets.conversion_task import Conversion
from modelyard.datasets.inspection import checked, unavailable
from modelyard.datasets.validator import Found
from modelyard.errors import InvalidDataset, TooLarge
from modelyard.filters import Filter, FilterFailed, Limits

__all__ = ["Conversion", "Converter"]

log = logging.getLogger(__name__)

MIB = 1024 * 1024
#: What the child may have beside its rows; Parquet takes pages of columns.
MEMORY_BYTES = 2048 * MIB
#: What a row takes while it is read, for each of its bytes.
ROW_FACTOR = 24
CPU_S = 4 * 3600
STALL_S = 120.0
_LENGTH_BYTES = 4


class Converter:
    """Converts one upload; `report` and `index` are there after the last block."""

    def __init__(self, conversion: Conversion, judge: Callable[[dict[str, Any]], None]) -> None:
        self._conversion = conversion
        self._judge = judge
        self.report: dict[str, Any] = {}
        self.index: list[tuple[int, int, int]] = []

    async def blocks(self, chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
        """Yield the file as JSONL, in blocks; ends well only if the whole file is known to be good.

        Raises:
            InvalidDataset: it is no dataset, is damaged, or has bad rows, as `judge` has it.
            TooLarge: what comes in or what is in it is more than a dataset may have.
            Unavailable: the child cannot be started, or has died.
        """
        limits = Limits(MEMORY_BYTES + ROW_FACTOR * self._conversion.max_line_bytes, CPU_S, STALL_S)
        task = msgspec.json.encode(self._conversion)
        try:
            child = Filter(f"from modelyard.datasets.converter import convert; convert({task!r})", limits)
        except OSError as error:
            raise unavailable(f"no process for it can be started ({error.strerror})") from error
        feeding = asyncio.create_task(self._feed(child, chunks), name="feed a conversion")
        try:
            frames = _Frames()
            async with aclosing(child.pieces(is_patient=True)) as pieces:
                async for piece in pieces:
                    for block in frames.take(piece):
                        yield block
            if feeding.done():
                feeding.result()  # a client that went away, before what the child thinks of half a file
            found = _checked(msgspec.json.decode(frames.answer, type=Found))
            await feeding
            assert found.report is not None
            self.report, self.index = found.report, found.index
            self._judge(found.report)
        except (FilterFailed, msgspec.MsgspecError) as failed:
            if feeding.done():
                feeding.result()
            raise unavailable(f"its process ended early: {failed}") from failed
        finally:
            feeding.cancel()
            with suppress(BaseException):
                await feeding
            await child.close()

    async def _feed(self, child: Filter, chunks: AsyncIterable[bytes]) -> None:
        left = self._conversion.max_bytes
        try:
            async for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    raise TooLarge(
                        f"The file is longer than the {self._conversion.max_bytes / (1024 * MIB):g} GiB that a dataset "
                        "may have (MODELYARD_MAX_DATASET_GIB).",
                        param="file",
                        code="dataset_too_large",
                    )
                await child.feed(chunk)
        except BrokenPipeError:
            return  # it knows enough: its answer says what
        finally:
            child.end_input()


class _Frames:
    """Takes apart what the child writes; `answer` is what comes after the last block."""

    def __init__(self) -> None:
        self._rest = b""
        self._left = 0
        self._is_over = False
        self.answer = b""

    def take(self, piece: bytes) -> list[bytes]:
        """Return the bytes of blocks that are in the next piece."""
        if self._is_over:
            self.answer += piece
            return []
        found = []
        data = memoryview(self._rest + piece if self._rest else piece)
        while data:
            if self._left:
                block = data[: self._left].tobytes()
                found.append(block)
                self._left -= len(block)
                data = data[len(block) :]
                continue
            if len(data) < _LENGTH_BYTES:
                break
            self._left = int.from_bytes(data[:_LENGTH_BYTES], "little")
            data = data[_LENGTH_BYTES:]
            if not self._left:
                self._is_over, self.answer = True, bytes(data)
                data = memoryview(b"")
        self._rest = bytes(data)
        return found


def _checked(found: Found) -> Found:
    try:
        return checked(found)
    except InvalidDataset as error:
        if error.code == "dataset_too_large":
            raise TooLarge(error.message, param="file", code=error.code) from None
        raise
