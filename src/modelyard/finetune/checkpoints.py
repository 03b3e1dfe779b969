"""A training's checkpoints and its adapter in the storage, so that another machine can go on.

    finetune/<id>/checkpoints/step-<n>/<file>           a checkpoint's files
    finetune/<id>/checkpoints/step-<n>/complete.json    written last: names, sizes, hashes
    finetune/<id>/adapter/...                           the adapter, likewise

`Keeper` copies beside the training, one checkpoint at a time and the newest first, and never makes it wait. Without a
manifest nothing is taken for a checkpoint, and what is fetched is compared with it before it is moved into place.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import UUID

from modelyard import tasks
from modelyard.errors import ModelyardError, UnsafePath
from modelyard.evidence import in_words
from modelyard.paths import below, remove_tree
from modelyard.storage import Storage, delete_prefix

log = logging.getLogger(__name__)

MANIFEST = "complete.json"
BLOCK = 1024 * 1024
MAX_MANIFEST_BYTES = 1024 * 1024
_STEP = re.compile(r"step-(\d{1,12})")


class DamagedCheckpoint(Exception):
    """The stored files differ from their manifest."""


def prefix(finetune_id: UUID) -> str:
    """Return what the keys of all objects of a training begin with."""
    return f"finetune/{finetune_id}/"


def folder_of(finetunes_dir: Path, finetune_id: UUID) -> Path:
    """Return a training's folder on this machine."""
    return finetunes_dir / str(finetune_id)


def newest_here(work: Path) -> tuple[int, Path] | None:
    """Return step and folder of the newest checkpoint on this machine's disk. Blocks.

    A folder of that name is whole: the trainer moves it into place.
    """
    folder = work / "checkpoints"
    found = [(int(match[1]), path) for path in _listed(folder) if (match := _STEP.fullmatch(path.name))]
    return max(found, default=None)


def _listed(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


async def steps(storage: Storage, finetune_id: UUID) -> list[int]:
    """Return the steps of the whole checkpoints in the storage, oldest first."""
    below = f"{prefix(finetune_id)}checkpoints/"
    found = []
    async with aclosing(storage.list(below)) as objects:
        async for one in objects:
            name, _, rest = one.key.removeprefix(below).partition("/")
            if rest == MANIFEST and (match := _STEP.fullmatch(name)):
                found.append(int(match[1]))
    return sorted(found)


async def save(storage: Storage, key: str, folder: Path) -> dict[str, Any]:
    """Copy a folder's files below `key`, which ends in a slash, the manifest last; return the manifest.

    Raises:
        FileNotFoundError: the folder was removed meanwhile; nothing that is whole was written.
        ModelyardError: the storage.
    """
    names = await asyncio.to_thread(_files, folder)
    files = []
    for name in names:
        stored = await storage.put(key + name, _content(folder / name))
        files.append({"name": name, "size_bytes": stored.size_bytes, "sha256": stored.sha256})
    manifest = {"files": files}
    await storage.put(key + MANIFEST, _once(json.dumps(manifest).encode()))
    return manifest


async def fetch(storage: Storage, key: str, folder: Path) -> None:
    """Bring what `save` stored into `folder`, which is whole or not there afterwards.

    Raises:
        DamagedCheckpoint: it is not what its manifest says.
        ModelyardError: the storage; `ObjectNotFound` without a manifest.
    """
    async with aclosing(storage.get(key + MANIFEST, length=MAX_MANIFEST_BYTES)) as blocks:
        content = b"".join([block async for block in blocks])
    beside = folder.with_name(f".fetching-{folder.name}")
    await asyncio.to_thread(shutil.rmtree, beside, ignore_errors=True)
    try:
        for entry in _entries(content):
            await fetch_file(storage, key + entry["name"], beside / entry["name"], entry["sha256"])
        await asyncio.to_thread(_move_into_place, beside, folder)
    finally:
        await asyncio.to_thread(shutil.rmtree, beside, ignore_errors=True)


async def fetch_file(storage: Storage, key: str, path: Path, sha256: str) -> None:
    """Bring an object into a file, which is moved into place when it is whole and has this hash.

    Raises:
        DamagedCheckpoint: it has not.
        ModelyardError: the storage.
    """
    await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True, mode=0o700)
    beside = path.with_name(f".{path.name}.part")
    digest = hashlib.sha256()
    file = await asyncio.to_thread(beside.open, "wb")
    try:
        async with aclosing(storage.get(key)) as blocks:
            async for block in blocks:
                await asyncio.to_thread(_append, file, block, digest)
    finally:
        await asyncio.to_thread(file.close)
    if digest.hexdigest() != sha256:
        await asyncio.to_thread(beside.unlink)
        raise DamagedCheckpoint(f"{key} has been changed since it was stored")
    await asyncio.to_thread(os.replace, beside, path)


async def remove_all(storage: Storage, finetune_id: UUID) -> None:
    """Remove all objects of a training. Safe to repeat."""
    await remove_below(storage, prefix(finetune_id))


async def remove_checkpoints(storage: Storage, finetune_id: UUID, *, older_than: int | None = None) -> None:
    """Remove the checkpoints of a training, all of them or those of an earlier step. Safe to repeat."""
    below = f"{prefix(finetune_id)}checkpoints/"
    if older_than is None:
        await remove_below(storage, below)
        return
    async with aclosing(storage.list(below)) as objects:
        names = {one.key.removeprefix(below).partition("/")[0] async for one in objects}
    for name in names:
        if (match := _STEP.fullmatch(name)) and int(match[1]) < older_than:
            await remove_below(storage, f"{below}{name}/")


async def remove_below(storage: Storage, below: str) -> None:
    """Remove what `save` has stored below a key, its manifest first. Safe to repeat."""
    async with aclosing(storage.list(below)) as objects:
        manifests = [one.key async for one in objects if one.key.endswith(f"/{MANIFEST}")]
    # First, so that what a crash leaves is not taken for whole.
    for key in manifests:
        await storage.delete(key)
    await delete_prefix(storage, below)


class Keeper:
    """Copies the checkpoints of one training to the storage while it goes on.

    `stored` is the step of the newest that is there already. `saved` is called with the step of each that is whole
    there; `failed` with the storage's error, after which the next checkpoint is tried.
    """

    def __init__(
        self,
        storage: Storage,
        finetune_id: UUID,
        stored: int = -1,
        *,
        saved: Callable[[int], Awaitable[None]],
        failed: Callable[[int, ModelyardError], Awaitable[None]],
    ) -> None:
        self._storage = storage
        self._finetune_id = finetune_id
        self._saved = saved
        self._failed = failed
        self._wanted: tuple[int, Path] | None = None
        self._last = stored
        self._task: asyncio.Task[None] | None = None

    def offer(self, step: int, folder: Path) -> None:
        """Have a checkpoint copied as soon as the one before it is; one that is overtaken by a newer one is not."""
        if step > max(self._last, self._wanted[0] if self._wanted is not None else -1):
            self._wanted = (step, folder)
        if self._wanted is not None and (self._task is None or self._task.done()):
            self._task = tasks.spawn(f"checkpoints of training {self._finetune_id}", self._work())

    async def finish(self) -> None:
        """Wait until what was offered is copied, or could not be."""
        while self._task is not None and not self._task.done():
            await asyncio.shield(asyncio.wait({self._task}))

    async def close(self) -> None:
        """Stop copying; what is half there has no manifest."""
        if self._task is not None:
            await tasks.end(self._task)

    async def _work(self) -> None:
        while self._wanted is not None:
            step, folder = self._wanted
            self._wanted = None
            try:
                await save(self._storage, f"{prefix(self._finetune_id)}checkpoints/step-{step}/", folder)
                self._last = step
                await self._saved(step)
                await remove_checkpoints(self._storage, self._finetune_id, older_than=step)
            except FileNotFoundError:
                # The trainer keeps the newest ones only: one that is on its way will be offered.
                log.info("checkpoint %s of training %s went before it was copied", step, self._finetune_id)
            except ModelyardError as error:
                await self._failed(step, error)


def _files(folder: Path) -> list[str]:
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if not found:
        raise FileNotFoundError(folder)
    return found


async def _content(path: Path) -> AsyncGenerator[bytes]:
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while block := await asyncio.to_thread(file.read, BLOCK):
            yield block
    finally:
        await asyncio.to_thread(file.close)


async def _once(data: bytes) -> AsyncGenerator[bytes]:
    yield data


def _append(file: Any, block: bytes, digest: Any) -> None:
    file.write(block)
    digest.update(block)


def _entries(content: bytes) -> list[dict[str, str]]:
    try:
        entries = json.loads(content)["files"]
        found = [{"name": str(entry["name"]), "sha256": str(entry["sha256"])} for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"a manifest cannot be read: {in_words(error)}") from None
    for entry in found:
        # Nobody but this server should have written it, but a name must not lead elsewhere all the same.
        try:
            below(Path(), entry["name"])
        except UnsafePath:
            raise DamagedCheckpoint(f"a manifest names {entry['name']!r}") from None
    return found


def _move_into_place(beside: Path, folder: Path) -> None:
    remove_tree(folder.parent, folder)
    os.rename(beside, folder)
