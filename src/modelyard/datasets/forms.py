"""The forms that a row of a dataset may have, and how each becomes the one canonical form.

    messages           {"messages": [{"role", "content", "tool_calls"?, "tool_call_id"?, "name"?, "weight"?}], "tools"?}
    sharegpt           {"conversations": [{"from", "value"}], "system"?}
    prompt_completion  {"prompt", "completion"}: one question, one answer
    instruction        {"instruction", "input"?, "output"}: likewise; the input follows after a blank line

Each row is read by its own form, the first of these that its keys have; other keys mean nothing here, and of a key
that is there twice the last one counts. The canonical form is the first one. Whether a conversation can be learnt from
is for `conversations` to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from modelyard.datasets.faults import MOST_IN_LINE, Fault, Faults, Kind, diagnose, too_deep

ROLES = ("system", "user", "assistant", "tool")
Role = Literal["system", "user", "assistant", "tool"]


class Form(StrEnum):
    """The format of a row."""

    #: OpenAI's chat format, which is the canonical one.
    MESSAGES = "messages"
    #: Turns with "from" and "value".
    SHAREGPT = "sharegpt"
    #: One prompt and its completion.
    PROMPT_COMPLETION = "prompt_completion"
    #: Alpaca's instruction, input and output.
    INSTRUCTION = "instruction"


class Part(Struct, gc=False):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Function(Struct, gc=False):
    """The function that a tool call calls; the canonical form has the arguments as an object."""

    name: str
    arguments: dict[str, Any] | str


class ToolCall(Struct, gc=False, omit_defaults=True):
    """One call of a tool."""

    function: Function
    id: str | None = None
    type: str | UnsetType = "function"


class Message(Struct, gc=False, omit_defaults=True):
    """One message. In the canonical form the content is text, or null in a message that only calls tools."""

    role: Role
    content: str | list[Part] | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    weight: int | float | None = None


class Row(Struct, gc=False, omit_defaults=True):
    """A conversation in the canonical form, and the form in which it came."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class SystemBeside(Row, gc=False, omit_defaults=True):
    """One whose system message was not among the turns: places in the line are one less than in the messages."""


class Plain(Struct, gc=False):
    """A message with text and nothing else that means something."""

    role: Role
    content: str
    tool_calls: None = None
    weight: None = None
    # Read, so that what `Message` refuses is refused here.
    tool_call_id: str | None = None
    name: str | None = None


class PlainRow(Struct, gc=False):
    """A conversation of such messages."""

    messages: list[Plain]
    tools: None = None


class Turn(Struct, gc=False):
    """One turn of ShareGPT's form."""

    speaker: str = msgspec.field(name="from")
    value: str


class _ShareGpt(Struct, gc=False):
    conversations: list[Turn]
    system: str | None = None
    messages: Raw | UnsetType = UNSET


class _PromptCompletion(Struct, gc=False):
    prompt: str
    completion: str
    messages: Raw | UnsetType = UNSET
    conversations: Raw | UnsetType = UNSET


class _Instruction(Struct, gc=False):
    instruction: str
    output: str
    input: str | None = None
    messages: Raw | UnsetType = UNSET
    conversations: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    completion: Raw | UnsetType = UNSET


#: The fields that would make a row one of an earlier form.
_EARLIER: dict[type, tuple[str, ...]] = {
    _ShareGpt: ("messages",),
    _PromptCompletion: ("messages", "conversations"),
    _Instruction: ("messages", "conversations", "prompt", "completion"),
}
SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_STRUCTS: dict[Form, type[Struct]] = {
    Form.MESSAGES: Row,
    Form.SHAREGPT: _ShareGpt,
    Form.PROMPT_COMPLETION: _PromptCompletion,
    Form.INSTRUCTION: _Instruction,
}
_DECODERS: dict[Form, msgspec.json.Decoder[Any]] = {form: msgspec.json.Decoder(kind) for form, kind in _STRUCTS.items()}
#: The fields whose items are looked at one by one.
_ITEMS: dict[str, type[Struct]] = {"messages": Message, "conversations": Turn}
#: Name, whether it must be there, and what reads it.
_FIELDS: dict[type[Struct], list[tuple[str, bool, msgspec.json.Decoder[Any]]]] = {
    kind: [
        (field.encode_name, field.required, msgspec.json.Decoder(field.type))
        for field in msgspec.structs.fields(kind)
        if field.type != Raw | UnsetType
    ]
    for kind in (*_STRUCTS.values(), *_ITEMS.values())
}
_decode_messages = _DECODERS[Form.MESSAGES].decode
_decode_plain = msgspec.json.Decoder(PlainRow).decode
_fields: msgspec.json.Decoder[dict[str, Raw]] = msgspec.json.Decoder(dict[str, Raw])
_items: msgspec.json.Decoder[list[Raw]] = msgspec.json.Decoder(list[Raw])
#: The keys that make a form, in the order in which they are looked for.
_KEYS = (
    (Form.MESSAGES, ("messages",)),
    (Form.SHAREGPT, ("conversations",)),
    (Form.PROMPT_COMPLETION, ("prompt", "completion")),
    (Form.INSTRUCTION, ("instruction", "output")),
)
#: What each form needs, one name of each, and all keys that it has.
NEEDED_KEYS: dict[Form, tuple[tuple[str, ...], ...]] = {form: tuple((key,) for key in keys) for form, keys in _KEYS}
KEYS_OF_FORMS: dict[Form, frozenset[str]] = {
    form: frozenset(field.encode_name for field in msgspec.structs.fields(kind) if field.type != Raw | UnsetType)
    for form, kind in _STRUCTS.items()
}
#: What decoders raise at a line that is not theirs.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
FORMS_HINT = (
    'a row is {"messages": [{"role": ..., "content": ...}, ...]}, '
    '{"conversations": [{"from": ..., "value": ...}, ...]}, {"prompt": ..., "completion": ...} '
    'or {"instruction": ..., "input": ..., "output": ...}'
)


def read_row(line: bytes, likely: Form = Form.MESSAGES) -> tuple[Form, Row]:
    """Return the form and the canonical conversation of a line; `likely` only says what to try first.

    Raises:
        Faults: the line is none; whatever is wrong with it, never anything else.
    """
    try:
        if likely is Form.MESSAGES:
            return Form.MESSAGES, _decode_messages(line)
        found = _DECODERS[likely].decode(line)
        if _is_really(found):
            return likely, _canonical(found)
    except UNREADABLE:
        pass
    form = _form_of(line)
    try:
        found = _DECODERS[form].decode(line)
    except msgspec.ValidationError as error:
        raise Faults(_all_faults(line, form, error)) from None
    except RecursionError:
        raise Faults([too_deep()]) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Faults([diagnose(line)]) from None
    return form, found if form is Form.MESSAGES else _canonical(found)


def plain_rows(lines: Iterable[bytes]) -> Iterator[PlainRow]:
    """Yield the rows of lines that are plain conversations in the canonical form; `read_row` would say the same.

    Raises:
        one of UNREADABLE: the next one is something else, or wrong.
    """
    return map(_decode_plain, lines)


def _is_really(found: Any) -> bool:
    """True if no form that goes before this one is there as well."""
    for name in _EARLIER[type(found)]:
        value = getattr(found, name)
        if value is not UNSET and bytes(value) != b"null":
            return False
    return True


def _form_of(line: bytes) -> Form:
    try:
        fields = _fields.decode(line)
    except msgspec.ValidationError:
        raise Faults([Fault(Kind.UNKNOWN_FORM, "$", f"is not an object; {FORMS_HINT}")]) from None
    except RecursionError:
        raise Faults([too_deep()]) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Faults([diagnose(line)]) from None
    there = {name for name, value in fields.items() if bytes(value) != b"null"}
    for form, keys in _KEYS:
        if there.issuperset(keys):
            return form
    from modelyard.datasets.mapping import advice, quoted

    shown = quoted(fields)
    if (said := advice(msgspec.json.decode(line))) is not None:
        raise Faults([Fault(Kind.UNKNOWN_FORM, "$", f"has the keys {shown}, no form's: {said}")])
    for _, keys in _KEYS:  # half of a form says more than none
        missing = [key for key in keys if key not in there]
        if 0 < len(missing) < len(keys):
            other = next(key for key in keys if key in there)
            raise Faults([Fault(Kind.MISSING_FIELD, f"$.{missing[0]}", f"is missing beside '{other}'")])
    raise Faults([Fault(Kind.UNKNOWN_FORM, "$", f"has the keys {shown}; {FORMS_HINT}")])


def _canonical(found: _ShareGpt | _PromptCompletion | _Instruction) -> Row:
    if isinstance(found, _PromptCompletion):
        return Row([Message("user", found.prompt), Message("assistant", found.completion)])
    if isinstance(found, _Instruction):
        question = f"{found.instruction}\n\n{found.input}" if found.input else found.instruction
        return Row([Message("user", question), Message("assistant", found.output)])
    messages = [Message("system", found.system)] if found.system else []
    row = SystemBeside if messages else Row
    faults = []
    for number, turn in enumerate(found.conversations):
        role = SPEAKERS.get(turn.speaker) or SPEAKERS.get(turn.speaker.lower())
        if role is None:
            faults.append(_unknown_speaker(f"$.conversations[{number}].from", turn.speaker))
            if len(faults) >= MOST_IN_LINE:
                break
        else:
            messages.append(Message(role, turn.value))
    if faults:
        raise Faults(faults)
    return row(messages)


def _unknown_speaker(path: str, speaker: str) -> Fault:
    if speaker == "function_call":
        reason = "is 'function_call', which only the messages form can say: with tool_calls"
    else:
        reason = f"is {speaker[:40]!r}, but must be one of {', '.join(SPEAKERS)}"
    return Fault(Kind.WRONG_VALUE, path, reason)


def _all_faults(line: bytes, form: Form, first: msgspec.ValidationError) -> Iterator[Fault]:
    """Yield what is wrong with each field; msgspec stops at the first one."""
    found = False
    for fault in _faults_in(line, _STRUCTS[form], "$"):
        found = True
        yield fault
    if not found:
        yield _fault(first, "$")


def _faults_in(text: bytes | Raw, kind: type[Struct], base: str) -> Iterator[Fault]:
    try:
        there = _fields.decode(text)
    except msgspec.ValidationError as error:
        yield _fault(error, base)
        return
    for name, required, decoder in _FIELDS[kind]:
        path = f"{base}.{name}"
        if name not in there:
            if required or (name == "content" and bytes(there.get("tool_calls", b"null")) in (b"null", b"[]")):
                yield Fault(Kind.MISSING_FIELD, path, "is missing")
            continue
        try:
            if name in _ITEMS:
                for number, item in enumerate(_items.decode(there[name])):
                    yield from _faults_in(item, _ITEMS[name], f"{path}[{number}]")
            else:
                decoder.decode(there[name])
        except msgspec.ValidationError as error:
            yield _fault(error, path)
        except UNREADABLE:
            continue  # the first fault stands for it


_AT = re.compile(r"^(.*?)(?: - at `(?:key in )?\$(.*)`)?$", re.DOTALL)
_TYPES = {"str": "text", "object": "an object", "array": "an array", "null": "null", "int": "a number"} | {
    "float": "a number",
    "bool": "true or false",
}


def _fault(error: msgspec.ValidationError, base: str) -> Fault:
    matched = _AT.match(str(error))
    assert matched is not None
    said, path = matched[1], base + (matched[2] or "")
    if missing := re.match(r"Object missing required field `(.*)`", said):
        return Fault(Kind.MISSING_FIELD, f"{path}.{missing[1]}", "is missing")
    if wrong := re.match(r"Expected `(.*)`, got `(.*)`", said):
        wanted = " or ".join(dict.fromkeys(_TYPES.get(name, name) for name in wrong[1].split(" | ")))
        return Fault(Kind.WRONG_VALUE, path, f"is {_TYPES.get(wrong[2], wrong[2])}, but must be {wanted}")
    if value := re.match(r"Invalid enum value (.*)", said, re.DOTALL):
        return Fault(Kind.WRONG_VALUE, path, f"is {value[1][:60]}, but must be one of {', '.join(ROLES)}")
    return Fault(Kind.WRONG_VALUE, path, f"{said[:1].lower()}{said[1:]}")
