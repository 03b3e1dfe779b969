"""REST for trainings: what can be trained, start, look, follow its curve, interrupt, resume, delete."""

from __future__ import annotations

import asyncio
import shutil
from typing import Annotated
from uuid import UUID

from fastapi import Path, Query

from modelyard.datasets.routes import Storage
from modelyard.errors import NotTrainable
from modelyard.finetune import actions, checkpoints, curves
from modelyard.finetune.request_checks import check
from modelyard.finetune.schemas import FinetuneDetailOut, FinetuneIn, FinetuneOut
from modelyard.http import Sessions, Settings, documented, router
from modelyard.jobs import actions as jobs
from modelyard.jobs.schemas import JobOut
from modelyard.models import actions as models
from modelyard.models import store, trainable
from modelyard.models.kinds import Task
from modelyard.models.lost import bring_back
from modelyard.models.schemas import ModelOut
from modelyard.models.tables import Model

api = router("/api/v1/finetune", "Fine-tuning")

FinetuneId = Annotated[UUID, Path(description="The training's id.", examples=["46c155b4-17fe-4226-9412-a77edfadc7e7"])]


@api.get("/models/", summary="List models that can be trained", responses=documented())
async def list_trainable_models(sessions: Sessions, settings: Settings) -> list[ModelOut]:
    """Return the generative models in the store that an adapter can be trained for, by name."""
    async with sessions.read() as session:
        known = [model for model in await models.all_models(session) if not model.adapter]
    found = await asyncio.to_thread(_trainable, settings, [one for one in known if one.task == Task.GENERATE])
    return [ModelOut.model_validate(model) for model in found]


def _trainable(settings: Settings, known: list[Model]) -> list[Model]:
    found = []
    for model in known:
        try:
            folder = store.folder_of(settings.models_dir, model.path)
            is_own = settings.trainer_python is not None
            trainable.check(model.model_id, folder, model.chat_template, is_own_python=is_own)
        except NotTrainable:
            continue
        found.append(model)
    return found


@api.post("/", summary="Train an adapter", responses=documented(400, 404, 409, 413, 422))
async def start_finetune(wanted: FinetuneIn, sessions: Sessions, settings: Settings) -> JobOut:
    """Start the job that trains a LoRA adapter of a model on a dataset, and puts it into the store.

    One training runs at a time (MODELYARD_MAX_FINETUNES); more of them wait in a queue. The model and the dataset
    cannot be deleted meanwhile. GET /api/v1/finetune/{id} shows how it goes and what came of it, and the job's events
    bring it as it happens. With `deploy` the adapter is loaded into the running engine of its base, after it was
    checked there.
    """
    await check(wanted, sessions, settings)
    async with sessions.begin() as session:
        job = await actions.start(session, wanted)
    return JobOut.of(job)


@api.get("/", summary="List trainings, newest first", responses=documented(404, 422))
async def list_finetunes(
    sessions: Sessions,
    limit: Annotated[int, Query(ge=1, le=1000, description="The most trainings to return.")] = 100,
    before: Annotated[UUID | None, Query(description="Only trainings created before this one: the next page.")] = None,
) -> list[FinetuneOut]:
    """Return a page of trainings. Pass the last one's id as `before` for the next page."""
    async with sessions.read() as session:
        rows = await actions.newest(session, limit=limit, before=before)
        places = await actions.places(session)
    return [FinetuneOut.of(row, job, places.get(job.id)) for row, job in rows]


@api.get("/status/", summary="Get the current training and its job", responses=documented(404))
async def get_finetune_status(sessions: Sessions) -> FinetuneOut:
    """Return the training that runs, else the next of the queue, else the last one; 404 `no_finetune` without any."""
    async with sessions.read() as session:
        row = await actions.current(session)
        job = await jobs.get(session, row.job_id)
        places = await actions.places(session)
    return FinetuneOut.of(row, job, places.get(job.id))


@api.post("/interrupt/", summary="Interrupt the current training", responses=documented(404, 409))
async def interrupt_finetune(sessions: Sessions) -> JobOut:
    """Ask the current training to stop, with a checkpoint to go on from. 409 `job_finished` if none runs or waits.

    The answer may still say RUNNING: the job becomes KILLED when nothing of it runs any more.
    """
    async with sessions.begin() as session:
        job = await actions.interrupt(session)
    return JobOut.of(job)


@api.get("/{finetune_id:uuid}", summary="Get a training", responses=documented(404, 422))
async def get_finetune(
    finetune_id: FinetuneId,
    sessions: Sessions,
    points: Annotated[int, Query(ge=2, le=10_000, description="The most measurements of the curve.")] = 1000,
) -> FinetuneDetailOut:
    """Return all that is known of a training: settings, figures, how it did on held-out rows, and its curve."""
    async with sessions.read() as session:
        row = await actions.get(session, finetune_id)
        job = await jobs.get(session, row.job_id)
        places = await actions.places(session)
        curve, total = await curves.read(session, row.id, points)
    return FinetuneDetailOut.with_curve(row, job, places.get(job.id), curve, total)


@api.post("/{finetune_id:uuid}/resume/", summary="Resume a training", responses=documented(404, 409, 422))
async def resume_finetune(finetune_id: FinetuneId, sessions: Sessions, settings: Settings) -> JobOut:
    """Have a training that was interrupted or failed go on from its last checkpoint, as a new job.

    409 `model_lost` where the files of the commit that it began on are gone.
    """
    async with sessions.begin() as session:
        job = await actions.resume(session, finetune_id)
        row = await actions.get(session, finetune_id)
        base = models.at_pin(await models.get(session, row.model_id), row.pinned)
        await bring_back(settings.models_dir, [base], None)  # a refusal takes the new job back
    return JobOut.of(job)


@api.delete("/{finetune_id:uuid}", summary="Delete a training", responses=documented(404, 409, 422, 503))
async def delete_finetune(
    finetune_id: FinetuneId, sessions: Sessions, settings: Settings, storage: Storage
) -> FinetuneOut:
    """Delete a training's record, curve and checkpoints, and return what it was. Its adapter stays in the store.

    409 `finetune_active` while its job has not ended. Safe to repeat where the storage was away.
    """
    async with sessions.read() as session:
        row = await actions.get(session, finetune_id)
        await actions.check_ended(session, row)
        has_adapter = await models.find(session, row.adapter_id) is not None
    # Its objects go first, so that a row is there for as long as anything of it is. The adapter's stay for as long as
    # it is in the store: it may have to come back from there.
    if has_adapter:
        await checkpoints.remove_checkpoints(storage, finetune_id)
    else:
        await checkpoints.remove_all(storage, finetune_id)
    await asyncio.to_thread(shutil.rmtree, settings.finetunes_dir / str(finetune_id), ignore_errors=True)
    async with sessions.begin() as session:
        row = await actions.delete(session, finetune_id)
        job = await jobs.get(session, row.job_id)
    return FinetuneOut.of(row, job, None)
