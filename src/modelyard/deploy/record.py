"""The record of one deployment: its row, kept at hand as it was last read, and the transactions on it.

Only its service writes through this. Where what is written depends on what is wanted, wishes are kept out meanwhile:
on PostgreSQL a wish beside such a transaction would be lost, or hold a model for ever.

Every method waits while the database is away (`@patient`), and the engine goes on serving meanwhile. So each may be
done twice: the connection may be lost between a commit and its answer.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.capacity import reservations
from modelyard.capacity.ledger import Allocation
from modelyard.capacity.tables import Kind
from modelyard.db import Sessions, exclusively, utcnow
from modelyard.deploy import actions, succession
from modelyard.deploy.tables import HOLDING, MOVES, Deployment, DeploymentState, Wanted
from modelyard.engine.adapter_loading import AdapterRefused
from modelyard.errors import JobFailure
from modelyard.jobs import actions as jobs
from modelyard.jobs import survival
from modelyard.jobs.runner import JobContext
from modelyard.jobs.tables import Job
from modelyard.models.tables import Model
from modelyard.states import move

M = TypeVar("M", bound=Callable[..., Awaitable[Any]])


def patient(method: M) -> M:
    """Have a method of the record wait while the database is away."""

    @functools.wraps(method)
    async def patiently(self: Record, *args: object, **kwargs: object) -> Any:
        async def once() -> Any:
            before = self.row
            try:
                return await method(self, *args, **kwargs)
            except BaseException:
                self.row = before  # a row of a transaction that was rolled back cannot be read any more
                raise

        return await self.context.patiently(once)

    return cast(M, patiently)


class Record:
    """One deployment's row."""

    def __init__(self, context: JobContext, sessions: Sessions, row: Deployment) -> None:
        self.context = context
        self.row = row
        self._sessions = sessions

    @patient
    async def look(self, *, may_let_go: bool) -> list[Model]:
        """Read the row; return the adapters that are wanted, if it is. Lets go of needless adapters where it may."""
        adapters: list[Model] = []
        async with self._sessions.read() as session:
            self.row = row = await self._of(session)
            if row.wanted == Wanted.UP:
                _, adapters = await actions.model_rows(session, row)
            holds_more = may_let_go and await actions.holds_more_than_it_needs(session, row)
        if holds_more:
            async with self._sessions.begin() as session:
                await exclusively(session, actions.KIND)  # a wish that comes now holds what it names
                await actions.let_go_of_adapters(session, await self._of(session))
        return adapters

    @patient
    async def wants(self, adapter_ids: list[str]) -> bool:
        """True if exactly these adapters are wanted now."""
        async with self._sessions.read() as session:
            return (await self._of(session)).adapter_ids == adapter_ids

    @patient
    async def write(self, **values: object) -> None:
        """Write columns."""
        async with self._sessions.begin() as session:
            self.row = await self._of(session)
            for name, value in values.items():
                setattr(self.row, name, value)

    @patient
    async def move(self, to: DeploymentState, reason: str, **values: object) -> None:
        """Write a state and its columns; being there already only writes the columns."""
        async with self._sessions.begin() as session:
            await self._move(session, to, reason, **values)

    @patient
    async def begin_attempt(self, reason: str, allocation: Allocation, **values: object) -> None:
        """Write that an engine is about to start with this memory."""
        async with self._sessions.begin() as session:
            row = await self._move(session, DeploymentState.STARTING, reason, **values)
            await self._reserve(session, row, allocation)

    @patient
    async def hold(self, allocation: Allocation) -> None:
        """Write what a running engine holds, where that was not known."""
        async with self._sessions.begin() as session:
            self.row = row = await self._of(session)
            await self._reserve(session, row, allocation)
            if row.state in HOLDING:
                await reservations.note_all_taken(session, row.id)

    @patient
    async def engine_is_gone(self, to: DeploymentState | None = None, reason: str = "", **values: object) -> None:
        """Write a state, if one is given, and give the engine's memory back."""
        async with self._sessions.begin() as session:
            if to is None:
                self.row = await self._of(session)
            else:
                await self._move(session, to, reason, **values)
            await self._release(session, self.row)

    @patient
    async def become_ready(self, reason: str, **values: object) -> bool:
        """Let requests in, and have those leave that it replaces; return False if it is not wanted any more."""
        async with self._sessions.begin() as session:
            # In one transaction, so that at no moment nobody serves; a wish that found it not ready must be seen.
            await exclusively(session, actions.KIND)
            if not await actions.is_wanted(session, await self._of(session)):
                return False
            row = await self._move(session, DeploymentState.READY, reason, wake_requested=False, **values)
            await succession.let_go_of_replaced(session, row)
            await reservations.note_all_taken(session, row.id)
            # Whoever sees it serve may kill the server: that is never counted against it.
            await survival.note_survival(session, [row.job_id], for_good=True)
        return True

    @patient
    async def make_room(self) -> list[UUID]:
        """Have those leave that it replaces before it starts, if it is wanted; return their jobs."""
        async with self._sessions.begin() as session:
            await exclusively(session, actions.KIND)
            row = await self._of(session)
            if not await actions.is_wanted(session, row):
                return []
            why = f"Leaves before {row.model_id} starts: there is not enough memory for both."
            touched = await succession.drain_replaced(session, row, why)
        return touched

    @patient
    async def take_back(self, refused: AdapterRefused, adapter_ids: list[str], asked: list[str]) -> None:
        """Want only the adapters that work, unless others than those asked for are wanted meanwhile."""
        async with self._sessions.begin() as session:
            await exclusively(session, actions.KIND)
            row = await self._of(session)
            if row.adapter_ids == asked:
                row.adapter_ids, row.adapter_failure = adapter_ids, refused.as_row()
                job = await jobs.get(session, row.job_id)
                job.name = actions.job_name(row.model_id, adapter_ids)
                self.row = row

    @patient
    async def stop(self, wanted: Wanted) -> None:
        """Write that it is not wanted any more, and ends."""
        async with self._sessions.begin() as session:
            await exclusively(session, actions.KIND)
            row = await self._of(session)
            if row.wanted == Wanted.UP:  # its job was interrupted: it comes back for nobody
                await succession.forget(session, row)
            await self._move(session, DeploymentState.STOPPING, "no longer wanted", wanted=wanted)

    @patient
    async def end(self, to: DeploymentState, reason: str, wanted: Wanted, failure: JobFailure | None = None) -> None:
        """Write the end with its cause, and let go of the models."""
        values = {"wanted": wanted, "ended_at": utcnow()}
        async with self._sessions.begin() as session:
            # In one transaction, and with no wish beside it: else what has ended would hold models for ever.
            await exclusively(session, actions.KIND)
            row = await self._move(session, to, reason, **values)
            await self._release(session, row)
            await actions.release(session, row.id)
            if failure is not None:
                # The runner does so too; a server that ends before it comes to that would forget the cause.
                job = await jobs.get(session, row.job_id)
                job.failure_code, job.failure_message, job.failure_hint = failure.code, failure.message, failure.hint
                job.failure_evidence = list(failure.evidence)

    @patient
    async def failure(self) -> JobFailure | None:
        """Return the cause that was written with the end."""
        async with self._sessions.read() as session:
            job = await jobs.get(session, self.row.job_id)
        if job.failure_code is None:
            return None
        return JobFailure(
            job.failure_code, job.failure_message or "", job.failure_hint or "", job.failure_evidence or ()
        )

    @patient
    async def restore_what_left(self) -> Job | None:
        """Want back what made room for it since it was last ready; return the new job."""
        async with self._sessions.begin() as session:
            job = await actions.restore_replaced(session, await self._of(session))
        return job

    async def _reserve(self, session: AsyncSession, row: Deployment, allocation: Allocation) -> None:
        await reservations.reserve(session, row.id, Kind.ENGINE, row.model_id, allocation, row.job_id)
        await session.refresh(row, ["reservations"])

    async def _release(self, session: AsyncSession, row: Deployment) -> None:
        for name, value in actions.no_engine().items():
            setattr(row, name, value)
        await reservations.release(session, row.id)
        await session.flush()
        await session.refresh(row, ["reservations"])

    async def _of(self, session: AsyncSession) -> Deployment:
        return await actions.of_job(session, self.row.job_id)

    async def _move(self, session: AsyncSession, to: DeploymentState, reason: str, **values: object) -> Deployment:
        row = await self._of(session)
        if row.state != to:
            await move(session, Deployment, row.id, "state", MOVES, to, reason)
            await session.refresh(row)
        for name, value in values.items():
            setattr(row, name, value)
        self.row = row
        return row
