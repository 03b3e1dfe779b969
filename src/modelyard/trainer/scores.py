"""Scores of texts: how like an answer is to the one that was wanted, and whether an adapter is better than its base.

ROUGE-L is computed by the library rouge-score, on words of our own: its own splitting knows no letter but a to z, so
that of a Russian or Chinese answer nothing would be left. For English text both split alike. Nothing here needs torch.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import cache, lru_cache
from typing import Any

from modelyard.trainer.certainty import Lowered

#: Scripts that put no space between words: each of their characters counts as a word.
UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "BOPOMOFO ")
#: Words of a text that are compared: the comparison takes the product of two lengths.
MOST_WORDS = 2000


def words(text: str) -> list[str]:
    """Return the words of a text of any script, in lower case; of one that has none, its signs."""
    found: list[str] = []
    is_open = False
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = _kind(character)
        if kind == "mark":
            if found and is_open:
                found[-1] += character
        elif kind == "alone":
            found.append(character)
            is_open = True
        elif kind == "letter":
            if is_open and _kind(found[-1][0]) == "letter":
                found[-1] += character
            else:
                found.append(character)
            is_open = True
        else:
            is_open = False
    return found or [character for character in text if not character.isspace()]


@lru_cache(maxsize=65536)
def _kind(character: str) -> str:
    """Return what a character is to a word: a letter of it, a mark on one, a word alone, or none of these."""
    category = unicodedata.category(character)
    if category.startswith("M"):
        return "mark"
    if category[0] in "LN":
        return "alone" if unicodedata.name(character, "").startswith(UNSPACED) else "letter"
    return ""


class _Words:
    """The splitter of texts that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)[:MOST_WORDS]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(reference: str, answer: str) -> float:
    """Return ROUGE-L's F-measure, from 0 to 1: the longest common subsequence of words. Two empty texts are alike."""
    if not reference.strip() or not answer.strip():
        return float(reference.strip() == answer.strip())
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


def is_exact(reference: str, answer: str) -> bool:
    """True if an answer is the one that was wanted, but for space around it."""
    return reference.strip() == answer.strip()


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, None of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else None


class Verdict(StrEnum):
    """The verdict of the rows that were held back on an adapter."""

    BETTER = "better"
    NOT_BETTER = "not_better"
    #: Too few rows, or too little of a difference.
    CANNOT_TELL = "cannot_tell"


def verdict(base: Mapping[str, Any], adapter: Mapping[str, Any], lower: Lowered | None) -> tuple[Verdict, str]:
    """Return whether the adapter is better than its base, and why, in one sentence with the numbers.

    Better is a loss per token that is surely lower, with neither fewer exact answers nor a lower ROUGE-L. A score that
    is no number is never better. `lower` is how much lower the loss is (`certainty.lowered`).
    """
    loss = f"loss per token {_shown(base['loss'])} → {_shown(adapter['loss'])}"
    exact = f"exact answers {_percent(base['exact_match'])} → {_percent(adapter['exact_match'])}"
    rouge = f"ROUGE-L {_shown(base['rouge_l'])} → {_shown(adapter['rouge_l'])}"
    rows = adapter["rows"]
    numbers = f"{loss}, {exact}, {rouge}, on {rows} {'row that was' if rows == 1 else 'rows that were'} held back"
    is_a_number = all(_is_number(side["loss"]) for side in (base, adapter))
    is_higher = not is_a_number or (lower is not None and lower.high <= 0)
    worse = [
        what
        for what, is_worse in (
            ("its loss is not lower", is_higher),
            ("it gives fewer exact answers", _is_lower(adapter["exact_match"], base["exact_match"])),
            ("its answers are less like those wanted", _is_lower(adapter["rouge_l"], base["rouge_l"])),
        )
        if is_worse
    ]
    if worse:
        return Verdict.NOT_BETTER, f"Not better: {' and '.join(worse)} ({numbers})."
    if lower is None:
        return Verdict.CANNOT_TELL, f"Can't tell: two rows at least are needed to be sure of anything ({numbers})."
    if lower.low <= 0:
        return Verdict.CANNOT_TELL, (
            f"Can't tell: of so few rows, or so little of a difference, the true one may be anything from "
            f"{_shown(-lower.low)} higher to {_shown(lower.high)} lower, in 95 of 100 cases ({numbers})."
        )
    return Verdict.BETTER, f"Better: {numbers}."


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _is_lower(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one < other


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}".replace("%", " %")
