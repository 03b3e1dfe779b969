"""A value read from the database that requests get at once: fresh where it can be, the last known one in an outage.

One read is under way at a time, as a task of its own, so that a read that hangs holds up nobody for longer than
`PATIENCE_S`, once. While the database is away, the last known value is given without a wait, and read anew beside that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from modelyard import tasks
from modelyard.deploy.open_requests import FRESH_S
from modelyard.outages import first_line, is_passing

log = logging.getLogger(__name__)
T = TypeVar("T")

#: A read that takes longer counts as an outage: whoever waits for it gets the last known value.
PATIENCE_S = 1.0
#: Between reads while the database is away.
RETRY_S = 0.25


class LastKnown(Generic[T]):
    """The value that `read` returns. `changed` says that what was read before is not true any more.

    A read that takes longer than `patience_s` counts as an outage.
    """

    def __init__(
        self, name: str, first: T, read: Callable[[], Awaitable[T]], *, patience_s: float = PATIENCE_S
    ) -> None:
        self.value = first
        self._name = name
        self._read = read
        self._patience_s = patience_s
        self._changes = self._changes_seen = 0
        self._read_at = self._failed_at = float("-inf")
        self._away_since: float | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        """True if the value is only the last known one, since the database does not answer."""
        return self._away_since is not None

    @property
    def is_fresh(self) -> bool:
        """True if the value is no older than the last change that was told."""
        return self._is_fresh(self._changes)

    def changed(self) -> None:
        """Have the value read anew for the next question."""
        self._changes += 1

    async def look(self) -> T:
        """Return the value, no older than the last change before this question unless the database is away.

        Raises:
            SQLAlchemyError: the read failed for another reason than an outage.
        """
        asked = self._changes
        # Twice at most: a read that is under way may have begun before the change. Changes since the question are not
        # waited for: where they never end, nobody would get an answer.
        for _ in range(2):
            if self._is_fresh(asked):
                break
            reading = self._begin()
            if self.is_away or reading is None:
                break
            await asyncio.wait({reading}, timeout=self._patience_s)
            if not reading.done():
                self._note_away(f"no answer within {self._patience_s:g} s")
                break
            reading.result()
        return self.value

    async def close(self) -> None:
        """End a read that is under way. Safe to repeat."""
        if self._reading is not None:
            await tasks.end(self._reading)

    def _begin(self) -> asyncio.Task[None] | None:
        if self._reading is None or self._reading.done():
            if self.is_away and time.monotonic() - self._failed_at < RETRY_S:
                return None
            self._reading = tasks.spawn(f"read of {self._name}", self._take())
        return self._reading

    async def _take(self) -> None:
        changes, began_at = self._changes, time.monotonic()
        try:
            self.value = await self._read()
        except SQLAlchemyError as error:
            self._failed_at = time.monotonic()
            if not is_passing(error):
                raise
            self._note_away(first_line(error))
            return
        # What changed during the read may have been missed: such a value is not fresh.
        self._changes_seen, self._read_at = changes, began_at
        if self._away_since is not None:
            log.warning("%s is fresh again after %.1f s", self._name, time.monotonic() - self._away_since)
            self._away_since = None

    def _note_away(self, reason: str) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("%s stays as last known: the database is away (%s)", self._name, reason)

    def _is_fresh(self, changes: int) -> bool:
        return self._changes_seen >= changes and time.monotonic() - self._read_at < FRESH_S
