"""What can be wrong with a line, where in it, and in words for whoever made it.

`diagnose` says why a line is no JSON that can be read. It is slow, and only for lines that have been refused already.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What can be wrong with a line; the report counts by it."""

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
    #: JSON, but none of the forms.
    UNKNOWN_FORM = "unknown_form"
    #: A field that is missing.
    MISSING_FIELD = "missing_field"
    #: A field of the wrong type or with a value that it cannot have.
    WRONG_VALUE = "wrong_value"
    #: A role in a place where no chat template takes it.
    WRONG_ORDER = "wrong_order"
    #: No assistant's message with anything to learn.
    NOTHING_TO_LEARN = "nothing_to_learn"


class Fault(Exception):
    """Something is wrong with a line: where in it (a JSON path, '$' for the line itself) and what."""

    def __init__(self, kind: Kind, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.kind = kind
        self.path = path
        self.reason = reason


class Faults(Exception):
    """All that is wrong with a line, one at least."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = faults


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
    path = _surrogate_in(value)
    if path is not None:
        reason = r"has half of a surrogate pair (such as \ud800), which is no character"
        return Fault(Kind.LONE_SURROGATE, path, reason)
    return Fault(Kind.NOT_JSON, "$", "is not JSON")


def _surrogate_in(value: Any, path: str = "$") -> str | None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return path
        return None
    pairs: Iterator[tuple[str, Any]]
    if isinstance(value, dict):
        if any(_surrogate_in(key) for key in value):
            return path
        pairs = ((f"{path}.{key}", item) for key, item in value.items())
    elif isinstance(value, list):
        pairs = ((f"{path}[{number}]", item) for number, item in enumerate(value))
    else:
        return None
    try:
        return next((found for where, item in pairs if (found := _surrogate_in(item, where))), None)
    except RecursionError:
        return None
