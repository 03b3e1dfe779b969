"""The cost of structured output, from a request alone: how much an engine would have to compile before it can answer.

JSON schemas, patterns and grammars become a grammar over the model's whole vocabulary. Engines do that for all their
requests together, and a few KiB can take minutes: what costs is not the text but the states that it stands for.
Counted here is what costs with xgrammar, measured with a vocabulary of 49,000 tokens: a repetition such as `{0,500}`
takes some 15 ms of a processor per repeat, up to about 250 of them, beyond which it is compiled another way; optional
properties of one object cost by their square, 4 s for 1,000; all else costs by its size.

Nothing here says whether a schema is valid: that is the engine's to say. All of it takes one pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from modelyard.errors import BadRequest

#: More repeats of one thing cost no more than so many.
COUNTED_REPEATS = 256
#: Properties of one object.
OBJECT_PROPERTIES = 1000
_QUANTIFIER = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GRAMMAR_REPEATS = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}|~\s*(\d+)(?:\.\.(\d+))?")
#: Here names are followed by schemas, so that none of the names is a keyword.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
#: Here values are data.
_DATA = frozenset({"default", "examples", "example", "const"})
_PATTERNS = frozenset({"pattern", "regex", "whitespace_pattern", "guided_regex", "guided_whitespace_pattern"})
_GRAMMARS = frozenset({"grammar", "guided_grammar", "definition"})
_LISTS = frozenset({"enum", "choice", "guided_choice"})
#: These may hold JSON as a text.
_TEXTS = frozenset({"json", "structural_tag", "schema", "guided_json"})

_KEYWORDS = _NAMED | _PATTERNS | _GRAMMARS | _LISTS | _TEXTS | {"minLength", "maxLength"}
#: Most tools have none of these and few properties: then there is nothing to count. (Escapes may hide a name.)
_TOOLS = frozenset({"tools", "functions"})
_COSTLY = (b"attern", b"Length", b"enum", b"regex", b"grammar", b"definition", b"choice", b"\\u")


@dataclass(frozen=True)
class SchemaLimits:
    """The most that one request may have of each, over all its schemas, tools, patterns and grammars."""

    size_bytes: int
    depth: int
    properties: int
    repeats: int
    choices: int
    pattern_length: int


@dataclass
class Cost:
    """The counts of one request so far, over all its fields."""

    limits: SchemaLimits
    size_bytes: int = 0
    properties: int = 0
    repeats: int = 0
    choices: int = 0
    #: Equal lengths of texts are compiled once.
    lengths: set[tuple[int, int]] = field(default_factory=set)

    def add(self, name: str, raw: bytes) -> None:
        """Count a field of the request, as it came.

        Raises:
            BadRequest: with it, the request has more than it may; it names the field, the bound and its setting.
        """
        self.size_bytes += len(raw)
        if self.size_bytes > self.limits.size_bytes:
            kib = self.limits.size_bytes >> 10
            raise _refused(name, "bytes of schemas and tools", self.size_bytes, f"{kib} KiB", "SCHEMA_KIB")
        if name in _TOOLS and raw.count(b":") < OBJECT_PROPERTIES and not any(word in raw for word in _COSTLY):
            return
        try:
            self._walk(name, msgspec.json.decode(raw), 0)
        except RecursionError:
            raise _refused(name, "levels", "very many", self.limits.depth, "SCHEMA_DEPTH") from None

    def _walk(self, name: str, value: Any, depth: int) -> None:
        waiting: list[tuple[Any, int, bool]] = [(value, depth, False)]
        while waiting:
            node, depth, is_named = waiting.pop()
            if depth > self.limits.depth:
                raise _refused(name, "levels, one within the other,", depth, self.limits.depth, "SCHEMA_DEPTH")
            if isinstance(node, list):
                waiting += [(item, depth + 1, False) for item in node if isinstance(item, dict | list)]
            elif isinstance(node, dict):
                if not is_named and (keywords := _KEYWORDS & node.keys()):
                    self._look(name, node, keywords, depth)
                for key, inner in node.items():
                    if isinstance(inner, dict | list) and (is_named or key not in _DATA | _LISTS):
                        waiting.append((inner, depth + 1, not is_named and key in _NAMED))

    def _look(self, name: str, node: dict[str, Any], keywords: Iterable[str], depth: int) -> None:
        self._look_at_lengths(name, node)
        for key in keywords:
            inner = node[key]
            if key in _NAMED and isinstance(inner, dict):
                self._count_properties(name, len(inner))
                if key == "patternProperties":
                    for pattern in inner:
                        self._count_pattern(name, pattern)
            elif key in _LISTS and isinstance(inner, list):
                self.choices += len(inner)
                if self.choices > self.limits.choices:
                    raise _refused(name, "choices", self.choices, self.limits.choices, "CHOICES")
            elif isinstance(inner, str):
                if key in _PATTERNS:
                    self._count_pattern(name, inner)
                elif key in _GRAMMARS:
                    self._count_repeats(name, sum(_repeats_of_grammar(inner)))
                elif key in _TEXTS and inner.lstrip()[:1] in ("{", "["):
                    self._walk_text(name, inner, depth)

    def _walk_text(self, name: str, text: str, depth: int) -> None:
        try:
            value = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeEncodeError):
            return  # the engine refuses it
        self._walk(name, value, depth + 1)

    def _look_at_lengths(self, name: str, node: dict[str, Any]) -> None:
        lengths = [node.get("minLength"), node.get("maxLength")]
        found = [one for one in lengths if isinstance(one, int | float) and one > 0]
        if found:
            pair = (int(min(found[0], 2**31)), int(min(found[-1], 2**31)))
            if pair not in self.lengths:
                self.lengths.add(pair)
                self._count_repeats(name, min(max(pair), COUNTED_REPEATS))

    def _count_properties(self, name: str, count: int) -> None:
        self.properties += count
        if count > OBJECT_PROPERTIES:
            raise BadRequest(
                f"'{name}' has an object with {count} properties; {OBJECT_PROPERTIES} are allowed in one: {_WHY}",
                param=name,
            )
        if self.properties > self.limits.properties:
            raise _refused(name, "properties", self.properties, self.limits.properties, "SCHEMA_PROPERTIES")

    def _count_pattern(self, name: str, pattern: str) -> None:
        if len(pattern) > self.limits.pattern_length:
            raise _refused(name, "characters in a pattern", len(pattern), self.limits.pattern_length, "PATTERN_LENGTH")
        self._count_repeats(name, repeats_of(pattern))

    def _count_repeats(self, name: str, count: int) -> None:
        self.repeats += count
        if self.repeats > self.limits.repeats:
            raise _refused(
                name,
                "repeats ({m,n} in patterns and grammars, minLength and maxLength; each counts "
                f"{COUNTED_REPEATS} at most, times those around it)",
                self.repeats,
                self.limits.repeats,
                "SCHEMA_REPEATS",
            )


_WHY = "an engine compiles all of it while others wait."


def _refused(name: str, what: str, found: object, limit: object, setting: str) -> BadRequest:
    return BadRequest(
        f"'{name}' has {found} {what}; {limit} are allowed (MODELYARD_REQUEST_MAX_{setting}): {_WHY}", param=name
    )


def repeats_of(pattern: str) -> int:
    """Return how many times parts of a regular expression are repeated by numbers, those within others multiplied."""
    groups = [0]
    #: What the last atom has inside, or None where nothing can be repeated.
    last: int | None = None
    at, end = 0, len(pattern)
    while at < end:
        char = pattern[at]
        if char == "\\":
            # A property's name stands in braces, as do some code points: no numbers of repeats.
            braced = pattern[at + 1 : at + 2] in ("p", "P", "u", "x") and pattern[at + 2 : at + 3] == "{"
            closed = pattern.find("}", at + 2) if braced else -1
            at = closed + 1 if closed >= 0 else at + 2
            last = 0
        elif char == "[":
            at = _end_of_class(pattern, at)
            last = 0
        elif char == "(":
            groups.append(0)
            at, last = at + 1, None
        elif char == ")":
            last = groups.pop() if len(groups) > 1 else 0
            groups[-1] += last
            at += 1
        elif char == "{" and last is not None and (found := _QUANTIFIER.match(pattern, at)):
            times = max(_number(found[1]), _number(found[3]))
            grown = min(times, COUNTED_REPEATS) * max(1, last)
            groups[-1] += max(0, grown - last)
            last = max(grown, last)
            at = found.end()
        else:
            last = None if char == "|" else last if char in "*+?" else 0
            at += 1
    return sum(groups)


def _end_of_class(pattern: str, at: int) -> int:
    at += 1
    if pattern[at : at + 1] == "^":
        at += 1
    if pattern[at : at + 1] == "]":
        at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1


def _repeats_of_grammar(text: str) -> Iterator[int]:
    for found in _GRAMMAR_REPEATS.finditer(text):
        yield min(max(_number(one) for one in found.groups()), COUNTED_REPEATS)


def _number(digits: str | None) -> int:
    return 0 if not digits else int(digits) if len(digits) < 10 else COUNTED_REPEATS
