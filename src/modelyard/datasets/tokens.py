"""How long the rows of a dataset are in tokens of a model, counted when somebody asks, and kept beside the dataset.

Counted are the contents of the messages, without what a chat template puts around them: templates are run by children.
The tokenizer is the model's own `tokenizer.json`; it is read and used in threads that do not hold up the server, and
forgotten afterwards. Of a large dataset the first 32 MiB are counted, and the answer says of how many rows it speaks.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from modelyard.datasets import actions
from modelyard.datasets.forms import Form, Row
from modelyard.datasets.lines import Rows
from modelyard.datasets.tables import Dataset, prefix
from modelyard.datasets.validation import LISTED_LINES
from modelyard.db import Sessions
from modelyard.errors import DatasetNotFound, JobFailure, ObjectNotFound, Unprocessable
from modelyard.models import config_file
from modelyard.storage import Storage

COUNTED_BYTES = 32 * 1024 * 1024
#: Texts that are handed to the tokenizer at once.
BATCH = 512


async def tokens_of(
    sessions: Sessions,
    storage: Storage,
    dataset: Dataset,
    *,
    folder: Path,
    model_id: str,
    commit: str,
    max_line_bytes: int,
) -> dict[str, Any]:
    """Return the token figures of a dataset for the model in `folder`, counted now or earlier.

    Raises:
        Unprocessable: the model has no tokenizer that can be read.
    """
    name = hashlib.sha256(f"{model_id}@{commit}".encode()).hexdigest()[:32]
    key = f"{prefix(dataset.id)}tokens-{name}.json"
    try:
        found: dict[str, Any] = msgspec.json.decode(b"".join([block async for block in storage.get(key)]))
        return found
    except ObjectNotFound:
        pass
    counter = await asyncio.to_thread(_Counter, folder, model_id)
    reader, read = Rows(max_line_bytes), 0
    async with aclosing(storage.get(dataset.data_key)) as blocks:
        async for block in blocks:
            await asyncio.to_thread(counter.take, reader.feed(block))
            read += len(block)
            if read >= COUNTED_BYTES:
                break
        else:
            await asyncio.to_thread(counter.take, reader.finish())
    figures = {"model_id": model_id, "commit": commit} | counter.figures(dataset.rows)
    await storage.put(key, _once(msgspec.json.encode(figures)))
    try:
        async with sessions.read() as session:
            await actions.get(session, dataset.id)
    except DatasetNotFound:
        await storage.delete(key)  # the dataset went while we counted, and its objects may have gone before this one
        raise
    return figures


class _Counter:
    def __init__(self, folder: Path, model_id: str) -> None:
        from tokenizers import Tokenizer  # here, since the server starts without it

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001  # the package raises nothing narrower
            raise Unprocessable(
                f"The tokens of '{model_id}' cannot be counted: its tokenizer.json is missing or cannot be read "
                f"({str(error)[:200]}).",
                param="model_id",
                code="no_tokenizer",
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._max_length = max_length(folder)
        self._rows = self._total = self._longest = self._truncated = 0
        self._truncated_lines: list[int] = []
        self._sizes: Counter[int] = Counter()

    def take(self, rows: Iterator[tuple[int, Form, Row]]) -> None:
        """Count the tokens of some rows; the tokenizer lets other threads work."""
        contents: list[tuple[int, list[str]]] = []
        for line, _, row in rows:
            contents.append((line, [message.content for message in row.messages if isinstance(message.content, str)]))
            if len(contents) == BATCH:
                self._count(contents)
                contents = []
        if contents:
            self._count(contents)

    def _count(self, contents: list[tuple[int, list[str]]]) -> None:
        everything = list(chain.from_iterable(texts for _, texts in contents))
        encoded = iter(self._tokenizer.encode_batch_fast(everything, add_special_tokens=False))
        for line, texts in contents:
            length = sum(len(next(encoded).ids) for _ in texts)
            self._rows += 1
            self._total += length
            self._sizes[length.bit_length()] += 1
            self._longest = max(self._longest, length)
            if self._max_length is not None and length > self._max_length:
                self._truncated += 1
                if len(self._truncated_lines) < LISTED_LINES:
                    self._truncated_lines.append(line)

    def figures(self, rows: int) -> dict[str, Any]:
        """Return what was counted; `rows` is how many there are."""
        return {
            "max_length": self._max_length,
            "counted_rows": self._rows,
            "is_exact": self._rows == rows,
            "total": self._total,
            "longest": self._longest,
            "truncated_rows": self._truncated,
            "truncated_lines": self._truncated_lines,
            "histogram": [{"below": 1 << bits, "rows": self._sizes[bits]} for bits in sorted(self._sizes)],
        }


def max_length(folder: Path) -> int | None:
    """Return how many tokens the model in a folder takes, by its config.json; None if that does not say."""
    try:
        return config_file.longest(config_file.read(folder))
    except JobFailure:
        return None


async def _once(data: bytes) -> AsyncGenerator[bytes]:
    yield data
