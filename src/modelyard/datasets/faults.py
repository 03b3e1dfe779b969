"""Faults of a line: their kind, the place in it, and words for whoever made it.

`diagnose` says why a line is no JSON that can be read. It is slow, and only for lines that have been refused already.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from itertools import islice
from typing import Any


class Kind(StrEnum):
    """The kinds of fault that a line can have; the report counts by them."""

    #: Bytes that are no UTF-8.
    NOT_UTF8 = "not_utf8"
    #: No JSON.
    NOT_JSON = "not_json"
    #: NaN or Infinity, which JSON does not have.
    NOT_A_NUMBER = "not_a_number"
    #: Half of a surrogate pair, which is no character.
    LONE_SURROGATE = "lone_surrogate"
    #: Nested too deeply to be read.
    TOO_DEEP = "too_deep"
    #: Longer than a line may be.
    LINE_TOO_LONG = "line_too_long"
    #: A record of a table with other cells than its header has names, or with wrong quotes.
    BAD_TABLE = "bad_table"
    #: JSON, but none of the forms.
    UNKNOWN_FORM = "unknown_form"
    #: A field that is missing.
    MISSING_FIELD = "missing_field"
    #: A field of the wrong type or with a value that it cannot have.
    WRONG_VALUE = "wrong_value"
    #: A role in a place where no chat template takes it.
    WRONG_ORDER = "wrong_order"
    #: A row that prefers one answer to another.
    PREFERENCE = "preference"
    #: No assistant's message with anything to learn.
    NOTHING_TO_LEARN = "nothing_to_learn"


#: Faults of one line that are told: a line may have a million.
MOST_IN_LINE = 100
#: Characters of a path and of a reason: both may quote the line, whose keys may have a million.
MOST_CHARACTERS = 300


class Fault(Exception):
    """Something is wrong with a line: where in it (a JSON path, '$' for the line itself) and what."""

    def __init__(self, kind: Kind, path: str, reason: str) -> None:
        path, reason = _clipped(path), _clipped(reason)
        super().__init__(f"{path}: {reason}")
        self.kind = kind
        self.path = path
        self.reason = reason


class Faults(Exception):
    """The faults of a line: one at least, `MOST_IN_LINE` at most."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(islice(faults, MOST_IN_LINE))
        super().__init__("; ".join(map(str, self.faults)))


def _clipped(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 3] + "..."


def too_deep() -> Fault:
    """Return what is wrong with a line that no reader gets to the bottom of."""
    return Fault(Kind.TOO_DEEP, "$", "is nested too deeply")


class _NoNumber(Exception):
    pass


def _refuse_constant(name: str) -> None:
    raise _NoNumber(name)


def diagnose(line: bytes) -> Fault:
    """Return why a line cannot be read as JSON."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        reason = f"is not UTF-8: byte 0x{byte:02x} at position {error.start + 1} of the line"
        return Fault(Kind.NOT_UTF8, "$", f"{reason}; convert the file, such as with iconv -f CP1251 -t UTF-8")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except _NoNumber as error:
        return Fault(Kind.NOT_A_NUMBER, "$", f"has {error}, which JSON does not know: write null, or leave it out")
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        return Fault(Kind.NOT_JSON, "$", f"is not JSON: {reason} at character {error.pos + 1}")
    except RecursionError:
        return too_deep()
    except ValueError as error:  # a number of thousands of digits
        return Fault(Kind.NOT_JSON, "$", f"is not JSON that can be read: {error}"[:200])
    try:
        path = _surrogate_in(value)
    except RecursionError:
        return too_deep()
    if path is not None:
        reason = r"has half of a surrogate pair (such as \ud800), which is no character"
        return Fault(Kind.LONE_SURROGATE, f"${path}", reason)
    return Fault(Kind.NOT_JSON, "$", "is not JSON")


def _surrogate_in(value: Any) -> str | None:
    """Return the path, below this value, of the first text with half a surrogate pair; None if there is none.

    The path is put together on the way back from it: one for each value, only to be thrown away, would cost the square
    of a line.
    """
    if isinstance(value, str):
        return "" if _is_cut(value) else None
    if isinstance(value, dict):
        for key, item in value.items():
            if _is_cut(key):
                return ""
            if (found := _surrogate_in(item)) is not None:
                return f".{_clipped(key)}{found}"
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if (found := _surrogate_in(item)) is not None:
                return f"[{number}]{found}"
    return None


def _is_cut(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
