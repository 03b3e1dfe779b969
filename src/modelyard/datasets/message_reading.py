"""Reads the messages of a row by the table of row forms: who speaks, parts, calls, thoughts, and marks."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from modelyard.datasets.canonical import Function, Message, Part, ToolCall
from modelyard.datasets.faults import Kind
from modelyard.datasets.raw_values import (
    UNREADABLE,
    Fields,
    Findings,
    decode_fields,
    decode_items,
    decode_text,
    fault_of,
    is_empty,
    is_null,
)
from modelyard.datasets.row_forms import CALL, MARKS, MEDIA, PARTS, REASONING, ROLES, SPEAKERS, Form

_text_or_null: msgspec.json.Decoder[str | None] = msgspec.json.Decoder(str | None)
_content: msgspec.json.Decoder[str | list[Raw] | None] = msgspec.json.Decoder(str | list[Raw] | None)
_content_part: msgspec.json.Decoder[str | Fields] = msgspec.json.Decoder(str | Fields)
_arguments: msgspec.json.Decoder[dict[str, Any] | str | None] = msgspec.json.Decoder(dict[str, Any] | str | None)


class MessageReader(Findings):
    """Reads messages or turns of a row of a form, one list after the other."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self._form = form
        self._messages: list[Message] = []
        #: The place of each in the line.
        self._spots: list[str] = []
        #: Whether the last message is a turn that was a call.
        self._was_call = False

    def _said_in(self, name: str, items: list[Raw], *, turns: bool) -> None:
        for number, raw in enumerate(items):
            spot = f"$.{name}[{number}]"
            try:
                fields = decode_fields.decode(raw)
            except msgspec.ValidationError as error:
                self._add(fault_of(error, spot))
                continue
            there = {key: value for key, value in fields.items() if not is_null(value)}
            as_turn = turns and not ("role" in there and "content" in there and "from" not in there)
            self._message(fields, there, spot, f"{name}[]", as_turn=as_turn)

    def _message(self, fields: Fields, there: Fields, spot: str, place: str, *, as_turn: bool) -> None:
        role_key, content_key = ("from", "value") if as_turn else ("role", "content")
        role = self._role(fields, f"{spot}.{role_key}", role_key, as_turn=as_turn)
        message = Message("user")
        for key in there:
            if key in (role_key, content_key):
                continue
            value, path = there[key], f"{spot}.{key}"
            if key in MARKS:
                learns = self._learns(key, value, path, place)
                if learns is False:
                    message.weight = 0
                elif learns and key == "weight" and message.weight is None:
                    message.weight = 1
            elif key in MEDIA:
                self._media(value, path)
            elif key in REASONING:
                self._reasoning(message, value, path, role)
            elif as_turn:
                self._ignore(place, key)
            elif key == "tool_calls":
                message.tool_calls = self._calls(value, path, f"{place}.tool_calls[]")
            elif key == "function_call":
                if is_empty(there.get("tool_calls", Raw(b"null"))):
                    call = self._call(value, path, f"{place}.function_call")
                    message.tool_calls = None if call is None else [call]
                else:
                    self._fault(Kind.WRONG_VALUE, path, "stands beside 'tool_calls', which means the same")
            elif key == "tool_call_id":
                message.tool_call_id = self._decoded(_text_or_null, value, path)
            elif key == "name":
                message.name = self._decoded(_text_or_null, value, path)
            else:
                self._ignore(place, key)
        path = f"{spot}.{content_key}"
        if content_key in fields:
            found = self._decoded(decode_text if as_turn else _content, fields[content_key], path)
            if isinstance(found, list):
                found = self._parts(message, found, path, f"{place}.{content_key}[]", role) or None
                found = [] if found is None and not message.tool_calls else found
            message.content = found
        elif as_turn or not any(not is_empty(there.get(key, Raw(b"null"))) for key in ("tool_calls", "function_call")):
            self._fault(Kind.MISSING_FIELD, path, "is missing")
        if role is None:
            return
        if role == CALL:
            self._called(message, path)
        else:
            message.role = role
        last = self._messages[-1] if self._messages else None
        if role == CALL and last is not None and self._was_call and last.weight == message.weight:
            last.tool_calls = [*(last.tool_calls or ()), *(message.tool_calls or ())]  # calls at the same time
        else:
            self._messages.append(message)
            self._spots.append(spot)
        self._was_call = role == CALL

    def _role(self, fields: Fields, path: str, key: str, *, as_turn: bool) -> Any:
        if key not in fields:
            self._fault(Kind.MISSING_FIELD, path, "is missing")
            return None
        name = self._decoded(decode_text, fields[key], path)
        if name is None:
            return None
        # Turns under "conversations" name their speakers in either way.
        of_turn = self._form is Form.SHAREGPT
        found = (SPEAKERS.get(name) or SPEAKERS.get(name.lower())) if of_turn else ROLES.get(name)
        if found is None:
            known = ", ".join(SPEAKERS) if of_turn else "system, user, assistant, tool"
            self._fault(Kind.WRONG_VALUE, path, f"is {name[:40]!r}, but must be one of {known}")
        return found

    def _reasoning(self, message: Message, raw: Raw, path: str, role: Any) -> None:
        text = self._decoded(decode_text, raw, path)
        if not text:
            return
        if role not in (None, "assistant"):
            self._fault(Kind.WRONG_VALUE, path, "is only for messages of the assistant")
        elif message.reasoning_content not in (None, text):
            self._fault(Kind.WRONG_VALUE, path, "is another thought than the one beside it")
        else:
            message.reasoning_content = text

    def _parts(self, message: Message, items: list[Raw], path: str, place: str, role: Any) -> list[Part]:
        parts = []
        for number, raw in enumerate(items):
            where = f"{path}[{number}]"
            value = self._decoded(_content_part, raw, where)
            if isinstance(value, str):
                parts.append(Part("text", value))
            if not isinstance(value, dict):
                continue
            there = {key: one for key, one in value.items() if not is_null(one)}
            if "thinking" in there:
                self._reasoning(message, there["thinking"], f"{where}.thinking", role)
                continue
            kind = self._decoded(decode_text, there["type"], f"{where}.type") if "type" in there else "text"
            if kind in PARTS and (key := "value" if "value" in there else "text") in there:
                self._said_in_part(message, PARTS[kind], there[key], f"{where}.{key}", place, role)
                continue
            part = Part(kind or "text")
            for key in there:
                if key in ("text", "value") and part.text is None:
                    part.text = self._decoded(decode_text, there[key], f"{where}.{key}")
                elif key != "type":
                    self._ignore(place, key)
            parts.append(part)
        return parts

    def _said_in_part(self, message: Message, kind: str, raw: Raw, path: str, place: str, role: Any) -> None:
        """Read a part that is a thought, or a call as JSON text."""
        if kind == REASONING[0]:
            self._reasoning(message, raw, path, role)
        elif (text := self._decoded(decode_text, raw, path)) is not None:
            message.tool_calls = [*(message.tool_calls or ()), *self._calls_in(text, path, place)]

    def _calls(self, raw: Raw, path: str, place: str) -> list[ToolCall]:
        calls = []
        for number, item in enumerate(self._decoded(decode_items, raw, path) or ()):
            call = self._call(item, f"{path}[{number}]", place)
            if call is not None:
                calls.append(call)
        return calls

    def _call(self, raw: Raw, path: str, place: str) -> ToolCall | None:
        """Return a call: a function in its envelope, or bare."""
        fields = self._decoded(decode_fields, raw, path)
        if fields is None:
            return None
        there = {key: value for key, value in fields.items() if not is_null(value)}
        envelope, where, inner = there, path, place
        if "function" in there:
            where, inner = f"{path}.function", f"{place}.function"
            there = self._decoded(decode_fields, there["function"], where) or {}
            if not there:
                return None
        call = ToolCall(Function("", {}))
        for key, value in envelope.items():
            if key == "id":
                call.id = self._decoded(decode_text, value, f"{path}.id")
            elif key == "type":
                call.type = self._decoded(decode_text, value, f"{path}.type") or "function"
            elif key != "function" and (envelope is not there or key not in ("name", "arguments")):
                self._ignore(place, key)
        for key, value in there.items():
            if key == "name":
                call.function.name = self._decoded(decode_text, value, f"{where}.name") or ""
            elif key == "arguments":
                call.function.arguments = self._decoded(_arguments, value, f"{where}.arguments") or {}
            elif envelope is not there:
                self._ignore(inner, key)
        if "name" not in there:
            self._fault(Kind.MISSING_FIELD, f"{where}.name", "is missing")
        return call

    def _called(self, message: Message, path: str) -> None:
        """Make a turn whose text is a call a message with that call."""
        message.role = "assistant"
        text, message.content = message.content, None
        if isinstance(text, str):
            message.tool_calls = self._calls_in(text, path, path) or None

    def _calls_in(self, text: str, path: str, place: str) -> list[ToolCall]:
        """Return the call, or the list of calls, that is JSON text."""
        try:
            raw = Raw(text.encode())
            items = decode_items.decode(raw) if text.lstrip()[:1] == "[" else [raw]
            for item in items:
                decode_fields.decode(item)
        except UNREADABLE:
            items = []
        if not items:
            reason = 'is a call, but not JSON text of {"name": ..., "arguments": ...}'
            self._fault(Kind.WRONG_VALUE, path, reason)
        found = [self._call(item, path, place) for item in items]
        return [call for call in found if call is not None]
