"""A watch on the client's connection: what is done for one that went away is given up.

The server does not end a request whose client has gone, it only says so to whoever reads on. The watch does, from the
end of the request's body on: first for what must be waited for before an engine is asked (one that wakes may take
minutes), then for the call to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGone(Exception):
    """The client went away before its request was complete."""


class ClientWatch:
    """Watches one client from its creation to `end`, in a task of its own."""

    def __init__(self, receive: Receive) -> None:
        self.is_gone = False
        self._waiting: asyncio.Timeout | None = None
        self._give_up: Callable[[], None] | None = None
        self._task = asyncio.create_task(self._watch(receive), name="client watch")

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """Await something that may take long; it is cancelled when the client goes away.

        Raises:
            ClientGone: it did.
        """
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await work
        except TimeoutError:
            if self._waiting is not None and self._waiting.expired():
                raise ClientGone from None
            raise
        finally:
            self._waiting = None

    def when_gone(self, give_up: Callable[[], None]) -> None:
        """Have something called, once, when the client goes away; at once if it has."""
        self._give_up = give_up
        if self.is_gone:
            give_up()

    def end(self) -> None:
        """Stop watching."""
        self._task.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())
        if self._give_up is not None:
            self._give_up()


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Await what one client waits for, from the end of its request's body on; cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    watch = ClientWatch(receive)
    try:
        return await watch.unless_gone(work)
    finally:
        watch.end()
