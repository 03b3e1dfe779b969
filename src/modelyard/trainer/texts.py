"""Rows that are one text, of which every token is learnt: cut into pieces, with the token that ends a text after it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

from modelyard.trainer.labels import IGNORED
from modelyard.trainer.rendering import Renderer

#: A longer text is tokenised in parts: its tokens' places take a hundred times the memory of the tokens.
PART_CHARACTERS = 256 * 1024


def parts(text: str) -> Iterator[str]:
    """Yield a text in parts of that length at most, cut at ends of lines or spaces, where tokens end anyway."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        end = start + PART_CHARACTERS
        cut = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end)
        cut = cut if cut > start else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def first_ids(tokenizer: Any) -> array[int]:
    """Return the tokens that the tokenizer puts before each text, as it does before a completion's prompt."""
    bare = list(tokenizer("x", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("x")["input_ids"])
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return array("i", whole[:at])


def end_id(renderer: Renderer) -> int:
    """Return the token that ends a text: the tokenizer's own, or the first that the engine stops at."""
    end = renderer.tokenizer.eos_token_id
    return int(min(renderer.stop_ids) if end is None else end)


def pieces(ids: array[int], limit: int) -> Iterator[tuple[array[int], array[int]]]:
    """Yield tokens and labels of `limit` tokens at most; nothing is learnt of the first, before which nothing is.

    Each piece begins with the token that the one before it ends with, so that all others are learnt.
    """
    for start in range(0, max(1, len(ids) - 1), max(1, limit - 1)):
        piece = ids[start : start + limit]
        if len(piece) > 1:
            yield piece, array("i", [IGNORED]) + piece[1:]
