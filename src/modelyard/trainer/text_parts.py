"""Joins the text parts of a message into one text, as the model's template, or the engine before it, does.

vLLM 0.32 (`renderers/chat_utils.py`) hands parts over as a list where the template goes through it as one, and else
joined by newlines, as it always does with what a tool said. How a template joins a list is seen by rendering one with
two marked parts. A row is then rendered both ways once: what cannot be said as one text is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Said = Sequence[Mapping[str, Any]]
_FIRST, _SECOND = "qzvjxa", "bqzvjx"


class PartsError(Exception):
    """The template does not join parts in a way that one text has, too."""


class Joiner:
    """Joins parts for one template; remembers how it does so in messages of each role."""

    def __init__(self, takes_parts: bool) -> None:
        self._takes_parts = takes_parts
        self._between: dict[str, str] = {}

    def joined(self, messages: Said, render: Callable[[Said], str]) -> list[Mapping[str, Any]]:
        """Return the messages with a text for each list of parts; `render` is the template, of either.

        Raises:
            PartsError: the template makes something of the parts that it does not make of any one text.
        """
        lists = [
            number
            for number, message in enumerate(messages)
            if self._takes_parts and isinstance(message.get("content"), list) and message["role"] != "tool"
        ]
        plain = [
            {**message, "content": "\n".join(_texts(message))}
            if isinstance(message.get("content"), list) and number not in lists
            else message
            for number, message in enumerate(messages)
        ]
        if not lists:
            return plain
        wanted = render(plain)
        for trimmed in (False, True):
            found = list(plain)
            for number in lists:
                between = self._separator(messages[number]["role"], render)
                texts = [text.strip() if trimmed else text for text in _texts(messages[number])]
                found[number] = {**messages[number], "content": between.join(texts)}
            if render(found) == wanted:
                return found
        raise PartsError("the chat template does not join the text parts of a message as one text; write one text")

    def _separator(self, role: str, render: Callable[[Said], str]) -> str:
        if role not in self._between:
            message = {"role": role, "content": [{"type": "text", "text": text} for text in (_FIRST, _SECOND)]}
            before = [{"role": "user", "content": "x"}] if role == "assistant" else []
            after = [{"role": "user", "content": "x"}] if role == "system" else []
            text = render([*before, message, *after])
            _, first, rest = text.partition(_FIRST)
            between, second, _ = rest.partition(_SECOND)
            if not (first and second):
                raise PartsError(f"the chat template leaves out parts of messages whose role is {role}")
            self._between[role] = between
        return self._between[role]


def _texts(message: Mapping[str, Any]) -> list[str]:
    return [part["text"] for part in message["content"]]
