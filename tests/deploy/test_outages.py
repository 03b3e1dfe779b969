"""A database that goes away and comes back, in each of its ways, ends nothing that serves and loses nothing wanted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import event, select, update

from modelyard.deploy.tables import Deployment, Wanted
from modelyard.errors import EngineStarting
from modelyard.jobs import survival
from modelyard.jobs.runner import JobContext
from modelyard.jobs.tables import Job
from modelyard.signals import Topic
from tests.deploy.yard import DeployYard, deploy_yard
from tests.deploy.yard_process import _ask
from tests.eventually import eventually
from tests.fixtures import missing
from tests.servers import postgres
from tests.servers.lifetime import ServerMissing

pytestmark = pytest.mark.timeout(120)

#: How long the database is away: for longer than any pause between two tries.
AWAY_S = 3.0


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[str]:
    """A server of this module's own, which may go away."""
    try:
        with postgres.running() as url:
            yield url
    except ServerMissing as error:
        missing("postgres", str(error))


class Outage:
    """A database and one way in which it goes away for a while."""

    def __init__(
        self, url: str, go: Callable[[], None], come_back: Callable[[], None], seconds: float, is_told: bool = True
    ) -> None:
        self.url = url
        self.go, self.come_back = go, come_back
        self.seconds = seconds
        #: Whether what waits for it gets an error, which an event tells of.
        self.is_told = is_told


@pytest.fixture(
    params=[
        "sqlite_locked",
        "sqlite_full",
        pytest.param("postgres_restarted", marks=pytest.mark.postgres),
        pytest.param("postgres_away", marks=pytest.mark.postgres),
        pytest.param("postgres_frozen", marks=pytest.mark.postgres),
    ]
)
def outage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outage]:
    kind: str = request.param
    if kind.startswith("sqlite"):
        monkeypatch.setattr("modelyard.db.BUSY_TIMEOUT_MS", 200)
        path = tmp_path / "test.db"
        made = _locked(path) if kind == "sqlite_locked" else _full(path)
        yield made
        made.come_back()
        return
    server: str = request.getfixturevalue("own_postgres")
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    outages = postgres.Outages(server)
    url = server.replace("/postgres?", f"/{name}?")
    if kind == "postgres_frozen":
        made = Outage(url, outages.freeze, outages.thaw, AWAY_S, is_told=False)
    else:
        seconds = 0.4 if kind == "postgres_restarted" else AWAY_S
        made = Outage(url, outages.stop, outages.start, seconds, is_told=seconds == AWAY_S)
    yield made
    outages.thaw() if kind == "postgres_frozen" else outages.start()


def _locked(path: Path) -> Outage:
    """Another program writes, as one that restores a backup does."""
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def come_back() -> None:
        if holder.in_transaction:
            holder.execute("ROLLBACK")

    def go() -> None:
        holder.execute("BEGIN IMMEDIATE")

    return Outage(f"sqlite:///{path}", go, come_back, AWAY_S)


def _full(path: Path) -> Outage:
    """No file of this process may grow, which SQLite takes for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = path.with_name(path.name + "-wal")

    def go() -> None:
        # Begun anew, the log grows with the next write: it never shrinks by itself, and old room is used again.
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, hard))

    return Outage(f"sqlite:///{path}", go, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)), AWAY_S)


def engine_of(yard: DeployYard, model_id: str) -> int:
    """Return the pid of the engine that was started last."""
    return int(yard.record(model_id, "start")[-1]["pid"])


async def in_service(yard: DeployYard, model_id: str) -> tuple[UUID, Deployment, int]:
    """Deploy a model, and return its job, its row and the pid of its engine once that is ready."""
    await yard.add_model(model_id)
    job_id = await yard.deploy(model_id)
    return job_id, await yard.becomes(job_id, "READY"), engine_of(yard, model_id)


async def test_an_outage_of_the_database_leaves_a_healthy_engine_as_it_is(tmp_path: Path, outage: Outage) -> None:
    async with deploy_yard(tmp_path / "data", database_url=outage.url) as yard:
        job_id, before, engine = await in_service(yard, "org/tiny")

        await asyncio.to_thread(outage.go)
        for _ in range(10):
            yard.sessions.signals.notify(Topic.DEPLOYMENTS)
            yard.sessions.signals.notify(Topic.JOBS)
            await asyncio.sleep(outage.seconds / 10)
        await asyncio.to_thread(outage.come_back)
        yard.sessions.signals.notify(Topic.DEPLOYMENTS)

        # Whoever looks at its row takes up wishes again: one is fulfilled, by the same engine.
        await yard.add_adapter("org/poems", "org/tiny")
        assert await yard.deploy("org/tiny", ["org/poems"]) == job_id

        async def loaded() -> bool:
            return [one["adapter_id"] for one in (await yard.deployment(job_id)).loaded] == ["org/poems"]

        await eventually(loaded, "a wish after the outage is fulfilled")
        after = await yard.deployment(job_id)
        assert (after.state, after.engine_url) == ("READY", before.engine_url)
        assert engine_of(yard, "org/tiny") == engine
        assert (await yard.job(job_id)).status == "RUNNING"


async def test_an_engine_that_dies_during_an_outage_is_started_again_after_it(tmp_path: Path, outage: Outage) -> None:
    async with deploy_yard(tmp_path / "data", database_url=outage.url) as yard:
        job_id, before, engine = await in_service(yard, "org/tiny")

        await asyncio.to_thread(outage.go)
        os.kill(engine, signal.SIGKILL)
        await asyncio.sleep(outage.seconds)
        await asyncio.to_thread(outage.come_back)

        async def again() -> bool:
            row = await yard.deployment(job_id)
            return row.state == "READY" and row.engine_url != before.engine_url

        await eventually(again, "another engine serves")
        assert engine_of(yard, "org/tiny") != engine
        assert (await yard.job(job_id)).status == "RUNNING"
        said = [one.message for one in await yard.events(job_id)]
        assert not outage.is_told or any(one.startswith("The database was away for ") for one in said), said


@pytest.mark.slow
async def test_outages_in_any_order_with_deaths_and_requests_touch_no_healthy_engine(
    tmp_path: Path, outage: Outage
) -> None:
    """The events are drawn by chance, anew each time; a failure prints the seed, which goes into `random.Random`."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    async with deploy_yard(tmp_path / "data", database_url=outage.url) as yard:
        for model_id in ("org/healthy", "org/dying"):
            await yard.add_model(model_id, misbehave={"chunk_ms": 20})
        healthy = await yard.deploy("org/healthy")
        dying = await yard.deploy("org/dying", keep_others=True)
        before = await yard.becomes(healthy, "READY")
        await yard.becomes(dying, "READY")
        wrong: list[str] = []
        answered = 0

        async def keep_asking() -> None:
            nonlocal answered
            while True:
                target = await yard.routing.resolve("org/healthy", "generate")
                with yard.routing.request(target):
                    said = await _ask(target, 5)
                wrong.extend([said] if said else [])
                answered += not said
                await asyncio.sleep(0.01)

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        try:
            for _ in range(3):
                await asyncio.to_thread(outage.go)
                for _ in range(chance.randrange(4)):
                    yard.sessions.signals.notify(Topic.DEPLOYMENTS)
                    await asyncio.sleep(chance.random() * 0.4)
                if chance.random() < 0.7:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(engine_of(yard, "org/dying"), signal.SIGKILL)
                await asyncio.sleep(chance.random())
                await asyncio.to_thread(outage.come_back)
                await asyncio.sleep(chance.random())
            await eventually(lambda: answered > 20, "requests are answered")
        finally:
            for task in asking:
                task.cancel()
            ended = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended), (seed, ended)
        assert not wrong, (seed, wrong)
        after = await yard.becomes(healthy, "READY")
        assert after.engine_url == before.engine_url, seed
        await yard.becomes(dying, "READY")
        assert [(await yard.job(one)).status for one in (healthy, dying)] == ["RUNNING", "RUNNING"], seed


async def test_an_engine_that_has_drained_gets_no_request_of_a_gateway_whose_read_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang() -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    async with deploy_yard(tmp_path / "data") as yard:
        await yard.add_model("org/tiny", misbehave={"chunk_ms": 50})
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")
        wrong: list[str] = []
        refused = 0

        async def ask() -> None:
            nonlocal refused
            try:
                target = await yard.routing.resolve("org/tiny", "generate")
            except EngineStarting:
                refused += 1
                return
            with yard.routing.request(target):
                wrong.append(await _ask(target, 10))

        await ask()
        monkeypatch.setattr(yard.routing._snapshots, "_read", hang)
        await yard.take_down(job_id, Wanted.DRAINED)
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                # With gaps between them: under way without end, they would keep the engine.
                group.create_task(ask())
                await asyncio.sleep(0.8)
        assert (await yard.deployment(job_id)).state == "STOPPED"
        assert wrong
        assert refused
        assert not any(wrong), wrong


async def test_requests_find_what_is_written_from_its_commit_on(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path / "data") as yard:
        await yard.add_model("org/tiny")
        out, told = 0, list[int]()
        writer = yard.sessions._writer.sync_engine

        @event.listens_for(writer, "checkout")
        def leaves(*_: object) -> None:
            nonlocal out
            out += 1

        @event.listens_for(writer, "checkin")
        def returns(*_: object) -> None:
            nonlocal out
            out -= 1

        yard.sessions.signals.subscribe(Topic.DEPLOYMENTS, lambda: told.append(out))
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")
        # Others read it while the connection goes back to its pool: requests must be told before that.
        assert told.count(1) >= 2, told


async def test_what_is_seen_to_serve_is_never_suspected_of_ending_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: JobContext) -> None:
        await asyncio.Event().wait()

    # As if the server died between the two.
    monkeypatch.setattr(JobContext, "survived", never)
    async with deploy_yard(tmp_path / "data") as yard:
        await yard.add_model("org/tiny")
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")
        async with yard.sessions.read() as session:
            assert await session.scalar(select(Job.deaths).where(Job.id == job_id)) == survival.IMMUNE


async def test_what_serves_while_its_job_has_failed_is_wanted_again_by_the_next_server(
    tmp_path: Path, database_url: str
) -> None:
    """Such rows were written by earlier servers, when their database was away for some seconds."""
    async with deploy_yard(tmp_path / "data", database_url=database_url) as yard:
        await yard.add_model("org/tiny")
        await yard.add_model("org/other")
        job_id, other = await yard.deploy("org/tiny"), await yard.deploy("org/other", keep_others=True)
        await yard.becomes(job_id, "READY")
        await yard.becomes(other, "READY")
    async with deploy_yard(tmp_path / "data", database_url=database_url) as yard:
        await yard.becomes(job_id, "READY")
        await yard.becomes(other, "READY")
        await yard.interrupt(other)
        await yard.ended(other)
        async with yard.sessions.begin() as session:
            await session.execute(update(Job).where(Job.id == job_id).values(status="FAILED"))
            gone = update(Deployment).where(Deployment.job_id == other)
            await session.execute(gone.values(state="READY", wanted="UP", ended_at=None))
    async with deploy_yard(tmp_path / "data", database_url=database_url) as yard:
        assert (await yard.deployment(job_id)).state == "FAILED"
        assert (await yard.deployment(other)).state == "FAILED"
        again = await yard.routing.where("org/tiny")
        assert again is not None
        await yard.becomes(again.deployment.job_id, "READY")
        assert await yard.routing.where("org/other") is None  # its end had been asked for


async def test_a_fault_of_the_server_itself_ends_the_deployment_and_its_job_together(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fault(*_: object) -> None:
        raise RuntimeError("a fault")

    async with deploy_yard(tmp_path / "data", database_url=database_url) as yard:
        await yard.add_model("org/tiny")
        monkeypatch.setattr("modelyard.deploy.record.Record.end", fault)
        monkeypatch.setattr("modelyard.deploy.service.Service._probe", fault)
        job_id = await yard.deploy("org/tiny")
        assert (await yard.ended(job_id)).failure is not None
        row = await yard.deployment(job_id)
        assert (row.state, row.wanted, row.engine_url) == ("FAILED", "DOWN", None)
