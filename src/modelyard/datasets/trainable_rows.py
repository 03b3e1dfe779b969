"""The rows of a dataset that a training with a model would learn from, and reasons by line; kept beside the dataset.

The trainer's own rendering says so, in a child with limits (`trainer.row_trial`). Of a large dataset the first 8 MiB
are tried: a chat template renders a row once for each of its turns.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from modelyard.datasets.tables import Dataset, prefix
from modelyard.datasets.tokens import beginning_of, keep, max_length
from modelyard.db import Sessions
from modelyard.errors import JobFailure, ObjectNotFound
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.storage import Storage

TRIED_BYTES = 8 * 1024 * 1024


async def trains(
    sessions: Sessions,
    storage: Storage,
    children: TokenizerChildren,
    dataset: Dataset,
    *,
    folder: Path,
    model_id: str,
    commit: str,
    max_line_bytes: int,
) -> dict[str, Any]:
    """Return `schemas.Trains` for the model in `folder`, tried now or earlier; with `unknown` where nobody can say.

    Raises:
        DatasetNotFound: the dataset went meanwhile.
    """
    name = hashlib.sha256(f"{model_id}@{commit}".encode()).hexdigest()[:32]
    key = f"{prefix(dataset.id)}trains-{name}.json"
    try:
        kept: dict[str, Any] = msgspec.json.decode(b"".join([block async for block in storage.get(key)]))
        return kept
    except ObjectNotFound:
        pass
    longest = await asyncio.to_thread(max_length, folder)
    arguments = f"{str(folder)!r}, {model_id!r}, {longest}, {max_line_bytes}"
    program = f"from modelyard.trainer.row_trial import main; main({arguments})"
    async with aclosing(beginning_of(storage, dataset, TRIED_BYTES)) as blocks:
        try:
            found = await children.ask(model_id, program, blocks)
        except JobFailure as failure:
            return {"unknown": f"{failure.message} {failure.hint}"}
    if "figures" not in found:
        return {"unknown": str(found.get("refusal", found.get("unknown")))}
    figures: dict[str, Any] = {"is_exact": found["figures"]["tried_rows"] == dataset.rows} | found["figures"]
    await keep(sessions, storage, dataset, key, figures)
    return figures
