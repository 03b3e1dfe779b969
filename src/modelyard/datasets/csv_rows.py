"""Reads a table (CSV, TSV) as a stream of rows: the names are in its first line, and every cell is text.

What is wrong with a record is a fault of that record, with its line in the file; the next one is read all the same.
Columns whose values are JSON in every form of a row (messages, tools, ...) are read as that.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec

from modelyard.datasets.faults import Fault, Kind
from modelyard.datasets.row_forms import FORMS, MARKS, Meaning
from modelyard.errors import InvalidDataset
from modelyard.plurals import counted

#: Columns whose cells are JSON, and those that are true and false or 1 and 0.
JSON_COLUMNS = frozenset(
    key
    for spec in FORMS
    for key, meaning in spec.keys.items()
    if meaning in (Meaning.MESSAGES, Meaning.TURNS, Meaning.TOOLS, Meaning.HISTORY)
)
FLAG_COLUMNS = frozenset(MARKS)
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_json = msgspec.json.Decoder()


class Table:
    """The rows of a table: `columns` are known at once, `rows` are read as they are asked for.

    Raises:
        InvalidDataset: its header cannot be read, or names a column twice.
    """

    def __init__(self, separator: str, blocks: Iterator[bytes], max_bytes: int) -> None:
        # A byte that is no UTF-8 is a fault of its record.
        text = io.TextIOWrapper(
            io.BufferedReader(_Blocks(blocks), 256 * 1024), "utf-8-sig", errors="surrogateescape", newline=""
        )
        self._lines = _Lines(text, max_bytes)
        self._max_bytes = max_bytes
        csv.field_size_limit(max_bytes)
        self._reader = csv.reader(self._lines, delimiter=separator, strict=True)
        try:
            self.columns = [name.strip() for name in next(self._reader, [])]
        except csv.Error as error:
            raise InvalidDataset(f"The table's header cannot be read: {error}.", code="bad_table") from None
        named = [name for name in self.columns if name]
        if len({*named}) < len(named):
            twice = next(name for name in named if named.count(name) > 1)
            raise InvalidDataset(
                f"The table's header names the column {twice[:64]!r} more than once: rename one of them.",
                code="bad_table",
            )

    def rows(self) -> Iterator[tuple[dict[str, Any] | Fault, int]]:
        """Yield each record as an object, or what is wrong with it, and the line of the file where it begins."""
        width, lines = len(self.columns), self._lines
        kept = [(name, at) for at, name in enumerate(self.columns) if name]
        special = [name for name, _ in kept if name in JSON_COLUMNS or name in FLAG_COLUMNS]
        while True:
            line = lines.begin_record()
            try:
                cells = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines.pass_over()
                yield self._fault(str(error), line), line
                continue
            if len(cells) == width:
                row: dict[str, Any] = {name: cells[at] for name, at in kept}
                fault = _read_values(row, special) if special else None
                yield (row if fault is None else fault), line
            elif cells:
                reason = f"has {counted(len(cells), 'cell')}, but the header names {counted(width, 'column')}"
                yield Fault(Kind.BAD_TABLE, "$", reason), line

    def _fault(self, said: str, line: int) -> Fault:
        if self._lines.is_too_long or "field larger" in said:
            mib = self._max_bytes / (1024 * 1024)
            reason = f"is longer than the {mib:g} MiB that a row may have (MODELYARD_DATASET_LINE_MIB)"
            kind = Kind.LINE_TOO_LONG
        else:
            kind = Kind.BAD_TABLE
            if "unexpected end of data" in said:
                reason = "has a quoted cell that is never closed: the rest of the file is in it"
            elif "expected after" in said:
                reason = 'has text after the end of a quoted cell: a quote within one is written twice ("")'
            else:
                reason = f"cannot be read: {said}"
        last = self._lines.number
        return Fault(kind, "$", f"{reason} (lines {line} to {last})" if last > line else reason)


def _read_values(row: dict[str, Any], special: list[str]) -> Fault | None:
    """Read the cells that are not text in place; an empty one is not there."""
    for name in special:
        cell: str = row[name]
        if not cell.strip():
            del row[name]
        elif name in FLAG_COLUMNS:
            row[name] = _FLAGS.get(cell.strip().lower(), cell)
        else:
            try:
                row[name] = _json.decode(cell)
            except (msgspec.MsgspecError, UnicodeError, RecursionError):
                is_python = cell.lstrip()[:2] in ("[{", "{'") and "'" in cell
                why = " (it is Python's own writing: write it with json.dumps)" if is_python else ""
                return Fault(Kind.WRONG_VALUE, f"$.{name}", f"is text that is no JSON{why}")
    return None


class _Lines:
    """The lines of a text, counted; a record that gets too long is given up."""

    def __init__(self, text: io.TextIOWrapper, max_bytes: int) -> None:
        self._read = partial(text.readline, max_bytes)
        self._max = max_bytes
        self._record = 0
        self._is_cut = False
        self.number = 0
        self.is_too_long = False

    def begin_record(self) -> int:
        """Return the line that comes next."""
        self._record = 0
        self.is_too_long = False
        return self.number + 1

    def pass_over(self) -> None:
        """Read to the end of a line that is longer than is read at once."""
        while self._is_cut:
            piece = self._read()
            self._is_cut = bool(piece) and not piece.endswith(("\n", "\r"))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._read()
        if not line:
            raise StopIteration
        self.number += 1
        self._record += len(line)
        if self._record >= self._max:
            self._is_cut = len(line) >= self._max and not line.endswith(("\n", "\r"))
            self.is_too_long = True
            raise csv.Error("too long")
        return line


class _Blocks(io.RawIOBase):
    """Blocks as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
