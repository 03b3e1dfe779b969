"""Exports from the store: an adapter or a model as a zip, or an adapter inside its base.

An adapter leaves with the name of its base where PEFT looks for it, whatever its file said. To merge, a trainer child
writes the whole model into a folder of its own (`errands`); whoever opened the `merged` block has it until the end of
the block. Everything is checked before the first byte is sent: afterwards nothing can be said any more.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.capacity.ledger import Allocation, Ledger, on_main_memory
from modelyard.capacity.tables import Kind
from modelyard.errors import Conflict, JobFailure, ModelNotFound, Unprocessable
from modelyard.export.archive import Entry, files_below, length
from modelyard.finetune.errands import Errands, Work, refusal
from modelyard.hardware import GIB, Machine
from modelyard.models import actions as models
from modelyard.models import store
from modelyard.models.store import bytes_below
from modelyard.models.tables import Model
from modelyard.paths import inside
from modelyard.settings import Settings
from modelyard.trainer.spec import Hyperparameters, Mode, Spec

CONFIG = "adapter_config.json"
#: Another number where the same files become another archive.
FORMAT = 1
#: Memory that a merge takes: the base, what is copied of it at a time, and the libraries.
MEMORY_FACTOR, MEMORY_MARGIN = 1.15, GIB
#: A merge has no use for any of them.
NO_HYPERPARAMETERS = Hyperparameters(
    epochs=None, max_steps=None, learning_rate=0.0, lr_schedule="constant", warmup_steps=None, batch_size=None,
    gradient_accumulation=1, rank=1, alpha=1.0, dropout=0.0, target_modules=None, max_seq_len=None, seed=0,
    packing=False, quantization=None, validation_split=None, early_stopping=None, checkpoint_steps=None,
)  # fmt: skip


@dataclass(frozen=True)
class Archive:
    """A zip that can be sent: its files, and its length in bytes."""

    entries: list[Entry]
    length: int


async def base_of(session: AsyncSession, adapter: Model) -> Model:
    """Return the base that an adapter is to be merged into.

    Raises:
        Unprocessable: it is no adapter.
        Conflict: its base is not in the store, or at another commit than it was trained on.
    """
    if not adapter.adapter:
        raise Unprocessable(
            f"{adapter.model_id} is a model, not an adapter: there is nothing to merge. Without `merged` it is "
            "exported as it is.",
            param="merged",
            code="not_an_adapter",
        )
    base = await models.find(session, adapter.base_model_id) if adapter.base_model_id else None
    if base is None:
        named = adapter.base_model_id or "it is not named"
        raise Conflict(
            f"The base of {adapter.model_id} is not in the store ({named}). POST /api/v1/models/add/ downloads it; "
            "without `merged` the adapter is exported alone.",
            param="merged",
            code="base_missing",
        )
    trained_on = (adapter.training or {}).get("base_commit", base.commit)
    if trained_on != base.commit:
        raise Conflict(
            f"{adapter.model_id} was trained on commit {trained_on} of {base.model_id}, and the store has "
            f"{base.commit}. POST /api/v1/models/add/?model_id={base.model_id}&revision={trained_on} brings that one "
            "back; without `merged` the adapter is exported alone.",
            param="merged",
            code="base_moved",
        )
    return base


def file_name(model_id: str, *, is_merged: bool) -> str:
    """Return the name under which the archive is saved."""
    return model_id.replace(":", "-").replace("/", "-") + ("-merged" if is_merged else "") + ".zip"


def etag(model: Model, base: Model | None = None) -> str:
    """Return the tag of the archive, merged where there is a base.

    A folder of the store never changes, and the same files are the same archive. Sums may be rounded differently on
    another machine: that tag is a weak one.
    """
    parts = [FORMAT, model.model_id, model.path, model.base_model_id, *([base.model_id, base.path] if base else [])]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
    return f'W/"{digest}"' if base is not None else f'"{digest}"'


async def archive(model: Model, folder: Path) -> Archive:
    """Return the archive of a model's or an adapter's folder.

    Raises:
        ModelNotFound: the folder has gone, with its model.
    """
    entries = await asyncio.to_thread(files_below, folder)
    if not entries:
        raise ModelNotFound(model.model_id, hint="It has just been deleted.")
    if model.adapter and model.base_model_id is not None:
        entries = [
            await asyncio.to_thread(_with_base, one, model.base_model_id) if one.name == CONFIG else one
            for one in entries
        ]
    return Archive(entries, length(entries))


def _with_base(entry: Entry, base_model_id: str) -> Entry:
    """Return an adapter's configuration with its base's name in it; the file as it is where it says so already."""
    assert isinstance(entry.content, Path)
    config = json.loads(entry.content.read_text("utf-8"))
    if config.get("base_model_name_or_path") == base_model_id:
        return entry
    content = (json.dumps(config | {"base_model_name_or_path": base_model_id}, indent=2) + "\n").encode()
    return Entry(entry.name, len(content), content)


@asynccontextmanager
async def merged(errands: Errands, settings: Settings, adapter: Model, base: Model) -> AsyncIterator[Archive]:
    """Merge an adapter into its base, and give the archive of the result for the block.

    Raises:
        ModelyardError: there is no memory or no room on the disk for it, or the child failed, with the cause.
    """
    base_dir = store.folder_of(settings.models_dir, base.path)
    size_bytes = await asyncio.to_thread(bytes_below, base_dir)
    await asyncio.to_thread(_check_disk, size_bytes, settings)
    async with errands.folder() as folder:

        @asynccontextmanager
        async def turn() -> AsyncIterator[Work]:
            holder = f"the merge of {adapter.model_id}"
            async with errands.memory.held(Kind.MERGE, holder, lambda *now: _room(size_bytes, *now)):
                yield Work(spec)

        spec = Spec(
            mode=Mode.MERGE,
            name=adapter.model_id,
            model_id=base.model_id,
            model_dir=str(base_dir),
            adapter_id=adapter.model_id,
            data="",
            max_line_bytes=0,
            hyperparameters=NO_HYPERPARAMETERS,
            work_dir=str(folder / "work"),
            progress=str(folder / "progress.jsonl"),
            result=str(folder / "result.json"),
            disk_reserve_bytes=int(settings.disk_reserve_gib * GIB),
            adapter_dir=str(store.folder_of(settings.models_dir, adapter.path)),
            merged_dir=str(folder / "merged"),
        )
        result = await errands.run(folder, turn)
        model_dir = await asyncio.to_thread(inside, folder, Path(result["model_dir"]))
        entries = await asyncio.to_thread(files_below, model_dir)
        yield Archive(entries, length(entries))


def _room(size_bytes: int, machine: Machine, ledger: Ledger) -> Allocation:
    """Return the memory that a merge takes of the machine's own, or refuse a merge that would not end well."""
    needed = int(size_bytes * MEMORY_FACTOR) + MEMORY_MARGIN
    available = ledger.left(machine).memory_available_bytes
    if available < needed:
        raise refusal(
            JobFailure(
                "out_of_memory",
                f"Merging takes about {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are free.",
                "Take a deployment out of service or wait for the training that runs, and try again.",
            )
        )
    return on_main_memory(needed)


def _check_disk(size_bytes: int, settings: Settings) -> None:
    """Refuse a merge for which there is no room on the disk before it has begun."""
    reserve = int(settings.disk_reserve_gib * GIB)
    free = shutil.disk_usage(settings.jobs_dir).free
    if free - reserve < size_bytes:
        raise refusal(
            JobFailure(
                "disk_full",
                f"The merged model takes {size_bytes / GIB:.1f} GiB of disk, and {max(0, free - reserve) / GIB:.1f} "
                f"GiB are free beside the reserve of {reserve / GIB:g} GiB (MODELYARD_DISK_RESERVE_GIB).",
                "Free some space on the disk of the data folder, and try again.",
            )
        )
