"""A database with rows of the rooms that a training needs, without a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from modelyard.datasets.tables import Dataset
from modelyard.db import Base, Sessions, database_url
from modelyard.finetune import actions
from modelyard.finetune.schemas import FinetuneIn
from modelyard.finetune.tables import Finetune
from modelyard.jobs.tables import Job, JobStatus
from modelyard.models.kinds import Source, Task
from modelyard.models.tables import Model

MODEL = "acme/tiny"


@asynccontextmanager
async def database(url: str, tmp_path: Path) -> AsyncIterator[Sessions]:
    """Open a database with all tables, one model and no dataset."""
    import modelyard.app  # noqa: F401  (every room declares its tables)

    sessions = Sessions(database_url(url, tmp_path))
    try:
        async with sessions.begin() as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
            session.add(model())
        yield sessions
    finally:
        await sessions.close()


def model(model_id: str = MODEL, **values: Any) -> Model:
    """Return the row of a model."""
    given = {
        "model_id": model_id, "adapter": False, "base_model_id": None, "task": Task.GENERATE, "revision": "main",
        "commit": "c0ffee", "size_bytes": 1000, "path": f"{model_id.replace('/', '--')}/c0ffee", "source": Source.HUB,
    }  # fmt: skip
    return Model(**given | values)


async def add_dataset(sessions: Sessions, rows: int = 50) -> Dataset:
    """Insert the row of a dataset."""
    dataset = Dataset(
        name="train.jsonl", size_bytes=1000, sha256="0" * 64, format="messages", rows=rows, skipped_lines=0
    )
    async with sessions.begin() as session:
        session.add(dataset)
    return dataset


async def start(sessions: Sessions, dataset: Dataset, name: str = "A training", **fields: Any) -> Finetune:
    """Start a training and return its row."""
    wanted = FinetuneIn.model_validate({"name": name, "model_id": MODEL, "dataset_id": dataset.id} | fields)
    async with sessions.begin() as session:
        job = await actions.start(session, wanted)
        (row,) = [row for row, its in await actions.newest(session, limit=1) if its.id == job.id]
    return row


async def end(sessions: Sessions, row: Finetune, status: JobStatus = JobStatus.KILLED) -> None:
    """End a training's job as the runner does."""
    async with sessions.begin() as session:
        job = await session.get_one(Job, (await _job(sessions, row)).number)
        job.status = status
        await actions.ended(session, row.job_id)


async def _job(sessions: Sessions, row: Finetune) -> Job:
    from modelyard.jobs import actions as jobs

    async with sessions.read() as session:
        return await jobs.get(session, row.job_id)
