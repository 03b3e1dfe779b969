"""Bodies of requests as programs really send them: compressed, with a byte order mark, in UTF-16.

`decompressor` undoes gzip while a body arrives, so that no more than what is allowed is ever unpacked. `as_utf8`
returns JSON in the one encoding that all who read it here know; what is UTF-8 already is not touched.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from typing import Any

from modelyard.errors import EncodingNotAllowed, InvalidJson

#: What is unpacked in one go, before the other requests have their turn.
STEP = 256 * 1024
_BROKEN = "The body is not the gzip that its header Content-Encoding says: {}."


class Gunzip:
    """Unpacks one body, which may consist of several gzip members."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self._is_begun = False

    async def feed(self, data: bytes, room: int) -> bytes:
        """Return what a piece unpacks to: all of it, or a little more than `room` bytes if it is more than that.

        Raises:
            InvalidJson: it is no gzip.
        """
        found: list[bytes] = []
        size = 0
        while data and size <= room:
            if self._member.eof:
                self._member = zlib.decompressobj(wbits=31)
            self._is_begun = True
            try:
                part = self._member.decompress(data, min(STEP, room + 1 - size))
            except zlib.error as error:
                raise InvalidJson(_BROKEN.format(error)) from None
            size += len(part)
            found.append(part)
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            await asyncio.sleep(0)
        return b"".join(found)

    def finish(self) -> None:
        """Refuse a body that ends in the middle.

        Raises:
            InvalidJson: it does.
        """
        if self._is_begun and not self._member.eof:
            raise InvalidJson(_BROKEN.format("it ends in the middle"))


def decompressor(content_encoding: bytes | None) -> Gunzip | None:
    """Return what unpacks a body with this header; None where there is nothing to unpack.

    Raises:
        EncodingNotAllowed: it is packed in a way that is not known here, or twice.
    """
    name = (content_encoding or b"").strip().lower()
    if name in (b"", b"identity"):
        return None
    if name in (b"gzip", b"x-gzip"):
        return Gunzip()
    raise EncodingNotAllowed(name[:100].decode("latin-1"))


def as_utf8(body: bytes) -> bytes:
    """Return a JSON text in UTF-8 without a byte order mark, whichever of JSON's encodings it came in.

    Raises:
        InvalidJson: it begins like UTF-16 or UTF-32, and is not.
    """
    # JSON begins with an ASCII character, so that its first two bytes tell.
    if body[:1] < b"\x80" and b"\0" not in body[:2]:
        return body
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body
    if encoding == "utf-8-sig":
        return body[3:]
    try:
        return body.decode(encoding).encode()
    except UnicodeDecodeError as error:
        name = encoding.upper()
        raise InvalidJson(
            f"The body begins like {name}, and is not: {error.reason} (byte {error.start}). Send JSON in UTF-8."
        ) from None


#: Everything up to an escape that is half of a character: in JSON such a character is written as two escapes, a high
#: half and a low one right behind it. Nothing here is tried twice, so that it takes one pass whatever the text is.
_UP_TO_A_HALF = re.compile(
    rb"(?:[^\\]++"
    rb"|\\(?:[^u]|u(?![dD][89a-fA-F])|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))*+"
)
#: Of larger bodies it is only told at which byte it is.
LOCATED_BYTES = 1024 * 1024


def refuse_half_characters(body: bytes) -> None:
    """Refuse a JSON text in which an escape stands for half of a character, as some programs cut emoji.

    No engine can read such a text, and parsers say odd things of it.

    Raises:
        InvalidJson: it says where.
    """
    if b"\\ud" not in body and b"\\uD" not in body:
        return
    found = _UP_TO_A_HALF.match(body)
    at = found.end() if found is not None else 0
    if not re.match(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}", body[at : at + 6]):
        return
    field = _field_with_half(body) if len(body) <= LOCATED_BYTES else None
    where = f"'{field}' has" if field else "The body has"
    raise InvalidJson(
        f"{where} half of a character: the escape {body[at : at + 6].decode()} at byte {at} is one of the two that "
        "make up a character beyond U+FFFF (a surrogate pair), and the other one is not beside it. A text was cut "
        "within an emoji: cut it elsewhere, or put \\ufffd in the place of the half.",
        param=field,
    )


def _field_with_half(body: bytes) -> str | None:
    try:
        waiting: list[tuple[str, Any]] = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return None
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, str):
            if any("\ud800" <= char <= "\udfff" for char in value):
                return where[:200] or None
        elif isinstance(value, list):
            waiting += [(f"{where}[{number}]", item) for number, item in enumerate(value)][::-1]
        elif isinstance(value, dict):
            waiting += [(f"{where}.{name}" if where else name, item) for name, item in value.items()][::-1]
    return None
