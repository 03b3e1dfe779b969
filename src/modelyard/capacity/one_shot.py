"""Holds memory for one-shot runs: those that a request waits for, and that end with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

from modelyard.capacity import reservations
from modelyard.capacity.ledger import Allocation, Ledger
from modelyard.capacity.tables import Kind
from modelyard.db import Sessions
from modelyard.hardware import Machine, this_machine


class OneShotMemory:
    """Reserves memory for one-shot runs. `sharing_memory` is the supervisor's: engines do not start during a look."""

    def __init__(self, sessions: Sessions, sharing_memory: asyncio.Lock, budget_gib: float | None) -> None:
        self._sessions = sessions
        self._sharing_memory = sharing_memory
        self._budget_gib = budget_gib

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
        run_id = uuid4()
        async with self._sharing_memory:
            async with self._sessions.read() as session:
                held = await reservations.ledger(session, self._budget_gib)
            allocation = decide(await asyncio.to_thread(this_machine), held)
            async with self._sessions.begin() as session:
                await reservations.reserve(session, run_id, kind, holder, allocation)
        try:
            yield allocation
        finally:
            # Although this task may be cancelled: nothing else would give it back before the server's next start.
            await asyncio.shield(self._release(run_id))

    async def _release(self, run_id: UUID) -> None:
        async with self._sessions.begin() as session:
            await reservations.release(session, run_id)
