"""Adapters that were trained here are kept in the storage, and come back from there byte for byte."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from modelyard.db import Sessions
from modelyard.errors import ModelLost
from modelyard.finetune.backups import AdapterBackups, adapter_key
from modelyard.foundation import Foundation
from modelyard.models.lost import bring_back, lost_of
from modelyard.models.tables import Model
from modelyard.storage import Storage, StorageAway
from tests.deploy.yard import make_settings, write_adapter


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Yard:
    def __init__(self, sessions: Sessions, models_dir: Path, storage: Storage) -> None:
        self.sessions, self.models_dir, self.storage = sessions, models_dir, storage
        self.backups = AdapterBackups(models_dir, sessions, storage)

    async def add(self, name: str, finetune_id: UUID | None) -> Model:
        """Put an adapter into the store, trained here if it has a training."""
        folder = self.models_dir / f"trained@{name}" / ("a" * 40)
        folder.mkdir(parents=True)
        write_adapter(folder, 8)
        (folder / "README.md").write_text(f"# {name}\n", "utf-8")
        row = Model(
            model_id=f"trained:{name}", adapter=True, base_model_id="org/a", task="generate", revision="trained",
            commit="a" * 40, size_bytes=1, path=f"trained@{name}/{'a' * 40}",
            source="training" if finetune_id is not None else "hub",
            training={"finetune_id": str(finetune_id)} if finetune_id is not None else None,
        )  # fmt: skip
        async with self.sessions.begin() as session:
            session.add(row)
        return row

    def folder(self, row: Model) -> Path:
        return self.models_dir / row.path


@asynccontextmanager
async def yard_of(tmp_path: Path, database_url: str, storage: Storage) -> AsyncIterator[Yard]:
    settings = make_settings(tmp_path / "data", database_url=database_url)
    foundation = Foundation(settings)
    foundation.lay()
    sessions = Sessions(foundation.url)
    try:
        yield Yard(sessions, settings.models_dir, storage)
    finally:
        await sessions.close()
        foundation.close()


async def test_a_lost_adapter_comes_back_byte_for_byte_at_the_start_and_on_demand(
    tmp_path: Path, database_url: str, storage: Storage
) -> None:
    async with yard_of(tmp_path, database_url, storage) as yard:
        row, other = await yard.add("poems", uuid4()), await yard.add("prose", uuid4())
        before = contents(yard.folder(row))
        assert await lost_of(yard.models_dir, [row, other]) == set()
        await yard.backups.store_missing()
        shutil.rmtree(yard.folder(row))
        assert await lost_of(yard.models_dir, [row, other]) == {"trained:poems"}
        await yard.backups.restore_lost()
        assert contents(yard.folder(row)) == before
        shutil.rmtree(yard.models_dir)
        await asyncio.gather(*(bring_back(yard.models_dir, [row, other], yard.backups) for _ in range(3)))
        assert contents(yard.folder(row)) == before
        assert await lost_of(yard.models_dir, [row, other]) == set()


async def test_what_the_storage_does_not_have_is_lost_and_says_what_to_do(
    tmp_path: Path, database_url: str, storage: Storage
) -> None:
    async with yard_of(tmp_path, database_url, storage) as yard:
        row, downloaded = await yard.add("poems", uuid4()), await yard.add("prose", None)
        shutil.rmtree(yard.models_dir)
        await yard.backups.restore_lost()
        with pytest.raises(ModelLost, match="train it again"):
            await bring_back(yard.models_dir, [row], yard.backups)
        with pytest.raises(ModelLost, match="POST /api/v1/models/add/"):
            await bring_back(yard.models_dir, [downloaded], yard.backups)


async def test_one_that_was_changed_in_the_storage_does_not_come_back(
    tmp_path: Path, database_url: str, storage: Storage
) -> None:
    async def other() -> AsyncIterator[bytes]:
        yield b"another adapter"

    async with yard_of(tmp_path, database_url, storage) as yard:
        row = await yard.add("poems", uuid4())
        await yard.backups.store_missing()
        await storage.put(f"{adapter_key(row)}adapter_model.safetensors", other())
        shutil.rmtree(yard.folder(row))
        assert not await yard.backups.restore(row)
        assert not yard.folder(row).exists()


async def test_what_is_kept_goes_with_its_model(tmp_path: Path, database_url: str, storage: Storage) -> None:
    async with yard_of(tmp_path, database_url, storage) as yard:
        row = await yard.add("poems", uuid4())
        await yard.backups.store_missing()
        assert [one.key async for one in storage.list("finetune/")]
        await yard.backups.forget(row)
        await yard.backups.forget(row)
        assert [one.key async for one in storage.list("finetune/")] == []


async def test_a_storage_that_is_away_is_no_word_that_an_adapter_is_lost_for_good(
    tmp_path: Path, database_url: str
) -> None:
    from modelyard.storage import S3Storage

    away = S3Storage("bucket", "", "http://127.0.0.1:9", {"aws_access_key_id": "a", "aws_secret_access_key": "b"}, 1.0)
    async with yard_of(tmp_path, database_url, away) as yard:
        row = await yard.add("poems", uuid4())
        await yard.backups.store_missing()
        shutil.rmtree(yard.folder(row))
        await yard.backups.restore_lost()
        with pytest.raises(StorageAway):
            await bring_back(yard.models_dir, [row], yard.backups)
    await away.close()
