"""The runner on a real database: every way in which a job can go, and every moment at which something can break."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import tempfile
import uuid
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from modelyard.errors import JobFailure, JobFinished
from modelyard.jobs import runner as runner_module
from modelyard.jobs.runner import JobContext, JobRunner
from modelyard.jobs.tables import ACTIVE, MOVES, Job, JobStatus
from modelyard.signals import Topic
from modelyard.states import StateChange
from tests.eventually import eventually
from tests.jobs.yard import JobYard, away, be_impatient, job_yard, without_table

# How a job goes


async def test_a_job_runs_and_finishes_with_its_events_and_moves(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create("TEST_a", spec={"model": "a", "nested": [1, {"b": None}]})
        context = await yard.runs(job_id)
        assert context.spec == {"model": "a", "nested": [1, {"b": None}]}
        assert context.folder == tmp_path / "jobs" / str(job_id)
        assert context.folder.is_dir()
        running = await yard.job(job_id)
        assert (running.status, running.finished_at) == ("RUNNING", None)
        assert running.started_at is not None
        await context.event("Half way.", data={"part": 1})
        await context.progress(10, 10, "bytes")
        yard.order(job_id)
        job = await yard.becomes(job_id, "FINISHED")
        assert job.finished_at is not None
        assert job.finished_at >= running.started_at >= job.created_at
        assert (job.progress_done, job.progress_total, job.progress_unit) == (10, 10, "bytes")
        assert job.failure_code is None
        assert [(event.level, event.message) for event in await yard.events(job_id)] == [
            ("info", "Running: its turn."), ("info", "Half way."), ("info", "Finished: done."),
        ]  # fmt: skip
        assert await yard.moves(job_id) == [("RUNNING", "its turn"), ("FINISHED", "done")]
        assert yard.runner.running("TEST") == 0


async def test_a_failure_is_recorded_with_its_code_message_hint_and_evidence(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        await yard.runs(job_id)
        yard.order(job_id, JobFailure("no_disk", "The disk is full.", "Free 4 GB.", ["OSError: [Errno 28]"]))
        job = await yard.becomes(job_id, "FAILED")
        assert (job.failure_code, job.failure_message, job.failure_hint) == (
            "no_disk",
            "The disk is full.",
            "Free 4 GB.",
        )
        assert job.failure_evidence == ["OSError: [Errno 28]"]
        last = (await yard.events(job_id))[-1]
        assert (last.level, last.message) == ("error", "Failed: The disk is full. Free 4 GB.")
        assert last.data == {"status": "FAILED", "code": "no_disk"}
        assert (await yard.moves(job_id))[-1] == ("FAILED", "no_disk")


class Panic(BaseException):
    """What a library of Rust raises when it panics: no `Exception`."""


CAUSES = [KeyError("a-private-detail"), asyncio.CancelledError("a-private-detail"), Panic("a-private-detail"),
          SystemExit("a-private-detail")]  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: type(cause).__name__)
async def test_what_nobody_expected_fails_the_job_and_its_cause_goes_to_the_log_alone(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, cause: BaseException
) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        await yard.runs(job_id)
        yard.order(job_id, cause)
        job = await yard.becomes(job_id, "FAILED")
        assert job.failure_code == "internal_error"
        told = f"{job.failure_message} {job.failure_hint} {[event.message for event in await yard.events(job_id)]}"
        assert str(job_id) in told
        assert "a-private-detail" not in told
        assert "Traceback" not in told
        assert "a-private-detail" in caplog.text
        follower = await yard.create()  # the runner goes on
        await yard.runs(follower)


async def test_a_kind_that_no_function_belongs_to_fails_rather_than_hangs(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job = await yard.becomes(await yard.create(kind="UNKNOWN"), "FAILED")
        assert job.failure_code == "internal_error"


async def test_a_job_whose_folder_cannot_be_made_fails_and_the_runner_goes_on(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "jobs").write_text("in the way", "utf-8")
    async with job_yard(database_url, tmp_path) as yard:
        assert (await yard.becomes(await yard.create(), "FAILED")).failure_code == "internal_error"
        (tmp_path / "jobs").unlink()
        await yard.runs(await yard.create())


# Interrupts


async def test_a_job_interrupted_while_it_waits_is_killed_without_a_turn_and_its_function_may_clear_up(
    database_url: str, tmp_path: Path
) -> None:
    async with job_yard(database_url, tmp_path, limits={"TEST": 1}) as yard:
        first = await yard.create()
        await yard.runs(first)
        waiting = await yard.create()
        await yard.interrupt(waiting)
        job = await yard.becomes(waiting, "KILLED")
        assert job.started_at is None
        assert await yard.moves(waiting) == [("KILLED", "interrupted before it started")]
        assert [call.interrupted.is_set() for call in yard.calls if call.id == waiting] == [True]
        assert (await yard.job(first)).status == "RUNNING"


async def test_a_running_job_is_killed_when_its_function_has_cleared_up(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        await yard.runs(job_id)
        assert (await yard.interrupt(job_id)).status == "RUNNING"
        job = await yard.becomes(job_id, "KILLED")
        assert job.finished_at is not None
        assert await yard.moves(job_id) == [("RUNNING", "its turn"), ("KILLED", "interrupted")]


async def test_interrupting_many_times_at_once_is_one_interrupt(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        await yard.runs(job_id)
        answers = await asyncio.gather(*(yard.interrupt(job_id) for _ in range(8)), return_exceptions=True)
        assert all(isinstance(answer, Job | JobFinished) for answer in answers)
        await yard.becomes(job_id, "KILLED")
        assert Counter(to for to, _ in await yard.moves(job_id)) == {"RUNNING": 1, "KILLED": 1}
        with pytest.raises(JobFinished):
            await yard.interrupt(job_id)


async def test_an_interrupt_that_comes_as_the_job_finishes_changes_nothing(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        for _ in range(10):
            job_id = await yard.create()
            await yard.runs(job_id)
            yard.order(job_id)
            answer, _ = await asyncio.gather(yard.interrupt(job_id), asyncio.sleep(0), return_exceptions=True)
            assert isinstance(answer, Job | JobFinished)
            await yard.becomes(job_id, "FINISHED")
            assert [to for to, _ in await yard.moves(job_id)] == ["RUNNING", "FINISHED"]


# Turns


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (JobFailure("no_disk", "The disk is full."), "FAILED"),
        (ValueError("nobody expected it"), "FAILED"),
        ("interrupt", "KILLED"),
        ("interrupt before it starts", "KILLED"),
    ],
)
async def test_what_a_kind_writes_at_a_jobs_end_is_written_once_however_it_ends(
    error: BaseException | str | None, status: str, database_url: str, tmp_path: Path
) -> None:
    async with job_yard(database_url, tmp_path, start=error != "interrupt before it starts") as yard:
        job_id = await yard.create(kind="WITH_ENDING")
        if error == "interrupt before it starts":
            await yard.interrupt(job_id)
            yard.start()
        else:
            await yard.runs(job_id)
            if error == "interrupt":
                await yard.interrupt(job_id)
            else:
                assert not isinstance(error, str)
                yard.order(job_id, error)
        await yard.becomes(job_id, status)
        said = [event.message for event in await yard.events(job_id)]
        assert said.count(f"ended as {status}") == 1
        assert said[-1] == f"ended as {status}"


async def test_a_limit_holds_back_the_rest_of_a_kind_in_order_and_no_other_kind(
    database_url: str, tmp_path: Path
) -> None:
    async with job_yard(database_url, tmp_path, limits={"TEST": 2}) as yard:
        ids = [await yard.create(f"job {number}", wake=False) for number in range(5)]
        other = await yard.create(kind="OTHER")
        await yard.runs(other)
        for number in range(5):
            await yard.runs(ids[number])
            assert yard.runner.running("TEST") <= 2
            # One ends, and the next one's turn comes: they end in the order in which they began.
            if number >= 1:
                yard.order(ids[number - 1])
                await yard.becomes(ids[number - 1], "FINISHED")
        assert [call.id for call in yard.calls if call.kind == "TEST"] == ids


async def test_a_new_job_starts_at_once_and_not_at_the_next_look(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        await yard.becomes(await yard.create(kind="UNKNOWN"), "FAILED")
        began = asyncio.get_running_loop().time()
        await yard.runs(await yard.create())
        assert asyncio.get_running_loop().time() - began < runner_module.LOOK_AGAIN_S / 2


async def test_a_wake_up_that_got_lost_delays_a_job_and_does_not_lose_it(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        await yard.runs(await yard.create(wake=False))


# Restarts


async def test_a_server_that_stops_leaves_jobs_running_and_the_next_one_calls_them_again(
    database_url: str, tmp_path: Path
) -> None:
    async with job_yard(database_url, tmp_path, limits={"TEST": 1}) as yard:
        job_id = await yard.create(spec={"a": 1})
        first = await yard.runs(job_id)
        waiting = await yard.create()
        await yard.stop()
        assert (await yard.job(job_id)).status == "RUNNING"
        yard.runner = yard.new_runner()
        yard.start()
        again = await yard.runs(job_id, calls=2)
        assert (again.spec, again.folder) == (first.spec, first.folder)
        assert (await yard.job(waiting)).status == "CREATED", "one that was left running counts for the limit"
        yard.order(job_id)
        await yard.becomes(job_id, "FINISHED")
        await yard.runs(waiting)
        assert await yard.moves(job_id) == [("RUNNING", "its turn"), ("FINISHED", "done")]


async def test_an_interrupt_that_came_while_no_server_was_there_is_followed(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        await yard.runs(job_id)
        await yard.stop()
        await yard.interrupt(job_id)
        yard.runner = yard.new_runner()
        yard.start()
        await yard.becomes(job_id, "KILLED")
        assert len(yard.calls) == 2


async def test_a_server_that_was_killed_and_one_that_follows_call_each_running_job_once(
    database_url: str, tmp_path: Path
) -> None:
    async with job_yard(database_url, tmp_path, start=False) as yard:
        # What a killed server leaves behind: rows.
        ids = [await yard.create(wake=False) for _ in range(4)]
        async with yard.sessions.begin() as session:
            await session.execute(text("UPDATE jobs SET status = 'RUNNING'"))
        yard.start()
        for job_id in ids:
            await yard.runs(job_id)
        last = await yard.create()
        await yard.runs(last)
        assert [call.id for call in yard.calls] == [*ids, last]


# A database that is away


WAITING = "waits for the database"


async def test_the_end_of_a_job_is_written_when_the_database_is_back(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_impatient(monkeypatch)
    async with job_yard(database_url, tmp_path, limits={"TEST": 1}) as yard:
        job_id, next_id = await yard.create(), await yard.create()
        context = await yard.runs(job_id)
        with away(database_url):
            await context.progress(1, 1, "bytes")  # only a figure: no reason to fail
            yard.order(job_id)
            await eventually(lambda: f"({job_id}) {WAITING}" in caplog.text, "a try that failed")
            yard.runner.wake()
            await asyncio.sleep(0.5)
        await yard.becomes(job_id, "FINISHED")
        assert [to for to, _ in await yard.moves(job_id)] == ["RUNNING", "FINISHED"]
        await yard.runs(next_id)
        assert caplog.text.count(f"({job_id}) {WAITING}") == 1
        assert "Traceback" not in caplog.text


async def test_stopping_the_server_while_the_database_is_away_leaves_the_job_to_the_next_one(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_impatient(monkeypatch)
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        await yard.runs(job_id)
        with away(database_url):
            yard.order(job_id)
            await eventually(lambda: f"({job_id}) {WAITING}" in caplog.text, "a try that failed")
            await yard.stop()
        assert (await yard.job(job_id)).status == "RUNNING"


async def test_a_fault_of_the_database_that_would_never_pass_ends_the_runner_and_what_it_runs_at_once(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with job_yard(database_url, tmp_path, start=False) as yard:
        job_id = await yard.create()
        running = asyncio.create_task(yard.runner.run())
        await yard.runs(job_id)
        async with without_table(yard.sessions, "jobs"):
            yard.runner.wake()
            with pytest.raises(DBAPIError, match="jobs"):
                await asyncio.wait_for(running, 10)
            assert all(task.get_name() != "job TEST_job" for task in asyncio.all_tasks()), "its function was cancelled"
        assert (await yard.job(job_id)).status == "RUNNING", "the next server calls it again"


async def test_an_end_that_cannot_be_written_fails_the_job_which_is_not_begun_again(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        async with yard.sessions.begin() as session:
            await session.execute(text("CREATE TABLE endings (number INTEGER)"))
        job_id = await yard.create(kind="WITH_ENDING", spec={"ending": "INSERT INTO endings VALUES (1)"})
        await yard.runs(job_id)
        async with without_table(yard.sessions, "endings"):
            yard.order(job_id)
            failed = await yard.becomes(job_id, "FAILED")
        assert (failed.failure_code, failed.finished_at is not None) == ("internal_error", True)
        assert caplog.text.count("could not be written") == 1
        assert [call.id for call in yard.calls] == [job_id]


# News and progress


async def test_news_wake_a_follower_long_before_it_would_look_again(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        context = await yard.runs(job_id)
        other = await yard.create()
        await yard.runs(other)
        told, told_of_other = asyncio.Event(), asyncio.Event()
        yard.sessions.signals.subscribe(Topic.JOB_NEWS, told.set, job_id)
        yard.sessions.signals.subscribe(Topic.JOB_NEWS, told_of_other.set, other)
        for tell in (context.event("Something."), context.progress(2, 2, "steps")):
            told.clear()
            await tell
            assert told.is_set()
        told.clear()
        yard.order(job_id)
        await asyncio.wait_for(told.wait(), runner_module.LOOK_AGAIN_S / 2)
        assert (await yard.job(job_id)).status == "FINISHED"
        assert not told_of_other.is_set(), "no other job's follower is woken"


async def test_the_figures_of_one_job_do_not_have_all_jobs_looked_at(tmp_path: Path) -> None:
    async with job_yard("", tmp_path) as yard:
        context = await yard.runs(await yard.create())
        await context.progress(1, 3, "steps")
        looks = []
        yard.sessions.signals.subscribe(Topic.JOBS, lambda: looks.append(1))
        await context.event("Something.")
        context._progress_at = 0.0
        await context.progress(2, 3, "steps")
        assert looks == []


async def test_progress_is_written_now_and_then_and_the_last_figure_always(database_url: str, tmp_path: Path) -> None:
    async with job_yard(database_url, tmp_path) as yard:
        job_id = await yard.create()
        context = await yard.runs(job_id)
        await context.progress(1, 1000, "bytes")
        for done in range(2, 1000):
            await context.progress(done, 1000, "bytes")
        early = await yard.job(job_id)
        assert early.progress_done is not None
        assert early.progress_done < 1000
        await context.progress(1000, 1000, "bytes")
        job = await yard.job(job_id)
        assert (job.progress_done, job.progress_total, job.progress_unit) == (1000, 1000, "bytes")


# Whatever happens, in whatever order

STEPS = st.lists(
    st.tuples(st.sampled_from(["create", "interrupt", "finish", "fail", "break", "restart"]), st.integers(0, 5)),
    max_size=14,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_any_sequence_of_events_makes_only_legal_moves_each_recorded_once(steps: list[tuple[str, int]]) -> None:
    logging.getLogger("modelyard").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as root:
            asyncio.run(_sequence(Path(root), steps))
    finally:
        logging.getLogger("modelyard").setLevel(logging.NOTSET)


async def _sequence(root: Path, steps: list[tuple[str, int]]) -> None:
    async with job_yard("", root, limits={"TEST": 2}) as yard:
        ids: list[uuid.UUID] = []
        for step, which in steps:
            await _step(yard, ids, step, which)
        # Everything ends in the end.
        for job_id in ids:
            with contextlib.suppress(JobFinished):
                await yard.interrupt(job_id)
        for job_id in ids:
            await eventually(lambda job_id=job_id: _has_ended(yard, job_id), "every job ends")  # type: ignore[misc]
        async with yard.sessions.read() as session:
            assert (await session.scalar(select(StateChange.number).where(StateChange.table != "jobs"))) is None
        for job_id in ids:
            path = [JobStatus.CREATED, *(JobStatus(to) for to, _ in await yard.moves(job_id))]
            assert all(after in MOVES[before] for before, after in itertools.pairwise(path)), path
            job = await yard.job(job_id)
            assert path[-1] == job.status
            assert (job.failure_code is not None) == (job.status == JobStatus.FAILED)
            assert job.finished_at is not None
            assert [event.data["status"] for event in await yard.events(job_id)] == path[1:]


async def _step(yard: JobYard, ids: list[uuid.UUID], step: str, which: int) -> None:
    if step == "create":
        ids.append(await yard.create())
    elif step == "restart":
        await yard.stop()
        yard.runner = yard.new_runner()
        yard.start()
    elif ids:
        job_id = ids[which % len(ids)]
        if step == "interrupt":
            if (await yard.job(job_id)).status in ACTIVE:
                try:
                    await yard.interrupt(job_id)
                except JobFinished:
                    assert (await yard.job(job_id)).status not in ACTIVE
        elif yard.may_be_ordered(job_id):
            ends = {"finish": None, "fail": JobFailure("told_to", "Told to."), "break": RuntimeError("told to")}
            yard.order(job_id, ends[step])
    for _ in range(which):
        await asyncio.sleep(0)


async def _has_ended(yard: JobYard, job_id: uuid.UUID) -> bool:
    return (await yard.job(job_id)).status not in ACTIVE


async def test_a_job_that_was_killed_before_its_start_is_not_called_again_by_a_look_at_old_rows(
    database_url: str, tmp_path: Path
) -> None:
    calls: list[uuid.UUID] = []

    async def at_once(context: JobContext) -> None:
        calls.append(context.id)

    async with job_yard(database_url, tmp_path, start=False) as yard:
        yard.runner = JobRunner(yard.sessions, {"TEST": at_once}, {}, tmp_path / "jobs")
        ids = []
        for number in range(60):
            ids.append(await yard.create(wake=False))
            if number % 2:
                await yard.interrupt(ids[-1])
        yard.start()

        async def all_ended() -> bool:
            yard.runner.wake()
            async with yard.sessions.read() as session:
                return (await session.scalar(select(Job.id).where(Job.status.in_(ACTIVE)).limit(1))) is None

        await eventually(all_ended, "all jobs have ended")
        assert Counter(calls) == dict.fromkeys(ids, 1)
