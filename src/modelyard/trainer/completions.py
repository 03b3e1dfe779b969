"""Finds in a rendered conversation the text that a model has to say after the engine's prompt. Pure functions on text.

A rendered answer begins most often with the prompt that asks for it, and what follows is the completion. Where the
prompt ends in an opening that rendered answers lack, the engine asks with it all the same: an open thought is closed
before the answer, and after any other opening (a thought that is closed already, a fixed sentence) comes the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

THOUGHT = re.compile(r"(?<!\s)\s*<think>(.*?)</think>(\s*)", re.DOTALL)
_OPEN_THOUGHT = re.compile(
    r"\A\s*(?P<tag>[<\[](?P<name>[\w:.-]*(?:think|thought|reason)[\w:.-]*)[>\]])\s*", re.IGNORECASE
)
_SPEAKS_OF_THOUGHTS = re.compile(r"think|thought", re.IGNORECASE)

#: Appended to a text to see whether a rendering depends on it.
MARK = " qzvjx"
_CLOSED = (
    "the chat template's prompt closes the thought before an answer, so that the answer's thought cannot be learnt: "
    "leave it out of the row"
)


class NoCompletionError(Exception):
    """A rendered answer does not follow on the prompt; the message says how."""


@dataclass(frozen=True)
class Opening:
    """The end of a prompt, where answers are rendered in another way.

    `base` characters of the prompt are in rendered answers too; `text` follows in the prompt, `instead` in an answer,
    before its content. `is_fixed`: `text` is the same whatever was asked.
    """

    base: int
    text: str
    instead: str
    is_fixed: bool


def completion(
    prompt: str, answered: str, content: str, around: tuple[str, str], opening: Callable[[], Opening | None]
) -> str:
    """Return what the model has to say after the prompt, by the rendering of the conversation with its answer.

    Args:
        prompt: The engine's.
        answered: The same conversation with the answer.
        content: The answer's text, with its thought.
        around: A text before the answer, and one at its beginning.
        opening: Looks how the prompt ends; asked only where the answer does not begin with it.

    Raises:
        NoCompletionError: nothing follows on the prompt.
    """
    thought = THOUGHT.match(content)
    if answered.startswith(prompt):
        rest = answered[len(prompt) :]
        if not thought or "</think>" in rest:
            return rest
        return _closed("<think>" + thought[1], "</think>", thought[2], rest)
    same = shared(prompt, answered)
    if thought and not prompt[same:].strip():
        return answered[same:]
    found = opening()
    if found is not None and thought and _closes_thoughts(found, len(prompt)):
        raise NoCompletionError(_CLOSED)
    if found is None or not found.is_fixed or not answered.startswith(prompt[: found.base]):
        # A template may word the last message differently, or put something before it: its end is the same.
        after = _after_the_same_end(prompt, answered, *around)
        if after is not None:
            return after
        raise NoCompletionError(_differs(prompt, answered))
    rest = answered[found.base :]
    tag = _OPEN_THOUGHT.fullmatch(found.text)
    closing = f"{tag['tag'][0]}/{tag['name']}{tag['tag'][-1]}" if tag else ""
    if found.instead.strip() and found.text.endswith(found.instead):
        return rest.removeprefix(found.instead)
    if found.instead.strip():
        if not found.text.strip() or (tag and found.instead.lstrip().startswith(closing)):
            return rest
        raise NoCompletionError(_differs(prompt, answered))
    rest = rest.removeprefix(found.instead)
    if not tag:
        return rest
    if not thought:
        return f"\n{closing}\n\n{rest}"
    if closing in rest:
        raise NoCompletionError(_differs(prompt, answered))
    body = thought[1].removeprefix("\n") if found.text.endswith("\n") else thought[1]
    return _closed(body, closing, thought[2], rest)


def shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with together."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (this, that) in pairs if this != that), min(len(one), len(other)))


def shared_end(one: str, other: str) -> str:
    """Return what two texts end with together."""
    length = shared(one[::-1], other[::-1])
    return one[len(one) - length :]


def has_calls(calls: Sequence[Mapping[str, Any]], text: str, depends_on: Callable[[dict[str, Any]], bool]) -> bool:
    """True if all of the calls are in the text, or at least make a difference to it."""
    for number, call in enumerate(calls):
        function = call["function"]
        name, arguments = function["name"], function["arguments"]
        if (
            arguments
            and name in text
            and any(json.dumps(arguments, ensure_ascii=ascii_only) in text for ascii_only in (False, True))
        ):
            continue
        for change in ({"name": name + MARK.strip()}, {"arguments": {**arguments, MARK.strip(): MARK}}):
            changed = {**call, "function": {**function, **change}}
            if not depends_on({"tool_calls": [*calls[:number], changed, *calls[number + 1 :]]}):
                return False
    return True


def _closes_thoughts(opening: Opening, length: int) -> bool:
    """Return True if prompts of this length end in a thought that is over, or leave no place for one."""
    is_over = _SPEAKS_OF_THOUGHTS.search(opening.text) is not None and _OPEN_THOUGHT.fullmatch(opening.text) is None
    return opening.base == length or is_over


def _closed(body: str, closing: str, gap: str, rest: str) -> str:
    return f"{body}{closing}{'' if rest[:1].isspace() else gap}{rest}"


def _differs(prompt: str, answered: str) -> str:
    same = shared(prompt, answered)
    return (
        f"the chat template's prompt for an answer ends with {prompt[same:][-40:]!r}, which is not how it renders the "
        f"answer ({answered[same : same + 40]!r})"
    )


def _after_the_same_end(prompt: str, answered: str, question: str, answer: str) -> str | None:
    """Return what follows in `answered` on the end of the prompt, if that end has the question in it."""
    ahead = answered.rfind(answer) if answer else -1
    best, length = 0, 0
    for at in range(ahead, max(ahead - 100, 0), -1):
        same = shared(prompt[::-1], answered[at - 1 :: -1])
        if same > length:
            best, length = at, same
    return answered[best:] if length and question.strip() in prompt[len(prompt) - length :] else None
