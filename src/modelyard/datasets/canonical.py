"""The canonical form of a row: a conversation in OpenAI's chat format, or a text.

`forms` and `row_reading` make it of a line, `conversations.examine` checks it and brings its contents into order.
Structs only; what is JSON of them is `canonical_json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from modelyard.datasets.row_forms import Role


class Part(Struct, gc=False, forbid_unknown_fields=True):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Function(Struct, gc=False, forbid_unknown_fields=True):
    """The function that a tool call names; the canonical form has the arguments as an object."""

    name: str
    arguments: dict[str, Any] | str


class ToolCall(Struct, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """One call of a tool."""

    function: Function
    id: str | None = None
    type: str | UnsetType = "function"


class Message(Struct, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """One message.

    In the canonical form the content is text, or several parts that are text, which a model's template joins; or null
    in a message that only calls tools. Weight 0 is an answer that is not learnt.
    """

    role: Role
    content: str | list[Part] | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    weight: int | float | None = None
    reasoning_content: str | None = None


class Row(Struct, gc=False):
    """A conversation, or a text (which has no messages), and where in its line it comes from."""

    messages: list[Message]
    #: Each in OpenAI's envelope; rows with the same tools may share the objects.
    tools: list[Any] | None = None
    text: str | None = None
    #: Whether nulls were taken out of it.
    is_padded: bool = False
    #: The place of each message in the line; None: as the form has them, after `shift` messages that stand beside.
    spots: tuple[str, ...] | None = None
    shift: int = 0
    #: Keys of the line that mean nothing, as the place of the object and the key.
    ignored: tuple[tuple[str, str], ...] = ()


def texts_of(row: Row) -> Iterator[str]:
    """Yield all that is said in a canonical row."""
    if row.text is not None:
        yield row.text
    for message in row.messages:
        if message.reasoning_content:
            yield message.reasoning_content
        if isinstance(message.content, str):
            yield message.content
        elif isinstance(message.content, list):
            yield from (part.text or "" for part in message.content)


class _Conversation(Struct, gc=False, omit_defaults=True):
    messages: list[Message]
    tools: list[Any] | None = None


class _Text(Struct, gc=False):
    text: str


_encoder = msgspec.json.Encoder()


def canonical_json(row: Row) -> bytes:
    """Return a row that was examined as JSON on one line; reading it again gives the same row."""
    if row.text is not None:
        return _encoder.encode(_Text(row.text))
    messages = [message if type(message) is Message else _plain(message) for message in row.messages]
    return _encoder.encode(_Conversation(messages, row.tools))


def _plain(message: Message) -> Message:
    """Return a message without the keys that mean nothing, which a reader may have kept beside it."""
    return Message(
        message.role,
        message.content,
        message.tool_calls,
        message.tool_call_id,
        message.name,
        message.weight,
        message.reasoning_content,
    )
