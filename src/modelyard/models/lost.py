"""Lost models: their row is in the database, and their folder is not in the data folder any more.

A disk may have been replaced, a folder deleted by hand, a database restored without its data folder. Such a model is
said to be lost wherever it is named. What can be had back without a person (an adapter that was trained here, from the
storage) is brought back by `Backups` when it is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from modelyard.errors import ModelLost
from modelyard.models import mistral_format, store
from modelyard.models.kinds import Source
from modelyard.models.tables import Model

#: Every model in the store has one of them.
CONFIGS = ("config.json", "adapter_config.json", mistral_format.PARAMS)


class Backups(Protocol):
    """A place that lost models may come back from."""

    async def restore(self, model: Model) -> bool:
        """Bring a lost model's folder back as it was, and return whether that could be done. Safe to repeat."""
        ...

    async def forget(self, model: Model) -> None:
        """Remove what is kept of a model that was deleted. Safe to repeat."""
        ...


def is_lost(models_dir: Path, model: Model) -> bool:
    """True if a model's folder is gone, or emptied. Blocks on the disk."""
    folder = store.folder_of(models_dir, model.path)
    return not any((folder / name).is_file() for name in CONFIGS)


async def lost_of(models_dir: Path, models: Iterable[Model]) -> set[str]:
    """Return the ids of those that are lost."""
    rows = list(models)
    return await asyncio.to_thread(lambda: {one.model_id for one in rows if is_lost(models_dir, one)})


async def bring_back(models_dir: Path, models: Sequence[Model], backups: Backups | None) -> None:
    """See to it that each model's files are there, from where they are kept if need be.

    Raises:
        ModelLost: one is lost for good; the message says what to do.
        StorageUnavailable: one may be kept in the storage, which cannot be asked.
    """
    lost = await lost_of(models_dir, models)
    for model in models:
        if model.model_id in lost and not (backups is not None and await backups.restore(model)):
            raise ModelLost(model.model_id, what_to_do(model))


def what_to_do(model: Model) -> str:
    """Return how a lost model is had back."""
    if model.source == Source.TRAINING:
        return "It was trained here, and the storage does not have it either: delete it, and train it again."
    if model.source == Source.IMPORT:
        return f"POST /api/v1/models/add/?model_id={model.model_id} imports it again."
    return f"POST /api/v1/models/add/?model_id={model.model_id}&revision={model.commit} downloads it again."
