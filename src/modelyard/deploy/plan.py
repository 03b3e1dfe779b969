"""The plan of a deploy: what it would take and do, without doing it.

The wish is written as a deploy writes it, looked at, and taken back: what `actions` would decide is decided by the same
lines. Whether the engine would start is asked of `engine.memory` and `engine.command`, as the supervisor asks them, on
the machine as it is now and as it will be when those that leave have given their memory back.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal
from uuid import UUID

from modelyard.capacity import reservations
from modelyard.capacity.ledger import Ledger
from modelyard.db import Sessions
from modelyard.deploy import actions, succession
from modelyard.deploy.fitting import Fitting, in_words, is_blind
from modelyard.deploy.tables import Deployment, Strategy
from modelyard.engine.command import check_length
from modelyard.engine.memory import Fit
from modelyard.engine.model_files import servable_files
from modelyard.engine.options import EngineOptions
from modelyard.errors import JobFailure
from modelyard.hardware import Machine, this_machine
from modelyard.models.stored_adapters import StoredAdapter, with_facts
from modelyard.models.tables import Model
from modelyard.settings import Settings

Way = Literal["in_place", "side_by_side", "replace"]


@dataclass(frozen=True)
class Leaving:
    """A deployment that would leave. `first`: before the new one starts."""

    deployment_id: UUID
    model_id: str
    memory_bytes: int
    first: bool


@dataclass(frozen=True)
class Plan:
    """The plan of a deploy. Memory in bytes; `free_bytes` is what engines may take now, None if nothing tells.

    `fit` is None where the model's files cannot be read; `failure` is the one that the deploy's job would end with.
    """

    model: Model
    adapters: Sequence[Model]
    way: Way
    fit: Fit | None
    fits: bool
    fits_beside: bool
    free_bytes: int | None
    free_after_bytes: int | None
    disk_free_bytes: int
    leaving: Sequence[Leaving]
    failure: JobFailure | None


async def plan(sessions: Sessions, settings: Settings, wish: actions.Wish) -> Plan:
    """Work out what a deploy would do. Nothing is changed and nothing is started.

    Raises:
        ModelNotFound: the store lacks the model or an adapter.
        Unprocessable: an adapter is given as the model, or does not belong to it.
    """
    row, model, adapters, live, leaving = await _decided(sessions, wish)
    async with sessions.read() as session:
        ledger = await reservations.ledger(session, settings.engine_memory_gib)
    fitting = Fitting(settings, sessions)
    stored = await with_facts(sessions, settings.models_dir, adapters)
    return await asyncio.to_thread(_worked_out, fitting, settings, row, model, adapters, stored, live, leaving, ledger)


async def _decided(
    sessions: Sessions, wish: actions.Wish
) -> tuple[Deployment, Model, Sequence[Model], Sequence[Deployment], list[Leaving]]:
    async with sessions.read() as session:
        live = await succession.live(session)
    async with sessions.begin() as session:
        model, adapters = await actions.wanted_models(session, wish.model_id, wish.adapter_ids, wish.names_base)
        job, touched = await actions.deploy(session, wish)
        row = await actions.of_job(session, job.id)
        staying = {one.id for one in await succession.staying(session, row)}
        # The rows keep what they say now, and the database what it said before.
        session.expunge_all()
        await session.rollback()
    leaving = [
        Leaving(one.id, one.model_id, one.memory_bytes or 0, first=one.job_id in touched)
        for one in live
        if one.id in staying or one.job_id in touched
    ]
    return row, model, adapters, live, leaving


def _worked_out(
    fitting: Fitting, settings: Settings, row: Deployment, model: Model, adapters: Sequence[Model],
    stored: Sequence[StoredAdapter], live: Sequence[Deployment], leaving: Sequence[Leaving], ledger: Ledger,
) -> Plan:  # fmt: skip
    look = _Look(this_machine(), row, ledger)
    is_same = any(one.id == row.id for one in live)
    way: Way = "in_place" if is_same else "side_by_side"
    found, fits, fits_beside, failure = None, False, False, None
    machine = look.without([one for one in leaving if one.first])
    try:
        check_length(servable_files(settings, model), EngineOptions(**row.options).over(settings))
        found = fitting.fit(row, model, stored, machine)
        fits = fits_beside = is_same or (found.fits and not look.is_blind(leaving))
        if (
            leaving
            and not is_same
            and (row.strategy == Strategy.REPLACE or (row.strategy == Strategy.AUTO and not fits))
        ):
            alone = look.without(leaving)
            instead = fitting.fit(row, model, stored, alone)
            # Nobody leaves first for what then cannot start all the same, unless that was asked for.
            if instead.fits or row.strategy == Strategy.REPLACE:
                way, machine, found, fits = "replace", alone, instead, instead.fits
                leaving = [replace(one, first=True) for one in leaving]
        if not fits:
            message = f"{found.message} {in_words(ledger)}".rstrip()
            failure = JobFailure("not_enough_memory", message, " ".join(found.hints))
    except JobFailure as error:
        failure = error
    after = _free(machine)
    if after is not None and found is not None:
        after = max(0, after - found.total_bytes)
    return Plan(
        model=model,
        adapters=adapters,
        way=way,
        fit=found,
        fits=fits,
        fits_beside=fits_beside,
        free_bytes=_free(ledger.left(look.machine, but=[row.id])),
        free_after_bytes=after,
        disk_free_bytes=shutil.disk_usage(settings.data_dir).free,
        leaving=leaving,
        failure=failure,
    )


class _Look:
    """A machine as it is now, and who holds how much of it."""

    def __init__(self, machine: Machine, row: Deployment, ledger: Ledger) -> None:
        self.machine = machine
        self._row = row
        self._ledger = ledger

    def without(self, leaving: Sequence[Leaving]) -> Machine:
        """Return what is left for the deployment when others have given their memory back, and its own engine too."""
        return self._ledger.left(self.machine, gone={self._row.id, *(one.deployment_id for one in leaving)})

    def is_blind(self, leaving: Sequence[Leaving]) -> bool:
        """True if nothing tells how much memory the GPUs have, and another run is on them."""
        gone = [one.deployment_id for one in leaving if one.first]
        return is_blind(self._ledger, self.machine, self._row.id, gone=gone)


def _free(machine: Machine) -> int | None:
    if machine.has_gpu:
        return sum(gpu.free_bytes for gpu in machine.gpus) if machine.gpus else None
    return machine.memory_available_bytes
