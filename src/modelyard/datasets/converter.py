"""The child that makes JSONL of a file of another kind, and validates it: bytes in, JSONL and what was found out.

`conversion` starts it, as a filter. Its standard output is frames: four bytes of length and as many of JSONL, then a
length of 0 and `Found` as JSON. It imports what reads files and rows, and nothing of the server; it holds a block and
a row, however long the file is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import msgspec

from modelyard.datasets.conversion_task import Conversion
from modelyard.datasets.csv_rows import JSON_COLUMNS, Table
from modelyard.datasets.faults import Fault, Kind
from modelyard.datasets.json_array import elements
from modelyard.datasets.lines import Lines
from modelyard.datasets.mapping import KeyMapping, advice, has_form, quoted
from modelyard.datasets.recognition import BYTE_ORDER_MARK, HEAD_BYTES, FileKind, kind_of, recognise, separator_of
from modelyard.datasets.unpacking import unpacked
from modelyard.datasets.validation import Validation
from modelyard.datasets.validator import READ_BYTES, Found, found_by, refused
from modelyard.errors import InvalidDataset

#: JSONL that is validated and handed on at once, at least.
BLOCK_BYTES = 128 * 1024
TOO_LARGE = "dataset_too_large"
ARCHIVES = frozenset({FileKind.GZIP, FileKind.ZSTD})
LENGTH = struct.Struct("<I")
#: A line of JSONL or what is wrong with a row, and the line of the file where that begins (0: as in the JSONL).
Item = tuple[bytes | Fault, int]
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def convert(task: bytes) -> None:
    """Convert what comes on standard input as a task (`Conversion` as JSON) says."""
    conversion = msgspec.json.decode(task, type=Conversion)

    def put(block: bytes) -> None:
        length = LENGTH.pack(len(block))
        written = os.writev(1, (length, block)) - len(length)  # the first page of a pipe takes the length whole
        _write(memoryview(block)[written:])

    found = converted(_standard_input(), conversion, put)
    os.close(0)
    _write(LENGTH.pack(0))
    _write(msgspec.json.encode(found))


def converted(blocks: Iterator[bytes], conversion: Conversion, put: Callable[[bytes], None]) -> Found:
    """Read a file in blocks, hand its JSONL on in blocks, and return what was found."""
    try:
        return _converted(blocks, conversion, put)
    except InvalidDataset as error:
        return refused(error)
    except MemoryError:
        return Found(refusal=("archive_damaged", "To unpack and read the file takes more memory than is given to it."))


def _converted(blocks: Iterator[bytes], conversion: Conversion, put: Callable[[bytes], None]) -> Found:
    kinds = []
    head, blocks = _with_head(blocks)
    kind = kind_of(head)
    if kind in ARCHIVES:
        kinds.append(kind)
        blocks = _counted(unpacked(kind, blocks), conversion.max_bytes)
        head, blocks = _with_head(blocks)
        kind = kind_of(head)
        said = recognise(head) if kind not in (FileKind.ARRAY, FileKind.TABLE) else None
        if said is not None:
            raise InvalidDataset(f"In the {kinds[0]} archive: {said[0].lower()}{said[1:]}", code="not_jsonl")
    if kind is not FileKind.JSONL or not kinds:
        kinds.append(kind)
    mapping = KeyMapping(conversion.mapping) if conversion.mapping is not None else None
    is_as_it_is = kind is FileKind.JSONL and mapping is None
    validation = Validation(conversion.max_line_bytes, is_recognised=not is_as_it_is)
    try:
        sink = _Sink(validation, put, conversion.max_bytes)
        if is_as_it_is:
            for block in blocks:
                sink.take_block(block)
        else:
            for item, line in _items(kind, head, blocks, mapping, conversion):
                sink.take(item, line)
        sink.flush()
        if sink.is_empty:
            raise InvalidDataset(_nothing_in(kind, [*kinds]), code="dataset_empty")
        found = found_by(validation)
    finally:
        validation.close()
    if found.report is not None:
        found.report |= {"converted_from": "+".join(kinds), "mapping": conversion.mapping}
    return found


def _nothing_in(kind: FileKind, kinds: list[str]) -> str:
    """Return the words for a file that is whole and has no row."""
    what = f"What is in the {kinds[0]} archive" if kinds[0] in ARCHIVES else "The file"
    if kind is FileKind.ARRAY:
        return f"{what} is a JSON array without elements."
    if kind in (FileKind.TABLE, FileKind.PARQUET):
        return f"{what} is a table with {'columns' if kind is FileKind.PARQUET else 'a header'} and no rows."
    return f"{what} is empty."


def _items(
    kind: FileKind, head: bytes, blocks: Iterator[bytes], mapping: KeyMapping | None, conversion: Conversion
) -> Iterator[Item]:
    limit = conversion.max_line_bytes
    separator = separator_of(head)
    if kind is FileKind.PARQUET:
        from modelyard.datasets.parquet import rows_of_parquet  # here: an extra, and only who has such a file loads it

        return _of_objects(((row, 0) for row in rows_of_parquet(blocks, conversion.scratch)), mapping)
    if kind is FileKind.ARRAY:
        lines = ((line, 0) for line in elements(blocks, limit))
        return lines if mapping is None else _mapped(lines, mapping)
    if kind is FileKind.TABLE or (mapping is not None and not _may_be_jsonl(head)):
        table = Table(separator or ",", blocks, limit)
        _check_columns(table.columns, mapping)
        return _of_objects(table.rows(), mapping)
    assert mapping is not None
    return _mapped(_lines(blocks, limit), mapping)


def _may_be_jsonl(head: bytes) -> bool:
    return head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] in (b"{", b"")


def _of_objects(rows: Iterable[tuple[dict[str, Any] | Fault, int]], mapping: KeyMapping | None) -> Iterator[Item]:
    for row, line in rows:
        if isinstance(row, Fault):
            yield row, line
            continue
        try:
            yield _encode(row if mapping is None else mapping.applied(row)) + b"\n", line
        except Fault as fault:
            yield fault, line
        except (UnicodeEncodeError, TypeError, ValueError) as error:
            yield _unwritable(row, error), line


def _unwritable(row: dict[str, Any], error: Exception) -> Fault:
    if isinstance(error, UnicodeEncodeError):
        byte = ord(error.object[error.start]) - 0xDC00
        key = next((key for key, value in row.items() if isinstance(value, str) and error.object == value), "")
        reason = f"is not UTF-8: byte 0x{byte & 0xFF:02x}; convert the file, such as with iconv -f CP1251 -t UTF-8"
        return Fault(Kind.NOT_UTF8, f"$.{key}" if key else "$", reason)
    return Fault(Kind.WRONG_VALUE, "$", f"has a value that cannot be written as JSON: {error}")


def _mapped(lines: Iterable[Item], mapping: KeyMapping) -> Iterator[Item]:
    """Yield lines with their keys mapped; one that is no object as it is, for the validation to say what it is."""
    for line, at in lines:
        assert isinstance(line, bytes)
        try:
            row = _decode(line)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            row = None
        try:
            yield (_encode(mapping.applied(row)) + b"\n" if isinstance(row, dict) else line), at
        except Fault as fault:
            yield fault, at


def _lines(blocks: Iterator[bytes], limit: int) -> Iterator[Item]:
    reader = Lines(limit)
    mib = limit / (1024 * 1024)
    too_long = Fault(
        Kind.LINE_TOO_LONG, "$", f"is longer than the {mib:g} MiB that a line may have (MODELYARD_DATASET_LINE_MIB)"
    )
    first = True
    for run in chain(chain.from_iterable(map(reader.feed, blocks)), reader.finish()):
        if run is None:
            yield too_long, 0
            continue
        if first:
            run, first = run.removeprefix(BYTE_ORDER_MARK), False
        for line in run[:-1].split(b"\n"):
            yield line + b"\n", 0


def _check_columns(columns: list[str], mapping: KeyMapping | None) -> None:
    """Refuse a table of whose columns no row can be made, with the mapping that would do it."""
    named = [name for name in columns if name]
    if mapping is not None:
        missing = [
            path for path in mapping.paths.values() if path not in named and path.partition(".")[0] not in JSON_COLUMNS
        ]
        if not missing:
            return
        raise InvalidDataset(
            f"The mapping names {quoted(missing)}, but the table has the columns {quoted(named)}.",
            code="mapping_needed",
        )
    if has_form(named):
        return
    said = advice(dict.fromkeys(named, ""))
    what = f"The file is a table with the columns {quoted(named)}, which are those of no form of a row"
    raise InvalidDataset(f"{what}: {said}." if said else f"{what}.", code="mapping_needed")


class _Sink:
    """Collects lines into blocks, which are validated and handed on."""

    def __init__(self, validation: Validation, put: Callable[[bytes], None], max_bytes: int) -> None:
        self._validation = validation
        self._put = put
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._lines: list[bytes] = []
        self._places: list[int] = []
        self._bytes = 0

    def take(self, item: bytes | Fault, line: int) -> None:
        """Take a row as a line of JSONL, or what is wrong with it; `line` is where it begins in the file."""
        if isinstance(item, Fault):
            self.flush()
            self._hand_on(b"\n")
            self._validation.refuse_row(item, line)
            return
        self._lines.append(item)
        self._places.append(line)
        self._bytes += len(item)
        if self._bytes >= BLOCK_BYTES:
            self.flush()

    def take_block(self, block: bytes) -> None:
        """Take a piece of a file that is JSONL already."""
        self._hand_on(block)
        self._validation.feed(block)

    @property
    def is_empty(self) -> bool:
        """True if nothing was handed on."""
        return self._left == self._max_bytes

    def flush(self) -> None:
        """Validate and hand on what was collected."""
        if not self._lines:
            return
        block = b"".join(self._lines)
        self._hand_on(block)
        self._validation.feed_rows(block, self._places)
        self._lines, self._places, self._bytes = [], [], 0

    def _hand_on(self, block: bytes) -> None:
        self._left -= len(block)
        if self._left < 0:
            raise _too_large(self._max_bytes)
        self._put(block)


def _too_large(max_bytes: int) -> InvalidDataset:
    return InvalidDataset(
        f"What is in the file is longer than the {max_bytes / 1024**3:g} GiB that a dataset may have "
        "(MODELYARD_MAX_DATASET_GIB).",
        code=TOO_LARGE,
    )


def _counted(blocks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield blocks until they are more than a dataset may have: of a few bytes gigabytes of spaces may come."""
    left = max_bytes
    for block in blocks:
        left -= len(block)
        if left < 0:
            raise _too_large(max_bytes)
        yield block


def _with_head(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes of a file, and its blocks with these in front."""
    first: list[bytes] = []
    length = 0
    for block in blocks:
        first.append(block)
        length += len(block)
        if length >= HEAD_BYTES:
            break
    return b"".join(first)[:HEAD_BYTES], chain(first, blocks)


def _standard_input() -> Iterator[bytes]:
    while block := os.read(0, READ_BYTES):
        yield block


def _write(data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
