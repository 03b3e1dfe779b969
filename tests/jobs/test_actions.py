"""What requests do with jobs, on both databases."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from modelyard.errors import JobFinished, JobNotFound
from modelyard.jobs import actions
from tests.jobs.yard import JobYard, job_yard


async def names(yard: JobYard, **filters: object) -> list[str]:
    async with yard.sessions.read() as session:
        return [job.name for job in await actions.newest(session, **filters)]  # type: ignore[arg-type]


async def test_jobs_are_paged_newest_first_without_a_gap_or_a_repeat(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path, start=False) as yard:
        ids = [await yard.create(f"job {number}") for number in range(7)]
        assert await names(yard, limit=3) == ["job 6", "job 5", "job 4"]
        await yard.create("came meanwhile")
        assert await names(yard, limit=3, before=ids[4]) == ["job 3", "job 2", "job 1"]
        assert await names(yard, limit=3, before=ids[1]) == ["job 0"]
        assert await names(yard, limit=3, before=ids[0]) == []


async def test_jobs_are_filtered_by_kind_and_status(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path, limits={"TEST": 1}) as yard:
        first = await yard.create("first")
        await yard.runs(first)
        await yard.create("second")
        other = await yard.create("other", kind="OTHER")
        await yard.runs(other)
        assert await names(yard, limit=10, status="RUNNING") == ["other", "first"]
        assert await names(yard, limit=10, status="CREATED") == ["second"]
        assert await names(yard, limit=10, kind="TEST") == ["second", "first"]
        assert await names(yard, limit=10, kind="TEST", status="RUNNING", before=other) == ["first"]
        assert await names(yard, limit=10, kind="NONE") == []


async def test_a_page_before_a_job_that_does_not_exist_names_the_parameter(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path, start=False) as yard:
        with pytest.raises(JobNotFound) as caught:
            await names(yard, limit=1, before=uuid.uuid4())
        assert caught.value.param == "before"


async def test_a_second_wish_for_the_same_thing_finds_the_first_unless_that_was_interrupted(
    database_url: str, tmp_path: Path
) -> None:
    async with job_yard(database_url, tmp_path, start=False) as yard:
        first = await yard.create(subject="a model")
        await yard.create(subject="another model")
        async with yard.sessions.read() as session:
            found = await actions.find_active(session, kind="TEST", subject="a model")
            assert found is not None
            assert found.id == first
            assert await actions.find_active(session, kind="OTHER", subject="a model") is None
        await yard.interrupt(first)
        async with yard.sessions.read() as session:
            assert await actions.find_active(session, kind="TEST", subject="a model") is None


async def test_interrupting_is_a_wish_that_may_be_repeated(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path, start=False) as yard:
        job_id = await yard.create()
        for _ in range(2):
            job = await yard.interrupt(job_id)
            assert (job.status, job.interrupt_requested) == ("CREATED", True)


async def test_interrupting_what_has_ended_or_never_was_is_refused(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        await yard.runs(job_id)
        yard.order(job_id)
        await yard.becomes(job_id, "FINISHED")
        with pytest.raises(JobFinished, match=rf"{job_id} has ended already \(FINISHED\)"):
            await yard.interrupt(job_id)
        assert not (await yard.job(job_id)).interrupt_requested
        absent = uuid.uuid4()
        with pytest.raises(JobNotFound, match=str(absent)):
            await yard.interrupt(absent)


async def test_events_written_at_the_same_time_are_seen_in_order_and_none_is_missed(
    database_url: str, tmp_path: Path
) -> None:
    async with job_yard(database_url, tmp_path, start=False) as yard:
        job_id = await yard.create()

        async def write(writer: int) -> None:
            for number in range(25):
                async with yard.sessions.begin() as session:
                    await actions.append_event(session, job_id, f"{writer}.{number}")
                    await asyncio.sleep(0.001 * (writer % 3))  # some transactions stay open longer than others

        writing = asyncio.gather(*(write(writer) for writer in range(6)))
        followed: list[int] = []
        while len(followed) < 150:
            done = writing.done()
            async with yard.sessions.read() as session:
                new = await actions.events_after(session, job_id, followed[-1] if followed else 0, limit=1000)
            followed += [event.number for event in new]
            if done and not new:
                break
            await asyncio.sleep(0)
        await writing
        assert followed == [event.number for event in await yard.events(job_id)]
        assert len(followed) == 150
