"""Reservations on each database, and what they keep others from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.capacity import reservations
from modelyard.capacity.ledger import Allocation, Ledger, on_gpus, on_main_memory
from modelyard.capacity.one_shot import OneShotMemory
from modelyard.capacity.tables import MAIN_MEMORY, UNKNOWN_GPU, Kind, Reservation
from modelyard.deploy.fitting import Fitting
from modelyard.deploy.tables import Deployment
from modelyard.finetune.tables import OnBusy
from modelyard.hardware import CUDA_DEVICES, GIB, Machine
from modelyard.jobs.tables import Job, JobStatus
from modelyard.processes import Children, Command
from tests.deploy.yard import DeployYard, deploy_yard, until_interrupted
from tests.eventually import eventually
from tests.finetune.test_accelerator import BUDGET, add_training

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("on_each_database")]


async def add_job(session: AsyncSession) -> Job:
    job = Job(kind="FT", name="FT", spec={}, status=JobStatus.RUNNING)
    session.add(job)
    await session.flush()
    return job


async def held(yard: DeployYard) -> dict[int, tuple[int, int]]:
    """Return what is held and taken of each device, in GiB."""
    async with yard.sessions.read() as session:
        found = await reservations.ledger(session, None)
    return {one.device: (one.memory_bytes // GIB, one.taken_bytes // GIB) for one in found.held}


async def test_a_reservation_counts_for_as_long_as_its_job_has_not_ended(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, {"FT": until_interrupted}) as yard:
        async with yard.sessions.begin() as session:
            job = await add_job(session)
            await reservations.reserve(session, job.id, Kind.TRAINING, "it", on_gpus([0, 1], 5 * GIB), job.id)
        assert await held(yard) == {0: (5, 0), 1: (5, 0)}
        async with yard.sessions.begin() as session:
            await reservations.note_taken(session, job.id, 2 * GIB)
        assert await held(yard) == {0: (5, 2), 1: (5, 2)}
        async with yard.sessions.begin() as session:
            # Another allocation takes its place.
            await reservations.reserve(session, job.id, Kind.TRAINING, "it", Allocation({3: 7 * GIB}), job.id)
            await reservations.note_all_taken(session, job.id)
        assert await held(yard) == {3: (7, 7)}
        async with yard.sessions.begin() as session:
            (await session.get_one(Job, job.number)).status = JobStatus.KILLED
        assert await held(yard) == {}


async def test_what_one_shot_runs_of_a_killed_server_held_is_given_back_at_the_next_start(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, {"FT": until_interrupted}) as yard:
        async with yard.sessions.begin() as session:
            job = await add_job(session)
            await reservations.reserve(session, uuid4(), Kind.PLAN, "a plan", on_main_memory(3 * GIB))
            await reservations.reserve(session, job.id, Kind.TRAINING, "it", Allocation({2: GIB}), job.id)
        assert await held(yard) == {MAIN_MEMORY: (3, 0), 2: (1, 0)}
        async with yard.sessions.begin() as session:
            await reservations.release_one_shot_runs(session)
        assert await held(yard) == {2: (1, 0)}


def two_gib(machine: Machine, ledger: Ledger) -> Allocation:
    assert ledger.left(machine).memory_available_bytes > 0
    return on_main_memory(2 * GIB)


def memory_of(yard: DeployYard) -> OneShotMemory:
    return OneShotMemory(yard.sessions, yard.supervisor.sharing_memory, yard.settings.engine_memory_gib)


async def test_a_one_shot_run_holds_memory_until_its_end_also_when_it_is_cancelled(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:

        async def run() -> None:
            async with memory_of(yard).held(Kind.MERGE, "the merge of org/poems", two_gib):
                await asyncio.sleep(60)

        running = asyncio.create_task(run())
        await eventually(lambda: held(yard), "it holds memory")
        assert await held(yard) == {MAIN_MEMORY: (2, 0)}
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await held(yard) == {}


async def test_an_engine_has_taken_its_memory_when_it_is_ready_and_gives_it_back_when_it_has_ended(
    tmp_path: Path,
) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        async with yard.sessions.read() as session:
            [one] = (await reservations.ledger(session, None)).held
        assert (one.job_id, one.device) == (job_id, MAIN_MEMORY)
        assert one.taken_bytes == one.memory_bytes > GIB
        await yard.take_down(job_id)
        await yard.ended(job_id)
        assert await held(yard) == {}


async def test_an_engine_waits_for_what_a_plan_holds_instead_of_failing(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, {}, **BUDGET) as yard:
        await yard.add_model("org/a")
        async with memory_of(yard).held(Kind.PLAN, "the plan of support", two_gib):
            job_id = await yard.deploy("org/a")

            async def waits() -> bool:
                return "2.0 GiB is promised to the plan of support" in "\n".join(
                    one.message for one in await yard.events(job_id)
                )

            await eventually(waits, "it waits, and says for what")
        await yard.becomes(job_id, "READY")


async def test_a_training_that_waits_for_nobody_waits_for_a_plan_all_the_same(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, {"FT": until_interrupted}, **BUDGET) as yard:
        training = await add_training(yard)
        async with memory_of(yard).held(Kind.PLAN, "the plan of support", two_gib):
            coming = asyncio.ensure_future(training.trains(OnBusy.FAIL))

            async def waits() -> bool:
                return "held by: the plan of support (2.0 GiB)" in await training.messages()

            await eventually(waits, "it waits, and says for what")
            assert not coming.done()
        assert (await coming).memory_bytes is not None


async def test_a_run_that_is_cancelled_while_it_reserves_holds_nothing_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with deploy_yard(tmp_path) as yard:
        reserve, reserved = reservations.reserve, asyncio.Event()

        async def reserve_and_commit(session: AsyncSession, *what: Any) -> None:
            await reserve(session, *what)
            await session.commit()
            reserved.set()
            await asyncio.sleep(60)

        async def run() -> None:
            async with memory_of(yard).held(Kind.PLAN, "the plan of support", two_gib):
                pass

        monkeypatch.setattr(reservations, "reserve", reserve_and_commit)
        running = asyncio.create_task(run())
        await reserved.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await held(yard) == {}


@pytest.mark.parametrize(("visible", "devices"), [("2,0", {0: 3, 2: 3}), ("", {UNKNOWN_GPU: 6})])
async def test_the_gpus_of_an_engine_of_the_version_before_are_those_that_it_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, devices: dict[int, int]
) -> None:
    machine = Machine(has_gpu=True, cpus=(0,), memory_available_bytes=0)
    monkeypatch.setattr("modelyard.deploy.fitting.this_machine", lambda: machine)
    async with deploy_yard(tmp_path) as yard:
        fitting = Fitting(yard.settings, yard.sessions)
        row = Deployment(id=uuid4(), model_id="org/a")
        command = Command(("/bin/sleep", "60"), {CUDA_DEVICES: visible}, cwd=tmp_path)
        child = await Children(yard.settings.data_dir / "server.lock", yard.settings.grace_s).start(
            yard.settings.jobs_dir / "x", command, log=tmp_path / "log.txt", stop_timeout_s=1.0
        )
        try:
            row.reservations = [Reservation(device=MAIN_MEMORY, memory_bytes=6 * GIB)]
            found = fitting.held_by_engine(child, row)
            assert found is not None
            assert {device: size // GIB for device, size in found.devices.items()} == devices
            row.reservations = [Reservation(device=0, memory_bytes=6 * GIB)]
            assert fitting.held_by_engine(child, row) is None
        finally:
            await child.kill()
