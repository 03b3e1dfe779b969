"""Reads the rows of a dataset at speed; what a row means is `row_forms`' table, and `row_reading` reads any row by it.

Most files are plain: each row has the keys of its form and text in them. `RowReader` reads those with decoders that
refuse every other key, and gives what they refuse to `row_reading`. Keys that turn out to mean nothing (an id, a
source) are added to the decoders as they come, so that a file whose rows all have them is read as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from modelyard.datasets.canonical import Message, Row
from modelyard.datasets.raw_values import UNREADABLE
from modelyard.datasets.row_forms import (
    FORMS,
    MARKS,
    MEDIA,
    MESSAGE_KEYS,
    PREFERENCES,
    REASONING,
    SPEAKERS,
    TURN_KEYS,
    Form,
    Role,
)
from modelyard.datasets.row_reading import object_of, read_fields
from modelyard.datasets.tool_calls import tools_of

__all__ = ["UNREADABLE", "Form", "Message", "PlainRow", "Row", "RowReader", "read_row"]

#: Keys without a meaning that a reader's decoders know, of rows and of messages each.
MOST_KNOWN_KEYS = 24
MOST_KEY_CHARACTERS = 100


class Plain(Struct, gc=False, forbid_unknown_fields=True):
    """A message with text and nothing else that means something."""

    role: Role
    content: str
    tool_calls: None = None
    weight: None = None
    reasoning_content: None = None
    # Read, so that what `Message` refuses is refused here.
    tool_call_id: str | None = None
    name: str | None = None


class PlainRow(Struct, gc=False, forbid_unknown_fields=True):
    """A conversation of such messages."""

    messages: list[Plain]
    tools: None = None
    system: None = None


class _Turn(Struct, gc=False, forbid_unknown_fields=True):
    speaker: str = msgspec.field(name="from")
    value: str


class _Messages(Struct, gc=False, forbid_unknown_fields=True):
    messages: list[Message]
    tools: Raw | UnsetType = UNSET
    system: str | None = None


class _ShareGpt(Struct, gc=False, forbid_unknown_fields=True):
    conversations: list[_Turn]
    system: str | None = None


class _PromptCompletion(Struct, gc=False, forbid_unknown_fields=True):
    prompt: str
    completion: str
    system: str | None = None


class _Instruction(Struct, gc=False, forbid_unknown_fields=True):
    instruction: str
    output: str
    input: str | None = None
    system: str | None = None
    history: list[tuple[str, str]] | None = None


class _Text(Struct, gc=False, forbid_unknown_fields=True):
    text: str


_STRUCTS: dict[Form, type[Struct]] = {
    Form.MESSAGES: _Messages,
    Form.SHAREGPT: _ShareGpt,
    Form.PROMPT_COMPLETION: _PromptCompletion,
    Form.INSTRUCTION: _Instruction,
    Form.TEXT: _Text,
}
#: The key of a form whose items have keys of their own, and what they are.
_ITEMS: dict[Form, tuple[str, type[Struct]]] = {
    Form.MESSAGES: ("messages", Message),
    Form.SHAREGPT: ("conversations", _Turn),
}
#: Keys with a meaning somewhere: never taken for one without, whatever they were in a row before. (Text is the last
#: form: beside another it means nothing.)
_MEANT = frozenset({*MARKS, *MEDIA, *MESSAGE_KEYS, *PREFERENCES, *REASONING, *TURN_KEYS}) | frozenset(
    key for spec in FORMS[:-1] for key in spec.keys
)
Decode = Callable[[bytes], Any]
_DECODERS: dict[Form, Decode] = {form: msgspec.json.Decoder(kind).decode for form, kind in _STRUCTS.items()}
_decode_plain: Decode = msgspec.json.Decoder(PlainRow).decode


class _Known:
    """Decoders of one form that know some keys without a meaning: those of rows, and those of their items."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.row: dict[str, str] = {}
        self.item: dict[str, str] = {}
        self.decode = _DECODERS[form]
        self.decode_plain = _decode_plain

    def learn(self, ignored: Iterable[tuple[str, str]]) -> None:
        """Know these keys from now on, as many as there is room for."""
        items = f"{_ITEMS[self.form][0]}[]" if self.form in _ITEMS else None
        before = len(self.row) + len(self.item)
        for place, key in ignored:
            known = self.row if place == "" else self.item if place == items else None
            if known is None or len(known) >= MOST_KNOWN_KEYS or len(key) > MOST_KEY_CHARACTERS or key in _MEANT:
                continue
            known.setdefault(key, f"other{len(known)}")
        if len(self.row) + len(self.item) > before:
            self._build()

    def _build(self) -> None:
        self.decode = self._decoder(_STRUCTS[self.form], _ITEMS.get(self.form))
        if self.form is Form.MESSAGES:
            self.decode_plain = self._decoder(PlainRow, ("messages", Plain))

    def _decoder(self, kind: type[Struct], items: tuple[str, type[Struct]] | None) -> Decode:
        fields: list[Any] = []
        if items is not None and self.item:
            item: Any = _with_others(items[1], self.item)
            fields.append((items[0], list[item]))
        return msgspec.json.Decoder(_with_others(kind, self.row, fields)).decode

    def ignored_in(self, found: Any) -> tuple[tuple[str, str], ...]:
        """Return the keys without a meaning that a row has, each once."""
        ignored = [("", key) for key, attribute in self.row.items() if _is_there(getattr(found, attribute, UNSET))]
        if self.item:
            name = _ITEMS[self.form][0]
            rows = getattr(found, name)
            place = f"{name}[]"
            for key, attribute in self.item.items():
                if any(_is_there(getattr(item, attribute, UNSET)) for item in rows):
                    ignored.append((place, key))
        return tuple(ignored)

    def ignored_in_rows(self, rows: Sequence[Any]) -> Iterator[tuple[tuple[str, str], list[int]]]:
        """Yield each of the keys without a meaning, and which of the conversations have it."""
        for key, attribute in self.row.items():
            yield ("", key), [at for at, row in enumerate(rows) if _is_there(getattr(row, attribute))]
        for key, attribute in self.item.items():
            there = (any(_is_there(getattr(item, attribute)) for item in row.messages) for row in rows)
            yield ("messages[]", key), [at for at, is_there in enumerate(there) if is_there]


def _with_others(kind: type[Struct], others: dict[str, str], fields: Iterable[Any] = ()) -> type[Struct]:
    extra = [(attribute, Raw | UnsetType, msgspec.field(default=UNSET, name=key)) for key, attribute in others.items()]
    return msgspec.defstruct(
        kind.__name__, [*fields, *extra], bases=(kind,), gc=False, forbid_unknown_fields=True, omit_defaults=True
    )


def _is_there(value: Any) -> bool:
    return value is not UNSET and (len(value := bytes(value)) != 4 or value != b"null")


class RowReader:
    """Reads the lines of one file."""

    def __init__(self, likely: Form = Form.MESSAGES) -> None:
        """`likely` only says what to try first."""
        self._likely = likely
        self._known: dict[Form, _Known] = {}

    def read(self, line: bytes) -> tuple[Form, Row]:
        """Return the form and the conversation, or text, of a line.

        Raises:
            Faults: the line is none; whatever is wrong with it, never anything else.
        """
        likely = self._likely
        row = self._at_once(line, likely)
        if row is not None:
            return likely, row
        form, fields = object_of(line)
        self._likely = form
        if form is not likely and (row := self._at_once(line, form)) is not None:
            return form, row
        row = read_fields(line, form, fields)
        if row.ignored:
            if form not in self._known:
                self._known[form] = _Known(form)
            self._known[form].learn(row.ignored)
        return form, row

    def plain_rows(self, lines: Iterable[bytes]) -> Iterator[PlainRow]:
        """Yield the rows of lines that are plain conversations in the canonical form; `read` would say the same.

        Raises:
            one of UNREADABLE: the next one is something else, or wrong.
        """
        known = self._known.get(Form.MESSAGES)
        return map(_decode_plain if known is None else known.decode_plain, lines)

    def ignored_in(self, rows: Sequence[PlainRow]) -> Iterator[tuple[tuple[str, str], list[int]]]:
        """Yield the keys of plain rows that mean nothing, as `Row.ignored` has them, and which of the rows have it."""
        if (known := self._known.get(Form.MESSAGES)) is not None:
            yield from known.ignored_in_rows(rows)

    @property
    def knows_keys(self) -> bool:
        """True once plain rows may have keys that mean nothing."""
        return Form.MESSAGES in self._known

    def _at_once(self, line: bytes, form: Form) -> Row | None:
        known = self._known.get(form)
        try:
            found = (_DECODERS[form] if known is None else known.decode)(line)
        except UNREADABLE:
            return None
        row = _CANONICAL[form](found)
        if row is not None and known is not None:
            row.ignored += known.ignored_in(found)
        return row


def read_row(line: bytes, likely: Form = Form.MESSAGES) -> tuple[Form, Row]:
    """Return the form and the conversation, or text, of one line; `likely` only says what to try first.

    Raises:
        Faults: the line is none; whatever is wrong with it, never anything else.
    """
    return RowReader(likely).read(line)


def _of_messages(found: _Messages) -> Row | None:
    row = Row(found.messages)
    if isinstance(found.tools, Raw):
        tools = tools_of(bytes(found.tools))
        if tools is None:
            return None
        row.tools, row.is_padded, row.ignored = tools.tools or None, tools.is_padded, tools.ignored
    if found.system:
        row.messages, row.shift = [Message("system", found.system), *found.messages], 1
    return row


def _of_sharegpt(found: _ShareGpt) -> Row | None:
    messages = [Message("system", found.system)] if found.system else []
    shift = len(messages)
    for turn in found.conversations:
        role = SPEAKERS.get(turn.speaker) or SPEAKERS.get(turn.speaker.lower())
        if role is None or role == "call":
            return None
        messages.append(Message(role, turn.value))
    return Row(messages, shift=shift)


def _of_prompt_completion(found: _PromptCompletion) -> Row:
    if found.system:
        spots = ("$.system", "$.prompt", "$.completion")
        messages = [Message("system", found.system), Message("user", found.prompt)]
        return Row([*messages, Message("assistant", found.completion)], spots=spots)
    return Row([Message("user", found.prompt), Message("assistant", found.completion)])


def _of_instruction(found: _Instruction) -> Row | None:
    if found.system or found.history:
        return None
    question = f"{found.instruction}\n\n{found.input}" if found.input else found.instruction
    return Row([Message("user", question), Message("assistant", found.output)])


def _of_text(found: _Text) -> Row:
    return Row([], text=found.text)


_CANONICAL: dict[Form, Callable[[Any], Row | None]] = {
    Form.MESSAGES: _of_messages,
    Form.SHAREGPT: _of_sharegpt,
    Form.PROMPT_COMPLETION: _of_prompt_completion,
    Form.INSTRUCTION: _of_instruction,
    Form.TEXT: _of_text,
}
