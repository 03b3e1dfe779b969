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
from typing import Any
from uuid import UUID

from sqlalchemy import update

from modelyard.capacity import ledger, reservations
from modelyard.capacity.ledger import Allocation, Held, Ledger, on_gpus, on_main_memory
from modelyard.capacity.tables import ONE_SHOT, Kind
from modelyard.db import Sessions
from modelyard.deploy import succession
from modelyard.deploy.tables import Deployment, Wanted
from modelyard.errors import JobFailure
from modelyard.finetune import stand_aside
from modelyard.finetune.needs import Need
from modelyard.finetune.tables import Finetune, OnBusy, Phase
from modelyard.hardware import Gpu, Machine, cuda_environment, gib, this_machine
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.settings import Settings

LOOK_EVERY_S = 0.5
#: Words for the kinds of run that hold memory beside engines.
WORDS = {Kind.TRAINING: "training", Kind.PLAN: "plan", Kind.MERGE: "merge"}


@dataclass(frozen=True)
class Share:
    """The share that a training was given. `memory_bytes` is None where nothing tells how much there is."""

    memory_bytes: int | None
    #: For the trainer's environment: which GPUs are its.
    env: dict[str, str] = field(default_factory=dict)
    #: That share the training, each with a GPU of its own and so much memory of it.
    processes: int = 1
    #: The places of its GPUs in the order of the PCI bus.
    gpus: tuple[int, ...] = ()

    def allocation(self, needed_bytes: int, *, has_gpu: bool) -> Allocation:
        """Return what it holds of each device; `needed_bytes` where nothing tells how much there is."""
        memory_bytes = needed_bytes if self.memory_bytes is None else self.memory_bytes
        return on_gpus(self.gpus, memory_bytes) if has_gpu else on_main_memory(memory_bytes)


@dataclass(frozen=True)
class Snapshot:
    """The accelerator at one moment. Memory in bytes; None where nothing tells how much a GPU has."""

    machine: Machine
    settings: Settings
    live: Sequence[Deployment]
    ledger: Ledger
    #: The run whose own reservation does not count.
    but: tuple[UUID, ...] = ()

    def free(self, gone: Collection[UUID] = (), *, alone: bool = False) -> int | None:
        """Return what a training may take, once deployments are gone, and other runs too (`alone`)."""
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
    def others(self) -> list[Held]:
        """Return what trainings, plans and merges hold of the accelerator."""
        held = self.ledger.on_accelerator(self.machine, but=self.but)
        return [one for one in held if one.kind != Kind.ENGINE]

    @property
    def leaving(self) -> list[UUID]:
        """Those deployments that are about to give their memory back."""
        return [one.id for one in self.holding if one.wanted != Wanted.UP]

    def victims(self, needed_bytes: int, *, alone: bool = False) -> list[Deployment] | None:
        """Return which deployments would have to leave: as few as possible, and of those the smallest.

        None: even without any of them there would not be enough.
        """
        leaving = self.leaving
        staying = [one for one in self.holding if one.id not in leaving]
        found = ledger.victims(
            [ledger.Candidate(one.id, one.memory_bytes or 0, one.number) for one in staying],
            lambda gone: self.fits(needed_bytes, [*leaving, *gone], alone=alone),
        )
        return [one for one in staying if one.id in found] if found is not None else None

    def held_by(self) -> list[dict[str, Any]]:
        """Return who holds what, as JSON has it."""
        engines: list[dict[str, Any]] = [
            {"kind": "deployment", "id": str(one.id), "job_id": str(one.job_id), "name": one.model_id,
             "memory_bytes": one.memory_bytes, "gpus": one.gpus, "leaving": one.wanted != Wanted.UP}
            for one in self.holding
        ]  # fmt: skip
        runs: dict[UUID, dict[str, Any]] = {}
        for one in self.others:
            run = runs.setdefault(
                one.run_id,
                {"kind": WORDS[one.kind], "id": None, "job_id": str(one.job_id) if one.job_id else None,
                 "name": one.holder, "memory_bytes": 0, "gpus": [], "leaving": False},
            )  # fmt: skip
            run["memory_bytes"] += one.memory_bytes
            run["gpus"] += [one.device] if one.device >= 0 else []
        return engines + list(runs.values())

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
        taken = tuple(sorted(gpu.index for gpu in self._freest(machine)))
        return Share(memory_bytes, cuda_environment(taken), len(taken), taken)

    def _freest(self, machine: Machine) -> list[Gpu]:
        """Return as many GPUs as a training is to have, or all that there are."""
        freest = sorted(machine.gpus, key=lambda gpu: (-gpu.free_bytes, gpu.index))
        return freest[: self.settings.trainer_processes]

    def _left(self, gone: Collection[UUID], *, alone: bool = False) -> Machine:
        others = [one.run_id for one in self.others] if alone else []
        return self.ledger.left(self.machine, but=self.but, gone=[*gone, *others])


async def take_snapshot(sessions: Sessions, settings: Settings, *, but: UUID | None = None) -> Snapshot:
    """Look at the accelerator now; `but` is the run whose own reservation does not count."""
    async with sessions.read() as session:
        live = await succession.live(session)
        held = await reservations.ledger(session, settings.engine_memory_gib)
    return Snapshot(await asyncio.to_thread(this_machine), settings, live, held, (but,) if but is not None else ())


async def look(sessions: Sessions, settings: Settings, need: Need) -> dict[str, Any]:
    """Return whether a training would find the accelerator taken, and by whom. Nothing is changed.

    Returns:
        `{"busy", "needed_bytes", "free_bytes", "held_by", "would_stop", "message"}`: `would_stop` are the ids of the
        deployments that `stop_deployment` would drain, None if even that would not be enough.
    """
    now = await take_snapshot(sessions, settings)
    fits = now.fits(need.needed_bytes)
    going = [] if fits else now.victims(need.needed_bytes)
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

    def __init__(self, settings: Settings, sessions: Sessions, sharing_memory: asyncio.Lock) -> None:
        self._settings = settings
        self._sessions = sessions
        self._sharing_memory = sharing_memory

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
            await reservations.release(session, context.id)
        return await stand_aside.bring_back(context, self._sessions, finetune_id, self._settings.engine_start_timeout_s)

    async def note_taken(self, context: JobContext, taken_bytes: int) -> None:
        """Note how much memory the trainer has taken, so that it is not counted twice."""
        async with self._sessions.begin() as session:
            await reservations.note_taken(session, context.id, taken_bytes)

    async def _wait_for(
        self, context: JobContext, finetune_id: UUID, need: Need, on_busy: OnBusy, holder: str
    ) -> Share:
        said = False
        while True:
            if context.interrupted.is_set():
                raise JobInterrupted
            async with self._sharing_memory:
                now = await take_snapshot(self._sessions, self._settings, but=context.id)
                async with self._sessions.read() as session:
                    gone = await stand_aside.are_gone(session, finetune_id)
                    before = await stand_aside.owed_before(session, finetune_id)
                fits = now.fits(need.needed_bytes) or not (now.holding or now.others)
                # Plans and merges end soon: nobody is refused or has to leave for these.
                waits = not fits and now.fits(need.needed_bytes, now.ledger.runs(ONE_SHOT))
                if gone and fits and not before:
                    return await self._take(context, now, need, holder)
                going = [] if waits else now.victims(need.needed_bytes)
                if on_busy == OnBusy.FAIL and (going != [] or before):
                    raise _busy(now, need, before)
                if going is None and now.victims(need.needed_bytes, alone=True) is None:
                    raise _hopeless(now, need)
                if not said:
                    said = True
                    await self._say(context, finetune_id, now, need, before)
                if on_busy == OnBusy.STOP_DEPLOYMENT and going and not before:
                    await self._have_them_leave(context, finetune_id, going)
            await _pause(context)

    async def _take(self, context: JobContext, now: Snapshot, need: Need, holder: str) -> Share:
        share = now.share(need)
        async with self._sessions.begin() as session:
            allocation = share.allocation(need.needed_bytes, has_gpu=now.machine.has_gpu)
            await reservations.reserve(session, context.id, Kind.TRAINING, holder, allocation, context.id)
        if not now.fits(need.needed_bytes):
            # An estimate is no reason to refuse what disturbs nobody: the trainer finds out.
            await context.event(f"It may be short of memory. {now.in_words(need)}", level="warning")
        return share

    async def _say(
        self, context: JobContext, finetune_id: UUID, now: Snapshot, need: Need, before: Sequence[str]
    ) -> None:
        async with self._sessions.begin() as session:
            await session.execute(update(Finetune).where(Finetune.id == finetune_id).values(phase=Phase.WAITING))
        data = {"needed_bytes": need.needed_bytes, "free_bytes": now.free(), "held_by": now.held_by()}
        await context.event(f"Waiting for the accelerator. {now.in_words(need)}{_first(before)}", data=data)

    async def _have_them_leave(self, context: JobContext, finetune_id: UUID, going: Sequence[Deployment]) -> None:
        async with self._sessions.begin() as session:
            touched = await stand_aside.leave(session, finetune_id, [one.id for one in going])
        if not touched:
            return
        names = ", ".join(f"{one.model_id} ({gib(one.memory_bytes or 0)})" for one in going)
        await context.event(
            f"Deployments leave for this training, and come back when it has ended: {names}.",
            level="warning", data={"leaving": [str(one.id) for one in going]},
        )  # fmt: skip


def _first(before: Sequence[str]) -> str:
    if not before:
        return ""
    return f" Deployments that left for the training {' and '.join(before)} come back first."


def _busy(now: Snapshot, need: Need, before: Sequence[str]) -> JobFailure:
    return JobFailure(
        "accelerator_busy",
        now.in_words(need) + _first(before),
        "Take deployments out of service, or ask with on_busy wait or stop_deployment; a smaller max_seq_len or "
        "batch_size wants less.",
    )


def _hopeless(now: Snapshot, need: Need) -> JobFailure:
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
