"""Waiting in tests: for a condition, with a deadline, and with a word on what did not come."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

#: Long enough for a busy machine with two cores; nothing waits so long when all is well.
PATIENCE_S = 30.0


async def eventually(condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> Any:
    """Wait until the condition (plain or async) is true and return its value; fail with `what` otherwise."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await _within(value, deadline, what)
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.01)


async def _within(work: Awaitable[Any], deadline: float, what: str) -> Any:
    try:
        return await asyncio.wait_for(work, max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        raise AssertionError(f"not in time: {what}") from None
