"""Checkpoints in the storage, on a folder and on S3: whole or not taken for one, and never in the training's way."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from modelyard.errors import ModelyardError, ObjectNotFound, StorageUnavailable
from modelyard.finetune import checkpoints
from modelyard.finetune.checkpoints import MANIFEST, DamagedCheckpoint, Keeper
from modelyard.storage import FolderStorage, Storage
from modelyard.storage.protocol import StoredObject
from tests.eventually import eventually


def make(work: Path, step: int, content: bytes = b"weights") -> Path:
    """Make a checkpoint as a trainer would."""
    folder = work / "checkpoints" / f"step-{step}"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(content * 50_000)
    (folder / "manifest.json").write_text("{}")
    (folder / "deep" / "state.json").write_text(str(step))
    (folder / "empty").touch()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def key(finetune_id: UUID, step: int) -> str:
    return f"{checkpoints.prefix(finetune_id)}checkpoints/step-{step}/"


async def keys(storage: Storage) -> list[str]:
    async with aclosing(storage.list()) as objects:
        return [one.key async for one in objects]


class Kept:
    """What a keeper told."""

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.failed: list[tuple[int, str]] = []

    async def on_saved(self, step: int) -> None:
        self.saved.append(step)

    async def on_failed(self, step: int, error: ModelyardError) -> None:
        self.failed.append((step, error.code))

    def keeper(self, storage: Storage, finetune_id: UUID) -> Keeper:
        return Keeper(storage, finetune_id, saved=self.on_saved, failed=self.on_failed)


async def test_what_is_stored_comes_back_byte_for_byte_on_another_machine(storage: Storage, tmp_path: Path) -> None:
    finetune_id = uuid.uuid4()
    folder = make(tmp_path / "here", 5)
    await checkpoints.save(storage, key(finetune_id, 5), folder)
    assert await checkpoints.steps(storage, finetune_id) == [5]
    there = tmp_path / "there" / "checkpoints" / "step-5"
    await checkpoints.fetch(storage, key(finetune_id, 5), there)
    assert files(there) == files(folder)
    assert checkpoints.newest_here(tmp_path / "there") == (5, there)
    assert [path.name for path in there.parent.iterdir()] == ["step-5"]


async def test_without_its_last_object_nothing_is_taken_for_a_checkpoint(storage: Storage, tmp_path: Path) -> None:
    finetune_id = uuid.uuid4()
    await checkpoints.save(storage, key(finetune_id, 5), make(tmp_path, 5))
    await checkpoints.save(storage, key(finetune_id, 10), make(tmp_path, 10))
    await storage.delete(f"{key(finetune_id, 10)}{MANIFEST}")
    assert await checkpoints.steps(storage, finetune_id) == [5]
    with pytest.raises(ObjectNotFound):
        await checkpoints.fetch(storage, key(finetune_id, 10), tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", MANIFEST])
async def test_what_was_changed_in_the_storage_is_refused_and_leaves_nothing(
    storage: Storage, tmp_path: Path, name: str
) -> None:
    finetune_id = uuid.uuid4()
    await checkpoints.save(storage, key(finetune_id, 5), make(tmp_path, 5))
    await storage.put(f"{key(finetune_id, 5)}{name}", once(b"something else"))
    with pytest.raises(DamagedCheckpoint):
        await checkpoints.fetch(storage, key(finetune_id, 5), tmp_path / "fetched" / "step-5")
    assert not list((tmp_path / "fetched").glob("*"))


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
async def test_a_manifest_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    storage = FolderStorage(tmp_path / "objects", tmp_path / "key")
    manifest = f'{{"files": [{{"name": "{name}", "sha256": "0"}}]}}'
    await storage.put(f"x/{MANIFEST}", once(manifest.encode()))
    with pytest.raises(DamagedCheckpoint):
        await checkpoints.fetch(storage, "x/", tmp_path / "fetched")
    await storage.close()


async def test_a_keeper_copies_the_newest_and_removes_the_older_ones_after(storage: Storage, tmp_path: Path) -> None:
    finetune_id, kept = uuid.uuid4(), Kept()
    keeper = kept.keeper(storage, finetune_id)
    for step in (5, 10, 15):
        keeper.offer(step, make(tmp_path, step))
    keeper.offer(10, tmp_path / "checkpoints" / "step-10")
    await keeper.finish()
    # The ones that were overtaken before their turn came are passed over.
    assert kept.saved[-1] == 15
    assert 10 not in kept.saved
    assert await checkpoints.steps(storage, finetune_id) == [15]
    left = await keys(storage)
    assert left
    assert not [one for one in left if "/step-15/" not in one]
    keeper.offer(15, tmp_path / "checkpoints" / "step-15")
    await keeper.finish()
    assert kept.saved.count(15) == 1


async def test_a_checkpoint_that_goes_while_it_is_copied_is_passed_over(storage: Storage, tmp_path: Path) -> None:
    finetune_id, kept = uuid.uuid4(), Kept()
    keeper = kept.keeper(storage, finetune_id)
    keeper.offer(5, tmp_path / "gone")
    await keeper.finish()
    keeper.offer(10, make(tmp_path, 10))
    await keeper.finish()
    assert (kept.saved, kept.failed) == ([10], [])


class Away(FolderStorage):
    """A folder that cannot be written for a while."""

    is_away = True

    async def put(self, key: str, chunks: AsyncIterable[bytes], *, max_bytes: int | None = None) -> StoredObject:
        if self.is_away:
            raise StorageUnavailable("It is away.")
        return await super().put(key, chunks, max_bytes=max_bytes)


async def test_a_storage_that_is_away_is_told_and_the_next_checkpoint_is_tried(tmp_path: Path) -> None:
    storage, kept, finetune_id = Away(tmp_path / "objects", tmp_path / "key"), Kept(), uuid.uuid4()
    keeper = kept.keeper(storage, finetune_id)
    keeper.offer(5, make(tmp_path, 5))
    await keeper.finish()
    storage.is_away = False
    keeper.offer(10, make(tmp_path, 10))
    await keeper.finish()
    assert (kept.saved, kept.failed) == ([10], [(5, "storage_unavailable")])
    await storage.close()


class Slow(FolderStorage):
    """A folder whose objects are not written before they are let through."""

    let_through: asyncio.Event

    async def put(self, key: str, chunks: AsyncIterable[bytes], *, max_bytes: int | None = None) -> StoredObject:
        await self.let_through.wait()
        return await super().put(key, chunks, max_bytes=max_bytes)


async def test_a_keeper_that_is_closed_leaves_nothing_that_is_taken_for_a_checkpoint(tmp_path: Path) -> None:
    storage, kept, finetune_id = Slow(tmp_path / "objects", tmp_path / "key"), Kept(), uuid.uuid4()
    storage.let_through = asyncio.Event()
    keeper = kept.keeper(storage, finetune_id)
    keeper.offer(5, make(tmp_path, 5))
    await eventually(lambda: keeper._task is not None and not keeper._task.done(), "it copies")
    await keeper.close()
    storage.let_through.set()
    assert kept.saved == []
    assert await checkpoints.steps(storage, finetune_id) == []
    await storage.close()


async def test_all_objects_of_a_training_go_and_no_others(storage: Storage, tmp_path: Path) -> None:
    one, other = uuid.uuid4(), uuid.uuid4()
    for finetune_id in (one, other):
        for step in (5, 10):
            await checkpoints.save(storage, key(finetune_id, step), tmp_path_of(tmp_path, finetune_id, step))
        await checkpoints.save(storage, f"{checkpoints.prefix(finetune_id)}adapter/", tmp_path_of(tmp_path, one, 5))
    await checkpoints.remove_checkpoints(storage, one, older_than=10)
    assert await checkpoints.steps(storage, one) == [10]
    await checkpoints.remove_checkpoints(storage, one)
    assert {name.split("/")[2] for name in await keys(storage) if str(one) in name} == {"adapter"}
    await checkpoints.remove_all(storage, one)
    await checkpoints.remove_all(storage, one)
    assert not [name for name in await keys(storage) if str(one) in name]
    assert await checkpoints.steps(storage, other) == [5, 10]


def tmp_path_of(tmp_path: Path, finetune_id: UUID, step: int) -> Path:
    work = tmp_path / str(finetune_id)
    folder = work / "checkpoints" / f"step-{step}"
    return folder if folder.exists() else make(work, step)


async def once(data: bytes) -> AsyncGenerator[bytes]:
    yield data


def test_what_is_half_written_on_this_machine_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest_here(tmp_path) is None
    make(tmp_path, 9)
    make(tmp_path, 10)
    for name in (".step-11", "step-12.partial", "step-x", ".fetching-step-13"):
        (tmp_path / "checkpoints" / name).mkdir()
    found: Any = checkpoints.newest_here(tmp_path)
    assert found[0] == 10
