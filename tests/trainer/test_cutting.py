"""What of a conversation surely lies beyond the length of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from modelyard.trainer.cutting import within


def said(*words: int, thought: str = "") -> list[dict[str, Any]]:
    """Messages of so many words in turn, the user's first."""
    return [
        {"role": "user", "content": "word " * count} if number % 2 == 0
        else {"role": "assistant", "content": f"{thought}{'word ' * count}"}
        for number, count in enumerate(words)
    ]  # fmt: skip


def kept(messages: Sequence[dict[str, Any]], limit: int) -> int:
    found = within(messages, limit, lambda text: len(text.split()))
    assert found == list(messages[: len(found)])
    return len(found)


@pytest.mark.parametrize(
    ("words", "limit", "count"),
    [
        ([3, 3, 3, 3], 100, 4),
        # Each counts one less: eight for certain where the fifth begins, ten where the sixth does.
        ([4, 3, 3, 2, 3, 3], 8, 5),
        ([4, 3, 3, 2, 3, 3], 100, 6),
        # The one that goes beyond is kept: some of it may be within.
        ([100, 3, 3], 8, 1),
        ([2, 100, 3, 3], 8, 2),
        ([2] * 1000, 8, 9),
    ],
)
def test_what_begins_after_more_tokens_than_a_row_may_have_is_left_out(
    words: list[int], limit: int, count: int
) -> None:
    assert kept(said(*words), limit) == count


def test_a_conversation_that_is_short_in_characters_is_not_counted_at_all() -> None:
    def never(text: str) -> int:
        raise AssertionError(text)

    assert len(within(said(2, 2), 100, never)) == 2


def test_no_more_is_counted_than_is_needed() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return len(text.split())

    within(said(*[10] * 500), 50, count)
    assert len(counted) < 10


def test_thoughts_do_not_count_as_templates_leave_them_out_of_earlier_turns() -> None:
    thought = "<think>" + "hm " * 100 + "</think>"
    assert kept(said(2, 2, 2, 2, thought=thought), 50) == 4
    assert kept(said(2, 2, 2, 2, thought=thought.replace("think>", "b>")), 50) == 2


def test_arguments_of_calls_count_whatever_they_are_made_of() -> None:
    call = {"function": {"name": "edit", "arguments": {"file": {"lines": ["word " * 40, 7, None]}}}}
    row: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert kept(row * 10, 20) == 2
    assert kept(row * 2, 100) == 4


def test_content_in_parts_counts() -> None:
    parts = [{"type": "text", "text": "word " * 20}, {"type": "text", "text": "word " * 20}]
    assert kept([{"role": "user", "content": parts}] * 9, 60) == 2
