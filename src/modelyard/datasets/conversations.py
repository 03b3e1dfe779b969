"""The check of a conversation: whether it can be learnt from, and what it is in the one canonical form.

Refused: no message of the assistant with anything in it (or all of weight 0), a system message that is not the first,
a tool message that does not follow a tool call, content that is not text. Warned of: what some chat templates refuse,
and empty messages. `forms.read_row` and `examine` are what validation, the rows of the API and a trainer have in
common: a row that passed means the same to all of them. Pure functions; nothing here knows of files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import msgspec
from msgspec import UNSET

from modelyard.datasets.faults import MOST_IN_LINE, Fault, Faults, Kind
from modelyard.datasets.forms import Form, Message, PlainRow, Role, Row, SystemBeside, ToolCall

WARNINGS = {
    "empty_content": "a message has no text",
    "not_alternating": "two messages of one role follow each other; some chat templates refuse that",
    "starts_with_assistant": "the assistant speaks first; some chat templates refuse that",
    "ends_without_answer": "the last message is not the assistant's: nothing is learnt from it",
}

#: What follows from longer conversations is not kept: a thousand of a million roles are a gigabyte.
MOST_KEPT_ROLES = 64


@dataclass(frozen=True)
class Shape:
    """The roles of a conversation, judged by themselves whatever their messages are."""

    roles: tuple[Role, ...]
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]
    has_tools: bool


def shape_of(roles: tuple[Role, ...]) -> Shape:
    """Return what follows from the order of the roles, of which short conversations have few different ones."""
    return _kept_shape_of(roles) if len(roles) <= MOST_KEPT_ROLES else _shape_of(roles)


@lru_cache(maxsize=1024)
def _kept_shape_of(roles: tuple[Role, ...]) -> Shape:
    return _shape_of(roles)


def _shape_of(roles: tuple[Role, ...]) -> Shape:
    faults: list[Fault] = []
    if not roles:
        faults.append(Fault(Kind.NOTHING_TO_LEARN, "$.messages", "is empty"))
    elif "assistant" not in roles:
        faults.append(Fault(Kind.NOTHING_TO_LEARN, "$.messages", "has no message of the assistant: nothing to learn"))
    for number, role in enumerate(roles):
        if len(faults) >= MOST_IN_LINE:
            break
        if role == "system" and number > 0:
            faults.append(
                Fault(Kind.WRONG_ORDER, f"$.messages[{number}].role", "is system, which may only be the first message")
            )
        if role == "tool" and (number == 0 or roles[number - 1] not in ("assistant", "tool")):
            faults.append(
                Fault(Kind.WRONG_ORDER, f"$.messages[{number}].role", "is tool, but no call of a tool goes before it")
            )
    spoken = roles[1:] if roles[:1] == ("system",) else roles
    warnings = []
    if spoken[:1] == ("assistant",):
        warnings.append("starts_with_assistant")
    if any(this == that and this != "tool" for this, that in pairwise(spoken)):
        warnings.append("not_alternating")
    if spoken and spoken[-1] != "assistant":
        warnings.append("ends_without_answer")
    return Shape(roles, tuple(faults), tuple(warnings), "tool" in roles)


def examine(row: Row, form: Form = Form.MESSAGES) -> tuple[Shape, int, tuple[str, ...]]:
    """Return the row's shape, the characters of its contents and what to warn of; makes the row canonical.

    Raises:
        Faults: it cannot be learnt from.
    """
    messages = row.messages
    shape = shape_of(tuple([message.role for message in messages]))
    characters = 0
    for message in messages:
        content = message.content
        if (
            type(content) is not str
            or not content
            or content.isspace()
            or message.tool_calls is not None
            or message.weight is not None
        ):
            break
        characters += len(content)
    else:
        if not shape.faults and not shape.has_tools:
            return shape, characters, shape.warnings
    return _examine_closely(row, shape, form)


def lengths_if_plain(rows: Iterable[PlainRow]) -> tuple[list[int], Counter[tuple[Role, ...]]] | None:
    """Return the characters of each row and how often each order of roles is there; None if one needs a closer look."""
    lengths: list[int] = []
    orders: list[tuple[Role, ...]] = []
    for row in rows:
        roles: list[Role] = []
        characters = 0
        for message in row.messages:
            content = message.content
            if not content or content.isspace():
                return None
            roles.append(message.role)
            characters += len(content)
        lengths.append(characters)
        orders.append(tuple(roles))
    counted = Counter(orders)
    for order in counted:
        shape = shape_of(order)
        if shape.faults or shape.warnings or shape.has_tools:
            return None
    return lengths, counted


def _examine_closely(row: Row, shape: Shape, form: Form) -> tuple[Shape, int, tuple[str, ...]]:
    faults = list(shape.faults)
    warnings = dict.fromkeys(shape.warnings)
    characters, learnt, callable_now = 0, False, False
    for number, message in enumerate(row.messages):
        if len(faults) >= MOST_IN_LINE:
            break
        where = f"$.messages[{number}]"
        try:
            _make_canonical(message, where)
        except Fault as fault:
            faults.append(fault)
            continue
        content = message.content
        assert content is None or isinstance(content, str)
        characters += len(content or "") + sum(len(call.function.name) for call in message.tool_calls or ())
        is_empty = not content or content.isspace()
        if is_empty and not message.tool_calls:
            warnings["empty_content"] = None
        if message.role == "assistant":
            callable_now = bool(message.tool_calls)
            learnt = learnt or (not (is_empty and not message.tool_calls) and message.weight != 0)
        elif message.role == "tool" and not callable_now and form is Form.MESSAGES and not shape.faults:
            faults.append(Fault(Kind.WRONG_ORDER, f"{where}.role", "is tool, but no tool_calls go before it"))
        elif message.role != "tool":
            callable_now = False
    if not faults and not learnt:
        reason = "has nothing to learn: every message of the assistant is empty or has weight 0"
        faults.append(Fault(Kind.NOTHING_TO_LEARN, "$.messages", reason))
    if faults:
        raise Faults(_in_words_of(form, faults, isinstance(row, SystemBeside)))
    return shape, characters, tuple(warnings)


def _make_canonical(message: Message, where: str) -> None:
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type not in ("text", "input_text", "output_text"):
                reason = f"is {part.type[:40]!r}: only text can be learnt"
                raise Fault(Kind.WRONG_VALUE, f"{where}.content[{number}].type", reason)
            if part.text is None:
                raise Fault(Kind.MISSING_FIELD, f"{where}.content[{number}].text", "is missing")
        # As the engine joins them when the model is in service.
        message.content = "\n".join(part.text or "" for part in content)
    elif content is None or content is UNSET:
        if message.role != "assistant" or not message.tool_calls:
            wrong = Kind.MISSING_FIELD if content is UNSET else Kind.WRONG_VALUE
            reason = "is missing" if content is UNSET else "is null, which only a message with tool_calls may have"
            raise Fault(wrong, f"{where}.content", reason)
        message.content = None
    if message.tool_calls is not None:
        if message.role != "assistant" and message.tool_calls:
            raise Fault(Kind.WRONG_VALUE, f"{where}.tool_calls", "is only for messages of the assistant")
        for number, call in enumerate(message.tool_calls):
            _make_call_canonical(call, f"{where}.tool_calls[{number}]")
        if not message.tool_calls:
            message.tool_calls = None
    if message.weight is not None and message.weight not in (0, 1):
        raise Fault(Kind.WRONG_VALUE, f"{where}.weight", f"is {message.weight}, but must be 0 or 1")


def _make_call_canonical(call: ToolCall, where: str) -> None:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            call.function.arguments = _arguments.decode(arguments or "{}")
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            raise Fault(Kind.WRONG_VALUE, f"{where}.function.arguments", "is text that is no JSON object") from None


_arguments: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])

_PLACES: dict[Form, Callable[[str], str]] = {
    Form.SHAREGPT: lambda path: (
        path.replace("$.messages", "$.conversations").replace("].role", "].from").replace("].content", "].value")
    ),
    Form.PROMPT_COMPLETION: lambda path: "$.prompt" if "[0]" in path else "$.completion",
    Form.INSTRUCTION: lambda path: "$.instruction" if "[0]" in path else "$.output",
}
_NUMBER = re.compile(r"^\$\.messages\[(\d+)\]")


def _in_words_of(form: Form, faults: list[Fault], has_system_beside: bool) -> list[Fault]:
    """Return the faults with the places that the line itself has."""
    if form is Form.MESSAGES:
        return faults
    shift = int(has_system_beside)
    place = _PLACES[form]
    return [
        Fault(
            fault.kind,
            place(_NUMBER.sub(lambda found: f"$.messages[{int(found[1]) - shift}]", fault.path)),
            fault.reason,
        )
        for fault in faults
    ]


_encoder = msgspec.json.Encoder()


def canonical_json(row: Row) -> bytes:
    """Return a row that was examined as JSON on one line; reading it again gives the same row."""
    return _encoder.encode(row)
