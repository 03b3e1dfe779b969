"""Retries: how long to pause between tries, and the loop around work that may fail for a while.

`Backoff` is the one rule by which pauses grow, in seconds. `retry` repeats async work, `retry_blocking` that of
children and threads. Which failures pass by themselves is for the caller to say. Where more than an exception decides
whether to try again (new bytes of a download, an engine's restarts), only the pauses are taken from here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


@dataclass(frozen=True)
class Backoff:
    """Exponential backoff: a first pause, each further one twice as long, up to the longest; in seconds."""

    first_s: float
    longest_s: float

    def pause_s(self, failures: int) -> float:
        """Return the pause after so many failures in a row; 1 is the first."""
        # The exponent is bounded, since a float is.
        return min(self.first_s * 2.0 ** min(failures - 1, 60), self.longest_s)


async def retry(
    work: Callable[[], Awaitable[T]],
    on: type[E],
    backoff: Backoff,
    *,
    passes: Callable[[E], bool] = lambda _: True,
    tries: int | None = None,
    before_pause: Callable[[E, float], Awaitable[None]] | None = None,
) -> T:
    """Return what work returns, done again after each error of class `on` that passes, `tries` times in all.

    `before_pause` is told of each such error and of the seconds that are waited. May be cancelled at any point.

    Raises:
        E: one that does not pass, or that of the last try.
    """
    failures = 0
    while True:
        try:
            return await work()
        except on as error:
            failures += 1
            if failures == tries or not passes(error):
                raise
            pause_s = backoff.pause_s(failures)
            if before_pause is not None:
                await before_pause(error, pause_s)
        await asyncio.sleep(pause_s)


def retry_blocking(work: Callable[[], T], on: type[Exception], backoff: Backoff, *, tries: int) -> T:
    """Return what work returns, done again after each error of class `on`, `tries` times in all; blocks meanwhile."""
    for failures in range(1, tries):
        try:
            return work()
        except on:
            time.sleep(backoff.pause_s(failures))
    return work()
