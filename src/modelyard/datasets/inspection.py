"""Where an upload is validated: a small file here, when it is whole; a large one in a child, while it arrives.

Validation is computation in Python, which would hold up every other request for as long as it takes. A small file does
not pay for a process: it waits in memory until it is known to be small. One that turns out to be much work all the same
(bad lines cost ten times as much as good ones, and a long line is read in one go) is given to a child after all. The
threads are this module's own: nobody else waits for uploads.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import msgspec

from modelyard.datasets.validation import Validation
from modelyard.datasets.validator import Found, found_by, refused
from modelyard.errors import InvalidDataset, ModelyardError, Unavailable
from modelyard.filters import Filter, FilterFailed
from modelyard.storage.streams import to_the_end

log = logging.getLogger(__name__)

#: What is longer is validated by a child.
SMALL_BYTES = 4 * 1024 * 1024
#: A thread of the server works on no more at once.
STEP_BYTES = 64 * 1024
#: What a thread of the server does not take: a longer line, more lines, more problems, more in bad lines.
LONG_LINE_BYTES = 256 * 1024
MANY_LINES = 100_000
FEW_PROBLEMS = 100
FEW_BAD_BYTES = 256 * 1024
THREADS = 2

_threads = ThreadPoolExecutor(THREADS, thread_name_prefix="validation")


class Inspection:
    """The validation of one file: `feed` it the bytes in order, then `finish`; `close` it whatever happened."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._child: Filter | None = None

    async def feed(self, block: bytes) -> None:
        """Take the next bytes.

        Raises:
            InvalidDataset: the file is of another kind altogether.
            Unavailable: the child cannot be started, or has died.
        """
        if self._child is None:
            self._waiting.append(block)
            self._waiting_bytes += len(block)
            if self._waiting_bytes <= SMALL_BYTES:
                return
            await self._hand_over()
        else:
            await self._pass_on([block])

    async def _hand_over(self) -> None:
        """Start the child, and give it what waits."""
        try:
            self._child = Filter(f"from modelyard.datasets.validator import validate; validate({self._max_line_bytes})")
        except OSError as error:
            raise unavailable(f"no process for it can be started ({error.strerror})") from error
        waiting, self._waiting = self._waiting, []
        await self._pass_on(waiting)

    async def _pass_on(self, waiting: list[bytes]) -> None:
        assert self._child is not None
        try:
            for piece in waiting:
                await self._child.feed(piece)
        except BrokenPipeError:
            checked(await self._answer())
            raise unavailable("its process stopped reading") from None
        except FilterFailed as failed:
            raise unavailable(f"its process does not go on: {failed}") from failed

    async def finish(self) -> Found:
        """Return what was found, once all bytes were fed.

        Raises:
            InvalidDataset: the file is of another kind altogether, or there is nothing in it.
            Unavailable: the child has died.
        """
        if self._child is None:
            work = asyncio.get_running_loop().run_in_executor(_threads, _validate, self._waiting, self._max_line_bytes)
            try:
                found = await asyncio.shield(work)
            finally:
                await to_the_end(work)
            if found is not None:
                return checked(found)
            await self._hand_over()
        return checked(await self._answer())

    async def close(self) -> None:
        """End the child, if there is one. Safe to repeat."""
        if self._child is not None:
            await self._child.close()

    async def _answer(self) -> Found:
        assert self._child is not None
        try:
            return msgspec.json.decode(await self._child.finish(), type=Found)
        except FilterFailed as failed:
            raise unavailable(f"its process ended early: {failed}") from failed


def _validate(blocks: list[bytes], max_line_bytes: int) -> Found | None:
    """Return what was found; None if it is more work than the server's own threads do."""
    data = b"".join(blocks)
    if data.count(b"\n") > MANY_LINES or _has_long_line(data):
        return None
    validation = Validation(max_line_bytes, most_problems=FEW_PROBLEMS, most_bad_bytes=FEW_BAD_BYTES)
    try:
        for start in range(0, len(data), STEP_BYTES):
            validation.feed(data[start : start + STEP_BYTES])
    except InvalidDataset as error:
        validation.close()
        found = refused(error)
    else:
        found = found_by(validation)
    return None if validation.is_over_budget else found


def _has_long_line(data: bytes) -> bool:
    """Return whether some line is longer than `LONG_LINE_BYTES`, in steps of that size."""
    start = 0
    while start + LONG_LINE_BYTES < len(data):
        end = data.rfind(b"\n", start, start + LONG_LINE_BYTES)
        if end < 0:
            return True
        start = end + 1
    return False


def checked(found: Found) -> Found:
    """Return what was found.

    Raises:
        InvalidDataset: that is a refusal.
    """
    if found.refusal is not None:
        code, message = found.refusal
        raise InvalidDataset(message, code=code, report=found.report)
    return found


def unavailable(why: str) -> ModelyardError:
    """Return what is said of a child that gives no answer."""
    log.warning("a dataset could not be validated: %s", why)
    return Unavailable(
        f"The file could not be validated: {why}. Nothing of it was kept; upload it again, and if that fails too, see "
        "the server's log and its memory.",
        code="validation_failed",
    )
