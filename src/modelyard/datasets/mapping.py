"""A mapping: which of a file's own keys stand for the keys of a row, as an upload says it, and as names suggest it.

    mapping={"prompt": "question", "completion": "answer"}      keys of another name
    mapping={"prompt": "qa.question", "completion": "qa.best"}  within objects, or by number in lists

A mapped row has the mapped keys and all others of its own that name no other form: what those mean, or that they mean
nothing, is for `forms` to say. Pure functions; nothing here knows of files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from modelyard.datasets.faults import Fault, Kind
from modelyard.datasets.row_forms import KEYS_OF_FORMS, NEEDED_KEYS
from modelyard.errors import Unprocessable

FIELD = "mapping"
MOST_PATH_CHARACTERS = 400
#: Names that are quoted in an answer, and their characters.
SHOWN_NAMES, SHOWN_CHARACTERS = 12, 40
_ALL_KEYS = frozenset().union(*KEYS_OF_FORMS.values())
#: The keys that make a row one of a form: those of another form than the mapped one would make it that.
_MAKING = frozenset(key for needs in NEEDED_KEYS.values() for names in needs for key in names)

#: Other names of what a form calls by one name; compared in small letters, without marks between words.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": (
        "prompt", "question", "query", "instruction", "input", "user", "human", "problem", "request", "usermessage",
        "inputs", "q", "source", "userprompt", "sentence",
    ),
    "completion": (
        "completion", "answer", "response", "output", "assistant", "reply", "solution", "target", "label", "outputs",
        "a", "bot", "gpt", "answers", "targets", "responsetext", "finalanswer", "bestanswer", "correctanswer",
    ),
    "system": ("system", "systemprompt", "systemmessage"),
    "input": ("input", "context", "passage"),
    "text": ("text", "content", "document", "body", "article", "story", "passage", "rawtext", "rawcontent"),
}  # fmt: skip


@dataclass(frozen=True)
class KeyMapping:
    """The keys of a row's form, and where each is found in the rows of a file."""

    paths: Mapping[str, str]

    def shown(self) -> str:
        """Return it as it is sent."""
        return json.dumps(dict(self.paths), ensure_ascii=False)

    def applied(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with its keys mapped.

        Raises:
            Fault: it has not what a form needs.
        """
        found: dict[str, Any] = {}
        taken = set()
        for key, path in self.paths.items():
            value = _value_at(row, path)
            if value is _MISSING or value is None:
                if key in _MAKING:
                    keys = quoted(row)
                    reason = f"is missing: the mapping takes {key!r} from it; the row has the keys {keys}"
                    raise Fault(Kind.MISSING_FIELD, f"$.{path}", reason)
                continue
            found[key] = value
            taken.add(path if path in row else path.partition(".")[0])
        others = {
            key: value
            for key, value in row.items()
            if key not in taken and key not in found and (key not in _MAKING or key in self._completing)
        }
        mapped = found | others
        if not (self._is_whole or has_form([key for key in mapped if mapped[key] is not None])) and (
            whole := self._completed(row)
        ):
            reason = (
                f"has the keys {quoted(row)}, and the mapping makes no whole row of these: send {FIELD}={whole.shown()}"
            )
            raise Fault(Kind.UNKNOWN_FORM, "$", reason)
        return mapped

    @cached_property
    def _is_whole(self) -> bool:
        """Return True if a row has all that its form needs by the mapped keys alone."""
        return has_form(self.paths)

    def _completed(self, row: Mapping[str, Any]) -> KeyMapping | None:
        """Return this mapping with what a row's names suggest for the rest of its form; None where they do not."""
        more = suggested(row)
        if more is None:
            return None
        taken = set(self.paths.values())
        rest = {key: path for key, path in more[0].paths.items() if path not in taken and key not in self.paths}
        whole = KeyMapping({**self.paths, **rest})
        making = _MAKING & whole.paths.keys()
        is_one = any(making <= keys for keys in KEYS_OF_FORMS.values())
        return whole if is_one and has_form(whole.paths) else None

    @property
    def _completing(self) -> frozenset[str]:
        """Return the keys that belong to the form of the mapped ones: they may have their own name already."""
        making = _MAKING & self.paths.keys()
        return frozenset().union(*(keys for keys in KEYS_OF_FORMS.values() if making <= keys)) if making else _MAKING


class _Missing:
    pass


_MISSING = _Missing()


def _value_at(row: Any, path: str) -> Any:
    if isinstance(row, dict) and path in row:
        return row[path]
    name, dot, rest = path.partition(".")
    if isinstance(row, dict):
        inner = row.get(name, _MISSING)
    elif isinstance(row, list) and name.isdecimal() and int(name) < len(row):
        inner = row[int(name)]
    else:
        return _MISSING
    return _value_at(inner, rest) if dot else inner


def parse(text: str) -> KeyMapping:
    """Return the mapping that a form field says.

    Raises:
        Unprocessable: `bad_mapping`: it is no JSON object of texts, or its keys are none of a row, or of two forms.
    """
    try:
        paths = msgspec.json.decode(text, type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise _bad(f"It is {text[:100]!r}, not a JSON object of texts.") from None
    if not paths:
        raise _bad("It is empty.")
    for key, path in paths.items():
        if key not in _ALL_KEYS:
            raise _bad(
                f"{key[:SHOWN_CHARACTERS]!r} is no key of a row; those are {', '.join(sorted(_ALL_KEYS))}. The row's "
                "key stands first, then the file's."
            )
        if not path or len(path) > MOST_PATH_CHARACTERS:
            raise _bad(f"What {key!r} is taken from must be a name of 1 to {MOST_PATH_CHARACTERS} characters.")
    making = _MAKING & paths.keys()
    if not any(making <= keys for keys in KEYS_OF_FORMS.values()):
        raise _bad(f"{quoted(sorted(making))} belong to different forms of a row: {_forms()}.")
    return KeyMapping(paths)


def _forms() -> str:
    return "; ".join(" and ".join(names[0] for names in needs) for needs in NEEDED_KEYS.values())


def _bad(what: str) -> Unprocessable:
    return Unprocessable(
        f"The field '{FIELD}' cannot be used. {what} Send it such as "
        f"{FIELD}={KeyMapping({'prompt': 'question', 'completion': 'answer'}).shown()}.",
        param=FIELD,
        code="bad_mapping",
    )


def has_form(keys: Collection[str]) -> bool:
    """Return True if a row with these keys has all that one of the forms needs."""
    there = frozenset(keys)
    return any(all(there.intersection(names) for names in needs) for needs in NEEDED_KEYS.values())


def suggested(row: Mapping[str, Any]) -> tuple[KeyMapping, bool] | None:
    """Return a mapping for a row like this, and True if its names tell it, False if it is a guess.

    The values are looked at only for what is text and what is a list of messages.
    """
    if any("chosen" in key or "reject" in key for key in row):
        return None  # a better answer and a worse one: no mapping makes that one answer
    named = [(key, value) for key, value in row.items() if key and len(key) <= SHOWN_CHARACTERS]
    for key, value in named:
        if (kind := _kind_of_list(value)) is not None:
            return KeyMapping({kind: key}), True
    found = _by_names([key for key, value in named if isinstance(value, str)])
    if found is not None:
        return KeyMapping(found), True
    for key, value in named:
        if isinstance(value, dict):
            inner = _by_names([f"{key}.{one}" for one, text in value.items() if isinstance(text, str)])
            if inner is not None and len("".join(inner.values())) <= 4 * SHOWN_CHARACTERS:
                return KeyMapping(inner), True
    texts = [key for key, value in named if isinstance(value, str)]
    return (KeyMapping({"prompt": texts[0], "completion": texts[1]}), False) if len(texts) >= 2 else None


def _kind_of_list(value: Any) -> str | None:
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, dict):
        return None
    return (
        "messages"
        if {"role", "content"} <= first.keys()
        else "conversations"
        if {"from", "value"} <= first.keys()
        else None
    )


def _by_names(keys: list[str]) -> dict[str, str] | None:
    plain = {_plain(key.rpartition(".")[2]): key for key in reversed(keys)}
    prompt, completion = (
        next((plain[name] for name in _OTHER_NAMES[key] if name in plain), None) for key in ("prompt", "completion")
    )
    if prompt is None or completion is None:
        text = next((plain[name] for name in _OTHER_NAMES["text"] if name in plain), None)
        return {"text": text} if text is not None and prompt is None and completion is None else None
    left = {name: key for name, key in plain.items() if key not in (prompt, completion)}
    system, more = (
        next((left[name] for name in _OTHER_NAMES[key] if name in left), None) for key in ("system", "input")
    )
    found = {"prompt": prompt, "completion": completion}
    if more is not None:
        found = {"instruction": prompt, "input": more, "output": completion}
    return found | ({"system": system} if system is not None and "system" in _ALL_KEYS else {})


def _plain(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())


def advice(row: Mapping[str, Any]) -> str | None:
    """Return what to send for rows like this one; None where nothing can be suggested."""
    found = suggested(row)
    if found is None:
        return None
    mapping, is_sure = found
    if not is_sure and frozenset(row) & _MAKING:
        return None  # half of a form says more
    begin = "send" if is_sure else "say which key is which: send, such as,"
    return f"{begin} the form field {FIELD}={mapping.shown()} before the file"


def quoted(names: Iterable[str]) -> str:
    """Return some names as they are shown in an answer."""
    found = list(names)
    shown = ", ".join(repr(name[:SHOWN_CHARACTERS]) for name in found[:SHOWN_NAMES])
    return f"{shown} and {len(found) - SHOWN_NAMES} more" if len(found) > SHOWN_NAMES else shown or "none"
