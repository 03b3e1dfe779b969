"""A training's turn at the accelerator: whether there is room beside the engines, and what to do if there is none.

The accelerator is the memory of the freest GPU (or of several, each with a process of the training) or, on a machine
without one, the machine's, within the budget that engines and trainings share (MODELYARD_ENGINE_MEMORY_GIB). What a
training is given is promised to it in the database: engines that start meanwhile leave it free, and other trainings
too, also after a restart of the server. Deployments that must leave are asked, not ended: their supervisors drain them
(`stand_aside`). How much a training wants is `needs`'.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any
from uuid import UUID

from sqlalchemy import update

from modelyard.db import Sessions
from modelyard.deploy import promises, succession
from modelyard.deploy.fit import gib
from modelyard.deploy.fitting import left_when_gone
from modelyard.deploy.promises import Promised
from modelyard.deploy.tables import Deployment, MemoryPromise, Wanted
from modelyard.errors import JobFailure
from modelyard.finetune import stand_aside
from modelyard.finetune.into_service import Told
from modelyard.finetune.needs import Need
from modelyard.finetune.tables import Finetune, OnBusy, Phase
from modelyard.hardware import Gpu, Machine, given_back, this_machine
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.settings import Settings

LOOK_EVERY_S = 0.5
#: More deployments than that are not tried in every combination.
MOST_TRIED = 10


@dataclass(frozen=True)
class Share:
    """The share that a training was given. `memory_bytes` is None where nothing tells how much there is."""

    memory_bytes: int | None
    #: For the trainer's environment: which GPUs are its.
    env: dict[str, str] = field(default_factory=dict)
    #: That share the training, each with a GPU of its own and so much memory of it.
    processes: int = 1


@dataclass(frozen=True)
class Sight:
    """The accelerator at one moment. Memory in bytes; None where nothing tells how much a GPU has."""

    machine: Machine
    settings: Settings
    live: Sequence[Deployment]
    others: Sequence[MemoryPromise]

    def free(self, gone: Collection[UUID] = (), *, alone: bool = False) -> int | None:
        """Return what a training may take, once deployments are gone, and other trainings too (`alone`)."""
        machine = self._left(gone, alone=alone)
        if not machine.has_gpu:
            return machine.memory_available_bytes
        return min((gpu.free_bytes for gpu in self._freest(machine)), default=None)

    def fits(self, needed_bytes: int, gone: Collection[UUID] = (), *, alone: bool = False) -> bool:
        """True if so much is free then; where nothing tells, one at a time is all that is safe."""
        free = self.free(gone, alone=alone)
        if free is not None:
            return free >= needed_bytes
        return not [one for one in self.holding if one.id not in gone] and (alone or not self.others)

    @property
    def holding(self) -> list[Deployment]:
        """The deployments that have memory."""
        return [one for one in self.live if one.memory_bytes]

    @property
    def leaving(self) -> list[UUID]:
        """Those of them that are about to give it back."""
        return [one.id for one in self.holding if one.wanted != Wanted.UP]

    def must_go(self, needed_bytes: int, *, alone: bool = False) -> list[Deployment] | None:
        """Return which deployments would have to leave: as few as possible, and of those the smallest.

        None: even without any of them there would not be enough.
        """
        gone = self.leaving
        staying = sorted(
            (one for one in self.holding if one.id not in gone), key=lambda one: (one.memory_bytes or 0, one.number)
        )
        for count in range(min(len(staying), MOST_TRIED) + 1):
            ways = [
                way for way in combinations(staying[-MOST_TRIED:] if count > 1 else staying, count)
                if self.fits(needed_bytes, [*gone, *(one.id for one in way)], alone=alone)
            ]  # fmt: skip
            if ways:
                return list(min(ways, key=lambda way: sum(one.memory_bytes or 0 for one in way)))
        everything = [*gone, *(one.id for one in staying)]
        return staying if self.fits(needed_bytes, everything, alone=alone) else None

    def held_by(self) -> list[dict[str, Any]]:
        """Return who holds what, as JSON has it."""
        engines: list[dict[str, Any]] = [
            {"kind": "deployment", "id": str(one.id), "job_id": str(one.job_id), "name": one.model_id,
             "memory_bytes": one.memory_bytes, "leaving": one.wanted != Wanted.UP}
            for one in self.holding
        ]  # fmt: skip
        return engines + [
            {"kind": "training", "id": None, "job_id": str(one.job_id), "name": one.holder,
             "memory_bytes": one.memory_bytes, "leaving": False}
            for one in self.others
        ]  # fmt: skip

    def in_words(self, need: Need) -> str:
        """Return what is wanted, what is free, and who holds what."""
        free = self.free()
        held = ", ".join(f"{one['name']} ({gib(one['memory_bytes'])})" for one in self.held_by()) or "nobody"
        there = f"{gib(free)} is free" if free is not None else "nothing tells how much of the GPU is free"
        return f"The training wants {need.in_words()}; {there}, and held by: {held}."

    def share(self, need: Need) -> Share:
        """Return what a training gets now: what is useful of what is free."""
        machine = self._left(())
        free = self.free()
        memory_bytes = min(need.useful_bytes, free) if free is not None else None
        if not machine.gpus:
            return Share(memory_bytes, processes=self.settings.trainer_processes)
        taken = sorted(gpu.index for gpu in self._freest(machine))
        # NVML counts GPUs in the order of the bus.
        env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, taken))}
        return Share(memory_bytes, env, len(taken))

    def _freest(self, machine: Machine) -> list[Gpu]:
        """Return as many GPUs as a training is to have, or all that there are."""
        freest = sorted(machine.gpus, key=lambda gpu: (-gpu.free_bytes, gpu.index))
        return freest[: self.settings.trainer_processes]

    def _left(self, gone: Collection[UUID], *, alone: bool = False) -> Machine:
        others = () if alone else self.others
        given = sum(one.memory_bytes for one in others)
        promised = Promised(given, sum(max(0, one.memory_bytes - one.taken_bytes) for one in others))
        machine = self.machine
        if alone:
            machine = given_back(machine, sum(min(one.taken_bytes, one.memory_bytes) for one in self.others))
        return left_when_gone(machine, None, self.live, gone, self.settings, promised)


async def sight(sessions: Sessions, settings: Settings, *, but: UUID | None = None) -> Sight:
    """Look at the accelerator now; `but` is the job whose own promise does not count."""
    async with sessions.read() as session:
        live = await succession.live(session)
        others = [one for one in await promises.all_promises(session) if one.job_id != but]
    return Sight(await asyncio.to_thread(this_machine), settings, live, others)


async def look(sessions: Sessions, settings: Settings, need: Need) -> dict[str, Any]:
    """Return whether a training would find the accelerator taken, and by whom. Nothing is changed.

    Returns:
        `{"busy", "needed_bytes", "free_bytes", "held_by", "would_stop", "message"}`: `would_stop` are the ids of the
        deployments that `stop_deployment` would drain, None if even that would not be enough.
    """
    now = await sight(sessions, settings)
    fits = now.fits(need.needed_bytes)
    going = [] if fits else now.must_go(need.needed_bytes)
    return {
        "busy": not fits and bool(now.holding or now.others),
        "needed_bytes": need.needed_bytes,
        "free_bytes": now.free(),
        "held_by": now.held_by(),
        "would_stop": [str(one.id) for one in going] if going is not None else None,
        "message": now.in_words(need),
    }


class Accelerator:
    """Gives trainings their turn. `sharing_memory` is the supervisor's: engines do not start during a look at it."""

    def __init__(self, settings: Settings, sessions: Sessions, sharing_memory: asyncio.Lock, told: Told) -> None:
        self._settings = settings
        self._sessions = sessions
        self._sharing_memory = sharing_memory
        self._told = told

    @asynccontextmanager
    async def held(
        self, context: JobContext, finetune_id: UUID, need: Need, on_busy: OnBusy, *, holder: str
    ) -> AsyncIterator[Share]:
        """Hold the accelerator for the block, in which the trainer runs; wait for it before, as `on_busy` says.

        What left for the training is back in service when the block has been left, however it is left: only a server
        that stops (a cancellation) leaves that to its next start, where the same call goes on. `holder` is the
        training in words.

        Raises:
            JobFailure: `accelerator_busy`, or `not_enough_memory` if nothing that could end would make enough room.
            JobInterrupted: while it waited.
        """
        try:
            share = await self._wait_for(context, finetune_id, need, on_busy, holder)
            yield share
        except asyncio.CancelledError:
            raise
        except BaseException:
            await self.give_back(context, finetune_id)
            raise
        else:
            await self.give_back(context, finetune_id)

    async def give_back(self, context: JobContext, finetune_id: UUID) -> float | None:
        """Take the promise back, and bring back what left; return the seconds of unavailability. Safe to repeat.

        To be called, too, by whoever goes on with a training whose trainer has ended already.
        """
        async with self._sessions.begin() as session:
            await promises.release(session, context.id)
        self._told(())
        return await stand_aside.bring_back(
            context, self._sessions, self._told, finetune_id, self._settings.engine_start_timeout_s
        )

    async def note_taken(self, context: JobContext, taken_bytes: int) -> None:
        """Note how much memory the trainer has taken, so that it is not counted twice."""
        async with self._sessions.begin() as session:
            await promises.note_taken(session, context.id, taken_bytes)

    async def _wait_for(
        self, context: JobContext, finetune_id: UUID, need: Need, on_busy: OnBusy, holder: str
    ) -> Share:
        said = False
        while True:
            if context.interrupted.is_set():
                raise JobInterrupted
            async with self._sharing_memory:
                now = await sight(self._sessions, self._settings, but=context.id)
                async with self._sessions.read() as session:
                    gone = await stand_aside.are_gone(session, finetune_id)
                    before = await stand_aside.owed_before(session, finetune_id)
                fits = now.fits(need.needed_bytes) or not (now.holding or now.others)
                if gone and fits and not before:
                    return await self._take(context, now, need, holder)
                going = now.must_go(need.needed_bytes)
                if on_busy == OnBusy.FAIL and (going != [] or before):
                    raise _busy(now, need, before)
                if going is None and now.must_go(need.needed_bytes, alone=True) is None:
                    raise _hopeless(now, need)
                if not said:
                    said = True
                    await self._say(context, finetune_id, now, need, before)
                if on_busy == OnBusy.STOP_DEPLOYMENT and going and not before:
                    await self._have_them_leave(context, finetune_id, going)
            await _pause(context)

    async def _take(self, context: JobContext, now: Sight, need: Need, holder: str) -> Share:
        share = now.share(need)
        async with self._sessions.begin() as session:
            await promises.promise(session, context.id, holder, share.memory_bytes or need.needed_bytes)
        if not now.fits(need.needed_bytes):
            # An estimate is no reason to refuse what disturbs nobody: the trainer finds out.
            await context.event(f"It may be short of memory. {now.in_words(need)}", level="warning")
        return share

    async def _say(self, context: JobContext, finetune_id: UUID, now: Sight, need: Need, before: Sequence[str]) -> None:
        async with self._sessions.begin() as session:
            await session.execute(update(Finetune).where(Finetune.id == finetune_id).values(phase=Phase.WAITING))
        data = {"needed_bytes": need.needed_bytes, "free_bytes": now.free(), "held_by": now.held_by()}
        await context.event(f"Waiting for the accelerator. {now.in_words(need)}{_first(before)}", data=data)

    async def _have_them_leave(self, context: JobContext, finetune_id: UUID, going: Sequence[Deployment]) -> None:
        async with self._sessions.begin() as session:
            touched = await stand_aside.leave(session, finetune_id, [one.id for one in going])
        if not touched:
            return
        self._told(touched)
        names = ", ".join(f"{one.model_id} ({gib(one.memory_bytes or 0)})" for one in going)
        await context.event(
            f"Deployments leave for this training, and come back when it has ended: {names}.",
            level="warning", data={"leaving": [str(one.id) for one in going]},
        )  # fmt: skip


def _first(before: Sequence[str]) -> str:
    if not before:
        return ""
    return f" Deployments that left for the training {' and '.join(before)} come back first."


def _busy(now: Sight, need: Need, before: Sequence[str]) -> JobFailure:
    return JobFailure(
        "accelerator_busy",
        now.in_words(need) + _first(before),
        "Take deployments out of service, or ask with on_busy wait or stop_deployment; a smaller max_seq_len or "
        "batch_size wants less.",
    )


def _hopeless(now: Sight, need: Need) -> JobFailure:
    everything = [one.id for one in now.holding]
    most = now.free(everything, alone=True)
    return JobFailure(
        "not_enough_memory",
        f"{now.in_words(need)} Even without these it would be {gib(most or 0)}, so that nobody is asked to leave.",
        "Train with a smaller max_seq_len, batch_size or rank, or a smaller model.",
    )


async def _pause(context: JobContext) -> None:
    try:
        async with asyncio.timeout(LOOK_EVERY_S):
            await context.interrupted.wait()
    except TimeoutError:
        return
