"""Datasets that come in and go out: the file is hashed, validated and stored in one pass, then its row is written.

Nothing is left of what was refused, broke off or could not be stored. What a killed server leaves is noted in the
database, and `sweep` removes it at the next start.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from modelyard.datasets import actions
from modelyard.datasets.conversion import Conversion, Converter
from modelyard.datasets.inspection import Inspection
from modelyard.datasets.mapping import KeyMapping
from modelyard.datasets.recognition import FileKind, kind_of
from modelyard.datasets.tables import Dataset, data_key, metadata_key, prefix
from modelyard.db import Sessions
from modelyard.errors import InvalidDataset, ModelyardError, TooLarge, TooManyUploads
from modelyard.storage import Storage, StorageAway, delete_prefix
from modelyard.storage.streams import to_the_end

log = logging.getLogger(__name__)

MIB = 1024 * 1024
#: What is validated and stored at once, at least.
BLOCK_BYTES = 128 * 1024
#: So many blocks (of up to 256 KiB) may wait to be validated while others are stored already.
MOST_WAITING = 32
OnError = Literal["refuse", "skip"]


class Uploads:
    """The number of uploads that go on. Each may take a process of its own, and some MiB."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count an upload for the block.

        Raises:
            TooManyUploads: as many as may go on do.
        """
        if self._open >= self._limit:
            raise TooManyUploads(self._limit)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


async def take_in(
    sessions: Sessions,
    storage: Storage,
    chunks: AsyncIterable[bytes],
    *,
    name: str,
    description: str | None = None,
    parent_id: UUID | None = None,
    on_error: OnError = "refuse",
    max_bytes: int,
    max_line_bytes: int,
    head: bytes = b"",
    mapping: KeyMapping | None = None,
    scratch: Path = Path(),
) -> Dataset:
    """Store and validate a file as it arrives, and return the row of the dataset that it has become.

    `head` is how the file begins: what is not JSONL, or has its keys mapped, is converted on its way into the storage
    (`scratch` is a folder for what cannot be read as a stream).

    Raises:
        InvalidDataset: it has bad lines (unless `on_error` is skip), or no good ones; with the report.
        TooLarge: it is longer than `max_bytes`.
        StorageUnavailable: it cannot be stored.
    """
    dataset_id = uuid4()
    async with sessions.begin() as session:
        if parent_id is not None:
            await actions.get(session, parent_id, param="parent_id")
        await actions.note(session, dataset_id)
    reader: _Reader | Converter
    if mapping is not None or kind_of(head) is not FileKind.JSONL:
        paths = dict(mapping.paths) if mapping is not None else None
        reader = Converter(Conversion(max_bytes, max_line_bytes, paths, str(scratch)), partial(_judge, on_error))
    else:
        reader = _Reader(max_line_bytes, max_bytes, partial(_judge, on_error))
    try:
        async with aclosing(reader.blocks(chunks)) as blocks:
            stored = await storage.put(data_key(dataset_id), blocks)
        dataset = Dataset(
            id=dataset_id,
            name=name,
            description=description,
            parent_id=parent_id,
            size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            format=reader.report["format"],
            rows=reader.report["rows"],
            skipped_lines=reader.report["bad_lines"],
            converted_from=reader.report.get("converted_from"),
        )
        about = {
            "id": str(dataset_id),
            "name": name,
            "description": description,
            "parent_id": str(parent_id) if parent_id else None,
            "file": data_key(dataset_id),
            "size_bytes": stored.size_bytes,
            "sha256": stored.sha256,
            "report": reader.report,
            "index": reader.index,
        }
        await storage.put(metadata_key(dataset_id), _once(msgspec.json.encode(about)))
        async with sessions.begin() as session:
            await actions.add(session, dataset)
    except StorageAway:
        raise  # to remove what is left would wait as long again: the next start does
    except BaseException:
        await clear(sessions, storage, dataset_id)
        raise
    return dataset


async def take_out(sessions: Sessions, storage: Storage, dataset_id: UUID) -> Dataset:
    """Delete a dataset and return what it was: its row first, so that nobody finds a row without its objects.

    Raises:
        DatasetNotFound: there is none.
        DatasetInUse: something refers to it.
    """
    async with sessions.begin() as session:
        dataset = await actions.delete(session, dataset_id)
    await clear(sessions, storage, dataset_id)
    return dataset


async def clear(sessions: Sessions, storage: Storage, dataset_id: UUID) -> None:
    """Remove the objects of a dataset that has no row, then their note. What fails is left to the next start."""
    try:
        await delete_prefix(storage, prefix(dataset_id))
        async with sessions.begin() as session:
            await actions.strike(session, dataset_id)
    except (ModelyardError, SQLAlchemyError) as error:  # a full disk is full for the database, too
        log.warning("what is left of dataset %s stays until the next start: %s", dataset_id, error)


async def sweep(sessions: Sessions, storage: Storage, forgotten: Sequence[UUID]) -> None:
    """Remove what uploads and deletions left that a crash cut short: `actions.leftovers` of before the start."""
    for dataset_id in forgotten:
        try:
            await storage.remove_unfinished(prefix(dataset_id))
        except ModelyardError as error:
            log.warning("what is left of dataset %s stays until the next start: %s", dataset_id, error)
            continue
        await clear(sessions, storage, dataset_id)


class _Reader:
    """Validates blocks while they are stored; `report` and `index` are there after the last one."""

    def __init__(self, max_line_bytes: int, max_bytes: int, judge: Callable[[dict[str, Any]], None]) -> None:
        self._inspection = Inspection(max_line_bytes)
        self._max_bytes = max_bytes
        self._judge = judge
        self.report: dict[str, Any] = {}
        self.index: list[tuple[int, int, int]] = []

    async def blocks(self, chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
        """Yield the file in blocks; ends well only if the whole file is known to be good."""
        working: deque[asyncio.Task[None]] = deque()
        try:
            async with aclosing(_regrouped(chunks, self._max_bytes)) as regrouped:
                async for block in regrouped:
                    while working and (working[0].done() or len(working) == MOST_WAITING):
                        await working.popleft()
                    work = self._validate(block, working[-1] if working else None)
                    working.append(asyncio.create_task(work, name="validate a dataset"))
                    yield block
            while working:
                await working.popleft()
            found = await self._inspection.finish()
            assert found.report is not None
            self.report, self.index = found.report, found.index
            self._judge(found.report)
        finally:
            for task in working:
                task.cancel()
            for task in working:
                await to_the_end(task)
            await self._inspection.close()

    async def _validate(self, block: bytes, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await after
        await self._inspection.feed(block)


def _judge(on_error: OnError, report: dict[str, Any]) -> None:
    """Refuse a file by its report.

    Raises:
        InvalidDataset: it has bad lines that are not to be skipped, or nothing but these.
    """
    bad = report["bad_lines"]
    if not bad or (on_error == "skip" and report["rows"]):
        return
    noun = "row" if report.get("converted_from") else "line"
    if not report["rows"]:
        said = f"None of its {noun}s can be learnt from"
    else:
        said = f"{bad} of its {report['lines']} {noun}s cannot be learnt from"
    first = report["problems"]["listed"][0]
    place = f" (line {line} of the file)" if (line := first.get("file_line")) else ""
    hint = "" if on_error == "skip" or not report["rows"] else f" (on_error=skip leaves bad {noun}s out)"
    raise InvalidDataset(
        f"{said}; {noun} {first['line']}{place}: {first['path']}: {first['reason']}. The report has them all{hint}.",
        report=report,
    )


async def _regrouped(chunks: AsyncIterable[bytes], max_bytes: int) -> AsyncGenerator[bytes]:
    """Yield blocks that are not tiny, whatever the chunks are; what is large enough already is not copied."""
    pieces: list[bytes] = []
    length = total = 0
    async for chunk in chunks:
        pieces.append(chunk)
        length += len(chunk)
        if total + length > max_bytes:
            raise TooLarge(
                f"The file is longer than the {max_bytes / (1024 * MIB):g} GiB that a dataset may have "
                "(MODELYARD_MAX_DATASET_GIB).",
                param="file",
                code="dataset_too_large",
            )
        if length >= BLOCK_BYTES:
            yield b"".join(pieces)
            total += length
            pieces, length = [], 0
    if length:
        yield b"".join(pieces)


async def _once(data: bytes) -> AsyncGenerator[bytes]:
    yield data
