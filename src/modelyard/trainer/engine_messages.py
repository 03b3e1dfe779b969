"""Messages, calls and tools in the form in which the engine hands them to a chat template.

Also the refusal of a row that cannot be had in that form, or rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]


class Refused(Exception):
    """A row cannot be learnt from with this model; the message says why."""


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message whose content is one, or parts of text."""
    content = message["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else str(content)


def as_engine_call(call: Mapping[str, Any]) -> Message:
    """Return a call with its arguments as an object."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {**call, "function": {**call["function"], "arguments": arguments or {}}}


def as_engine_tools(tools: Sequence[Any] | None) -> list[Any] | None:
    """Return tools with the fields, and in the order, that the engine gives them: templates print them as JSON."""
    if not tools:
        return None
    given = []
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Refused(f'tool {number + 1} is not {{"type": "function", "function": {{"name": ...}}}}')
        known: Message = {key: function.get(key) for key in ("name", "description", "parameters")}
        if function.get("strict") is not None:
            known["strict"] = function["strict"]
        given.append({"type": "function", "function": known})
    return given
