"""The messages of a row in the two forms that training needs: for rendering, and as a client would send them.

For rendering they are the canonical form as plain objects, with weights, and arguments of calls as objects; a thought
stands before its answer in <think> tags, as models write it. A client sends no weights, and arguments as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from modelyard.datasets.canonical import Message, Row
from modelyard.trainer.completions import THOUGHT


def messages_of(row: Row) -> list[dict[str, Any]]:
    """Return the messages of a canonical row, weights included."""
    return [_message(message) for message in row.messages]


def _message(message: Message) -> dict[str, Any]:
    content: Any = message.content
    if isinstance(content, list):
        content = [{"type": "text", "text": part.text or ""} for part in content]
    if message.reasoning_content:
        content = _with_thought(message.reasoning_content, content)
    said: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        said["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        said["name"] = message.name
    if message.weight is not None:
        said["weight"] = message.weight
    return said


def _with_thought(thought: str, content: Any) -> Any:
    before = f"<think>\n{thought.strip()}\n</think>\n\n"
    if isinstance(content, list):
        return [{"type": "text", "text": before + content[0]["text"]}, *content[1:]]
    return before + (content or "")


def split_thought(content: Any) -> tuple[str | None, Any]:
    """Return an answer's thought, which is in tags before it, and the answer; None for the thought if it has none.

    The answer is a text, or parts that are text.
    """
    if isinstance(content, list):
        thought, first = split_thought(content[0]["text"] if content else None)
        return thought, content if thought is None else [{"type": "text", "text": first}, *content[1:]]
    if content is None or (found := THOUGHT.match(content)) is None:
        return None, content
    return found[1].strip(), content[found.end() :]


def as_sent(messages: Sequence[dict[str, Any]], *, takes_thoughts: bool = False) -> list[dict[str, Any]]:
    """Return messages as a client sends them: no weights, and the arguments of calls as text.

    `takes_thoughts`: thoughts go beside the content, as `reasoning`, since the chat template takes them there.
    """
    sent = []
    for message in messages:
        said = {key: value for key, value in message.items() if key != "weight"}
        if takes_thoughts and said["role"] == "assistant":
            thought, said["content"] = split_thought(said.get("content"))
            said.update({} if thought is None else {"reasoning": thought})
        if "tool_calls" in said:
            said["tool_calls"] = [
                {
                    "id": call.get("id") or "",
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": msgspec.json.encode(call["function"]["arguments"]).decode(),
                    },
                }
                for call in said["tool_calls"]
            ]
        sent.append(said)
    return sent
