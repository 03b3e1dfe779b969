"""Texts as tokens, with the characters that each stands for: no more of them than somebody asked for.

Of a text with more than `most_tokens` only the beginning is tokenised. Pieces of one row often begin alike, each with
all that was said before it: of such a one only what follows on the shared beginning is tokenised, from a stop token on
that both have. That is the same: such a token splits a text before anything else looks at it, so that what is before
it has no effect on what follows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

#: Characters that a token stands for on average at most; where it is more, a text is tokenised again, twice as far.
TOKEN_CHARACTERS = 8
#: Tokens beyond those asked for: at the place where a text was cut, they may not be those of the whole text.
MARGIN = 64
#: Shared beginnings that are shorter are not looked for.
SHARED_CHARACTERS = 512


class Encoded:
    """A text's tokens, of which as many `characters` were tokenised, from its beginning on.

    With `before`, the first `taken` tokens are those of that one, up to character `at`, and the encoding is of what
    follows them and the stop token at their end, which is its first.
    """

    def __init__(
        self, encoding: Any, characters: int, before: Encoded | None = None, taken: int = 0, at: int = 0
    ) -> None:
        self.ids: array[int] = (
            array("i", encoding.ids) if before is None else before.ids[:taken] + array("i", encoding.ids[1:])
        )
        self.characters = characters
        self._encoding = encoding
        self._before = before
        self._at, self._taken = at, taken
        # Where the encoding's characters and tokens are in the whole.
        self._shift = at - encoding.token_to_chars(0)[1] if before is not None else 0
        self._first = taken - 1 if before is not None else 0

    def token_at(self, character: int) -> int | None:
        """Return the token that a character belongs to; None: to none."""
        here = self
        while here._before is not None and character < here._at:
            here = here._before
        found = here._encoding.char_to_token(character - here._shift)
        return None if found is None else int(found) + here._first

    def characters_of(self, token: int) -> tuple[int, int]:
        """Return the characters [start, end) that a token stands for."""
        here = self
        while here._before is not None and token < here._taken:
            here = here._before
        start, end = here._encoding.token_to_chars(token - here._first)
        return int(start) + here._shift, int(end) + here._shift


class Encoder:
    """Encodes with a tokenizer of the library tokenizers. `stop_ids` are tokens that may split a text."""

    def __init__(self, tokens: Any, stop_ids: Iterable[int], most_tokens: int | None = None) -> None:
        self._tokens = tokens
        self._most = most_tokens
        known = tokens.get_added_tokens_decoder()
        self._stops = {
            token.content: one for one in stop_ids
            if (token := known.get(one)) is not None and token.special and not token.normalized
        }  # fmt: skip

    def count(self, text: str) -> int:
        """Return how many tokens a text has; of one with more than `most_tokens` no more than about as many."""
        (encoding,) = self._batch([text[: self._window()]])
        return len(encoding)

    def encode(self, rows: Sequence[Sequence[str]]) -> list[list[Encoded]]:
        """Return the texts of each row as tokens."""
        texts, ends = [], []
        for row in rows:
            for number, text in enumerate(row):
                end, stop = self._shared(row[number - 1], text) if number else (0, "")
                ends.append((end, stop))
                texts.append(stop + text[end:])
        encodings = iter(self._encodings(texts))
        found = []
        places = iter(ends)
        for row in rows:
            encoded: list[Encoded] = []
            for text in row:
                encoding, characters = next(encodings)
                end, stop = next(places)
                encoded.append(self._joined(text, encoding, characters, end, stop, encoded))
            found.append(encoded)
        return found

    def _joined(
        self, text: str, encoding: Any, characters: int, end: int, stop: str, before: Sequence[Encoded]
    ) -> Encoded:
        if not stop:
            return Encoded(encoding, characters)
        wanted = self._stops[stop]
        last = before[-1].token_at(end - 1) if before[-1].characters >= end else None
        is_split = last is not None and before[-1].ids[last] == wanted and before[-1].characters_of(last)[1] == end
        if not is_split or last is None or not encoding.ids or encoding.ids[0] != wanted:
            ((encoding, characters),) = self._encodings([text])
            return Encoded(encoding, characters)
        return Encoded(encoding, end + characters - len(stop), before[-1], last + 1, end)

    def _shared(self, one: str, other: str) -> tuple[int, str]:
        """Return where the last stop token ends that two texts have in the beginning which they share, and its text."""
        length = _shared_characters(one, other)
        if length < SHARED_CHARACTERS:
            return 0, ""
        return max(((other.rfind(stop, 0, length) + len(stop), stop) for stop in self._stops if stop in other[:length]),
                   default=(0, ""))  # fmt: skip

    def _encodings(self, texts: Sequence[str]) -> list[tuple[Any, int]]:
        """Return each text's encoding and how many of its characters that has."""
        window = self._window()
        found = []
        encodings = self._batch([text[:window] for text in texts])
        for text, encoding in zip(texts, encodings, strict=True):
            taken = len(text) if window is None else min(window, len(text))
            while taken < len(text) and self._most is not None and len(encoding.ids) < self._most + MARGIN:
                taken = min(2 * taken, len(text))
                (encoding,) = self._batch([text[:taken]])
            found.append((encoding, taken))
        return found

    def _batch(self, texts: list[str]) -> list[Any]:
        # Never `encode`, which would keep the watchdog's thread from running (`stall_watch`).
        found: list[Any] = self._tokens.encode_batch(texts, add_special_tokens=False)
        return found

    def _window(self) -> int | None:
        return None if self._most is None else TOKEN_CHARACTERS * (self._most + MARGIN)


def _shared_characters(one: str, other: str) -> int:
    """Return how many characters two texts begin with together."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
