"""Holds memory for one-shot runs: those that a request waits for, and that end with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

from modelyard import outages, tasks
from modelyard.capacity import reservations
from modelyard.capacity.ledger import Allocation, Ledger
from modelyard.capacity.tables import Kind
from modelyard.db import Sessions
from modelyard.hardware import Machine, this_machine

#: The time for which the end of a run waits until its memory is given back.
RELEASE_PATIENCE_S = 1.0


class OneShotMemory:
    """Reserves memory for one-shot runs. `sharing_memory` is the supervisor's: engines do not start during a look."""

    def __init__(self, sessions: Sessions, sharing_memory: asyncio.Lock, budget_gib: float | None) -> None:
        self._sessions = sessions
        self._sharing_memory = sharing_memory
        self._budget_gib = budget_gib
        self._releases: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def held(
        self, kind: Kind, holder: str, decide: Callable[[Machine, Ledger], Allocation]
    ) -> AsyncIterator[Allocation]:
        """Hold memory for the block.

        Args:
            kind: The kind of run.
            holder: Whose it is, in words.
            decide: Returns what the run takes of a machine as it is now, or raises. It must not block.
        """
        run_id, may_be_held = uuid4(), False
        try:
            async with self._sharing_memory:
                async with self._sessions.read() as session:
                    held = await reservations.ledger(session, self._budget_gib)
                allocation = decide(await asyncio.to_thread(this_machine), held)
                # Whoever is cancelled at the commit may hold memory all the same.
                may_be_held = True
                async with self._sessions.begin() as session:
                    await reservations.reserve(session, run_id, kind, holder, allocation)
            yield allocation
        finally:
            if may_be_held:
                # A task of its own: this one may be cancelled, and the database may be away for longer than a request
                # can wait. Nothing else would give it back before the server's next start.
                release = tasks.spawn(f"memory of {holder}", self._release(run_id))
                self._releases.add(release)
                release.add_done_callback(self._releases.discard)
                await asyncio.wait({release}, timeout=RELEASE_PATIENCE_S)

    async def close(self) -> None:
        """End what waits for the database: the next start gives that memory back. Safe to repeat."""
        await tasks.end(*self._releases)

    async def _release(self, run_id: UUID) -> None:
        async def once() -> None:
            async with self._sessions.begin() as session:
                await reservations.release(session, run_id)

        await outages.wait_out("memory of a one-shot run", once)
