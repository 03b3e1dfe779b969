"""The plan of a training, before it is asked for: rows, steps, minutes, memory, and whether there is room.

Asked with the same body as the training. A trainer child prepares every row; where no training of this model and
these settings tells what its steps take, and nobody holds the memory, it measures a few of them. Nothing is kept and
nobody has to leave: while the accelerator is taken, the plan says by whom, and estimates memory by arithmetic alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.capacity.ledger import Allocation, Ledger, on_main_memory
from modelyard.capacity.tables import Kind
from modelyard.datasets import reading
from modelyard.db import Sessions
from modelyard.deploy import succession
from modelyard.engine import adapter_support
from modelyard.engine.model_files import model_files
from modelyard.errors import JobFailure, StorageUnavailable
from modelyard.finetune import accelerator, actions, checkpoints
from modelyard.finetune.errands import Errands, Work, refusal
from modelyard.finetune.needs import estimate as need_of
from modelyard.finetune.schemas import FinetuneIn
from modelyard.finetune.tables import Finetune
from modelyard.finetune.trainings import TEMPLATE_TOKENS
from modelyard.hardware import GIB, Machine, this_machine
from modelyard.models import store
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.paths import below
from modelyard.settings import Settings
from modelyard.storage import Storage
from modelyard.trainer.spec import Hyperparameters, Mode, Spec

MIB = 1024**2
#: Trainings of a model that are looked at for one of the same settings.
LOOKED_AT = 50
#: Settings on which speed and memory of a training depend, beside its rows.
TELLING = (
    "rank", "target_modules", "dropout", "batch_size", "gradient_accumulation", "quantization", "packing", "retention",
)  # fmt: skip


async def plan(
    sessions: Sessions,
    settings: Settings,
    storage: Storage,
    errands: Errands,
    tokenizers: TokenizerChildren,
    wanted: FinetuneIn,
) -> dict[str, Any]:
    """Return what the training of a request would take (`plan_schemas.FinetunePlanOut`). Cancelling ends its child.

    Raises:
        ModelNotFound, DatasetNotFound: there is no such thing.
        ModelyardError: what the training would be refused for, by the server or by the trainer.
    """
    hyperparameters = wanted.hyperparameters.filled()
    async with sessions.read() as session:
        model, dataset = await actions.check(session, wanted)
        past = await history(session, model.model_id, hyperparameters)
    report = (await reading.about(storage, dataset)).report
    longest = int(report["characters"]["longest"]) + TEMPLATE_TOKENS

    def needed(longest_tokens: int) -> Any:
        files = model_files(settings, model)
        has_gpu = this_machine().has_gpu
        return need_of(
            files.config, files.size_bytes, hyperparameters, has_gpu=has_gpu, longest_tokens=longest_tokens,
            characters=dataset.size_bytes,
        )  # fmt: skip

    try:
        need = await asyncio.to_thread(needed, longest)
        fault = adapter_support.fault((await asyncio.to_thread(model_files, settings, model)).config)
        await tokenizers.tried(model.model_id, below(settings.models_dir, model.path))
    except JobFailure as failure:
        raise refusal(failure) from failure
    async with errands.folder() as folder:
        data = folder / "data.jsonl"
        try:
            await checkpoints.fetch_file(storage, dataset.data_key, data, dataset.sha256)
        except checkpoints.DamagedCheckpoint:
            raise StorageUnavailable(
                f"The file of the dataset {dataset.id} in the storage is not the one that came: upload it again."
            ) from None
        spec = Spec(
            mode=Mode.PLAN,
            name=wanted.name,
            model_id=model.model_id,
            model_dir=str(store.folder_of(settings.models_dir, model.path)),
            adapter_id="",
            data=str(data),
            max_line_bytes=settings.dataset_line_mib * MIB,
            hyperparameters=hyperparameters,
            work_dir=str(folder / "work"),
            progress=str(folder / "progress.jsonl"),
            result=str(folder / "result.json"),
            disk_reserve_bytes=int(settings.disk_reserve_gib * GIB),
            history=past,
        )

        @asynccontextmanager
        async def turn() -> AsyncIterator[Work]:
            async with sessions.read() as session:
                live = await succession.live(session)
            work = [Work(spec)]

            def decide(machine: Machine, ledger: Ledger) -> Allocation:
                now = accelerator.Snapshot(machine, settings, live, ledger)
                if not now.fits(need.needed_bytes):
                    # Nothing is measured; on a machine that is full, rows are prepared all the same.
                    work[0] = Work(replace(spec, measure=False))
                    return on_main_memory(need.processes_bytes + need.dataset_bytes)
                share = now.share(need)
                work[0] = Work(replace(spec, memory_bytes=share.memory_bytes, measure=True), share.env)
                return share.allocation(need.needed_bytes, has_gpu=machine.has_gpu)

            async with errands.memory.held(Kind.PLAN, f"the plan of {wanted.name}", decide):
                yield work[0]

        found: dict[str, Any] = (await errands.run(folder, turn))["plan"]
    # With the rows prepared, the longest is known in tokens.
    need = await asyncio.to_thread(needed, int(found["prepared"]["longest"]))
    if found["estimate"] is not None:
        need = replace(need, needed_bytes=int(found["estimate"]["memory_bytes"]), is_measured=True)
    seconds = found["seconds"]
    if fault is not None:
        note = f"{model.model_id} {fault}. When it is trained, {adapter_support.remedy('ADAPTER_ID')}"
        found["prepared"]["notes"] = [*found["prepared"].get("notes", ()), note]
    return {
        **found,
        "chosen": found["prepared"].pop("chosen"),
        "model_id": model.model_id,
        "dataset_id": dataset.id,
        "minutes": round(seconds["total"] / 60, 2) if seconds is not None else None,
        "memory_bytes": need.needed_bytes,
        "accelerator": await accelerator.look(sessions, settings, need),
        "on_busy": wanted.on_busy,
    }


async def history(session: AsyncSession, model_id: str, settings: Hyperparameters) -> dict[str, Any] | None:
    """Return what the last training of a model with such settings took, as `Spec.history` has it; None without one."""
    query = (
        select(Finetune)
        .where(Finetune.model_id == model_id, Finetune.figures.is_not(None))
        .order_by(Finetune.number.desc())
        .limit(LOOKED_AT)
    )
    wanted = [getattr(settings, name) for name in TELLING]
    for row in (await session.scalars(query)).all():
        taken = Hyperparameters(**row.hyperparameters)
        if [getattr(taken, name) for name in TELLING] == wanted:
            found = _taken(row.figures or {}, row.prepared or {})
            if found is not None:
                return found
    return None


def _taken(figures: Mapping[str, Any], prepared: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a training's figures tell, if they tell it all."""
    try:
        return {
            **{name: figures[name] for name in ("device", "dtype", "rows_per_step", "batch_size", "tokens_per_s")},
            "memory_bytes": int(figures["peak_memory_bytes"]),
            "validation_share": figures["validation_seconds"] / max(figures["training_seconds"], 1e-9),
            "seconds": dict(figures["seconds"]),
            "longest": int(prepared["longest"]),
            "held_out_rows": int(prepared["held_out_rows"]),
        }
    except (KeyError, TypeError, ValueError):
        return None
