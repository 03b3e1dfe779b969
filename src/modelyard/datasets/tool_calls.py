"""Tools and calls of them in the canonical form: OpenAI's envelope around each function, arguments as an object.

Bare functions are put into the envelope (`parameters` is also read as Anthropic's `input_schema`), text that is JSON is
read, and the nulls that Arrow writes for every key that some other row has are taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from modelyard.datasets.canonical import ToolCall
from modelyard.datasets.faults import Fault, Kind

#: Keys of a function that a chat template sees; the others mean nothing.
FUNCTION_KEYS = ("name", "description", "parameters", "strict")
#: Longer lists of tools are not kept.
MOST_KEPT_BYTES = 16 * 1024
#: Objects and lists within each other in the arguments of a call or in a tool's schema.
MOST_DEPTH = 100
#: In a JSON schema a null under these is a value.
_NULLS_MEANT = frozenset({"default", "const"})
_UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeError)
_arguments: msgspec.json.Decoder[dict[str, Any] | str] = msgspec.json.Decoder(dict[str, Any] | str)
_list: msgspec.json.Decoder[list[Any] | None] = msgspec.json.Decoder(list[Any] | None)
_schema: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


def make_call_canonical(call: ToolCall, where: str) -> bool:
    """Make the arguments of a call an object, and return whether nulls were taken out of it.

    Nulls in arguments that come as text are somebody's own: Arrow knows nothing of a text's inside.

    Raises:
        Fault: they are no JSON object, or what is called is no function.
    """
    if call.type != "function" and isinstance(call.type, str):
        raise Fault(Kind.WRONG_VALUE, f"{where}.type", f"is {call.type[:40]!r}, but must be 'function'")
    if not call.function.name:
        raise Fault(Kind.WRONG_VALUE, f"{where}.function.name", "is empty")
    arguments = call.function.arguments
    if isinstance(arguments, dict):
        call.function.arguments, has_nulls = without_nulls(arguments, frozenset(), where)
        return has_nulls
    for _ in range(2):  # some are encoded twice
        try:
            arguments = _arguments.decode(arguments or "{}")
        except _UNREADABLE:
            break
        if isinstance(arguments, dict):
            _has_null(arguments, frozenset(), where)
            call.function.arguments = arguments
            return False
    raise Fault(Kind.WRONG_VALUE, f"{where}.function.arguments", "is text that is no JSON object")


@dataclass(frozen=True)
class Tools:
    """Tools in the canonical form, whether nulls were taken out of them, and keys of functions that mean nothing."""

    tools: list[Any]
    is_padded: bool
    ignored: tuple[tuple[str, str], ...]


def canonical_tools(tools: list[Any], path: str) -> Tools:
    """Return tools in their envelopes; `path` is where they are.

    Raises:
        Fault: one of them is no function.
    """
    found, is_padded, ignored = [], False, []
    for number, tool in enumerate(tools):
        where = f"{path}[{number}]"
        if not isinstance(tool, dict):
            raise Fault(Kind.WRONG_VALUE, where, 'is no function: {"name": ..., "description": ..., "parameters": ...}')
        kind = tool.get("type")
        if kind not in (None, "function", "custom") or (kind == "custom" and "input_schema" not in tool):
            raise Fault(Kind.WRONG_VALUE, f"{where}.type", f"is {str(kind)[:40]!r}, but must be 'function'")
        function = tool.get("function")
        if function is None:
            function = {key: value for key, value in tool.items() if key != "type"}
        else:
            where = f"{where}.function"
        if not isinstance(function, dict):
            raise Fault(Kind.WRONG_VALUE, where, "is no object")
        if not isinstance(name := function.get("name"), str) or not name:
            raise Fault(Kind.WRONG_VALUE, f"{where}.name", "must be the function's name")
        known, has_nulls = _function(function, where)
        is_padded |= has_nulls
        ignored += [("tools[].function", key) for key in function if key not in _READ and function[key] is not None]
        found.append({"type": "function", "function": known})
    return Tools(found, is_padded, tuple(dict.fromkeys(ignored)))


@lru_cache(maxsize=64)
def _kept_tools(data: bytes) -> Tools | None:
    return _tools_of(data)


def _tools_of(data: bytes) -> Tools | None:
    try:
        return canonical_tools(_list.decode(data) or [], "$.tools")
    except (Fault, *_UNREADABLE):
        return None


def tools_of(data: bytes) -> Tools | None:
    """Return the canonical tools in a JSON list; None if something is wrong with them.

    Many rows of a file have the same tools: some short lists are kept.
    """
    return _kept_tools(data) if len(data) <= MOST_KEPT_BYTES else _tools_of(data)


_READ = frozenset({*FUNCTION_KEYS, "input_schema", "function"})


def _function(function: dict[str, Any], where: str) -> tuple[dict[str, Any], bool]:
    known = {key: function[key] for key in FUNCTION_KEYS if function.get(key) is not None}
    if "parameters" not in known and function.get("input_schema") is not None:
        known["parameters"] = function["input_schema"]
    description = known.get("description")
    if description is not None and not isinstance(description, str):
        raise Fault(Kind.WRONG_VALUE, f"{where}.description", "must be text")
    parameters, has_nulls = known.get("parameters"), False
    if isinstance(parameters, str):
        try:
            parameters = _schema.decode(parameters or "{}")
        except _UNREADABLE:
            raise Fault(Kind.WRONG_VALUE, f"{where}.parameters", "is text that is no JSON object") from None
        known["parameters"] = parameters
    elif isinstance(parameters, dict):
        known["parameters"], has_nulls = without_nulls(parameters, _NULLS_MEANT, where)
    elif parameters is not None:
        raise Fault(Kind.WRONG_VALUE, f"{where}.parameters", "must be an object: a JSON schema")
    return known, has_nulls


def without_nulls(value: dict[str, Any], meant: frozenset[str], where: str) -> tuple[dict[str, Any], bool]:
    """Return an object without the keys whose value is null, at any depth, and whether there was one.

    What has none is returned as it is. Nulls in lists are values, and those under the keys in `meant`.

    Raises:
        Fault: it is nested more deeply than a chat template could print.
    """
    if not _has_null(value, meant, where):
        return value, False
    cleaned = _cleaned(value, meant)
    assert isinstance(cleaned, dict)
    return cleaned, True


def _has_null(value: Any, meant: frozenset[str], where: str, depth: int = 0) -> bool:
    if depth > MOST_DEPTH:
        raise Fault(Kind.TOO_DEEP, where, "is nested too deeply")
    found = False
    if isinstance(value, dict):
        for key, one in value.items():
            found |= one is None and key not in meant
            if isinstance(one, dict | list):
                found |= _has_null(one, meant, where, depth + 1)
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, dict | list):
                found |= _has_null(one, meant, where, depth + 1)
    return found


def _cleaned(value: Any, meant: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(one, meant) for key, one in value.items() if one is not None or key in meant}
    return [_cleaned(one, meant) for one in value] if isinstance(value, list) else value
