"""A job during which servers die again and again is not resumed for ever; one that merely was there is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import select, update

from modelyard.jobs import survival
from modelyard.jobs.tables import Job, JobStatus
from tests.jobs.yard import JobYard, job_yard


async def dies(yard: JobYard) -> None:
    """End the runner as a server that is killed does: what a good end writes is not written."""
    async with yard.sessions.read() as session:
        before = {job.id: {"at_risk": job.at_risk, "deaths": job.deaths} for job in await session.scalars(select(Job))}
    await yard.stop()
    async with yard.sessions.begin() as session:
        for job_id, values in before.items():
            await session.execute(update(Job).where(Job.id == job_id).values(**values))
    yard.calls.clear()


async def starts(yard: JobYard) -> None:
    """Start a server on the database, as the application does."""
    yard.runner = yard.new_runner()
    await yard.runner.end_deadly()
    yard.start()


async def dies_with(yard: JobYard, job_id: UUID) -> None:
    """Wait until the job runs, and let the server die."""
    await yard.runs(job_id)
    await dies(yard)


async def test_a_job_at_two_deaths_is_failed_with_the_reason_and_what_to_do(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create(kind="WITH_ENDING")
        await dies_with(yard, job_id)
        await starts(yard)
        await dies_with(yard, job_id)
        await starts(yard)
        job = await yard.becomes(job_id, "FAILED")
        assert yard.calls == [], "its function was not called a third time"
        assert (job.failure_code, job.finished_at is not None) == ("server_died", True)
        assert "died 2 times while this job ran" in str(job.failure_message)
        assert "/resume/" in str(job.failure_hint)
        assert [event.message for event in await yard.events(job_id)][-1] == "ended as FAILED", "its kind is told"
        other = await yard.create()
        await yard.runs(other)


async def test_a_server_that_stops_in_good_order_counts_nothing(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        for number in range(4):
            await yard.runs(job_id)
            await (yard.stop() if number % 2 else dies(yard))
            yard.calls.clear()
            await starts(yard)
        await yard.runs(job_id)
        assert (await yard.job(job_id)).status == "RUNNING"


async def test_a_job_that_comes_further_each_time_is_resumed_each_time(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        for number in range(1, 6):
            context = await yard.runs(job_id)
            await context.progress(number, 6, "steps")
            await dies(yard)
            await starts(yard)
        assert (await yard.job(job_id)).status == "RUNNING"
        for _ in range(2):  # and when it comes no further
            context = await yard.runs(job_id)
            await context.progress(5, 5, "steps")
            await dies(yard)
            await starts(yard)
        assert (await yard.job(job_id)).status == "FAILED"


async def test_a_job_that_ran_for_long_is_no_suspect(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survival, "SURVIVED_S", 0.05)
    monkeypatch.setattr("modelyard.jobs.runner.LOOK_AGAIN_S", 0.05)
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        for _ in range(4):
            context = await yard.runs(job_id)
            while context.is_at_risk:
                await asyncio.sleep(0.01)
            await dies(yard)
            await starts(yard)
        assert (await yard.job(job_id)).status == "RUNNING"


async def test_a_job_that_has_done_its_work_once_is_never_blamed_again(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        await (await yard.runs(job_id)).survived()
        for _ in range(4):
            await dies_with(yard, job_id)
            await starts(yard)
        assert (await yard.job(job_id)).status == "RUNNING"


async def test_a_job_that_waits_for_its_turn_is_not_counted(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path, limits={"TEST": 0}) as yard:
        job_id = await yard.create()
        for _ in range(3):
            await dies(yard)
            await starts(yard)
        assert (await yard.job(job_id)).status == "CREATED"


async def test_rows_of_an_older_version_are_not_suspected_at_once(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path, start=False) as yard:
        job_id = await yard.create(wake=False)
        async with yard.sessions.begin() as session:
            await session.execute(update(Job).where(Job.id == job_id).values(status=JobStatus.RUNNING))
        await starts(yard)
        await dies_with(yard, job_id)
        await starts(yard)
        await yard.runs(job_id)
