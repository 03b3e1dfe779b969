"""Signals: each commit tells those who wait for what it wrote, whoever wrote it and however; no other does."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

import modelyard.app  # all tables
from modelyard.capacity import reservations
from modelyard.capacity.ledger import Allocation
from modelyard.capacity.tables import MAIN_MEMORY, Kind, Reservation
from modelyard.db import Base, Sessions, database_url
from modelyard.deploy.tables import MOVES, Deployment, DeploymentState
from modelyard.jobs import actions, survival
from modelyard.jobs import tables as jobs
from modelyard.jobs.tables import Job, JobEvent, JobStatus
from modelyard.routing.tables import Alias
from modelyard.signals import Topic
from modelyard.states import StateChange, move

SOURCES = Path(modelyard.app.__file__).parent
OF_DEPLOY = (Deployment, Alias, Reservation)
JOB, OTHER, DEPLOYMENT = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
NEWS, NEWS_OF_OTHER = "news", "news of the other job"


class Told:
    """A database with two jobs, a deployment, an alias and a reservation, and all that its commits notify."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._told: list[str] = []
        for topic in set(Topic) - {Topic.JOB_NEWS}:
            self._subscribe(topic, topic)
        self._subscribe(Topic.JOB_NEWS, NEWS, JOB)
        self._subscribe(Topic.JOB_NEWS, NEWS_OF_OTHER, OTHER)

    def _subscribe(self, topic: Topic, name: str, row_id: uuid.UUID | None = None) -> None:
        self.sessions.signals.subscribe(topic, lambda: self._told.append(name), row_id)

    def taken(self) -> set[str]:
        """Return what was notified since the last time, each once."""
        told, self._told = self._told, []
        assert len(told) == len(set(told)), "one commit notifies each once"
        return set(told)


@asynccontextmanager
async def opened(url: str, folder: Path) -> AsyncIterator[Told]:
    sessions = Sessions(database_url(url, folder))
    try:
        async with sessions.begin() as session:
            tables = [Base.metadata.tables[each.__tablename__] for each in (Job, JobEvent, *OF_DEPLOY, StateChange)]
            await session.run_sync(lambda sync: Base.metadata.create_all(sync.connection(), tables))
            for job_id in (JOB, OTHER):
                session.add(Job(id=job_id, kind="TEST", name="one", spec={}, status=JobStatus.RUNNING))
            await session.flush()
            session.add(Deployment(id=DEPLOYMENT, job_id=JOB, model_id="org/a", task="generate"))
            session.add(Alias(name="best", target="org/a"))
            session.add(
                Reservation(run_id=JOB, kind="training", job_id=JOB, holder="it", device=MAIN_MEMORY, memory_bytes=1)
            )
        yield Told(sessions)
    finally:
        await sessions.close()


async def change(session: AsyncSession) -> None:
    (await session.scalars(select(Deployment))).one().wake_requested = True


async def change_alias(session: AsyncSession) -> None:
    (await session.scalars(select(Alias))).one().target = "org/b"


async def change_to_the_same(session: AsyncSession) -> None:
    (await session.scalars(select(Alias))).one().target = "org/a"


async def remove(session: AsyncSession) -> None:
    await session.delete((await session.scalars(select(Deployment))).one())


async def add(session: AsyncSession) -> None:
    session.add(Alias(name="worst", target="org/a"))


async def write_off(session: AsyncSession) -> None:
    (await actions.get(session, JOB)).failure_code = "no_disk"


#: What is written, and what that notifies.
WRITES: dict[str, tuple[Callable[[AsyncSession], Awaitable[object]], set[str]]] = {
    "a row is added": (add, {Topic.ALIASES}),
    "a row is changed": (change, {Topic.DEPLOYMENTS}),
    "a row is given the value that it has": (change_to_the_same, set()),
    "another kind of row": (change_alias, {Topic.ALIASES}),
    "a row is deleted": (remove, {Topic.DEPLOYMENTS}),
    "a row of a job": (write_off, {Topic.JOBS, NEWS}),
    "UPDATE": (lambda session: session.execute(update(Alias).values(target="org/b")), {Topic.ALIASES}),
    "INSERT": (lambda session: session.execute(insert(Alias).values(name="x", target="y")), {Topic.ALIASES}),
    "INSERT of many": (
        lambda session: session.execute(insert(Alias), [{"name": name, "target": "y"} for name in "xyz"]),
        {Topic.ALIASES},
    ),
    "DELETE": (lambda session: session.execute(delete(Reservation)), {Topic.MEMORY}),
    "UPDATE of a table, without its class": (
        lambda session: session.execute(update(Alias.__table__).values(target="org/b")),  # type: ignore[arg-type]
        {Topic.ALIASES},
    ),
    "UPDATE of jobs that does not say which": (
        lambda session: session.execute(update(Job).values(name="new")),
        {Topic.JOBS, NEWS, NEWS_OF_OTHER},
    ),
    "INSERT of events": (
        lambda session: session.execute(insert(JobEvent).values(job_id=JOB, level="info", message="It.", data={})),
        {NEWS, NEWS_OF_OTHER},
    ),
    "SELECT": (lambda session: session.execute(select(Job)), set()),
    "the state of a deployment": (
        lambda session: move(session, Deployment, DEPLOYMENT, "state", MOVES, DeploymentState.READY),
        {Topic.DEPLOYMENTS},
    ),
    "the status of a job": (
        lambda session: move(session, Job, JOB, "status", jobs.MOVES, JobStatus.FINISHED),
        {Topic.JOBS, NEWS},
    ),
    "a job is created": (
        lambda session: actions.create(session, kind="TEST", name="new", spec={}),
        {Topic.JOBS},
    ),
    "a job is interrupted": (lambda session: actions.interrupt(session, OTHER), {Topic.JOBS, NEWS_OF_OTHER}),
    "an event": (lambda session: actions.append_event(session, OTHER, "It."), {NEWS_OF_OTHER}),
    "progress": (lambda session: actions.set_progress(session, JOB, 1, 2, "bytes"), {NEWS}),
    "what only the next server reads": (lambda session: survival.note_survival(session, [JOB]), set()),
    "a reservation": (
        lambda session: reservations.reserve(session, OTHER, Kind.TRAINING, "it", Allocation({MAIN_MEMORY: 1})),
        {Topic.MEMORY},
    ),
    "a reservation given back": (lambda session: reservations.release(session, JOB), {Topic.MEMORY}),
    "memory that was reserved is taken": (lambda session: reservations.note_taken(session, JOB, 1), set()),
}


@pytest.mark.parametrize("name", WRITES)
async def test_a_commit_notifies_of_all_that_it_wrote_and_of_nothing_else(tmp_path: Path, name: str) -> None:
    write, expected = WRITES[name]
    async with opened("", tmp_path) as told:
        async with told.sessions.begin() as session:
            await write(session)
            await session.flush()
            assert told.taken() == set(), "nothing before the commit"
        assert told.taken() == expected


async def test_a_transaction_that_is_rolled_back_notifies_nobody(database_url: str, tmp_path: Path) -> None:
    async with opened(database_url, tmp_path) as told:
        with suppress(KeyError):
            async with told.sessions.begin() as session:
                await change(session)
                await session.flush()
                await session.execute(update(Alias).values(target="org/b"))
                raise KeyError
        async with told.sessions.begin() as session:  # as a plan does, which only looks what would be
            await change(session)
            await session.flush()
            await session.rollback()
        assert told.taken() == set()


async def test_a_savepoint_notifies_nobody_before_the_commit(database_url: str, tmp_path: Path) -> None:
    async with opened(database_url, tmp_path) as told:
        async with told.sessions.begin() as session:
            async with session.begin_nested():
                await change(session)
            assert told.taken() == set()
        assert told.taken() == {Topic.DEPLOYMENTS}


async def test_who_has_left_is_told_nothing_and_forgotten(tmp_path: Path) -> None:
    async with opened("", tmp_path) as told:
        signals, came = told.sessions.signals, list[str]()
        first, second = lambda: came.append("first"), lambda: came.append("second")
        signals.subscribe(Topic.JOB_NEWS, first, DEPLOYMENT)
        signals.subscribe(Topic.JOB_NEWS, second, DEPLOYMENT)
        signals.unsubscribe(Topic.JOB_NEWS, first, DEPLOYMENT)
        signals.notify(Topic.JOB_NEWS, DEPLOYMENT)
        assert came == ["second"]
        assert signals.has_subscribers(Topic.JOB_NEWS, DEPLOYMENT)
        for _ in range(2):
            signals.unsubscribe(Topic.JOB_NEWS, second, DEPLOYMENT)
        assert not signals.has_subscribers(Topic.JOB_NEWS, DEPLOYMENT)


def test_each_topic_has_a_table_and_each_row_in_it_a_column() -> None:
    tables = {mapper.class_: mapper.class_.TOPICS for mapper in Base.registry.mappers}
    assert {topic for topics in tables.values() for topic, _ in topics} == set(Topic)
    for table, topics in tables.items():
        assert {column for _, column in topics if column is not None} <= set(table.__table__.columns.keys())


def test_nothing_is_written_past_the_sessions_and_nobody_calls_by_hand() -> None:
    """What a session does not see it cannot notify of; whoever calls by hand has another forget it."""
    texts = {str(path.relative_to(SOURCES)): path.read_text("utf-8") for path in SOURCES.rglob("*.py")}
    in_words = re.compile(
        r"""(?:text|exec_driver_sql|execute)\(\s*f?["']\s*(?:INSERT|UPDATE|DELETE)\b""", re.IGNORECASE
    )
    found = [name for name, text in texts.items() if in_words.search(text)]
    assert found == ["health/checks.py"], "it changes no row"
    callers = {name for name, text in texts.items() if re.search(r"signals\.notify\(|\]\.notify\(", text)}
    assert callers == {"db.py", "jobs/feeds.py"}, "feeds: when the server stops"
    silent = {name for name, text in texts.items() if "NOTIFIES" in text} - {"db.py", "signals.py"}
    assert silent == {"jobs/actions.py", "jobs/survival.py", "capacity/reservations.py"}, "WRITES has them"
