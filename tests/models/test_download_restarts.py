"""Downloads that are interrupted, killed or outlive their server, with the real child and the real hub client."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from modelyard.jobs import actions as jobs
from modelyard.jobs.tables import JobStatus
from modelyard.models import actions, store
from tests.eventually import eventually
from tests.models.repositories import llama
from tests.models.yard import child_pid, fetched, make_settings, open_yard
from tests.servers.hub import Fault, Hub

TINY = "acme/tiny"
WEIGHTS = "model.safetensors"
SIZE = 2_000_000


async def test_an_interrupt_keeps_what_arrived_and_the_next_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("stall", after=600_000))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job_id = await yard.add(TINY)
        await fetched(yard, TINY, 600_000)
        await yard.interrupt(job_id)
        assert (await yard.ended(job_id)).status == JobStatus.KILLED
        assert child_pid(yard.runner.log_of(job_id).parent) == 0
        assert store.bytes_below(yard.partial(TINY)) >= 600_000
        assert await yard.model(TINY) is None
        second = await yard.bring(TINY)
        assert second.id != job_id
        assert second.status == JobStatus.FINISHED
        assert hub.starts(TINY, WEIGHTS) == [0, 600_000]
        assert hub.sent(TINY, WEIGHTS) == len(content[WEIGHTS])


async def test_an_interrupt_while_the_hub_says_nothing_ends_the_job(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama())
    hub.misbehave(TINY, "", Fault("stall", times=None))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job_id = await yard.add(TINY)
        await eventually(lambda: hub.listings, "a request for the listing")
        await yard.interrupt(job_id)
        assert (await yard.ended(job_id)).status == JobStatus.KILLED
        assert child_pid(yard.runner.log_of(job_id).parent) == 0


async def test_a_child_killed_by_sigkill_is_replaced_and_the_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("stall", after=800_000))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job_id = await yard.add(TINY)
        await fetched(yard, TINY, 800_000)
        os.kill(child_pid(yard.runner.log_of(job_id).parent), signal.SIGKILL)
        assert (await yard.ended(job_id)).status == JobStatus.FINISHED
        assert hub.starts(TINY, WEIGHTS) == [0, 800_000]
        assert hub.sent(TINY, WEIGHTS) == len(content[WEIGHTS])
        warnings = [event for event in await yard.events(job_id) if event.level == "warning"]
        assert "SIGKILL" in warnings[0].message


async def test_a_server_that_stops_in_good_order_resumes_the_job_at_its_next_start(hub: Hub, tmp_path: Path) -> None:
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("stall", after=800_000))
    settings = make_settings(tmp_path, hub.endpoint)
    async with open_yard(settings) as yard:
        job_id = await yard.add(TINY)
        await fetched(yard, TINY, 800_000)
    assert child_pid(settings.jobs_dir / str(job_id)) == 0
    async with open_yard(settings) as yard:
        assert (await yard.ended(job_id)).status == JobStatus.FINISHED
        assert hub.starts(TINY, WEIGHTS) == [0, 800_000]
        assert hub.sent(TINY, WEIGHTS) == len(content[WEIGHTS])


async def test_a_server_killed_mid_download_finds_its_child_alive_and_keeps_it(hub: Hub, tmp_path: Path) -> None:
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("slow", bytes_per_s=400_000))
    settings = make_settings(tmp_path, hub.endpoint)
    argv = [sys.executable, "-m", "tests.models.yard", str(tmp_path), hub.endpoint]
    async with open_yard(settings) as yard:
        pass  # makes the tables
    server = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert server.stdout is not None
        assert await asyncio.to_thread(server.stdout.readline) == b"running\n"
        job_id = await _ask_from_outside(settings)
        await eventually(
            lambda: store.bytes_below(store.partial_dir(settings.models_dir, TINY)) > 100_000, "some bytes on disk"
        )
        before = child_pid(settings.jobs_dir / str(job_id))
        assert before
    finally:
        server.kill()
        await asyncio.to_thread(server.communicate)
    async with open_yard(settings) as yard:
        assert (await yard.job(job_id)).status == JobStatus.RUNNING
        assert child_pid(settings.jobs_dir / str(job_id)) == before
        assert (await yard.ended(job_id)).status == JobStatus.FINISHED
        assert [path.name for path in (settings.jobs_dir / str(job_id)).glob("attempt-*")] == ["attempt-1"]
        assert hub.starts(TINY, WEIGHTS) == [0]
        assert hub.sent(TINY, WEIGHTS) == len(content[WEIGHTS])


async def _ask_from_outside(settings: Any) -> UUID:
    """Write the wish into the database of a running server, which looks by itself every two seconds."""
    from sqlalchemy import make_url

    from modelyard.db import Sessions

    sessions = Sessions(make_url(f"sqlite+aiosqlite:///{settings.data_dir / 'modelyard.db'}"))
    try:
        async with sessions.begin() as session:
            return (await actions.request_download(session, TINY)).id
    finally:
        await sessions.close()


async def test_a_server_that_died_between_the_move_and_the_row_writes_the_row(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(SIZE))
    settings = make_settings(tmp_path, hub.endpoint)
    async with open_yard(settings) as yard:
        job_id = await yard.add(TINY)
        assert (await yard.ended(job_id)).status == JobStatus.FINISHED
        # As the crash would have left it: job RUNNING, folder in place, no row.
        async with yard.sessions.begin() as session:
            await session.delete(await actions.get(session, TINY))
            (await jobs.get(session, job_id)).status = JobStatus.RUNNING
    async with open_yard(settings) as yard:
        assert (await yard.ended(job_id)).status == JobStatus.FINISHED
        assert await yard.model(TINY) is not None
        assert hub.sent(TINY, WEIGHTS) == len(llama(SIZE)[WEIGHTS])


async def test_two_jobs_never_write_the_same_partial_folder(hub: Hub, tmp_path: Path) -> None:
    """The first job is being interrupted, and its child is still there, when the second one starts."""
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("stall", after=300_000))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        first = await yard.add(TINY)
        await fetched(yard, TINY, 300_000)
        async with yard.sessions.begin() as session:
            await jobs.interrupt(session, first)
            second = (await actions.request_download(session, TINY)).id
        assert second != first
        assert (await yard.ended(first)).status == JobStatus.KILLED
        assert (await yard.ended(second)).status == JobStatus.FINISHED
        assert hub.sent(TINY, WEIGHTS) == len(content[WEIGHTS])
