"""Adapters that were trained here, kept in the storage for as long as their model is in the store.

    finetune/<id>/adapter/...    the adapter's files as published, their manifest last (`checkpoints`)

They are stored when they are published, or at the next start if that failed then (`store_missing`). One that is lost
from the data folder comes back at a start (`restore_lost`), and when it is deployed or exported (`restore`).
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from uuid import UUID

from modelyard.db import Sessions
from modelyard.errors import ModelyardError, ObjectNotFound
from modelyard.finetune import checkpoints
from modelyard.finetune.checkpoints import DamagedCheckpoint
from modelyard.models import actions as models
from modelyard.models import store
from modelyard.models.kinds import Source
from modelyard.models.lost import is_lost
from modelyard.models.tables import Model
from modelyard.storage import Storage

log = logging.getLogger(__name__)


class AdapterBackups:
    """Stores, brings back and removes the files of adapters that were trained here."""

    def __init__(self, models_dir: Path, sessions: Sessions, storage: Storage) -> None:
        self._models_dir = models_dir
        self._sessions = sessions
        self._storage = storage
        #: One at a time: two that bring the same folder back would remove each other's.
        self._lock = asyncio.Lock()

    async def restore(self, model: Model) -> bool:
        """Bring a lost adapter back, byte for byte; return whether its files are there now.

        Raises:
            StorageUnavailable: it may be there, and cannot be asked.
        """
        key = adapter_key(model)
        if key is None:
            return False
        folder = store.folder_of(self._models_dir, model.path)
        async with self._lock:
            if not await asyncio.to_thread(is_lost, self._models_dir, model):
                return True
            try:
                await checkpoints.fetch(self._storage, key, folder)
            except ObjectNotFound:
                return False
            except DamagedCheckpoint as error:
                log.error("what is stored of %s is not what was trained: %s", model.model_id, error)
                return False
        log.warning("%s was lost from the data folder, and has come back from the storage", model.model_id)
        return True

    async def forget(self, model: Model) -> None:
        """Remove what is stored of an adapter that was deleted; what fails is left, and said. Safe to repeat."""
        key = adapter_key(model)
        if key is None:
            return
        try:
            await checkpoints.remove_below(self._storage, key)
        except ModelyardError as error:
            log.warning("the files of %s are left in the storage below %s: %s", model.model_id, key, error.message)

    async def restore_lost(self) -> None:
        """Bring back every adapter that is lost, if it can be. For the start of a server; errors are logged."""
        for row in await self._trained():
            try:
                if await asyncio.to_thread(is_lost, self._models_dir, row) and not await self.restore(row):
                    log.error("%s is lost: it is neither in the data folder nor in the storage", row.model_id)
            except ModelyardError as error:
                log.warning("%s is lost, and cannot be brought back now: %s", row.model_id, error.message)

    async def store_missing(self) -> None:
        """Store every adapter that could not be stored when it was published. Safe to repeat; errors are logged."""
        for row in await self._trained():
            key = adapter_key(row)
            try:
                if key is not None and not await self._is_stored(key):
                    await checkpoints.save(self._storage, key, store.folder_of(self._models_dir, row.path))
            except FileNotFoundError:
                continue  # it is lost, too, or was deleted meanwhile
            except ModelyardError as error:
                log.warning("the adapter %s is on this machine's disk only: %s", row.model_id, error.message)

    async def _trained(self) -> list[Model]:
        async with self._sessions.read() as session:
            return [one for one in await models.all_models(session) if one.source == Source.TRAINING]

    async def _is_stored(self, key: str) -> bool:
        try:
            await self._storage.size(key + checkpoints.MANIFEST)
        except ObjectNotFound:
            return False
        return True


def adapter_key(model: Model) -> str | None:
    """Return what the keys of an adapter's files begin with; None if it was not trained here."""
    if model.source != Source.TRAINING or not model.training:
        return None
    return f"{checkpoints.prefix(UUID(model.training['finetune_id']))}adapter/"
