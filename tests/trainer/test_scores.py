"""Scores of answers: words of any script, ROUGE-L, and when an adapter counts as better."""

from __future__ import annotations

import math
from typing import Any

import pytest

from modelyard.trainer.scores import is_exact, rouge_l, verdict, words
from tests.fixtures import missing


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Hello, World! It's 3.5", ["hello", "world", "it", "s", "3", "5"]),
        ("Ёлка — это дерево.", ["ёлка", "это", "дерево"]),
        ("你好，世界 ok", ["你", "好", "世", "界", "ok"]),
        ("カタカナ", ["カ", "タ", "カ", "ナ"]),
        ("हिन्दी में लिखा", ["हिन्दी", "में", "लिखा"]),
        ("a你b", ["a", "你", "b"]),
        ("ﬁne ＡＢＣ", ["fine", "abc"]),
        ("+ ->", ["+", "-", ">"]),
        ("  \n", []),
    ],
)
def test_a_text_of_any_script_has_words(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_english_is_split_as_the_library_splits_it() -> None:
    try:
        from rouge_score.tokenize import tokenize
    except ImportError as error:
        missing("engine", str(error))
    text = "The Volga (3,530 km) isn't Asia's longest river; it's Europe's: see chapter 4.2, e.g. 'Rivers'."
    assert words(text) == tokenize(text, None)


def scored(reference: str, answer: str) -> float:
    try:
        return rouge_l(reference, answer)
    except ImportError as error:
        missing("engine", str(error))


def test_rouge_l_is_the_longest_common_subsequence_of_words() -> None:
    # 3 of 3 wanted words in their order, among 4: precision 3/4, recall 1.
    assert scored("Волга впадает в", "Волга не впадает в") == pytest.approx(2 * 0.75 / 1.75)
    assert scored("one two three", "three two one") == pytest.approx(1 / 3)
    assert scored("The Volga.", "the volga") == 1.0
    assert scored("你好世界", "你好") == pytest.approx(2 * 0.5 / 1.5)


def test_nothing_is_like_nothing_and_unlike_all_else() -> None:
    assert (rouge_l("", "  "), rouge_l("x", ""), rouge_l("", "x")) == (1.0, 0.0, 0.0)
    assert scored("!!", "!!") == 1.0


def test_an_exact_answer_may_have_space_around_it_and_nothing_else() -> None:
    assert is_exact("The Volga.", " The Volga.\n")
    assert not is_exact("The Volga.", "The volga.")


def side(loss: float | None, exact: float | None = 0.5, rouge: float | None = 0.5) -> dict[str, Any]:
    return {"loss": loss, "exact_match": exact, "rouge_l": rouge, "rows": 8}


@pytest.mark.parametrize(
    ("base", "adapter", "better", "says"),
    [
        (
            side(2.0),
            side(1.0, 0.75, 0.875),
            True,
            "Better: loss per token 2.000 → 1.000, exact answers 50.0 % → 75.0 %",
        ),
        (side(2.0), side(1.0), True, "on 8 rows that were held back."),
        (side(2.0), side(2.0), False, "Not better: its loss is not lower (loss"),
        (side(2.0), side(3.0, 1.0, 1.0), False, "its loss is not lower"),
        (side(2.0), side(1.0, 0.4, 0.5), False, "it gives fewer exact answers"),
        (side(2.0), side(1.0, 0.5, 0.4), False, "its answers are less like those wanted"),
        (side(2.0), side(3.0, 0.4, 0.4), False, "exact answers and its answers are less like"),
        (side(2.0), side(math.nan), False, "its loss is not lower"),
        (side(math.nan), side(1.0), False, "its loss is not lower"),
        (side(None), side(None), False, "unknown → unknown"),
    ],
)
def test_better_is_a_lower_loss_with_answers_that_are_no_worse(
    base: dict[str, Any], adapter: dict[str, Any], better: bool, says: str
) -> None:
    found, why = verdict(base, adapter)
    assert found is better
    assert says in why
    assert why.count(".\n") == 0
    assert why.endswith(".")
