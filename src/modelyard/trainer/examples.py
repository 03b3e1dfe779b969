"""Rows as they are learnt, held back and probed: what `rows` makes, and training, scores and checks read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """Something to learn from: labels are as long as the ids, IGNORED (-100) where nothing is learnt, not shifted.

    Both are arrays of 32-bit integers where `prepare` made them: a list of Python's takes nine times the memory.
    """

    line: int
    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class HeldOut:
    """A row that is not learnt from: its last answer as a question that a model can be asked.

    `messages` and `tools` are the request, `prompt_ids` what the engine makes of it, and `answer` the text that should
    come back, special tokens left out. `example` measures the loss; a text, in which nobody is asked, has only that.
    """

    line: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    prompt_ids: Sequence[int]
    answer: str
    example: Example


@dataclass(frozen=True)
class Probe:
    """A request, and the tokens that the engine must make of its prompt if it is to fit what was learnt."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    token_ids: list[int]


@dataclass(frozen=True)
class Prepared:
    """A dataset's prepared rows. `facts` are JSON; `template` is the chat template that all was rendered with.

    `ordinary` are the texts that `retention` reads beside them, none where it is off.
    """

    train: list[Example]
    held_out: list[HeldOut]
    probes: list[Probe]
    facts: dict[str, Any]
    template: str
    ordinary: list[Example]


@dataclass(frozen=True, slots=True)
class Kept:
    """A row that can be learnt from."""

    line: int
    examples: list[Example]
    is_cut: bool
    #: Tokens before its last answer; None of a text.
    prompt_length: int | None
    #: The same for exact duplicates only.
    key: bytes
