"""Actions on models, as functions on a session that never commit."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnExpressionArgument, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import exclusively, utcnow
from modelyard.errors import SHOWN_NAMES, Conflict, ModelInUse, ModelNotFound, Unprocessable
from modelyard.jobs import actions as jobs
from modelyard.jobs.tables import ACTIVE, Job
from modelyard.models import adapter_facts, store
from modelyard.models.adapter_facts import AdapterFacts
from modelyard.models.ids import check_model_id, check_revision, is_local, is_trained
from modelyard.models.kinds import Source
from modelyard.models.tables import Model
from modelyard.plurals import counted

DOWNLOAD = "DOWNLOAD"
DEFAULT_REVISION = "main"
#: The condition of what can be a base.
BASES = (~Model.adapter,)
#: What of a row belongs to its commit.
PINNED = ("commit", "path", "size_bytes", "chat_template")
#: The revision of everything from the import directory.
LOCAL_REVISION = "local"


async def all_models(session: AsyncSession) -> Sequence[Model]:
    """Return the models and adapters in the store, by name."""
    return (await session.scalars(select(Model).order_by(Model.model_id))).all()


async def find(session: AsyncSession, model_id: str) -> Model | None:
    """Return a model or an adapter, if it is in the store."""
    return (await session.scalars(select(Model).where(Model.model_id == model_id))).first()


async def known_ids(session: AsyncSession, *among: ColumnExpressionArgument[bool]) -> Sequence[str]:
    """Return what an error names: the first ids that meet the conditions, models before adapters, and one more."""
    query = select(Model.model_id).where(*among).order_by(Model.adapter, Model.model_id).limit(SHOWN_NAMES + 1)
    return (await session.scalars(query)).all()


async def get(session: AsyncSession, model_id: str, *, among: Iterable[ColumnExpressionArgument[bool]] = ()) -> Model:
    """Return a model or an adapter.

    Raises:
        ModelNotFound: it is not in the store; the error names what is, of those that meet the conditions `among`.
    """
    model = await find(session, model_id)
    if model is None:
        known = await known_ids(session, *among)
        raise ModelNotFound(model_id[:200], known=known, hint="POST /api/v1/models/add/ downloads a model.")
    return model


async def get_for_use(
    session: AsyncSession, model_id: str, *, among: Iterable[ColumnExpressionArgument[bool]] = ()
) -> Model:
    """Return a model that somebody wants to use now; `among` as `get` has it.

    Raises:
        ModelNotFound: as `get`.
        Conflict: it is being downloaded; the error names the job and how much of it has arrived.
    """
    if await find(session, model_id) is None:
        await _refuse_while_it_arrives(session, model_id, "model_id")
    return await get(session, model_id, among=among)


async def _refuse_while_it_arrives(session: AsyncSession, model_id: str, param: str) -> None:
    job = await jobs.find_active(session, kind=DOWNLOAD, subject=model_id)
    if job is None:
        return
    arrived = "nothing of it has arrived yet"
    if job.progress_total:
        arrived = f"{job.progress_done or 0:,} of {counted(job.progress_total, 'byte')} have arrived"
    raise Conflict(
        f"{model_id} is being downloaded: {arrived}. Ask again when its job {job.id} is FINISHED: "
        f"GET /api/v1/jobs/{job.id}/status/ tells how far it is.",
        param=param,
        code="download_running",
    )


async def get_adapter(session: AsyncSession, adapter_id: str, base_model_id: str) -> Model:
    """Return what is to be put on a model as its adapter, whatever it turns out to be.

    Raises:
        ModelNotFound: it is not in the store; the error names the model's adapters that are.
        Conflict: it is being downloaded.
    """
    adapter = await find(session, adapter_id)
    if adapter is None:
        await _refuse_while_it_arrives(session, adapter_id, "adapter_ids")
        mine = await known_ids(session, Model.adapter, Model.base_model_id == base_model_id)
        raise ModelNotFound(
            adapter_id[:200],
            what="adapter",
            where=f"of '{base_model_id}' in the store",
            known=mine,
            hint="POST /api/v1/models/add/ downloads one.",
            param="adapter_ids",
        )
    return adapter


async def request_download(
    session: AsyncSession, model_id: str, revision: str | None = None, base_model_id: str | None = None
) -> Job:
    """Return the job that brings a model into the store: the one that is at it, or a new one.

    Wake the runner after the commit. A new job for a model that is there at that commit ends at once; for a branch or
    a tag it asks the hub whether that has moved. No revision is `main`, whatever else is on its way.
    `base_model_id` says which model an adapter belongs to, whatever its own files say.

    Raises:
        Unprocessable: no such name or revision can exist, or the base is an adapter.
        ModelNotFound: the base is neither in the store nor on its way.
        Conflict: another revision of the model is on its way, or it is with another base.
    """
    check_model_id(model_id)
    if base_model_id is not None:
        await _check_base(session, base_model_id)
    if is_trained(model_id):
        raise Unprocessable(
            f"{model_id} is the name of an adapter that is trained here, not downloaded: POST /api/v1/finetune/.",
            param="model_id",
        )
    if is_local(model_id):
        if revision is not None:
            raise Unprocessable(f"{model_id} comes from a folder and has no revisions.", param="revision")
        wanted = LOCAL_REVISION
    else:
        wanted = check_revision(revision or DEFAULT_REVISION)
    await exclusively(session, f"{DOWNLOAD} {model_id}")
    active = await jobs.find_active(session, kind=DOWNLOAD, subject=model_id)
    if active is None:
        spec = {"model_id": model_id, "revision": wanted}
        if base_model_id is not None:
            spec["base_model_id"] = base_model_id
        return await jobs.create(session, kind=DOWNLOAD, name=f"DOWNLOAD_{model_id}", spec=spec, subject=model_id)
    running = active.spec["revision"]
    if running != wanted:
        raise Conflict(
            f"{model_id} is being downloaded at revision '{running}' (job {active.id}): wait for it, or interrupt it.",
            param="revision",
            code="download_running",
        )
    if base_model_id not in (None, active.spec.get("base_model_id")):
        raise Conflict(
            f"{model_id} is being downloaded without this base (job {active.id}): ask again when it has ended.",
            param="base_model_id",
            code="download_running",
        )
    return active


async def _check_base(session: AsyncSession, base_model_id: str) -> None:
    check_model_id(base_model_id, param="base_model_id")
    base = await find(session, base_model_id)
    if base is not None and base.adapter:
        raise Unprocessable(
            f"'{base_model_id}' is an adapter itself: name the model that it belongs to.", param="base_model_id"
        )
    if base is None and await jobs.find_active(session, kind=DOWNLOAD, subject=base_model_id) is None:
        known = await known_ids(session, *BASES)
        raise ModelNotFound(
            base_model_id[:200],
            known=known,
            hint="POST /api/v1/models/add/ downloads the base; the adapter can be added as soon as that has begun.",
            param="base_model_id",
        )


async def is_there(session: AsyncSession, model_id: str, revision: str) -> Model | None:
    """Return the model if it is in the store at that branch, tag or commit. A folder import is always looked at."""
    model = await find(session, model_id)
    if model is None or is_local(model_id) or revision not in (model.revision, model.commit):
        return None
    return model


def is_fixed(model: Model, revision: str) -> bool:
    """True if a revision is the very commit that is in the store: a branch or a tag may have moved."""
    return revision == model.commit


def pin(model: Model) -> dict[str, Any]:
    """Return what somebody who uses a model keeps of it, to stay with its commit when the row goes on to another."""
    return {name: getattr(model, name) for name in PINNED}


def at_pin(model: Model, pinned: Mapping[str, Any] | None) -> Model:
    """Return a model as it was when it was pinned: a copy that no session knows, or the row itself."""
    if pinned is None or pinned["path"] == model.path:
        return model
    # Facts are of adapters, which nobody pins, and are not loaded.
    columns = [column.key for column in Model.__table__.columns if column.key != Model.adapter_facts.key]
    said = {name: getattr(model, name) for name in columns}
    return Model(**said | {name: pinned[name] for name in PINNED if name in pinned})


async def add(session: AsyncSession, model_id: str, revision: str, result: Mapping[str, Any]) -> Model:
    """Insert the row of a model whose folder is in place, or replace what the row says. Safe to repeat."""
    model = await find(session, model_id)
    if model is None:
        model = Model(model_id=model_id)
        session.add(model)
    model.adapter = bool(result["adapter"])
    model.base_model_id = result["base_model_id"]
    model.task = str(result["task"])
    model.chat_template = result.get("chat_template")
    model.revision = revision
    model.commit = str(result["commit"])
    model.size_bytes = int(result["size_bytes"])
    model.path = str(result["path"])
    model.adapter_facts = adapter_facts.from_json(result.get("adapter_facts"))
    model.differs_from_base = None
    if is_trained(model_id):
        model.source = Source.TRAINING
    else:
        model.source = Source.IMPORT if is_local(model_id) else Source.HUB
    # Of a training here only: what a download says of itself is no record.
    model.training = result.get("training") if is_trained(model_id) else None
    model.added_at = utcnow()
    await session.flush()
    return model


async def name_base(session: AsyncSession, adapter: Model, base_model_id: str) -> None:
    """Write down which model an adapter belongs to, as somebody says who knows it better than its files do."""
    adapter.base_model_id = base_model_id
    await session.flush()


async def adapter_facts_of(session: AsyncSession, adapters: Sequence[Model]) -> dict[str, AdapterFacts]:
    """Return the facts of adapters by their `path`, without those whose row has none."""
    paths = [one.path for one in adapters]
    rows = await session.execute(select(Model.path, Model.adapter_facts).where(Model.path.in_(paths)))
    return {path: facts for path, facts in rows if facts is not None}


async def keep_adapter_facts(session: AsyncSession, adapter: Model, facts: AdapterFacts) -> None:
    """Write what was read of an adapter's files to its row, unless that has gone on to others. Safe to repeat."""
    of_these_files = (Model.model_id == adapter.model_id, Model.path == adapter.path)
    await session.execute(update(Model).where(*of_these_files).values(adapter_facts=facts))


async def adapters_of(session: AsyncSession, model_id: str) -> Sequence[Model]:
    """Return the adapters in the store that belong to a model."""
    return (await session.scalars(select(Model).where(Model.adapter, Model.base_model_id == model_id))).all()


async def note_differences(session: AsyncSession, adapter: Model, found: Sequence[str]) -> None:
    """Write to an adapter's row what it carries otherwise than its base, unless it has gone on to other files."""
    of_these_files = (Model.model_id == adapter.model_id, Model.path == adapter.path)
    await session.execute(update(Model).where(*of_these_files).values(differs_from_base=list(found)))


async def note_checks(session: AsyncSession, model_id: str, checks: Mapping[str, Any]) -> None:
    """Keep with an adapter that was trained here what was found before it was named to clients. Safe to repeat."""
    model = await find(session, model_id)
    if model is not None and model.training is not None:
        model.training = {**model.training, "checks": dict(checks)}
        await session.flush()


async def sweep(
    session: AsyncSession, models_dir: Path, unpublished: Collection[str] = (), in_use: Collection[str] = ()
) -> list[Path]:
    """Remove folders that no row stands for, such as a commit that was replaced. Call it before any job runs.

    `unpublished` are adapters that are being trained: their folder may be in place before their row. `in_use` are
    paths, as rows have them, that an engine or a training still reads.
    """
    known = {*(await session.scalars(select(Model.path))).all(), *in_use}
    unfinished = select(Job.subject).where(Job.kind == DOWNLOAD, Job.status.in_(ACTIVE), Job.subject.is_not(None))
    busy = [subject for subject in (await session.scalars(unfinished)).all() if subject is not None]
    busy += unpublished
    return await asyncio.to_thread(store.sweep, models_dir, known, busy)


async def delete(session: AsyncSession, model_id: str) -> Model:
    """Delete a model's row and return what it said; its folder goes after the commit (`store.remove`).

    Raises:
        ModelNotFound: it is not in the store.
        ModelInUse: it is deployed (a row of a higher room refers to it), or an adapter has it as its base.
        Conflict: it is being downloaded.
    """
    model = await get(session, model_id)
    adapters = (await session.scalars(select(Model.model_id).where(Model.base_model_id == model_id).limit(5))).all()
    if adapters:
        raise ModelInUse(f"{model_id} is the base of {', '.join(adapters)}: delete that first.", param="model_id")
    active = await jobs.find_active(session, kind=DOWNLOAD, subject=model_id)
    if active is not None:
        raise Conflict(
            f"{model_id} is being downloaded (job {active.id}): wait for it, or interrupt it, then delete.",
            param="model_id",
            code="download_running",
        )
    await session.delete(model)
    try:
        await session.flush()
    except IntegrityError:
        raise ModelInUse(
            f"{model_id} is deployed or in use by a training: POST /api/v1/deploy/interrupt/ or "
            "/api/v1/finetune/interrupt/ first, then delete it.",
            param="model_id",
        ) from None
    return model
