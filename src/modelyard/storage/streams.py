"""Between asynchronous streams and blocking stores: blocks of a fixed size, and threads that cleaning up can trust.

A thread cannot be cancelled. What runs here is therefore waited for when its task is cancelled, so that nobody
closes a file or aborts an upload under a thread that still works on it, and nothing that a thread opened is lost.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from modelyard.errors import TooLarge

P = ParamSpec("P")
T = TypeVar("T")

BLOCK_BYTES = 1024 * 1024
THREADS = 16


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
    """Threads of the storage's own, so that a slow store does not starve the rest of the server of its threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="storage")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work. If cancelled, wait until it is done first: it may use what the caller would remove."""
        return await self.acquire(functools.partial(function, *args, **kwargs), lambda _: None)

    async def acquire(self, function: Callable[[], T], release: Callable[[T], object]) -> T:
        """Run blocking work whose result must be given back, which `release` does in a thread if we are cancelled."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await to_the_end(future)
            if not future.cancelled() and future.exception() is None:
                await to_the_end(loop.run_in_executor(self._pool, release, future.result()))
            raise

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.shutdown)


async def to_the_end(work: asyncio.Future[Any]) -> None:
    """Wait for `work`, however often we are cancelled meanwhile; what it returns or raises stays in it."""
    while not work.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([work])
    if not work.cancelled():
        work.exception()  # looked at, or asyncio reports it as never retrieved
