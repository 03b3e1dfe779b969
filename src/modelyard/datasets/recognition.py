"""Recognises common files that are not JSONL by magic bytes, to say how to convert them."""

from __future__ import annotations

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: Enough for every mark below.
HEAD_BYTES = 4096

_MARKS = (
    (b"\x1f\x8b", "a gzip archive", "unpack it first: gunzip FILE"),
    (b"PK\x03\x04", "a zip archive (or an Office document)", "unpack it first: unzip FILE"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first: unzstd FILE"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it first: unxz FILE"),
    (b"BZh", "a bzip2 archive", "unpack it first: bunzip2 FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first: 7z x FILE"),
    (b"%PDF", "a PDF document", "a dataset is text with one JSON object on each line"),
    (b"PAR1", "a Parquet file", "convert it: python -c \"import pandas; pandas.read_parquet('FILE')"
     ".to_json('train.jsonl', orient='records', lines=True, force_ascii=False)\""),
    (b"ARROW1", "an Arrow file", "convert it: datasets.Dataset.from_file('FILE').to_json('train.jsonl')"),
    (b"SQLite format 3\x00", "an SQLite database", "export one JSON object on each line"),
    (b"\x89PNG", "a PNG picture", "a dataset is text with one JSON object on each line"),
    (b"\xff\xd8\xff", "a JPEG picture", "a dataset is text with one JSON object on each line"),
)  # fmt: skip
_UTF16 = "convert it: iconv -f UTF-16 -t UTF-8 FILE > train.jsonl"
_ARRAY = "convert it: jq -c '.[]' FILE > train.jsonl"
_CSV = (
    "convert it: python -c \"import pandas; pandas.read_csv('FILE')"
    ".to_json('train.jsonl', orient='records', lines=True, force_ascii=False)\""
)


def recognise(head: bytes) -> str | None:
    """Return what a file that begins like this is and what to do with it; None if it may be JSONL."""
    for mark, what, remedy in _MARKS:
        if head.startswith(mark):
            return f"The file is {what}, not JSONL; {remedy}."
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "The file is text in UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8 FILE > train.jsonl."
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _looks_like_utf16(head):
        return f"The file is text in UTF-16, not UTF-8; {_UTF16}."
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if not text or text.startswith(b"{"):
        first = text.partition(b"\n")[0].strip()
        if first == b"{" and b"\n" in text:
            return (
                "The file is JSON spread over several lines, not JSONL, which has one object on each line; "
                "convert it: jq -c . FILE > train.jsonl."
            )
        return None
    if text.startswith(b"[") and text[1:].lstrip()[:1] in (b"{", b"[", b"", b"]"):
        return f"The file is one JSON array, not JSONL, which has one object on each line; {_ARRAY}."
    if text[:1].lower() == b"<":
        return "The file is XML or HTML, not JSONL, which has one JSON object on each line."
    return f"The file is CSV, not JSONL; {_CSV}." if _looks_like_csv(text) else None


def _looks_like_utf16(head: bytes) -> bool:
    sample = head[: len(head) // 2 * 2][:64]
    if len(sample) < 4:
        return False
    even, odd = sample[::2], sample[1::2]
    return (not any(even) and 0 not in odd) or (not any(odd) and 0 not in even)


def _looks_like_csv(text: bytes) -> bool:
    lines = text.split(b"\n")
    if len(lines) < 2:
        return False
    header, second = lines[0], lines[1]
    for separator in (b",", b";", b"\t"):
        columns = header.count(separator)
        if columns and second.count(separator) >= columns and b"{" not in header:
            return True
    return False
