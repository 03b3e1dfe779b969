"""Reads any row by the table of row forms (`row_forms`), key by key, and says all that is wrong with it.

`forms` reads the plain rows, which are most, several times as fast; the rest, and whatever is wrong, is read here. A
value is decoded only where its key means something. Nothing is checked that `conversations.examine` checks of all rows.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from modelyard.datasets.canonical import Message, Row
from modelyard.datasets.faults import Fault, Faults, Kind, diagnose, too_deep
from modelyard.datasets.mapping import advice, quoted
from modelyard.datasets.message_reading import MessageReader
from modelyard.datasets.raw_values import (
    UNREADABLE,
    Fields,
    TooManyFaults,
    decode_any,
    decode_fields,
    decode_items,
    decode_text,
    fault_of,
    is_empty,
    is_null,
    shown,
)
from modelyard.datasets.recognition import rows_within
from modelyard.datasets.row_forms import (
    FORMS,
    FORMS_HINT,
    MARKS,
    MEDIA,
    PREFERENCE_REASON,
    PREFERENCES,
    SPEC,
    Form,
    Meaning,
    Role,
    RowForm,
)
from modelyard.datasets.tool_calls import Tools, canonical_tools

#: A name that may stand in a command as it is.
_PLAIN_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_tools: msgspec.json.Decoder[list[Any] | str | None] = msgspec.json.Decoder(list[Any] | str | None)
_history: msgspec.json.Decoder[list[tuple[str, str]]] = msgspec.json.Decoder(list[tuple[str, str]])


def object_of(line: bytes) -> tuple[Form, Fields]:
    """Return the form of a line, and its keys.

    Raises:
        Faults: it is no JSON, no object, or of none of the forms.
    """
    try:
        fields = decode_fields.decode(line)
    except msgspec.ValidationError:
        raise Faults([Fault(Kind.UNKNOWN_FORM, "$", f"is not an object; {FORMS_HINT}")]) from None
    except RecursionError:
        raise Faults([too_deep()]) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Faults([diagnose(line)]) from None
    keys = list(fields)
    fields = {name: value for name, value in fields.items() if not is_null(value)}
    for name in fields:
        if name in PREFERENCES and bytes(memoryview(fields[name])[:1]) in (b'"', b"[", b"{"):
            raise Faults([Fault(Kind.PREFERENCE, f"$.{name}", PREFERENCE_REASON)])
    for spec in FORMS:
        if all(any(name in fields for name in names) for names in spec.needs):
            return spec.form, fields
    if (said := _advice(line)) is not None:
        raise Faults([Fault(Kind.UNKNOWN_FORM, "$", f"has the keys {quoted(keys)}, no form's: {said}")])
    for spec in FORMS:  # half of a form says more than none
        missing = [names[0] for names in spec.needs if names[0] not in fields]
        if 0 < len(missing) < len(spec.needs):
            other = next(names[0] for names in spec.needs if names[0] in fields)
            raise Faults([Fault(Kind.MISSING_FIELD, f"$.{missing[0]}", f"is missing beside '{other}'")])
    if not keys:
        raise Faults([Fault(Kind.UNKNOWN_FORM, "$", f"has no keys; {FORMS_HINT}")])
    if (within := next((name for name in fields if _is_list_of_rows(name, fields[name])), None)) is not None:
        said = f"if the objects in '{within}' are the rows, convert the file: {rows_within(within)}"
        raise Faults([Fault(Kind.UNKNOWN_FORM, "$", f"has the keys {quoted(keys)}, no form's: {said}")])
    raise Faults([Fault(Kind.UNKNOWN_FORM, "$", f"has the keys {quoted(keys)}; {FORMS_HINT}")])


def _is_list_of_rows(name: str, value: msgspec.Raw) -> bool:
    """Return True for a list of objects under a name that a shell takes as it is."""
    begins = bytes(memoryview(value)[:1024]).translate(None, b" \t\r\n")
    return begins.startswith(b"[{") and _PLAIN_NAME.fullmatch(name) is not None


def _advice(line: bytes) -> str | None:
    """Return what to send for a row of no form, where its names tell."""
    try:
        return advice(decode_any.decode(line))
    except RecursionError:
        raise Faults([too_deep()]) from None
    except (msgspec.MsgspecError, ValueError):  # what no key of a form is was not looked at so far
        raise Faults([diagnose(line)]) from None


def read_fields(line: bytes, form: Form, fields: Fields) -> Row:
    """Return the conversation, or text, that the keys of a line make.

    Raises:
        Faults: whatever is wrong with them.
    """
    reading = _Reading(SPEC[form], fields)
    try:
        row = reading.row()
    except RecursionError:
        raise Faults([too_deep()]) from None
    except msgspec.ValidationError as error:  # nothing is known to get here
        raise Faults([fault_of(error, "$")]) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Faults([diagnose(line)]) from None
    if reading.faults:
        raise Faults(reading.faults)
    return row


class _Reading(MessageReader):
    """The reading of one row: what it found, and what is wrong."""

    def __init__(self, spec: RowForm, fields: Fields) -> None:
        super().__init__(spec.form)
        self._spec = spec
        self._fields = fields
        self._used = {name for names in spec.needs for name in names if name in fields}
        #: The key that was read last.
        self._last = ""

    def row(self) -> Row:
        form, tools, text = self._spec.form, None, None
        try:
            self._marks_of_the_row()
            self._say("system", self._text(Meaning.SYSTEM))
            if form in (Form.MESSAGES, Form.SHAREGPT):
                self._conversation()
            elif form is Form.TEXT:
                text = self._text(Meaning.TEXT)
                text = "" if text is None else text
            else:
                self._question_and_answer()
            tools = self._tools()
            if (name := self._one_of(Meaning.UNPLACED)) is not None:
                self._unplaced(name)
        except TooManyFaults:
            pass
        for name in self._fields:
            if name not in self._used:
                self._ignore("", name)
        if tools is not None:
            self._ignored.update(dict.fromkeys(tools.ignored))
        row = Row(self._messages, text=text, spots=tuple(self._spots), ignored=tuple(self._ignored))
        if tools is not None:
            row.tools, row.is_padded = tools.tools or None, tools.is_padded
        return row

    def _say(self, role: Role, text: str | None) -> None:
        if text:
            self._messages.append(Message(role, text))
            self._spots.append(f"$.{self._last}")

    # Keys of the row.

    def _one_of(self, meaning: Meaning, *, alike: bool = True) -> str | None:
        """Return the key of the row that means this; of several with something in them, all others are faults."""
        there = [name for name, means in self._spec.keys.items() if means is meaning and not self._is_empty_field(name)]
        self._used.update(name for name, means in self._spec.keys.items() if means is meaning)
        if not there:
            return None
        for other in there[1:]:
            if alike:
                self._fault(Kind.WRONG_VALUE, f"$.{other}", f"stands beside '{there[0]}', which means the same")
            else:
                self._ignore("", other)
        self._last = there[0]
        return there[0]

    def _is_empty_field(self, name: str) -> bool:
        return name not in self._fields or is_empty(self._fields[name])

    def _text(self, meaning: Meaning) -> str | None:
        name = self._one_of(meaning)
        return None if name is None else self._decoded(decode_text, self._fields[name], f"$.{name}")

    def _marks_of_the_row(self) -> None:
        for name, raw in self._fields.items():
            if name in MARKS and name not in self._spec.keys:
                self._used.add(name)
                if self._learns(name, raw, f"$.{name}", "") is False:
                    reason = f"is {shown(raw)}: the row's answers are marked as not to be learnt"
                    self._fault(Kind.NOTHING_TO_LEARN, f"$.{name}", reason)
            elif name in MEDIA:
                self._used.add(name)
                self._media(raw, f"$.{name}")

    def _unplaced(self, name: str) -> None:
        if bytes(self._fields[name])[:1] != b'"':
            self._ignore("", name)
            return
        reason = "belongs to the question, but not in a defined place: put it into the message that it is for"
        self._fault(Kind.WRONG_VALUE, f"$.{name}", reason)

    def _tools(self) -> Tools | None:
        name = self._one_of(Meaning.TOOLS)
        if name is None:
            return None
        found = self._decoded(_tools, self._fields[name], f"$.{name}")
        if isinstance(found, str):
            try:
                found = msgspec.json.decode(found or "[]", type=list[Any] | None)
            except UNREADABLE:
                self._fault(Kind.WRONG_VALUE, f"$.{name}", "is text that is no JSON array")
                return None
        try:
            return canonical_tools(found or [], f"$.{name}")
        except Fault as fault:
            self._add(fault)
            return None

    # Forms.

    def _question_and_answer(self) -> None:
        if (name := self._one_of(Meaning.HISTORY)) is not None:
            pairs = self._decoded(_history, self._fields[name], f"$.{name}")
            for number, (question, answer) in enumerate(pairs or ()):
                self._messages += [Message("user", question), Message("assistant", answer)]
                self._spots += [f"$.{name}[{number}][0]", f"$.{name}[{number}][1]"]
        asked, answered = (next(name for name in names if name in self._fields) for names in self._spec.needs)
        for names in self._spec.needs:
            for other in names:
                if other in self._fields and other not in (asked, answered):
                    self._ignore("", other)
        lists = all(bytes(self._fields[name])[:1] == b"[" for name in (asked, answered))
        if lists and self._spec.form is Form.PROMPT_COMPLETION:
            for name in (asked, answered):
                before = len(self._messages)
                self._said_in(name, decode_items.decode(self._fields[name]), turns=False)
                if name == asked:  # as in TRL, only the completion is learnt
                    for message in self._messages[before:]:
                        if message.role == "assistant":
                            message.weight = 0
            return
        question = self._decoded(decode_text, self._fields[asked], f"$.{asked}")
        more = self._text(Meaning.INPUT)
        answer = self._decoded(decode_text, self._fields[answered], f"$.{answered}")
        self._messages += [
            Message("user", f"{question}\n\n{more}" if more else question),
            Message("assistant", answer),
        ]
        self._spots += [f"$.{asked}", f"$.{answered}"]

    def _conversation(self) -> None:
        (name,) = self._spec.needs[0]
        items = self._decoded(decode_items, self._fields[name], f"$.{name}")
        self._said_in(name, items or [], turns=self._spec.form is Form.SHAREGPT)
