"""Actions on trainings, as functions on a session that never commit.

Requests write wishes here: a training with its job, one more job for it, its deletion. What a training holds (its base
and its dataset, which cannot be deleted meanwhile) is held from the transaction that creates its job to the one that
ends it (`ended`), whichever end that is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import delete as delete_from
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.datasets import actions as datasets
from modelyard.datasets.tables import Dataset
from modelyard.db import exclusively, utcnow
from modelyard.errors import AliasTaken, FinetuneActive, FinetuneDone, FinetuneNotFound, NoFinetune, Unprocessable
from modelyard.finetune.schemas import FinetuneIn
from modelyard.finetune.tables import Finetune, FinetuneHold, FinetunePoint, Phase
from modelyard.jobs import actions as jobs
from modelyard.jobs.tables import ACTIVE, Job, JobStatus
from modelyard.models import actions as models
from modelyard.models.ids import TRAINED
from modelyard.models.kinds import Task
from modelyard.models.tables import Model
from modelyard.models.trainable import check_kind
from modelyard.plurals import counted
from modelyard.routing import aliases

KIND = "FT"
#: An adapter's id is this long at most, without what tells it from another of the name.
SLUG_LENGTH = 60
#: Without a word in the request, nothing is held back of fewer rows.
HELD_BACK_FROM = 20


async def start(session: AsyncSession, wanted: FinetuneIn) -> Job:
    """Write down a training and return its job; wake the runner after the commit.

    Raises:
        ModelNotFound, DatasetNotFound: there is no such thing.
        Unprocessable: the model is none that can be trained, or the request contradicts itself.
        AliasTaken: the alias that is to lead to the adapter is the name of a model.
    """
    await exclusively(session, "FINETUNE")
    model, dataset = await check(session, wanted)
    finetune_id = uuid4()
    job = await _new_job(session, finetune_id, wanted.model_id, wanted.dataset_id)
    row = Finetune(
        id=finetune_id,
        job_id=job.id,
        name=wanted.name,
        model_id=model.model_id,
        dataset_id=dataset.id,
        pinned=models.pin(model),
        adapter_id=await _free_id(session, wanted.name, finetune_id),
        hyperparameters=asdict(wanted.hyperparameters.filled()),
        on_busy=wanted.on_busy,
        deploy=wanted.deploy,
        promote=wanted.promote.model_dump(by_alias=True) if wanted.promote is not None else None,
    )
    session.add(row)
    await session.flush()
    await _hold(session, row)
    return job


async def check(session: AsyncSession, wanted: FinetuneIn) -> tuple[Model, Dataset]:
    """Return the model and the dataset of a wish that could be fulfilled, as far as their rows tell.

    Raises:
        ModelNotFound, DatasetNotFound: there is no such thing.
        Unprocessable: the model is none that can be trained, or the request contradicts itself.
        AliasTaken: the alias that is to lead to the adapter is the name of a model.
    """
    model = await trainable(session, wanted.model_id)
    dataset = await datasets.get(session, wanted.dataset_id)
    _check_measuring(wanted, dataset)
    if wanted.promote is not None:
        await _check_alias(session, wanted.promote.alias)
    return model, dataset


async def resume(session: AsyncSession, finetune_id: UUID) -> Job:
    """Have a training that was interrupted or failed go on from its last checkpoint, and return its new job.

    Raises:
        FinetuneNotFound: there is none.
        FinetuneActive: it has not ended.
        FinetuneDone: it has done its work.
        ModelNotFound, DatasetNotFound: what it learnt from or on is gone.
    """
    await exclusively(session, "FINETUNE")
    row = await get(session, finetune_id)
    job = await jobs.get(session, row.job_id)
    if job.status in ACTIVE:
        raise FinetuneActive(finetune_id, job.status)
    if job.status == JobStatus.FINISHED:
        raise FinetuneDone(finetune_id, row.adapter_id)
    await trainable(session, row.model_id)
    await datasets.get(session, row.dataset_id)
    job = await _new_job(session, row.id, row.model_id, row.dataset_id)
    row.job_id, row.phase, row.finished_at, row.followed = job.id, Phase.QUEUED, None, None
    await session.flush()
    await _hold(session, row)
    return job


async def interrupt(session: AsyncSession) -> Job:
    """Write the wish that the current training stops, and return its job.

    Raises:
        NoFinetune: nothing was ever trained.
        JobFinished: none runs.
    """
    return await jobs.interrupt(session, (await current(session)).job_id)


async def ended(session: AsyncSession, job_id: UUID) -> None:
    """Let go of what a training held, in the transaction that ends its job. Safe to repeat."""
    mine = select(Finetune.id).where(Finetune.job_id == job_id)
    await session.execute(delete_from(FinetuneHold).where(FinetuneHold.finetune_id.in_(mine)))
    await session.execute(update(Finetune).where(Finetune.job_id == job_id).values(finished_at=utcnow()))


async def delete(session: AsyncSession, finetune_id: UUID) -> Finetune:
    """Delete a training's row with its measurements, and return what it said. Its objects go before (`checkpoints`).

    Raises:
        FinetuneNotFound: there is none.
        FinetuneActive: it has not ended.
    """
    row = await get(session, finetune_id)
    await check_ended(session, row)
    await session.execute(delete_from(FinetunePoint).where(FinetunePoint.finetune_id == row.id))
    await session.delete(row)
    await session.flush()
    return row


async def check_ended(session: AsyncSession, row: Finetune) -> Job:
    """Return the job of a training that has ended.

    Raises:
        FinetuneActive: it has not.
    """
    job = await jobs.get(session, row.job_id)
    if job.status in ACTIVE:
        raise FinetuneActive(row.id, job.status)
    return job


async def get(session: AsyncSession, finetune_id: UUID, *, param: str = "finetune_id") -> Finetune:
    """Return a training.

    Raises:
        FinetuneNotFound: there is none; `param` is what named it.
    """
    row = (await session.scalars(select(Finetune).where(Finetune.id == finetune_id))).first()
    if row is None:
        raise FinetuneNotFound(finetune_id, param=param)
    return row


async def current(session: AsyncSession) -> Finetune:
    """Return the training that runs, else the next one of the queue, else the last one.

    Raises:
        NoFinetune: there never was one.
    """
    with_job = select(Finetune).join(Job, Job.id == Finetune.job_id)
    for status in (JobStatus.RUNNING, JobStatus.CREATED):
        found = (await session.scalars(with_job.where(Job.status == status).order_by(Job.number).limit(1))).first()
        if found is not None:
            return found
    last = (await session.scalars(with_job.order_by(Job.number.desc()).limit(1))).first()
    if last is None:
        raise NoFinetune
    return last


async def newest(session: AsyncSession, *, limit: int, before: UUID | None = None) -> Sequence[tuple[Finetune, Job]]:
    """Return trainings with their jobs, newest first; with `before`, those created before that one.

    Raises:
        FinetuneNotFound: `before` names no training.
    """
    query = select(Finetune, Job).join(Job, Job.id == Finetune.job_id).order_by(Finetune.number.desc()).limit(limit)
    if before is not None:
        query = query.where(Finetune.number < (await get(session, before, param="before")).number)
    return [(row, job) for row, job in (await session.execute(query)).all()]


async def places(session: AsyncSession) -> Mapping[UUID, int]:
    """Return the jobs that wait for their turn, each with its place: 1 is next."""
    waiting = select(Job.id).where(Job.kind == KIND, Job.status == JobStatus.CREATED).order_by(Job.number)
    return {job_id: place for place, job_id in enumerate((await session.scalars(waiting)).all(), start=1)}


async def unpublished(session: AsyncSession) -> Sequence[str]:
    """Return the adapters of trainings that have not ended: their folder may be in the store before their row is."""
    query = select(Finetune.adapter_id).join(Job, Job.id == Finetune.job_id).where(Job.status.in_(ACTIVE))
    return (await session.scalars(query)).all()


async def folders_in_use(session: AsyncSession) -> set[str]:
    """Return the folders of the store that trainings which have not ended read, as models' rows name them."""
    query = select(Finetune).join(Job, Job.id == Finetune.job_id).where(Job.status.in_(ACTIVE))
    return {row.pinned["path"] for row in (await session.scalars(query)).all() if row.pinned is not None}


async def trainable(session: AsyncSession, model_id: str) -> Model:
    """Return a model of the store that can be the base of a training, as far as its row tells.

    Raises:
        ModelNotFound: it is not in the store.
        Unprocessable: it is an adapter, or embeds.
    """
    model = await models.get_for_use(session, model_id, among=(~Model.adapter, Model.task == Task.GENERATE))
    check_kind(model)
    return model


async def _new_job(session: AsyncSession, finetune_id: UUID, model_id: str, dataset_id: UUID) -> Job:
    spec: dict[str, Any] = {"finetune_id": str(finetune_id)}
    return await jobs.create(
        session, kind=KIND, name=f"FT_{model_id}_{dataset_id}", spec=spec, subject=str(finetune_id)
    )


async def _hold(session: AsyncSession, row: Finetune) -> None:
    session.add(FinetuneHold(finetune_id=row.id, model_id=row.model_id, dataset_id=row.dataset_id))
    await session.flush()


async def _check_alias(session: AsyncSession, alias: str) -> None:
    aliases.check_name(alias, param="promote.alias")
    if await models.find(session, alias) is not None:
        raise AliasTaken(alias, param="promote.alias")


def _check_measuring(wanted: FinetuneIn, dataset: Dataset) -> None:
    """Refuse what asks for a measurement when no row would be held back to measure by."""
    split = wanted.hyperparameters.validation_split
    if (split is None and dataset.rows >= HELD_BACK_FROM) or (split and dataset.rows > 1):
        return
    asked, without = None, ""
    if wanted.promote is not None and wanted.promote.condition == "better":
        asked, without = "promote.if", 'have it promoted with "if": "always"'
    elif wanted.hyperparameters.early_stopping is not None:
        asked, without = "hyperparameters.early_stopping", "leave early_stopping out"
    if asked is None:
        return
    why = f"of {counted(dataset.rows, 'row')} none is held back" if split is None else f"validation_split is {split:g}"
    more = "" if dataset.rows > 1 else ", on a dataset of more than one row"
    raise Unprocessable(
        f"There would be nothing to measure by: {why}. Set hyperparameters.validation_split, to 0.1 for example{more}, "
        f"or {without}.",
        param=asked,
    )


async def _free_id(session: AsyncSession, name: str, finetune_id: UUID) -> str:
    """Return an adapter's id for a training of this name that neither a model nor another training has."""
    wanted = TRAINED + (slug(name) or f"training-{finetune_id.hex[:8]}")
    taken = {*(await session.scalars(select(Model.model_id).where(Model.model_id.startswith(wanted, autoescape=True))))}
    ours = select(Finetune.adapter_id).where(Finetune.adapter_id.startswith(wanted, autoescape=True))
    taken |= {*(await session.scalars(ours))}
    found, number = wanted, 1
    while found in taken:
        number += 1
        found = f"{wanted}-{number}"
    return found


def slug(name: str) -> str:
    """Return what of a name may be in an id: small ASCII letters and digits, with '-' for the rest; it may be empty."""
    plain = "".join(one for one in unicodedata.normalize("NFKD", name) if not unicodedata.combining(one)).lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:SLUG_LENGTH].strip("-")
