"""Between asynchronous streams and blocking stores: blocks of a fixed size, and threads that cleaning up can trust.

A thread cannot be cancelled. What runs here is therefore waited for when its task is cancelled, so that nobody
closes a file or aborts an upload under a thread that still works on it, and nothing that a thread opened is lost.

A thread may hang, too, as on a network folder whose server is gone. It is waited for no longer than a bound; whoever
asked gets `StorageAway`, and what the thread still holds is given back when it comes out of it, if it does.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from modelyard.errors import StorageUnavailable, TooLarge

P = ParamSpec("P")
T = TypeVar("T")

BLOCK_BYTES = 1024 * 1024
THREADS = 16
TIMEOUT_S = 30.0


class StorageAway(StorageUnavailable):
    """The storage gives no answer at all: to ask it to clean up would only take as long again."""

    def __init__(self, message: str, work: Future[Any] | None = None) -> None:
        super().__init__(message)
        self._work = work

    def tell(self, message: str) -> None:
        """Say more of what does not answer."""
        self.message, self.args = message, (message,)

    def then(self, tidy: Callable[[], object]) -> None:
        """Tidy up in the thread that hangs, when it comes out of that."""
        if self._work is not None:
            self._work.add_done_callback(lambda _: tidy())


async def blocks(chunks: AsyncIterable[bytes], size: int, max_bytes: int | None) -> AsyncGenerator[bytearray]:
    """Regroup a stream into blocks of exactly `size` bytes; the last one may be shorter, and none is empty."""
    block = bytearray()
    total = 0
    async for chunk in chunks:
        total += len(chunk)
        if max_bytes is not None and total > max_bytes:
            raise TooLarge(f"The upload is longer than the {max_bytes} bytes that are allowed.")
        view = memoryview(chunk)
        while view:
            taken = view[: size - len(block)]
            block += taken
            view = view[len(taken) :]
            if len(block) == size:
                yield block
                block = bytearray()
    if block:
        yield block


class Threads:
    """Threads of the storage's own, so that a slow store does not starve the rest of the server of its threads.

    Work that has not begun within `timeout_s`, since all threads are busy, is given up; work that takes longer as well,
    unless it bounds itself.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S, *, work_is_bounded: bool = False) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="storage")
        self._timeout_s = timeout_s
        self._work_is_bounded = work_is_bounded

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work. If cancelled, wait until it is done first: it may use what the caller would remove.

        Raises:
            StorageAway: it hangs.
        """
        return await self.acquire(functools.partial(function, *args, **kwargs), lambda _: None)

    async def acquire(self, function: Callable[[], T], release: Callable[[T], object]) -> T:
        """Run blocking work whose result must be given back, which `release` does in a thread if nobody takes it.

        Raises:
            StorageAway: it hangs.
        """
        work = self._pool.submit(function)
        waiting = asyncio.ensure_future(self._until_done(work))
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await to_the_end(waiting)
            if work.done():
                # Not here: to give something back may ask the store, too.
                await to_the_end(asyncio.wrap_future(self._pool.submit(_give_back, work, release)))
            else:
                work.add_done_callback(lambda work: _give_back(work, release))
            raise
        if work.done() and not work.cancelled():
            return work.result()
        work.add_done_callback(lambda work: _give_back(work, release))
        raise StorageAway(f"The storage has not answered for {self._timeout_s:g} s.", work)

    async def _until_done(self, work: Future[Any]) -> None:
        future = asyncio.wrap_future(work)
        await asyncio.wait({future}, timeout=self._timeout_s)
        if not future.done() and not work.cancel() and self._work_is_bounded:
            await asyncio.wait({future})
        if future.done() and not future.cancelled():
            future.exception()  # looked at, or asyncio reports it as never retrieved

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.shutdown)


def _give_back(work: Future[T], release: Callable[[T], object]) -> None:
    if not work.cancelled() and work.exception() is None:
        release(work.result())


async def to_the_end(work: asyncio.Future[Any]) -> None:
    """Wait for `work`, however often we are cancelled meanwhile; what it returns or raises stays in it."""
    while not work.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([work])
    if not work.cancelled():
        work.exception()  # looked at, or asyncio reports it as never retrieved
