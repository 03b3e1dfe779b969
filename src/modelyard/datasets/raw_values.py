"""JSON values that are decoded one by one, and what is found out about them: faults, and keys that mean nothing."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Raw

from modelyard.datasets.faults import MOST_IN_LINE, Fault, Kind
from modelyard.datasets.row_forms import MARKS, MEDIA_REASON, Mark

#: What decoders raise at a line that is not theirs.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
Fields = dict[str, Raw]
decode_any: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
decode_fields: msgspec.json.Decoder[Fields] = msgspec.json.Decoder(Fields)
decode_items: msgspec.json.Decoder[list[Raw]] = msgspec.json.Decoder(list[Raw])
decode_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)
_EMPTY = (b"null", b"[]", b"{}", b'""', b"false")


class TooManyFaults(Exception):
    """As many faults were found as a line tells."""


class Findings:
    """The faults of a row, and those of its keys that mean nothing."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._ignored: dict[tuple[str, str], None] = {}

    def _fault(self, kind: Kind, path: str, reason: str) -> None:
        self._add(Fault(kind, path, reason))

    def _add(self, fault: Fault) -> None:
        self.faults.append(fault)
        if len(self.faults) >= MOST_IN_LINE:
            raise TooManyFaults

    def _ignore(self, place: str, name: str) -> None:
        self._ignored[place, name] = None

    def _decoded(self, decoder: msgspec.json.Decoder[Any], raw: Raw, path: str) -> Any:
        """Return the value; None after a fault."""
        try:
            return decoder.decode(raw)
        except msgspec.ValidationError as error:
            self._add(fault_of(error, path))
            return None

    def _media(self, raw: Raw, path: str) -> None:
        if not is_empty(raw):
            self._fault(Kind.WRONG_VALUE, path, MEDIA_REASON)

    def _learns(self, name: str, raw: Raw, path: str, place: str) -> bool | None:
        """Return whether a mark says that something is learnt; None: it says nothing, or is a fault."""
        mark = MARKS[name]
        if mark is Mark.PARTIAL:
            reason = "says which parts are learnt, which is not kept: mark whole messages with weight 0 instead"
            self._fault(Kind.WRONG_VALUE, path, reason)
            return None
        value = self._decoded(decode_any, raw, path)
        if isinstance(value, bool) and mark is not Mark.WEIGHT:
            return value
        if mark is Mark.VERDICT:
            self._ignore(place, name)
            return None
        if isinstance(value, int | float) and value in (0, 1):
            return bool(value)
        wanted = "0 or 1" if mark is Mark.WEIGHT else "true or false"
        self._fault(Kind.WRONG_VALUE, path, f"is {shown(raw)}, but must be {wanted}")
        return None


def is_null(raw: Raw) -> bool:
    """Return True for null."""
    return len(memoryview(raw)) == 4 and bytes(raw) == b"null"


def is_empty(raw: Raw) -> bool:
    """Return True for a value with nothing in it: null, false, an empty text, list or object, or a list of such."""
    view = memoryview(raw)
    if len(view) > 64:
        return False
    text = bytes(view)
    return text in _EMPTY or (text[:1] in b"[{" and _holds_nothing(text))


def _holds_nothing(text: bytes) -> bool:
    try:
        value = decode_any.decode(text)
    except UNREADABLE:
        return False
    return not value or (isinstance(value, list) and not any(value))


def shown(raw: Raw) -> str:
    """Return a value for a sentence: the beginning of a long one."""
    text = bytes(memoryview(raw)[:60]).decode("utf-8", "replace")
    return text if len(memoryview(raw)) <= 60 else f"{text}..."


_AT = re.compile(r"^(.*?)(?: - at `(?:key in )?\$(.*)`)?$", re.DOTALL)
_TYPES = {"str": "text", "object": "an object", "array": "an array", "null": "null", "int": "a number"} | {
    "float": "a number",
    "bool": "true or false",
}


def fault_of(error: msgspec.ValidationError, base: str) -> Fault:
    """Return what a decoder found wrong below a place, as a fault."""
    matched = _AT.match(str(error))
    assert matched is not None
    said, path = matched[1], base + (matched[2] or "")
    if missing := re.match(r"Object missing required field `(.*)`", said):
        return Fault(Kind.MISSING_FIELD, f"{path}.{missing[1]}", "is missing")
    if wrong := re.match(r"Expected `(.*)`, got `(.*)`", said):
        wanted = " or ".join(dict.fromkeys(_TYPES.get(name, name) for name in wrong[1].split(" | ")))
        return Fault(Kind.WRONG_VALUE, path, f"is {_TYPES.get(wrong[2], wrong[2])}, but must be {wanted}")
    return Fault(Kind.WRONG_VALUE, path, f"{said[:1].lower()}{said[1:]}")


def key_name(ignored: tuple[str, str]) -> str:
    """Return a key that means nothing with its place, such as `messages[].avatar`."""
    place, key = ignored
    return f"{place}.{key}" if place else key
