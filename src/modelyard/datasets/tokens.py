"""Token counts of datasets: how long the rows are for a model, counted when somebody asks and kept beside the dataset.

Counted are the contents of the messages, without what a chat template puts around them: templates are run by children.
The model's own `tokenizer.json` is read in a child with limits (`token_counter`). Of a large dataset the first 32 MiB
are counted, and the answer says of how many rows it speaks.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from modelyard.datasets import actions
from modelyard.datasets.tables import Dataset, prefix
from modelyard.db import Sessions
from modelyard.errors import DatasetNotFound, JobFailure, ModelyardError, ObjectNotFound, Unavailable, Unprocessable
from modelyard.models import config_file
from modelyard.models.tokenizer_child import NO_PROCESS, TokenizerChildren
from modelyard.storage import Storage

COUNTED_BYTES = 32 * 1024 * 1024


async def tokens_of(
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
    """Return the token figures of a dataset for the model in `folder`, counted now or earlier.

    Raises:
        Unprocessable: the model has no tokenizer that can be read, or not within the limits.
        Unavailable: the machine has no room for the child.
    """
    name = hashlib.sha256(f"{model_id}@{commit}".encode()).hexdigest()[:32]
    key = f"{prefix(dataset.id)}tokens-{name}.json"
    try:
        kept: dict[str, Any] = msgspec.json.decode(b"".join([block async for block in storage.get(key)]))
        return kept
    except ObjectNotFound:
        pass
    longest = await asyncio.to_thread(max_length, folder)
    program = f"from modelyard.datasets.token_counter import count; count({str(folder)!r}, {longest}, {max_line_bytes})"
    async with aclosing(beginning_of(storage, dataset, COUNTED_BYTES)) as blocks:
        try:
            found = await children.ask(model_id, program, blocks)
        except JobFailure as failure:
            raise _refusal(failure) from failure
    if "refusal" in found:
        raise Unprocessable(
            f"The tokens of '{model_id}' cannot be counted: its tokenizer.json is missing or cannot be read "
            f"({found['refusal']}).",
            param="model_id",
            code="no_tokenizer",
        )
    counted = found["figures"]
    figures: dict[str, Any] = {
        "model_id": model_id,
        "commit": commit,
        "is_exact": counted["counted_rows"] == dataset.rows,
    } | counted
    await keep(sessions, storage, dataset, key, figures)
    return figures


async def keep(sessions: Sessions, storage: Storage, dataset: Dataset, key: str, figures: dict[str, Any]) -> None:
    """Store figures of a dataset beside it.

    Raises:
        DatasetNotFound: the dataset went meanwhile; nothing is left.
    """
    await storage.put(key, _once(msgspec.json.encode(figures)))
    try:
        async with sessions.read() as session:
            await actions.get(session, dataset.id)
    except DatasetNotFound:
        await storage.delete(key)  # the dataset went while we counted, and its objects may have gone before this one
        raise


def max_length(folder: Path) -> int | None:
    """Return how many tokens the model in a folder takes, by its config.json; None if that does not say."""
    try:
        return config_file.longest(config_file.read(folder))
    except JobFailure:
        return None


def _refusal(failure: JobFailure) -> ModelyardError:
    message = f"{failure.message} {failure.hint}"
    if failure.code == NO_PROCESS:
        return Unavailable(message, code=failure.code)
    return Unprocessable(message, param="model_id", code=failure.code)


async def beginning_of(storage: Storage, dataset: Dataset, most_bytes: int) -> AsyncGenerator[bytes]:
    """Read some blocks of a dataset, of so many bytes at least. They may end within a row, which is not counted."""
    read = 0
    async with aclosing(storage.get(dataset.data_key)) as blocks:
        async for block in blocks:
            yield block
            read += len(block)
            if read >= most_bytes:
                return


async def _once(data: bytes) -> AsyncGenerator[bytes]:
    yield data
