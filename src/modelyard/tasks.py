"""Background tasks that cannot fail in silence: each has a name, a guard and an end.

`spawn` logs what kills a task. An `eternal` task that returns or raises before it was cancelled is a bug, and
calls `on_end` so that the owner can stop the server rather than limp on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

log = logging.getLogger(__name__)


def spawn(
    name: str,
    work: Coroutine[object, object, None],
    *,
    eternal: bool = False,
    on_end: Callable[[], None] | None = None,
) -> asyncio.Task[None]:
    """Start `work` as a named, guarded task. Keep the returned task: the loop holds only a weak reference."""
    task = asyncio.create_task(work, name=name)

    def ended(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        cause = task.exception()
        if cause is not None:
            log.error("task %s died", name, exc_info=cause)
        elif eternal:
            log.error("task %s ended though it should never", name)
        if on_end is not None and (eternal or cause is not None):
            on_end()

    task.add_done_callback(ended)
    return task


async def end(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until each is gone. What they raise was logged by their guard already."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
