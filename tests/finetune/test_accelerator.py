"""A training's turn at the accelerator: with a budget that one engine or one training fits, and not both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from modelyard.capacity import reservations
from modelyard.capacity.ledger import Held, Ledger, on_main_memory
from modelyard.capacity.tables import MAIN_MEMORY, UNKNOWN_GPU, Kind, Reservation
from modelyard.db import utcnow
from modelyard.deploy import roster
from modelyard.deploy.actions import Wish
from modelyard.deploy.plan import plan
from modelyard.deploy.tables import Deployment, DeploymentState, Wanted
from modelyard.errors import JobFailure
from modelyard.finetune import stand_aside
from modelyard.finetune.accelerator import Accelerator, Share, Snapshot, look
from modelyard.finetune.needs import Need
from modelyard.finetune.tables import Finetune, OnBusy, Phase
from modelyard.hardware import GIB, Gpu, Machine
from modelyard.jobs import actions as jobs
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.jobs.tables import Job, JobStatus
from tests.deploy.test_changes import ask
from tests.deploy.yard import DeployYard, deploy_yard, make_settings, until_interrupted
from tests.eventually import eventually

pytestmark = [pytest.mark.timeout(120)]

#: An engine of the yard's models is given 2.2 GiB and something; the training wants 2.
BUDGET = {"engine_memory_gib": 3.0, "engine_cpu_kv_cache_gib": 0.1}
NEED = Need(GIB, GIB // 2, GIB // 4, GIB // 4, 100, 2 * GIB, 2 * GIB + GIB // 4)


@dataclass
class Training:
    """A training that has come to the accelerator."""

    yard: DeployYard
    finetune_id: UUID
    context: JobContext

    @property
    def accelerator(self) -> Accelerator:
        return Accelerator(self.yard.settings, self.yard.sessions, self.yard.supervisor.sharing_memory)

    async def trains(
        self, on_busy: OnBusy, until: asyncio.Event | None = None, error: BaseException | None = None
    ) -> Share:
        """Hold the accelerator until told."""
        held = self.accelerator.held(self.context, self.finetune_id, NEED, on_busy, holder="the training support")
        async with held as share:
            if until is not None:
                await until.wait()
            if error is not None:
                raise error
        return share

    async def again(self) -> Training:
        """Return it as a server sees it that was started again."""
        return Training(self.yard, self.finetune_id, await _context(self.yard, self.context.id))

    async def row(self) -> Finetune:
        async with self.yard.sessions.read() as session:
            return await stand_aside._row(session, self.finetune_id)

    async def promised(self) -> int:
        async with self.yard.sessions.read() as session:
            found = await reservations.ledger(session, None)
        return sum(one.memory_bytes for one in found.held if one.kind == Kind.TRAINING)

    async def messages(self) -> str:
        return "\n".join(event.message for event in await self.yard.events(self.context.id))


async def _context(yard: DeployYard, job_id: UUID) -> JobContext:
    async with yard.sessions.read() as session:
        job = await jobs.get(session, job_id)
    return JobContext(job, yard.settings.jobs_dir / str(job.id), yard.sessions)


async def add_training(yard: DeployYard) -> Training:
    async with yard.sessions.begin() as session:
        job = Job(kind="FT", name="FT", spec={}, status=JobStatus.RUNNING)
        session.add(job)
        await session.flush()
        finetune_id = uuid4()
        session.add(
            Finetune(
                id=finetune_id, job_id=job.id, name="support", model_id="org/a", dataset_id=uuid4(),
                adapter_id=f"ft:{finetune_id}", hyperparameters={},
            )
        )  # fmt: skip
    return Training(yard, finetune_id, await _context(yard, job.id))


@asynccontextmanager
async def busy(data_dir: Path, **misbehave: Any) -> AsyncIterator[tuple[Training, UUID]]:
    """Have a model in service with an adapter and options of its own, and a training that finds no room."""
    async with deploy_yard(data_dir, {"FT": until_interrupted}, **BUDGET) as yard:
        await yard.add_model("org/a", misbehave=misbehave)
        await yard.add_adapter("org/poems", "org/a")
        job_id = await yard.deploy("org/a", ["org/poems"], {"max_loras": 2}, idle_timeout_s=600.0)
        await yard.becomes(job_id, "READY")
        yield await add_training(yard), job_id


async def is_promised(ft: Training) -> bool:
    return await ft.promised() > 0


async def back(ft: Training) -> Deployment:
    """Return the deployment that has come back."""
    [entry] = (await ft.row()).stopped
    async with ft.yard.sessions.read() as session:
        return await roster.get(session, UUID(entry["back_deployment_id"]))


async def test_where_there_is_room_nobody_is_disturbed(tmp_path: Path) -> None:
    async with deploy_yard(
        tmp_path, {"FT": until_interrupted}, engine_memory_gib=6.0, engine_cpu_kv_cache_gib=0.1
    ) as yard:
        await yard.add_model("org/a")
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        ft = await add_training(yard)
        share = await ft.trains(OnBusy.FAIL)
        assert share.memory_bytes is not None
        assert NEED.needed_bytes <= share.memory_bytes <= NEED.useful_bytes
        assert (await yard.deployment(job_id)).state == "READY"
        assert await ft.promised() == 0, "it is given back"


@pytest.mark.usefixtures("on_each_database")
async def test_it_fails_with_the_numbers_if_that_was_asked_for(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, job_id):
        with pytest.raises(JobFailure) as failure:
            await ft.trains(OnBusy.FAIL)
        assert failure.value.code == "accelerator_busy"
        assert "wants about 2.0 GiB (1.0 GiB for the trainer" in failure.value.message
        assert "held by: org/a (2.3 GiB)" in failure.value.message
        assert (await ft.yard.deployment(job_id)).wanted == "UP"


async def test_it_waits_visibly_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, job_id):
        training = asyncio.ensure_future(ft.trains(OnBusy.WAIT))

        async def waits() -> bool:
            return (await ft.row()).phase == Phase.WAITING and "Waiting for the accelerator." in await ft.messages()

        await eventually(waits, "it waits")
        assert (await ft.yard.deployment(job_id)).wanted == "UP"
        await ft.yard.take_down(job_id, Wanted.DRAINED)
        assert (await training).memory_bytes is not None
        assert (await ft.row()).stopped == [], "nobody left for it"


async def test_a_wait_is_interrupted(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, _):
        training = asyncio.ensure_future(ft.trains(OnBusy.WAIT))
        await eventually(lambda: _is_waiting(ft), "it waits")
        ft.context.interrupted.set()
        with pytest.raises(JobInterrupted):
            await training


async def _is_waiting(ft: Training) -> bool:
    return (await ft.row()).phase == Phase.WAITING


@pytest.mark.usefixtures("on_each_database")
@pytest.mark.parametrize("how", ["ends", "fails", "is interrupted"])
async def test_a_deployment_stands_aside_and_is_back_however_the_training_ends(tmp_path: Path, how: str) -> None:
    error = {
        "ends": None, "fails": JobFailure("loss_not_a_number", "No.", ""), "is interrupted": JobInterrupted()
    }[how]  # fmt: skip
    async with busy(tmp_path) as (ft, job_id):
        before = await ft.yard.deployment(job_id)
        until = asyncio.Event()
        training = asyncio.ensure_future(ft.trains(OnBusy.STOP_DEPLOYMENT, until, error))
        await eventually(lambda: is_promised(ft), "it trains")
        assert (await ft.yard.deployment(job_id)).state == "STOPPED", "it had left before"
        [entry] = (await ft.row()).stopped
        assert (entry["deployment_id"], entry["back_at"]) == (str(before.id), None)
        until.set()
        if error is None:
            await training
        else:
            with pytest.raises(type(error)):
                await training
        now = await back(ft)
        assert now.state == "READY"
        assert now.id != before.id
        same = ("model_id", "adapter_ids", "options", "strategy", "idle_timeout_s", "current_at")
        assert [getattr(now, name) for name in same] == [getattr(before, name) for name in same]
        row = await ft.row()
        assert row.unavailable_s is not None
        assert row.unavailable_s > 0
        assert row.stopped[0]["back_at"] is not None
        said = await ft.messages()
        assert "Deployments leave for this training, and come back when it has ended: org/a (2.3 GiB)." in said
        assert "org/a is back after" in said
        assert "Leaves for the training support" in "\n".join(one.message for one in await ft.yard.events(job_id))
        assert await ft.promised() == 0


async def test_requests_in_progress_are_let_end_before(tmp_path: Path) -> None:
    async with busy(tmp_path, chunk_ms=50) as (ft, job_id):
        target = await ft.yard.routing.resolve("org/a", "generate")
        with ft.yard.routing.request(target):
            asking = asyncio.ensure_future(ask(target.url, "org/a", max_tokens=40))
            await eventually(lambda: len(ft.yard.record("org/a", "request")) > 2, "it is asked")
            until = asyncio.Event()
            training = asyncio.ensure_future(ft.trains(OnBusy.STOP_DEPLOYMENT, until))
            await ft.yard.becomes(job_id, "DRAINING")
            assert (await asking)[0] == 200
            assert not await is_promised(ft)
        until.set()
        await training


async def test_an_engine_that_starts_meanwhile_leaves_alone_what_was_promised(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, {"FT": until_interrupted}, **BUDGET) as yard:
        await yard.add_model("org/a")
        ft, until = await add_training(yard), asyncio.Event()
        training = asyncio.ensure_future(ft.trains(OnBusy.FAIL, until))
        await eventually(lambda: is_promised(ft), "it trains")
        planned = await plan(yard.sessions, yard.settings, Wish("org/a"))
        assert not planned.fits
        assert planned.free_bytes is not None
        assert planned.free_bytes < GIB
        job = await yard.ended(await yard.deploy("org/a"))
        assert job.failure is not None
        assert job.failure.code == "not_enough_memory"
        assert "is promised to the training support" in job.failure.message
        until.set()
        await training
        await yard.becomes(await yard.deploy("org/a"), "READY")


async def test_an_engine_that_served_before_waits_for_the_training(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, {"FT": until_interrupted}, **BUDGET) as yard:
        await yard.add_model("org/a")
        job_id = await yard.deploy("org/a", idle_timeout_s=0.3)
        await yard.becomes(job_id, "IDLE")
        ft, until = await add_training(yard), asyncio.Event()
        training = asyncio.ensure_future(ft.trains(OnBusy.FAIL, until))
        await eventually(lambda: is_promised(ft), "it trains")
        asking = asyncio.ensure_future(yard.routing.resolve("org/a", "generate"))

        async def is_told() -> bool:
            return "Waiting for memory" in "\n".join(one.message for one in await yard.events(job_id))

        await eventually(is_told, "it waits")
        assert not asking.done()
        until.set()
        await training
        assert (await asking).model_id == "org/a"


async def test_a_server_that_stops_leaves_it_to_the_next_one(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, _):
        training = asyncio.ensure_future(ft.trains(OnBusy.STOP_DEPLOYMENT, asyncio.Event()))
        await eventually(lambda: is_promised(ft), "it trains")
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training
        assert await is_promised(ft), "engines leave it alone until it goes on"
        assert (await ft.row()).stopped[0]["back_deployment_id"] is None
        await (await ft.again()).trains(OnBusy.STOP_DEPLOYMENT)
        assert (await back(ft)).state == "READY"
        assert len((await ft.row()).stopped) == 1


async def test_what_a_training_that_ended_still_owes_comes_back_with_the_next_start(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, _):
        training = asyncio.ensure_future(ft.trains(OnBusy.STOP_DEPLOYMENT, asyncio.Event()))
        await eventually(lambda: is_promised(ft), "it trains")
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)
        async with ft.yard.sessions.begin() as session:
            (await jobs.get(session, ft.context.id)).status = JobStatus.FAILED
        assert await ft.promised() == 0, "a job that has ended holds nothing"
        for owed in (1, 0):
            async with ft.yard.sessions.begin() as session:
                assert await stand_aside.bring_back_forgotten(session) == owed
        await ft.yard.becomes((await back(ft)).job_id, "READY")


async def test_what_somebody_else_has_brought_back_is_not_doubled(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, _):
        training = asyncio.ensure_future(ft.trains(OnBusy.STOP_DEPLOYMENT, until := asyncio.Event()))
        await eventually(lambda: is_promised(ft), "it trains")
        async with ft.yard.sessions.begin() as session:
            await reservations.release(session, ft.context.id)  # as if it needed none
        other = await ft.yard.deploy("org/a", options={"max_loras": 2})
        await ft.yard.becomes(other, "READY")
        until.set()
        await training
        assert (await back(ft)).job_id == other
        assert (await ft.yard.deployment(other)).adapter_ids == [], "it stays as it was asked for"
        assert "deployed again by somebody else" in await ft.messages()


async def test_what_was_replaced_meanwhile_stays_away(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, _):
        await ft.yard.add_model("org/b")
        training = asyncio.ensure_future(ft.trains(OnBusy.STOP_DEPLOYMENT, until := asyncio.Event()))
        await eventually(lambda: is_promised(ft), "it trains")
        async with ft.yard.sessions.begin() as session:
            await reservations.release(session, ft.context.id)
        await ft.yard.becomes(await ft.yard.deploy("org/b"), "READY")
        until.set()
        await training
        [entry] = (await ft.row()).stopped
        assert entry["note"] == "org/b was deployed in its place meanwhile"
        assert (await ft.row()).unavailable_s is None


async def test_one_that_does_not_come_back_is_told(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, _):
        training = asyncio.ensure_future(ft.trains(OnBusy.STOP_DEPLOYMENT, until := asyncio.Event()))
        await eventually(lambda: is_promised(ft), "it trains")
        ft.yard.misbehave("org/a", {"die_at_start": {"stderr": "ValueError: no", "exit_code": 1}})
        until.set()
        await training
        [entry] = (await ft.row()).stopped
        assert "(" in entry["note"]
        assert "is not back" in await ft.messages()


async def test_two_trainings_share_and_the_second_waits_for_the_first(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, {"FT": until_interrupted}, **BUDGET) as yard:
        first, second = await add_training(yard), await add_training(yard)
        until = asyncio.Event()
        one = asyncio.ensure_future(first.trains(OnBusy.STOP_DEPLOYMENT, until))
        await eventually(lambda: is_promised(first), "the first trains")
        with pytest.raises(JobFailure, match=r"held by: the training support \(2\.\d GiB\)"):
            await second.trains(OnBusy.FAIL)
        two = asyncio.ensure_future(second.trains(OnBusy.STOP_DEPLOYMENT))
        await eventually(lambda: _is_waiting(second), "the second waits")
        until.set()
        await asyncio.gather(one, two)


async def test_what_left_for_one_training_is_back_before_another_takes_its_memory(tmp_path: Path) -> None:
    async with busy(tmp_path) as (first, _):
        one = asyncio.ensure_future(first.trains(OnBusy.STOP_DEPLOYMENT, until := asyncio.Event()))
        await eventually(lambda: is_promised(first), "the first trains")
        second = await add_training(first.yard)
        with pytest.raises(JobFailure, match="left for the training support come back first"):
            await second.trains(OnBusy.FAIL)
        two = asyncio.ensure_future(second.trains(OnBusy.WAIT))
        await eventually(lambda: _is_waiting(second), "the second waits")
        until.set()
        await one
        assert (await back(first)).state == "READY"
        assert not two.done()
        assert not await is_promised(second)
        second.context.interrupted.set()
        with pytest.raises(JobInterrupted):
            await two


async def test_what_comes_back_waits_for_memory_that_somebody_was_quicker_to_take(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, _):
        one = asyncio.ensure_future(ft.trains(OnBusy.STOP_DEPLOYMENT, until := asyncio.Event()))
        await eventually(lambda: is_promised(ft), "it trains")
        other = await add_training(ft.yard)
        async with ft.yard.sessions.begin() as session:
            share = on_main_memory(2 * GIB)
            await reservations.reserve(session, other.context.id, Kind.TRAINING, "somebody", share, other.context.id)
        until.set()

        async def is_asked() -> bool:
            return (await ft.row()).stopped[0]["back_deployment_id"] is not None

        await eventually(is_asked, "it is wanted again")

        async def waits() -> bool:
            job_id = (await back(ft)).job_id
            return "Waiting for memory" in "\n".join(one.message for one in await ft.yard.events(job_id))

        await eventually(waits, "it waits")
        assert not one.done()
        async with ft.yard.sessions.begin() as session:
            await reservations.release(session, other.context.id)
        await one
        assert (await back(ft)).state == "READY"


async def test_more_than_there_ever_is_disturbs_nobody(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, job_id):
        huge = Need(GIB, 900 * GIB, 0, 0, 1, 901 * GIB, 901 * GIB)
        held = ft.accelerator.held(ft.context, ft.finetune_id, huge, OnBusy.STOP_DEPLOYMENT, holder="it")
        with pytest.raises(JobFailure) as failure:
            async with held:
                raise AssertionError("it was given the accelerator")
        assert failure.value.code == "not_enough_memory"
        assert "nobody is asked to leave" in failure.value.message
        assert (await ft.yard.deployment(job_id)).wanted == "UP"
        seen = await look(ft.yard.sessions, ft.yard.settings, huge)
        assert (seen["busy"], seen["would_stop"]) == (True, None)


async def test_a_look_says_who_holds_what_and_who_would_leave(tmp_path: Path) -> None:
    async with busy(tmp_path) as (ft, job_id):
        row = await ft.yard.deployment(job_id)
        seen = await look(ft.yard.sessions, ft.yard.settings, NEED)
        assert (seen["busy"], seen["needed_bytes"], seen["would_stop"]) == (True, 2 * GIB, [str(row.id)])
        assert seen["free_bytes"] < GIB
        [held] = seen["held_by"]
        assert (held["kind"], held["name"], held["memory_bytes"]) == ("deployment", "org/a", row.memory_bytes)


def deployment(
    number: int, gib: float, state: DeploymentState = DeploymentState.READY, gpus: Sequence[int] = (), **more: Any
) -> Deployment:
    """Return a deployment whose engine holds so much of each of its GPUs, or of the machine's memory."""
    values = {"wanted": Wanted.UP, "current_at": utcnow(), **more}
    row = Deployment(number=number, id=uuid4(), job_id=uuid4(), model_id=f"m{number}", state=state, **values)
    size = int(gib * GIB)
    row.reservations = [
        Reservation(run_id=row.id, kind=Kind.ENGINE, device=one, memory_bytes=size, taken_bytes=size)
        for one in gpus or [MAIN_MEMORY]
    ]
    return row


def snapshot(
    tmp_path: Path, *live: Deployment, free_gib: float = 0.0, others: Sequence[Held] = (), gpus: Sequence[Gpu] = (),
    **settings: Any,
) -> Snapshot:  # fmt: skip
    machine = Machine(bool(gpus), (0, 1), int(free_gib * GIB), tuple(gpus))
    return Snapshot(machine, make_settings(tmp_path, **settings), live, Ledger([*engines(live), *others]))


def engines(live: Sequence[Deployment]) -> list[Held]:
    return [
        Held(one.id, Kind.ENGINE, one.job_id, one.model_id, part.device, part.memory_bytes, part.taken_bytes)
        for one in live
        for part in one.reservations
    ]


@pytest.mark.parametrize(
    ("needed_gib", "going"), [(1, [1]), (3, [2]), (5, [3]), (7, [1, 3]), (8, [2, 3]), (9, [1, 2, 3]), (20, None)]
)
def test_as_few_leave_as_possible_and_of_those_the_smallest(
    tmp_path: Path, needed_gib: int, going: list[int] | None
) -> None:
    now = snapshot(tmp_path, deployment(1, 2), deployment(2, 3), deployment(3, 5))
    found = now.victims(needed_gib * GIB)
    assert (sorted(one.number for one in found) if found is not None else None) == going


def test_what_is_leaving_anyway_is_counted_on(tmp_path: Path) -> None:
    now = snapshot(tmp_path, deployment(1, 2), deployment(2, 3, wanted=Wanted.DRAINED))
    assert now.victims(3 * GIB) == []
    assert [one.number for one in now.victims(4 * GIB) or []] == [1]


def test_what_other_trainings_were_promised_is_not_free(tmp_path: Path) -> None:
    other = Held(uuid4(), Kind.TRAINING, uuid4(), "it", MAIN_MEMORY, 3 * GIB, GIB)
    now = snapshot(tmp_path, free_gib=4, others=[other])
    assert now.free() == 2 * GIB
    assert now.free(alone=True) == 5 * GIB


def test_on_gpus_a_training_gets_the_freest_and_is_told_which(tmp_path: Path) -> None:
    gpus = [Gpu(0, "a", 80 * GIB, 10 * GIB), Gpu(1, "a", 80 * GIB, 60 * GIB), Gpu(2, "a", 80 * GIB, 20 * GIB)]
    now = snapshot(tmp_path, deployment(1, 70, gpus=[0]), gpus=gpus)
    assert now.free() == 60 * GIB
    assert now.fits(50 * GIB)
    share = now.share(NEED)
    assert share.env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}
    assert share.memory_bytes == NEED.useful_bytes
    assert [one.number for one in now.victims(75 * GIB) or []] == [1]


@pytest.mark.parametrize(("wanted", "got", "devices"), [(2, 2, "1,2"), (8, 3, "0,1,2")])
def test_processes_that_share_a_training_get_a_gpu_each(tmp_path: Path, wanted: int, got: int, devices: str) -> None:
    gpus = [Gpu(0, "a", 80 * GIB, 10 * GIB), Gpu(1, "a", 80 * GIB, 60 * GIB), Gpu(2, "a", 80 * GIB, 20 * GIB)]
    now = snapshot(tmp_path, gpus=gpus, trainer_processes=wanted)
    # What the fullest of them has: each process has the whole model.
    assert now.free() == (20 if got == 2 else 10) * GIB
    share = now.share(NEED)
    assert share.processes == got
    assert share.env["CUDA_VISIBLE_DEVICES"] == devices
    held = share.allocation(NEED.needed_bytes, has_gpu=True)
    assert (held.gpus, set(held.devices.values())) == (tuple(map(int, devices.split(","))), {share.memory_bytes})
    # Without GPUs they share the processor.
    assert snapshot(tmp_path, free_gib=4, trainer_processes=wanted).share(NEED).processes == wanted


def test_where_nothing_tells_about_a_gpu_one_at_a_time_is_all(tmp_path: Path) -> None:
    blind = Machine(True, (0,), 0)
    one = deployment(1, 70, gpus=[UNKNOWN_GPU])
    now = Snapshot(blind, make_settings(tmp_path), [one], Ledger(engines([one])))
    assert now.free() is None
    assert not now.fits(GIB)
    assert [one.number for one in now.victims(GIB) or []] == [1]
    share = Snapshot(blind, make_settings(tmp_path), [], Ledger()).share(NEED)
    assert share == Share(None)
    assert share.allocation(5 * GIB, has_gpu=True).devices == {UNKNOWN_GPU: 5 * GIB}
