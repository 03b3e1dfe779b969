"""Reading what was stored of a dataset: its description, and pages of its rows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import Struct

from modelyard.datasets.canonical import Row, canonical_json
from modelyard.datasets.lines import Rows
from modelyard.datasets.row_forms import Form
from modelyard.datasets.tables import Dataset
from modelyard.storage import Storage

#: A page is not begun again with another row when it is as long as this.
PAGE_BYTES = 8 * 1024 * 1024


class About(Struct):
    """The part of `metadata.json` that is beside the columns of the row."""

    report: dict[str, Any]
    #: Byte, lines and rows before it.
    index: list[tuple[int, int, int]]


async def about(storage: Storage, dataset: Dataset) -> About:
    """Return the stored report and index of a dataset."""
    blocks = [block async for block in storage.get(dataset.s3_path)]
    return msgspec.json.decode(b"".join(blocks), type=About)


async def page(storage: Storage, dataset: Dataset, offset: int, limit: int, max_line_bytes: int) -> bytes:
    """Return a page of rows as JSON (`schemas.PageOut`). It reads some MiB before the page at most."""
    found = _Page(offset, limit)
    if offset < dataset.rows:
        index = (await about(storage, dataset)).index
        start, lines, rows = max((entry for entry in index if entry[2] <= offset), key=lambda entry: entry[2])
        found.number = rows
        reader = Rows(max_line_bytes, lines)
        async with aclosing(storage.get(dataset.data_key, start=start)) as blocks:
            async for block in blocks:
                await asyncio.to_thread(found.take, reader.feed(block))
                if found.is_full:
                    break
            else:
                await asyncio.to_thread(found.take, reader.finish())
    end = offset + len(found.rows)
    following = str(end) if end < dataset.rows and found.rows else "null"
    tail = f'],"offset":{offset},"next_offset":{following},"total":{dataset.rows}}}'
    return b'{"rows":[' + b",".join(found.rows) + tail.encode()


class _Page:
    def __init__(self, offset: int, limit: int) -> None:
        self._offset = offset
        self._limit = limit
        self._bytes = 0
        self.number = 0
        self.rows: list[bytes] = []

    @property
    def is_full(self) -> bool:
        return len(self.rows) >= self._limit or self._bytes >= PAGE_BYTES

    def take(self, rows: Iterator[tuple[int, Form, Row]]) -> None:
        for line, form, row in rows:
            if self.is_full:
                return
            if self.number >= self._offset:
                body = canonical_json(row)
                self.rows.append(b'{"line":%d,"format":"%b",' % (line, form.encode()) + body[1:])
                self._bytes += len(body)
            self.number += 1
