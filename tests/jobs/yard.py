"""A database with a runner on it, whose jobs do what the test tells them to while they run."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard import tasks
from modelyard.db import Base, Sessions, database_url
from modelyard.jobs import actions
from modelyard.jobs.runner import JobContext, JobInterrupted, JobRunner
from modelyard.jobs.tables import Job, JobEvent
from modelyard.states import StateChange
from tests.eventually import eventually

Order = Callable[[JobContext], Any]


class JobYard:
    """Creates, orders and reads jobs. A job of the kind TEST waits for the test's `order` or for an interrupt."""

    def __init__(self, sessions: Sessions, root: Path, limits: Mapping[str, int]) -> None:
        self.sessions = sessions
        self.root = root
        self.limits = limits
        self.calls: list[JobContext] = []
        self._orders: dict[UUID, asyncio.Future[BaseException | None]] = {}
        self.runner = self.new_runner()
        self._running: asyncio.Task[None] | None = None

    def new_runner(self) -> JobRunner:
        functions = dict.fromkeys(("TEST", "OTHER", "WITH_ENDING"), self._obey)
        return JobRunner(self.sessions, functions, self.limits, self.root / "jobs", {"WITH_ENDING": self._end})

    async def _end(self, session: AsyncSession, job_id: UUID) -> None:
        """Write down that a job of the kind WITH_ENDING has ended, in the runner's own transaction."""
        job = await actions.get(session, job_id)
        await actions.append_event(session, job_id, f"ended as {job.status}")
        if "ending" in job.spec:
            await session.execute(text(job.spec["ending"]))

    async def _obey(self, context: JobContext) -> None:
        self.calls.append(context)
        order = self._orders[context.id] = asyncio.get_running_loop().create_future()
        interrupted = asyncio.create_task(context.interrupted.wait())
        try:
            await asyncio.wait({order, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if not order.done():
                raise JobInterrupted
            error = order.result()
            if error is not None:
                raise error
        finally:
            interrupted.cancel()

    def order(self, job_id: UUID, end: BaseException | None = None) -> None:
        """Have a running job end: by returning, or by raising `end`."""
        self._orders[job_id].set_result(end)

    def may_be_ordered(self, job_id: UUID) -> bool:
        """Whether the job's function waits for an order now."""
        return job_id in self._orders and not self._orders[job_id].done()

    def start(self) -> None:
        self._running = tasks.spawn("runner", self.runner.run(), eternal=True)

    async def stop(self) -> None:
        """Stop the runner as a server does that ends in good order."""
        if self._running is not None:
            assert not self._running.done(), "the runner ended by itself"
            await tasks.end(self._running)
            self._running = None

    async def create(self, name: str = "TEST_job", *, kind: str = "TEST", wake: bool = True, **values: Any) -> UUID:
        """Create a job; without `wake` as another process would, of whose writes nobody here is told."""
        sessions = self.sessions if wake else Sessions(self.sessions.url)
        async with sessions.begin() as session:
            job = await actions.create(session, kind=kind, name=name, spec=values.pop("spec", {}), **values)
        if not wake:
            await sessions.close()
        return job.id

    async def interrupt(self, job_id: UUID) -> Job:
        async with self.sessions.begin() as session:
            return await actions.interrupt(session, job_id)

    async def job(self, job_id: UUID) -> Job:
        async with self.sessions.read() as session:
            return await actions.get(session, job_id)

    async def becomes(self, job_id: UUID, status: str) -> Job:
        async def so() -> bool:
            return (await self.job(job_id)).status == status

        await eventually(so, f"the job is {status}")
        return await self.job(job_id)

    async def runs(self, job_id: UUID, calls: int = 1) -> JobContext:
        """Wait until the job's function has been called so often, and can be given an order."""
        found = await eventually(
            lambda: len(own := [call for call in self.calls if call.id == job_id]) == calls and own, "the job runs"
        )
        last: JobContext = found[-1]
        return last

    async def events(self, job_id: UUID) -> list[JobEvent]:
        async with self.sessions.read() as session:
            return list(await actions.events_after(session, job_id, 0, limit=10_000))

    async def moves(self, job_id: UUID) -> list[tuple[str, str]]:
        query = select(StateChange).where(StateChange.row_id == job_id).order_by(StateChange.number)
        async with self.sessions.read() as session:
            return [(change.to, change.reason) for change in await session.scalars(query)]


@asynccontextmanager
async def job_yard(
    url: str, root: Path, *, limits: Mapping[str, int] | None = None, start: bool = True
) -> AsyncIterator[JobYard]:
    """Open a yard on an empty database; its runner runs, and has not ended by itself when the block does."""
    root.mkdir(exist_ok=True)
    sessions = Sessions(database_url(url, root))
    async with sessions.begin() as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)
    yard = JobYard(sessions, root, limits or {})
    if start:
        yard.start()
    try:
        yield yard
        await yard.stop()
    finally:
        with contextlib.suppress(AssertionError):
            await yard.stop()
        await yard.sessions.close()


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have SQLite tell at once that it is locked. Call it before a yard is opened."""
    monkeypatch.setattr("modelyard.db.BUSY_TIMEOUT_MS", 100)


@contextmanager
def away(url: str) -> Iterator[None]:
    """Keep a database away, as a backup does that locks it or an operator who lets nobody in."""
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            yield
        return
    server, _, rest = url.rpartition("/")
    name, _, options = rest.partition("?")
    with psycopg.connect(f"{server}/postgres?{options}", autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        yield
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


@asynccontextmanager
async def without_table(sessions: Sessions, table: str) -> AsyncIterator[None]:
    """Take a table away: a fault that no waiting cures."""
    async with sessions.begin() as session:
        await session.execute(text(f"ALTER TABLE {table} RENAME TO {table}_away"))
    yield
    async with sessions.begin() as session:
        await session.execute(text(f"ALTER TABLE {table}_away RENAME TO {table}"))
