"""Recognises a file's kind by its first bytes: one that is read, or another, which is named with its conversion.

Read are JSONL, one JSON array, a table (CSV, TSV) with a header, gzip and zstd of these, and Parquet. Nothing is
concluded from a file's name. What a command here says was tried; it is for a shell, with FILE in place of the name.
"""

from __future__ import annotations

import csv
import re
from enum import StrEnum

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: Enough for every mark below.
HEAD_BYTES = 4096
#: Characters of a column's name; a header with longer ones is a text.
MOST_NAME = 64


class FileKind(StrEnum):
    """The formats of files that are read."""

    #: One JSON object on each line.
    JSONL = "jsonl"
    #: All objects in one JSON array.
    ARRAY = "json_array"
    #: Lines of cells (CSV, TSV) under a line of names.
    TABLE = "csv"
    GZIP = "gzip"
    ZSTD = "zstd"
    PARQUET = "parquet"


_READ = ((b"\x1f\x8b", FileKind.GZIP), (b"\x28\xb5\x2f\xfd", FileKind.ZSTD), (b"PAR1", FileKind.PARQUET))


def _python(imports: str, rows: str) -> str:
    """Return the command that prints rows as JSONL."""
    printing = "[print(json.dumps(row, ensure_ascii=False, default=str)) for row in "
    return f'python3 -c "import json, {imports}; {printing}{rows}]" > train.jsonl'


_PYARROW = " (after: pip install pyarrow)"
PARQUET_REMEDY = (
    "convert it: " + _python("pyarrow.parquet", "pyarrow.parquet.read_table('FILE').to_pylist()") + _PYARROW
)
_ARROW_STREAM = "convert it: " + _python(
    "pyarrow", "pyarrow.ipc.open_stream(open('FILE', 'rb')).read_all().to_pylist()"
)
_ARROW_FILE = "convert it: " + _python("pyarrow", "pyarrow.ipc.open_file(open('FILE', 'rb')).read_all().to_pylist()")
_ORC = "convert it: " + _python("pyarrow.orc", "pyarrow.orc.read_table('FILE').to_pylist()")
_PICKLE = "convert it if you trust it, since to load a pickle runs what is in it: " + _python(
    "pickle", "pickle.load(open('FILE', 'rb'))"
)
_YAML = "convert it: " + _python("yaml", "yaml.safe_load(open('FILE'))") + " (after: pip install pyyaml)"
_XLSX = (
    "save it as CSV in UTF-8, or convert it: python3 -c \"import csv, openpyxl; csv.writer(open('train.csv', 'w'))."
    "writerows(openpyxl.load_workbook(open('FILE', 'rb'), read_only=True).active.values)\""
    " (after: pip install openpyxl)"
)
_ONE_COLUMN = "convert it: " + _python("csv", "csv.DictReader(open('FILE', newline=''))")
_TEXT = "to learn it line by line, convert it: " + _python(
    "sys", "({'text': line.strip()} for line in open('FILE') if line.strip())"
).replace("json, sys;", "json;")
_NOTHING = "a dataset is text with one JSON object on each line"

_MARKS = (
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it first: xz -dc FILE > train.jsonl"),
    (b"BZh", "a bzip2 archive", "unpack it first: bzip2 -dc FILE > train.jsonl"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first: 7z e -so FILE > train.jsonl"),
    (b"\x04\x22\x4d\x18", "an lz4 archive", "unpack it first: lz4 -dc FILE > train.jsonl"),
    (b"ARROW1", "an Arrow file", _ARROW_FILE + _PYARROW),
    (b"\xff\xff\xff\xff", "an Arrow stream (as datasets' save_to_disk writes it)", _ARROW_STREAM + _PYARROW),
    (b"ORC", "an ORC file", _ORC + _PYARROW),
    (b"SQLite format 3\x00", "an SQLite database", "export one JSON object on each line"),
    (b"%PDF", "a PDF document", _NOTHING),
    (b"\x89PNG", "a PNG picture", _NOTHING),
    (b"\xff\xd8\xff", "a JPEG picture", _NOTHING),
    (b"\x89HDF\r\n", "an HDF5 file", _NOTHING),
    (b"\x93NUMPY", "a NumPy array", _NOTHING),
    (b"Obj\x01", "an Avro file", "export one JSON object on each line"),
    (
        b"version https://git-lfs.github.com/spec/v1",
        "a Git LFS pointer, which stands for the file",
        "get the file itself, where it was cloned: git lfs pull",
    ),
)
_TAR_MARK, _TAR_AT = b"ustar", 257
_UTF16 = "convert it: iconv -f UTF-16 -t UTF-8 FILE > train.jsonl"
_UTF32 = "convert it: iconv -f UTF-32 -t UTF-8 FILE > train.jsonl"
_OLD_MAC = "convert it: tr '\\r' '\\n' < FILE > train.jsonl"
_YAML_BEGINS = re.compile(
    rb"\A(?:%YAML\b|---\s*\n|- +[\"']?[\w.-]+[\"']? *:(?:\s|$)|[\w.-]+:[ \t]*[|>]?-?[ \t]*\r?\n[ \t-])"
)
_OLD_MAC_LINE = re.compile(rb"\A[^\x00-\x08\x0e-\x1f\r]+\r\s*[^\s\x00-\x08\x0e-\x1f]")
_ONE_NAME = re.compile(rb"\A\"?([A-Za-z_][\w.-]{1,63})\"?\r?\n(?=[^{\s])")
#: A header without a line after it.
_NAMES_ALONE = re.compile(rb"\A[A-Za-z_][\w.-]{0,63}(?:[,;\t|][A-Za-z_][\w.-]{0,63}){1,99}\r?")
#: A list of objects in an object, with nothing but plain values before it.
_ROWS_WITHIN = re.compile(
    rb"\{\s*(?:\"[^\"\\]{1,64}\"\s*:\s*(?:\"[^\"\\]{0,1000}\"|[\w.+-]{1,40})\s*,\s*){0,20}"
    rb"\"([\w.-]{1,64})\"\s*:\s*\[\s*\{"
)
_SEPARATORS = ",;\t|"


def kind_of(head: bytes) -> FileKind:
    """Return what a file that begins like this is read as: JSONL where it is nothing else that is known."""
    for mark, kind in _READ:
        if head.startswith(mark):
            return kind
    if _named(head) is not None:
        return FileKind.JSONL
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if _is_array(text):
        return FileKind.ARRAY
    return FileKind.TABLE if separator_of(head) is not None else FileKind.JSONL


def recognise(head: bytes) -> str | None:
    """Return what a file that begins like this is and what to do with it; None if it may be JSONL."""
    found = _named(head) if not head.startswith(tuple(mark for mark, _ in _READ)) else None
    if found is None and (kind := kind_of(head)) is not FileKind.JSONL:
        found = (f"a {kind} file", "it is read at the upload, and not within another file")
    if found is None:
        return None
    what, remedy = found
    return f"The file is {what if ', not' in what else f'{what}, not JSONL'}; {remedy}."


def separator_of(head: bytes) -> str | None:
    """Return what is between the cells of a table that begins like this; None if it is none of two columns."""
    text = head.removeprefix(BYTE_ORDER_MARK)
    line, end, rest = text.partition(b"\n")
    rest = rest.strip(b"\r\n") and rest
    if not (end or _NAMES_ALONE.fullmatch(line)):
        return None
    if b"{" in line or text.lstrip()[:1] in (b"[", b"<") or rest.lstrip()[:1] == b"{":
        return None
    try:
        header = line.decode().rstrip("\r")
    except UnicodeDecodeError:
        return None
    found = max(_SEPARATORS, key=lambda separator: len(_cells(header, separator)))
    names = _cells(header, found)
    if len(names) < 2 or (rest and not rest.startswith(b'"') and found.encode() not in rest):
        return None
    return found if all(_is_name(name) for name in names[1:]) and (not names[0] or _is_name(names[0])) else None


def _cells(header: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([header], delimiter=separator, strict=True), [])
    except csv.Error:
        return []


def _is_name(cell: str) -> bool:
    cell = cell.strip()
    return 0 < len(cell) <= MOST_NAME and not cell.endswith((".", "!", "?")) and ". " not in cell


def _named(head: bytes) -> tuple[str, str] | None:
    """Return what a file is that is not read, and what to do with it."""
    if head.startswith(b"PK\x03\x04"):
        if b"[Content_Types].xml" in head or b"xl/" in head:
            return "an Excel workbook (or another Office document)", _XLSX
        return "a zip archive", "unpack it first: unzip -p FILE > train.jsonl"
    if head[_TAR_AT : _TAR_AT + len(_TAR_MARK)] == _TAR_MARK:
        return "a tar archive", "unpack it first: tar -xOf FILE > train.jsonl"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle of Python's", _PICKLE
    for mark, what, remedy in _MARKS:
        if head.startswith(mark):
            return what, remedy
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "text in UTF-32, not UTF-8", _UTF32
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _looks_like_utf16(head):
        return "text in UTF-16, not UTF-8", _UTF16
    return _named_text(head.removeprefix(BYTE_ORDER_MARK).lstrip())


def _named_text(text: bytes) -> tuple[str, str] | None:
    if not text:
        return None
    if b"\n" not in text and _OLD_MAC_LINE.match(text):
        return "text with the line ends of old Macs (CR)", _OLD_MAC
    if text.startswith(b"{"):
        if text.partition(b"\n")[0].strip() == b"{" and b"\n" in text:
            return "JSON spread over several lines", _spread(text)
        return None
    if _is_array(text):
        return None
    if text[:1] == b"<":
        return "XML or HTML", _NOTHING
    if _YAML_BEGINS.match(text):
        return "YAML", _YAML
    if separator_of(text) is not None:
        return None
    if _ONE_NAME.match(text):
        return "a table of one column", _ONE_COLUMN
    return ("plain text", _TEXT) if _looks_like_prose(text) else None


def _spread(text: bytes) -> str:
    """Return how to convert an object over several lines: its rows may be a list within it."""
    found = _ROWS_WITHIN.match(text)
    if found is not None and found[1] not in (b"messages", b"conversations", b"tools"):
        return f"convert it: {rows_within(found[1].decode('ascii', 'replace'))}"
    return "convert it: jq -c . FILE > train.jsonl"


def rows_within(name: str) -> str:
    """Return the command that makes JSONL of the objects in a list of this name, within one object or in each line."""
    return f"jq -c '.[\"{name}\"][]' FILE > train.jsonl"


def _is_array(text: bytes) -> bool:
    return text.startswith(b"[") and text[1:].lstrip()[:1] in (b"{", b"[", b"", b"]")


def _looks_like_prose(text: bytes) -> bool:
    """Return True for lines of words none of which might be a row."""
    try:
        begin = text[: HEAD_BYTES - 64].decode("utf-8", "ignore" if len(text) > HEAD_BYTES - 64 else "strict")
    except UnicodeDecodeError:
        return False
    lines = begin.splitlines()
    return (
        lines[0][:1].isalpha()
        and any(one.strip().count(" ") >= 5 for one in lines)  # the first may be a title
        and not any(one.lstrip()[:1] in '{["' for one in lines if one)
    )


def _looks_like_utf16(head: bytes) -> bool:
    sample = head[: len(head) // 2 * 2][:64]
    if len(sample) < 4:
        return False
    even, odd = sample[::2], sample[1::2]
    return (not any(even) and 0 not in odd) or (not any(odd) and 0 not in even)
