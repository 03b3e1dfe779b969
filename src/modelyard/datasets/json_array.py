"""Reads one JSON array as a stream of its elements, each on a line of its own, in memory for one element.

An element is given out as it is written, but for the ends of lines in it, which can only lie between its values:
whether it is a row is for the validation to say. What lies around the elements must be right, or the file is refused.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from modelyard.errors import InvalidDataset
from modelyard.plurals import counted

#: Least characters that are read at once.
_STEP = 64 * 1024
#: So near to the end of what was read, an error may only say that a word or an escape is cut.
_NEAR_END = 16
_SPACE = re.compile(r"[ \t\r\n]*")

# Values are thrown away: a number of a million digits shall cost nothing.
_decode = json.JSONDecoder(parse_int=lambda text: None, parse_float=lambda text: None).raw_decode


def elements(blocks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield the elements of an array, each as one line with its end.

    Raises:
        InvalidDataset: the array is no JSON, is not UTF-8, ends early, is followed by more, or has an element that is
            longer than `max_bytes`; says after which element.
    """
    text = _Text(blocks)
    if text.next() == "\ufeff":
        text.at += 1
        text.next()
    text.at += 1  # past the bracket, by which the file was recognised
    number = 0
    if text.next() != "]":
        while True:
            end = _end_of(text, number + 1, max_bytes)
            if end is None:
                raise _early(number)
            yield text.buffer[text.at : end].replace("\n", " ").replace("\r", " ").encode() + b"\n"
            number += 1
            text.at = end
            follows = text.next()
            if follows == "]":
                break
            if follows != ",":
                what = f"has {follows!r} where a comma or its end is due"
                raise _wrong(what, number) if follows else _early(number)
            text.at += 1
            if text.next() == "]":
                raise _wrong("has a comma before its end: take that out", number)
    text.at += 1
    if text.next():
        rest = text.buffer[text.at : text.at + 20]
        raise _wrong(f"has ended, but {rest!r} follows: a file is one array, or one object on each line", number)


def _end_of(text: _Text, number: int, max_bytes: int) -> int | None:
    """Return where the element ends that is next; None if the file ends first."""
    while True:
        try:
            _, end = _decode(text.buffer, text.at)
            # A number may go on in what comes next.
            if end < len(text.buffer) or text.buffer[end - 1] in '}]"' or text.has_ended:
                return int(end)
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated")
            if text.has_ended and (is_cut or error.pos >= len(text.buffer)):
                return None
            if text.has_ended or not (is_cut or error.pos > len(text.buffer) - _NEAR_END):
                said = f"{error.msg[:1].lower()}{error.msg[1:]} at its character {error.pos - text.at + 1}"
                raise _wrong(f"is no JSON in element {number}: {said}", number - 1) from None
        except RecursionError:
            raise _wrong(f"is nested too deeply in element {number}", number - 1) from None
        waiting = len(text.buffer) - text.at
        if waiting > max_bytes:
            raise InvalidDataset(
                f"Element {number} of the JSON array is longer than the {max_bytes / (1024 * 1024):g} MiB that a row "
                "may have (MODELYARD_DATASET_LINE_MIB).",
                code="array_damaged",
            )
        text.more(max(_STEP, waiting))  # twice as much each time: no element is read again and again


class _Text:
    """The part of a text that has been read; all before `at` has been given out."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read_bytes = 0
        self.buffer = ""
        self.at = 0
        self.has_ended = False

    def next(self) -> str:
        """Go to the next character that is no space, and return it; "" at the end."""
        while True:
            found = _SPACE.match(self.buffer, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.buffer) or self.has_ended:
                return self.buffer[self.at : self.at + 1]
            self.more(_STEP)

    def more(self, characters: int) -> None:
        """Read that many more characters, or to the end, and forget what has been given out."""
        pieces = [self.buffer[self.at :]]
        self.at = got = 0
        while got < characters and not self.has_ended:
            block = next(self._blocks, None)
            self.has_ended = block is None
            try:
                piece = self._decoder.decode(block or b"", final=block is None)
            except UnicodeDecodeError as error:
                byte, at = error.object[error.start], self._read_bytes + error.start
                raise InvalidDataset(
                    f"The JSON array is not UTF-8: byte 0x{byte:02x}, {at:,} bytes or so from its beginning; convert "
                    "the file, such as with iconv -f CP1251 -t UTF-8.",
                    code="array_damaged",
                ) from None
            self._read_bytes += len(block or b"")
            got += len(piece)
            pieces.append(piece)
        self.buffer = "".join(pieces)


def _early(number: int) -> InvalidDataset:
    return InvalidDataset(
        f"The JSON array ends early, after {counted(number, 'whole element')}: the rest of it is missing. Send the "
        "whole file.",
        code="array_damaged",
    )


def _wrong(what: str, number: int) -> InvalidDataset:
    return InvalidDataset(f"The JSON array {what} (after {counted(number, 'whole element')}).", code="array_damaged")
