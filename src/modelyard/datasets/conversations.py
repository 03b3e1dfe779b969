"""The check of a conversation: whether it can be learnt from, and what it is in the one canonical form.

Refused: no answer of the assistant to anybody with anything in it (or all of weight 0), a system message that is not
the first, a tool message that does not follow a tool call, content that is not text, tools that are no functions.
Warned of: what some chat templates refuse, empty messages, and nulls that were taken out. `forms.RowReader` and
`examine` are what validation, the rows of the API and a trainer have in common: a row that passed means the same to
all of them, and only a model's own template may refuse it later. Pure functions; nothing here knows of files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from msgspec import UNSET

from modelyard.datasets.canonical import Message, Row
from modelyard.datasets.faults import MOST_IN_LINE, Fault, Faults, Kind
from modelyard.datasets.forms import PlainRow
from modelyard.datasets.row_forms import Form, Role
from modelyard.datasets.tool_calls import make_call_canonical

WARNINGS = {
    "empty_content": "a message has no text",
    "not_alternating": "two messages of one role follow each other; some chat templates refuse that",
    "starts_with_assistant": "the assistant speaks first; some chat templates refuse that",
    "ends_without_answer": "the last message is not the assistant's: nothing is learnt from it",
    "null_padding": "nulls were taken out of a call's arguments or of tools: Arrow writes every key into every object",
}

NOBODY_ASKS = (
    "has nothing to learn: what the assistant says is learnt as an answer, and no user says anything before it; "
    'text to be learnt as it is goes into {"text": ...}'
)

#: What follows from longer conversations is not kept: a thousand of a million roles are a gigabyte.
MOST_KEPT_ROLES = 64


@dataclass(frozen=True)
class Shape:
    """The roles of a conversation, judged by themselves whatever their messages are."""

    roles: tuple[Role, ...]
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]
    has_tools: bool


#: A row without messages.
TEXT = Shape((), (), (), False)


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
    if not faults and not learnt_turns((role, True) for role in roles):
        faults.append(Fault(Kind.NOTHING_TO_LEARN, "$.messages", NOBODY_ASKS))
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
    if row.text is not None:
        if not row.text or row.text.isspace():
            raise Faults([Fault(Kind.NOTHING_TO_LEARN, "$.text", "is empty")])
        return TEXT, len(row.text), ()
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
            or message.reasoning_content is not None
        ):
            break
        characters += len(content)
    else:
        if not shape.faults and not shape.has_tools and not row.is_padded:
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
    characters, callable_now, is_padded = 0, False, row.is_padded
    turns: list[tuple[str, bool]] = []
    for number, message in enumerate(row.messages):
        if len(faults) >= MOST_IN_LINE:
            break
        where = f"$.messages[{number}]"
        try:
            is_padded |= _make_canonical(message, where)
        except Fault as fault:
            faults.append(fault)
            continue
        characters += _length(message)
        says_something = bool(message.tool_calls) or not is_blank(message.content)
        if not says_something:
            warnings["empty_content"] = None
        turns.append((message.role, says_something and message.weight != 0))
        if message.role == "assistant":
            callable_now = bool(message.tool_calls)
        elif message.role == "tool" and not callable_now and form is not Form.SHAREGPT and not shape.faults:
            faults.append(Fault(Kind.WRONG_ORDER, f"{where}.role", "is tool, but no tool_calls go before it"))
        elif message.role != "tool":
            callable_now = False
    if is_padded:
        warnings["null_padding"] = None
    if not faults and not learnt_turns(turns):
        faults.append(Fault(Kind.NOTHING_TO_LEARN, "$.messages", _nothing_learnt(row)))
    if faults:
        raise Faults(_in_words_of(form, faults, row))
    return shape, characters, tuple(warnings)


def learnt_turns(turns: Iterable[tuple[str, bool]]) -> list[int]:
    """Return the turns that are learnt: the assistant's, after somebody spoke to it.

    Each turn is its role, and whether there is something in it that is to be learnt. Validation and trainer ask this
    one function.
    """
    spoken, learnt = False, []
    for number, (role, has_something) in enumerate(turns):
        if role in ("user", "tool"):
            spoken = True
        elif role == "assistant" and spoken and has_something:
            learnt.append(number)
    return learnt


def is_blank(content: Any) -> bool:
    """Return True for content with nothing to read in it: a text, or parts, as structs or as objects."""
    if not isinstance(content, list):
        return not content or bool(content.isspace())
    return all(is_blank(part["text"] if isinstance(part, dict) else part.text) for part in content)


def _nothing_learnt(row: Row) -> str:
    if all(message.weight == 0 or message.role != "assistant" for message in row.messages):
        return "has nothing to learn: every message of the assistant is marked as not to be learnt (weight 0)"
    return "has nothing to learn: every message of the assistant is empty or has weight 0"


def _length(message: Message) -> int:
    """Return the characters of a canonical message."""
    content = message.content
    if isinstance(content, str):
        length = len(content)
    else:
        length = sum(len(part.text or "") for part in content) if isinstance(content, list) else 0
    if message.tool_calls:
        length += sum(len(call.function.name) for call in message.tool_calls)
    return length + len(message.reasoning_content or "")


def _make_canonical(message: Message, where: str) -> bool:
    """Bring what a message holds into the canonical form, and return whether Arrow's nulls were taken out of it."""
    content, is_padded = message.content, False
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type not in ("text", "input_text", "output_text"):
                reason = f"is {part.type[:40]!r}: only text can be learnt"
                raise Fault(Kind.WRONG_VALUE, f"{where}.content[{number}].type", reason)
            if part.text is None:
                raise Fault(Kind.MISSING_FIELD, f"{where}.content[{number}].text", "is missing")
            part.type = "text"
        # Several are joined by the model's template, each in its own way.
        message.content = content if len(content) > 1 else "".join(part.text or "" for part in content)
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
            is_padded |= make_call_canonical(call, f"{where}.tool_calls[{number}]")
        if not message.tool_calls:
            message.tool_calls = None
    if message.weight is not None and message.weight not in (0, 1):
        raise Fault(Kind.WRONG_VALUE, f"{where}.weight", f"is {message.weight}, but must be 0 or 1")
    if message.reasoning_content is not None:
        if message.reasoning_content and message.role != "assistant":
            reason = "is only for messages of the assistant"
            raise Fault(Kind.WRONG_VALUE, f"{where}.reasoning_content", reason)
        message.reasoning_content = message.reasoning_content or None
    return is_padded


_PLACES: dict[Form, Callable[[int], str]] = {
    Form.MESSAGES: lambda number: f"$.messages[{number}]",
    Form.SHAREGPT: lambda number: f"$.conversations[{number}]",
    Form.PROMPT_COMPLETION: lambda number: ("$.prompt", "$.completion")[number],
    Form.INSTRUCTION: lambda number: ("$.instruction", "$.output")[number],
}
#: Where a conversation as a whole is.
_WHOLE = {
    Form.SHAREGPT: "$.conversations",
    Form.PROMPT_COMPLETION: "$.completion",
    Form.INSTRUCTION: "$.output",
}
_NUMBER = re.compile(r"^\$\.messages(?:\[(\d+)\](.*))?$", re.DOTALL)


def _in_words_of(form: Form, faults: list[Fault], row: Row) -> list[Fault]:
    """Return the faults with the places that the line itself has."""
    if form is Form.MESSAGES and row.spots is None and not row.shift:
        return faults
    return [Fault(fault.kind, _place(form, fault.path, row), fault.reason) for fault in faults]


def _place(form: Form, path: str, row: Row) -> str:
    matched = _NUMBER.match(path)
    if matched is None:
        return path
    if matched[1] is None:
        return _WHOLE.get(form, path)
    number, rest = int(matched[1]), matched[2]
    if row.spots is not None:
        spot = row.spots[number]
    else:
        spot = _PLACES[form](number - row.shift) if number >= row.shift else "$.system"
    if spot.startswith("$.conversations["):
        rest = re.sub(r"^\.(role|content|tool_calls\b.*)", lambda found: _OF_A_TURN.get(found[1], ".value"), rest)
    elif not spot.endswith("]") or spot.startswith("$.history"):
        rest = ""  # the value is the text itself
    return spot + rest


_OF_A_TURN = {"role": ".from"}
