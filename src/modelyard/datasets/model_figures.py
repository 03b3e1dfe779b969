"""Figures of a dataset for a model in the store: asked of a child with limits, once, and kept beside the dataset.

`tokens` and `trainable_rows` have a question each: the child's program, and how much of a large dataset it is fed.
The child reads a stranger's tokenizer and chat template, which the server never does (`models.tokenizer_child`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from modelyard.datasets import actions
from modelyard.datasets.tables import Dataset, prefix
from modelyard.db import Sessions
from modelyard.errors import DatasetNotFound, JobFailure, ObjectNotFound
from modelyard.models import config_file
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.storage import Storage


@dataclass(frozen=True)
class StoredModel:
    """A model whose files a child reads, and the longest line that a dataset may have."""

    model_id: str
    commit: str
    folder: Path
    max_line_bytes: int


@dataclass(frozen=True)
class Question:
    """Something that a child says of a dataset and a model."""

    #: Of the objects that keep its answers. Another one where answers that were kept are no longer right.
    name: str
    #: Makes the child's program of the model and of how many tokens it takes (None: its files do not say).
    program: Callable[[StoredModel, int | None], str]
    #: Bytes of the dataset that the child is fed, at least.
    most_bytes: int
    #: The figure with the rows that the answer is about.
    counted: str


async def ask(
    question: Question,
    sessions: Sessions,
    storage: Storage,
    children: TokenizerChildren,
    dataset: Dataset,
    model: StoredModel,
) -> dict[str, Any]:
    """Return what a child answers, now or earlier: `{"figures"}`, with `is_exact` added and kept, or what it refused.

    Raises:
        JobFailure: `bad_tokenizer` or `no_process` (`models.tokenizer_child`).
        DatasetNotFound: the dataset went meanwhile.
    """
    name = hashlib.sha256(f"{model.model_id}@{model.commit}".encode()).hexdigest()[:32]
    key = f"{prefix(dataset.id)}{question.name}-{name}.json"
    try:
        return {"figures": msgspec.json.decode(b"".join([block async for block in storage.get(key)]))}
    except ObjectNotFound:
        pass
    longest = await asyncio.to_thread(max_length, model.folder)
    async with aclosing(_beginning_of(storage, dataset, question.most_bytes)) as blocks:
        found: dict[str, Any] = await children.ask(model.model_id, question.program(model, longest), blocks)
    if "figures" not in found:
        return found
    figures = {"is_exact": found["figures"][question.counted] == dataset.rows} | found["figures"]
    await _keep(sessions, storage, dataset, key, figures)
    return {"figures": figures}


def max_length(folder: Path) -> int | None:
    """Return how many tokens the model in a folder takes, by its config.json; None if that does not say."""
    try:
        return config_file.longest(config_file.read(folder))
    except JobFailure:
        return None


async def _keep(sessions: Sessions, storage: Storage, dataset: Dataset, key: str, figures: dict[str, Any]) -> None:
    await storage.put(key, _once(msgspec.json.encode(figures)))
    try:
        async with sessions.read() as session:
            await actions.get(session, dataset.id)
    except DatasetNotFound:
        await storage.delete(key)  # the dataset went while we counted, and its objects may have gone before this one
        raise


async def _beginning_of(storage: Storage, dataset: Dataset, most_bytes: int) -> AsyncGenerator[bytes]:
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
