"""Rendered pieces as tokens and labels: which token is learnt, decided by the characters that it stands for.

A piece is tokenised once, as the engine tokenises a rendered prompt, and each span's characters are found again by
the tokens' offsets. Where a span's edge would cut a token, the prompt and what follows it are tokenised each for
itself, which is what happens in service. Every span ends in a stop token that it has nowhere else, or the row is
refused. That the prompt's tokens are those of the prompt alone is checked on the first rows of each run, and on all
from then on if it ever does not hold.

No more is tokenised than is asked for (`encoded`): of a long text as many characters as make `most_tokens`, and of a
piece that begins as the one before it only what follows on that.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelyard.errors import JobFailure
from modelyard.trainer.encoded import Encoded, Encoder
from modelyard.trainer.engine_messages import Refused
from modelyard.trainer.rendering import Piece, Renderer

IGNORED = -100
#: Spans whose prompt is tokenised by itself to see that offsets tell the truth.
CHECKED_SPANS = 256


@dataclass(frozen=True)
class Labelled:
    """Tokens and, at the places that are learnt, the same again (else IGNORED); both are 32-bit integers.

    The last span begins at token `answer_at`.
    """

    input_ids: array[int]
    labels: array[int]
    answer_at: int
    turn: int


class _Cut(Exception):
    pass


class Labeller:
    """Tokenises for a renderer, `most_tokens` of a piece and a few more; None: all of it.

    Raises:
        JobFailure: `unsupported_tokenizer` where there are no offsets.
    """

    def __init__(self, renderer: Renderer, most_tokens: int | None = None) -> None:
        backend = getattr(renderer.tokenizer, "backend_tokenizer", None)
        if backend is None:
            kind = type(renderer.tokenizer).__name__
            raise JobFailure(
                "unsupported_tokenizer",
                f"The model's tokenizer ({kind}) cannot say which characters a token stands for.",
                "Choose a model with a tokenizer.json.",
            )
        # A copy: its post-processor would trim offsets, and has no other effect without special tokens.
        self._tokens: Any = copy.deepcopy(backend)
        self._tokens.post_processor = None
        self._tokens.no_truncation()
        self._tokens.no_padding()
        self._encoder = Encoder(self._tokens, renderer.stop_ids, most_tokens)
        self._stops = renderer.stop_ids
        self._stop_text = renderer.stop_text
        self._to_check = CHECKED_SPANS

    def ids(self, text: str) -> array[int]:
        """Return the tokens of a rendered text."""
        return array("i", self._encoded(text))

    def count(self, text: str) -> int:
        """Return how many tokens a text has by itself; of one with more than `most_tokens`, about as many."""
        return self._encoder.count(text)

    def label(self, rows: Sequence[Sequence[Piece]]) -> list[list[Labelled] | Refused]:
        """Return for each row its pieces as tokens, or why it is refused; a piece may have become one per span.

        Of a piece longer than `most_tokens` there are so many tokens at least; a span's end beyond them is not seen.
        """
        encoded = self._encoder.encode([[piece.text for piece in row] for row in rows])
        found: list[list[Labelled] | Refused] = []
        for row, encodings in zip(rows, encoded, strict=True):
            try:
                try:
                    found.append([self._labelled(*pair) for pair in zip(row, encodings, strict=True)])
                except _Cut:
                    found.append([self._apart(piece, span) for piece in row for span in piece.spans])
            except Refused as refused:
                found.append(refused)
        return found

    def _labelled(self, piece: Piece, encoded: Encoded) -> Labelled:
        ids = encoded.ids
        labels = array("i", [IGNORED]) * len(ids)
        first = len(ids)
        for start, end in piece.spans:
            if start >= encoded.characters:
                first = len(ids)
                break
            first, last = self._tokens_of(encoded, start, min(end, encoded.characters))
            if self._to_check:
                if self.ids(piece.text[:start]) != ids[:first]:
                    self._to_check = -1
                    raise _Cut
                self._to_check -= self._to_check > 0
            if end <= encoded.characters:
                self._check_stop(ids[first : last + 1])
            labels[first : last + 1] = ids[first : last + 1]
        return Labelled(ids, labels, first, piece.turn)

    @staticmethod
    def _tokens_of(encoded: Encoded, start: int, end: int) -> tuple[int, int]:
        first, last = encoded.token_at(start), encoded.token_at(end - 1)
        if first is None or last is None or encoded.characters_of(first)[0] != start:
            raise _Cut
        if (first and encoded.characters_of(first - 1)[1] > start) or encoded.characters_of(last)[1] != end:
            raise _Cut
        return first, last

    def _apart(self, piece: Piece, span: tuple[int, int]) -> Labelled:
        start, end = span
        prompt, whole = self.ids(piece.text[:start]), self._decoded(self.ids(piece.text[:end]))
        # Some tokenizers put a space before a text, but not after a special token.
        for before in ("", self._stop_text):
            answer = self.ids(before + piece.text[start:end])[bool(before) :]
            if self._decoded(prompt + answer) == whole:
                self._check_stop(answer)
                return Labelled(prompt + answer, array("i", [IGNORED]) * len(prompt) + answer, len(prompt), piece.turn)
        raise Refused("the chat template's prompt ends inside a token, which this tokenizer cannot take apart")

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokens.decode_batch([list(ids)], skip_special_tokens=False)[0])

    def _encoded(self, text: str) -> list[int]:
        # As a batch of one: `encode` would keep the watchdog's thread from running (`stall_watch`).
        ids: list[int] = self._tokens.encode_batch([text], add_special_tokens=False)[0].ids
        return ids

    def _check_stop(self, ids: Sequence[int]) -> None:
        if not ids or ids[-1] not in self._stops:
            raise Refused("its answer does not end in a stop token: the chat template's is not one token")
        if sum(one in self._stops for one in ids) > 1:
            raise Refused("its answer has a stop token in it, after which nothing would be said")
