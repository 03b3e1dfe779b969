"""A conversation without what surely lies beyond the length of a row: it need be neither rendered nor tokenised.

A template renders a conversation once for each turn that is learnt. Of one with hundreds of turns of which the first
thirty are within `max_seq_len`, all the others would be rendered for nothing, each with all that was said before it.
What is left out here begins after more tokens than a row may have, counted from below: the texts of messages alone,
without what the template adds, and without thoughts, which templates leave out of turns that are over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

#: Rows of fewer characters a token of the limit are not counted: they have little that could be left out.
COUNTED_CHARACTERS = 3
#: How thoughts end in an answer's text.
THOUGHT_ENDS = ("</think>", "</thinking>", "</thought>", "</seed:think>", "</reasoning>", "[/THINK]", "◁/think▷")

Message = dict[str, Any]


def within(messages: Sequence[Message], limit: int, count: Callable[[str], int]) -> list[Message]:
    """Return the messages of which some token may be among the first `limit` of a rendering, in their order.

    Args:
        messages: Canonical ones (`messages.messages_of`).
        limit: Tokens.
        count: Returns how many tokens a text has; of one with more than `limit` it may be any number above that.
    """
    if sum(len(text) for message in messages for text in _texts(message)) <= COUNTED_CHARACTERS * limit:
        return list(messages)
    tokens = 0
    for number, message in enumerate(messages):
        if tokens > limit:
            return list(messages[:number])
        for text in _texts(message):
            # One that is joined with its neighbour.
            tokens += max(0, count(_without_thought(message, text)) - 1)
            if tokens > limit:
                break
    return list(messages)


def _texts(message: Message) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, Sequence):
        yield from (str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    for call in message.get("tool_calls") or ():
        yield from _strings(call["function"].get("arguments"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _without_thought(message: Message, text: str) -> str:
    if message["role"] != "assistant":
        return text
    return text[max((text.rfind(end) + len(end) for end in THOUGHT_ENDS if end in text), default=0) :]
