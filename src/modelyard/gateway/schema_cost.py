"""The cost of structured output, from a request alone: how much an engine would have to compile before it can answer.

JSON schemas, patterns and grammars become a grammar over the model's whole vocabulary. Engines do that for all their
requests together, and a few KiB can take minutes: what costs is not the text but the states that it stands for.
Counted here is what costs with xgrammar, in milliseconds of one processor, measured with a vocabulary of 49,000 tokens;
a larger one takes longer. Patterns and grammars: see `pattern_cost`. A text with a `maxLength` takes some 7 ms for each
character up to 200; properties of an object that may have others too take as much each; optional properties take by
their square, 3.5 s for 1,000; values of `enum` and `const` and names of properties by their length.

Nothing here says whether a schema is valid: that is the engine's to say. All of it takes one pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from modelyard.errors import BadRequest
from modelyard.gateway.pattern_cost import ANY_MS, COUNTED_REPEATS, grammar_ms, pattern_ms

#: Properties of one object.
OBJECT_PROPERTIES = 1000
#: Milliseconds of optional properties, by their square, and of a property of an object that may have others.
OPTIONAL_MS, OPEN_MS = 0.0035, 7.0
#: Milliseconds of a character that is to be said as it is.
TEXT_MS = 0.008
#: Here names are followed by schemas, so that none of the names is a keyword.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
#: Here values are data.
_DATA = frozenset({"default", "examples", "example", "const"})
_PATTERNS = frozenset({"pattern", "regex", "whitespace_pattern", "guided_regex", "guided_whitespace_pattern"})
_GRAMMARS = frozenset({"grammar", "guided_grammar", "definition"})
_LISTS = frozenset({"enum", "choice", "guided_choice"})
#: These may hold JSON as a text.
_TEXTS = frozenset({"json", "structural_tag", "schema", "guided_json"})

_KEYWORDS = _NAMED | _PATTERNS | _GRAMMARS | _LISTS | _TEXTS | {"minLength", "maxLength", "const"}
#: Most tools have none of these and few properties: then there is nothing to count. (Escapes may hide a name.)
_TOOLS = frozenset({"tools", "functions"})
_COSTLY = (b"attern", b"Length", b"enum", b"regex", b"grammar", b"definition", b"choice", b"alPropert", b"unevaluated",
           b"\\u")  # fmt: skip


@dataclass(frozen=True)
class SchemaLimits:
    """The most that one request may have of each, over all its schemas, tools, patterns and grammars."""

    size_bytes: int
    depth: int
    properties: int
    ms: int
    choices: int
    pattern_length: int


@dataclass
class Cost:
    """The counts of one request so far, over all its fields."""

    limits: SchemaLimits
    size_bytes: int = 0
    properties: int = 0
    ms: float = 0.0
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
        if isinstance(node.get("const"), str):
            self._count_ms(name, TEXT_MS * len(node["const"]))
        for key in keywords:
            inner = node[key]
            if key in _NAMED and isinstance(inner, dict):
                self._count_properties(name, len(inner))
                if key == "properties":
                    self._count_ms(name, _properties_ms(node, inner))
                if key == "patternProperties":
                    for pattern in inner:
                        self._count_pattern(name, pattern)
            elif key in _LISTS and isinstance(inner, list):
                self._count_ms(name, TEXT_MS * len(msgspec.json.encode(inner)))
                self.choices += len(inner)
                if self.choices > self.limits.choices:
                    raise _refused(name, "choices", self.choices, self.limits.choices, "CHOICES")
            elif isinstance(inner, str):
                if key in _PATTERNS:
                    self._count_pattern(name, inner)
                elif key in _GRAMMARS:
                    self._count_ms(name, grammar_ms(inner))
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
                self._count_ms(name, ANY_MS * min(max(pair), COUNTED_REPEATS))

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
        self._count_ms(name, pattern_ms(pattern))

    def _count_ms(self, name: str, ms: float) -> None:
        self.ms += ms
        if self.ms > self.limits.ms:
            raise _refused(
                name,
                "ms of work in it by our estimate (repeats in patterns, those within others most of all, maxLength, "
                "optional properties, additionalProperties)",
                round(self.ms),
                self.limits.ms,
                "SCHEMA_MS",
            )


_WHY = "an engine compiles all of it while others wait."


def _refused(name: str, what: str, found: object, limit: object, setting: str) -> BadRequest:
    return BadRequest(
        f"'{name}' has {found} {what}; {limit} are allowed (MODELYARD_REQUEST_MAX_{setting}): {_WHY}", param=name
    )


def _properties_ms(node: dict[str, Any], properties: dict[str, Any]) -> float:
    """Return what the properties of an object cost beside their size."""
    required = node.get("required")
    named = {one for one in required if isinstance(one, str)} if isinstance(required, list) else set()
    optional = len(properties) - len(named & properties.keys())
    is_open = any(node.get(key) not in (None, False) for key in ("additionalProperties", "unevaluatedProperties"))
    names_ms = TEXT_MS * sum(map(len, properties))
    return names_ms + OPTIONAL_MS * optional**2 + (OPEN_MS * len(properties) if is_open else 0.0)
