"""HTTP headers of a file that is handed out: the part of it that is wanted, and the name to save it under."""

from __future__ import annotations

import re
from urllib.parse import quote

from modelyard.errors import RangeNotSatisfiable

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,20})\s*-\s*(\d{0,20})", re.IGNORECASE)


def part_of(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return start and length of the part that a `Range` header asks for; None for the whole file.

    What is not one range of bytes is passed over, as RFC 9110 has it.

    Raises:
        RangeNotSatisfiable: there is no byte of it.
    """
    found = _RANGE.fullmatch(header.strip()) if header is not None else None
    if found is None or not any(found.groups()):
        return None
    first, last = (int(text) if text else None for text in found.groups())
    if first is None:
        assert last is not None
        start, end = max(size_bytes - last, 0), size_bytes - 1
    else:
        start, end = first, size_bytes - 1 if last is None else min(last, size_bytes - 1)
        if last is not None and last < first:
            return None
    if start > end:
        raise RangeNotSatisfiable(size_bytes)
    return start, end - start + 1


def content_disposition(name: str) -> str:
    """Return the header that has a browser save a file under its name, whatever is in the name (RFC 6266)."""
    plain = re.sub(r'[^\x20-\x7e]|["\\%/]', "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
