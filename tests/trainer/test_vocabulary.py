"""Rows with tokens that the model's embedding does not have."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.trainer import vocabulary


class Tokens:
    """A tokenizer that has a name for each id."""

    def convert_ids_to_tokens(self, one: int) -> str:
        return f"<|{one}|>"


def check(rows: Any, *texts: list[int]) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=rows))
    vocabulary.check("acme/tiny", config, Tokens(), [array("i", ids) for ids in texts])


@pytest.mark.parametrize("rows", [None, 0, 100])
def test_rows_whose_tokens_the_model_has_are_taken(rows: int | None) -> None:
    check(rows, [0, 99, 3], [], [99])


def test_tokens_without_a_row_of_the_embedding_are_named_with_their_ids_and_its_size() -> None:
    with pytest.raises(JobFailure) as caught:
        check(100, [1, 2], [3, 101, 100], [101])
    assert caught.value.code == "tokens_beyond_embedding"
    assert "'<|100|>' (id 100), '<|101|>' (id 101). Its embedding has 100 rows" in caught.value.message


def test_of_many_such_tokens_some_are_named() -> None:
    with pytest.raises(JobFailure, match=r"\(id 104\) and 45 more"):
        check(100, list(range(150)))
