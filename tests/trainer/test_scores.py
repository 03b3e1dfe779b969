"""Scores of answers: words of any script, ROUGE-L, and when an adapter counts as better."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from modelyard.trainer.certainty import Lowered, lowered
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


LOWER, MAYBE, HIGHER = Lowered(1.0, 0.5, 1.5), Lowered(0.1, -0.2, 0.4), Lowered(-1.0, -1.5, -0.5)


@pytest.mark.parametrize(
    ("base", "adapter", "lower", "found", "says"),
    [
        (
            side(2.0),
            side(1.0, 0.75, 0.875),
            LOWER,
            "better",
            "Better: loss per token 2.000 → 1.000, exact answers 50.0 % → 75.0 %",
        ),
        (side(2.0), side(1.0), LOWER, "better", "on 8 rows that were held back."),
        (side(2.0), side(1.9), MAYBE, "cannot_tell", "from 0.200 higher to 0.400 lower, in 95 of 100 cases"),
        (side(2.0), side(1.9, 1.0, 1.0), MAYBE, "cannot_tell", "Can't tell: "),
        (side(2.0), side(1.0), None, "cannot_tell", "two rows at least"),
        (side(2.0), side(3.0, 1.0, 1.0), HIGHER, "not_better", "Not better: its loss is not lower (loss"),
        (side(2.0), side(1.0, 0.4, 0.5), LOWER, "not_better", "it gives fewer exact answers"),
        (side(2.0), side(1.0, 0.5, 0.4), MAYBE, "not_better", "its answers are less like those wanted"),
        (side(2.0), side(3.0, 0.4, 0.4), HIGHER, "not_better", "exact answers and its answers are less like"),
        (side(2.0), side(math.nan), None, "not_better", "its loss is not lower"),
        (side(math.nan), side(1.0), None, "not_better", "its loss is not lower"),
        (side(None), side(None), None, "not_better", "unknown → unknown"),
    ],
)
def test_better_is_a_loss_that_is_surely_lower_with_answers_that_are_no_worse(
    base: dict[str, Any], adapter: dict[str, Any], lower: Lowered | None, found: str, says: str
) -> None:
    verdict_, why = verdict(base, adapter, lower)
    assert verdict_ == found
    assert says in why
    assert why.count(".\n") == 0
    assert why.endswith(".")


def test_an_interval_has_the_true_difference_in_it_as_often_as_it_says() -> None:
    chance = random.Random(5)
    # Rows of unlike length, whose losses differ much more than base and adapter do.
    for count in (2, 3, 8, 40):
        covered = 0
        for _ in range(1500):
            tokens = [chance.randint(10, 30) for _ in range(count)]
            base = [chance.gauss(50.0, 20.0) for _ in range(count)]
            adapter = [loss - chance.gauss(0.2, 0.1) * many for loss, many in zip(base, tokens, strict=True)]
            found = lowered(list(zip(base, tokens, strict=True)), list(zip(adapter, tokens, strict=True)))
            assert found is not None
            assert found.low < found.mean < found.high
            covered += found.low <= 0.2 <= found.high
        assert 0.92 <= covered / 1500 <= 0.985, count


def test_few_rows_are_less_sure_than_many_with_the_same_differences() -> None:
    base, adapter = [(10.0, 5), (20.0, 5)], [(9.0, 5), (17.0, 5)]
    few, many = lowered(base, adapter), lowered(base * 20, adapter * 20)
    assert few is not None
    assert many is not None
    assert few.mean == pytest.approx(many.mean) == pytest.approx(0.4)
    assert not few.is_sure
    assert many.is_sure
    # Two rows whose residuals are 1 and -1 token losses: t is 12.706.
    assert few.low == pytest.approx(0.4 - 12.706 * math.sqrt(2 * 2) / 10)


@pytest.mark.parametrize("rows", [[], [(1.0, 3)], [(1.0, 3), (2.0, 0)], [(1.0, 3), (math.nan, 3)]])
def test_of_one_row_or_of_no_number_nothing_is_said(rows: list[tuple[float, int]]) -> None:
    assert lowered(rows, [(0.5, 3)] * len(rows)) is None
