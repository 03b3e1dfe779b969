"""Bounds on what one request may ask of an engine that all share, by setting. Normal clients never meet them.

Looked at are the fields whose cost for others has nothing to do with the request's size. A field that is not there
costs nothing, and one that is too short to break its bound is not taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import msgspec

from modelyard.errors import BadRequest
from modelyard.gateway.envelope import ABSENT, Envelope
from modelyard.gateway.schema_cost import Cost, SchemaLimits
from modelyard.settings import Settings

#: Lists of token ids: more than any vocabulary has.
TOKEN_IDS = 1 << 20
#: A text of so many characters is always taken to be tokenised, however short the model.
ALWAYS_TOKENISED = 64 * 1024
_SCHEMAS = ("response_format", "structured_outputs", "text", "output_config", "output_format", "tools", "functions",
            "guided_json", "guided_regex", "guided_grammar", "guided_choice")  # fmt: skip
_STOPS = frozenset({"stop", "stop_sequences", "bad_words"})
_IDS = frozenset({"stop_token_ids", "allowed_token_ids"})
_TOOLS = frozenset({"tools", "functions"})
_LOOKED_AT = frozenset({"n", "best_of", "input", "prompt", "logit_bias", *_SCHEMAS, *_STOPS, *_IDS})
_list = msgspec.json.Decoder(list[msgspec.Raw])
_values = attrgetter(*sorted(_LOOKED_AT))
#: Of a request that has none of these fields, which nearly all are.
_NO_VALUES = _values(Envelope())


@dataclass(frozen=True)
class Limits:
    """The bounds: of answers (`n`), prompts, stop strings, tools, biases, of schemas, and of texts to be tokenised."""

    answers: int
    prompts: int
    stops: int
    tools: int
    logit_biases: int
    chars_per_token: int
    schemas: SchemaLimits

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Return the bounds that the settings set."""
        return cls(
            answers=settings.request_max_n,
            prompts=settings.request_max_prompts,
            stops=settings.request_max_stops,
            tools=settings.request_max_tools,
            logit_biases=settings.request_max_logit_biases,
            chars_per_token=settings.tokenize_chars_per_token,
            schemas=SchemaLimits(
                size_bytes=settings.request_max_schema_kib * 1024,
                depth=settings.request_max_schema_depth,
                properties=settings.request_max_schema_properties,
                ms=settings.request_max_schema_ms,
                choices=settings.request_max_choices,
                pattern_length=settings.request_max_pattern_length,
            ),
        )

    def check(self, envelope: Envelope) -> None:
        """Refuse a request that asks for more than one may.

        Raises:
            BadRequest: it names the field, the bound and its setting.
        """
        values = _values(envelope)
        if values == _NO_VALUES:
            return
        given = {
            name
            for name, value in zip(sorted(_LOOKED_AT), values, strict=True)
            if value is not None and value is not ABSENT
        }
        answers = 1
        for name in ("n", "best_of"):
            count = getattr(envelope, name)
            if isinstance(count, int | float) and count > 1:
                answers = max(answers, int(min(count, 2**62)))
                if count > self.answers:
                    raise _refused(name, "answers", count, self.answers, "N")
        prompts = max(self._prompts(envelope), 1)
        if prompts > self.prompts:
            name = "prompt" if envelope.raw("prompt") else "input"
            raise _refused(name, "texts", prompts, self.prompts, "PROMPTS")
        if prompts * answers > self.prompts and prompts > 1:
            raise _refused("n", "answers to all prompts together", prompts * answers, self.prompts, "PROMPTS")
        for name in given & _STOPS:
            self._count(envelope, name, "strings", self.stops, "STOPS", least_bytes=3)
        for name in given & _IDS:
            self._count(envelope, name, "token ids", TOKEN_IDS, None, least_bytes=2)
        for name in given & _TOOLS:
            self._count(envelope, name, "tools", self.tools, "TOOLS", least_bytes=3)
        self._count(envelope, "logit_bias", "biases", self.logit_biases, "LOGIT_BIASES", least_bytes=6)
        cost: Cost | None = None
        for name in _SCHEMAS:
            if name in given and (raw := envelope.raw(name)):
                cost = cost or Cost(self.schemas)
                # The field's own name tells what it holds where it is no object (`guided_regex`).
                cost.add(name, raw if not name.startswith("guided_") else b'{"%b":%b}' % (name.encode(), raw))

    def _prompts(self, envelope: Envelope) -> int:
        texts = envelope.input
        if isinstance(texts, list) and texts and isinstance(texts[0], str | list):
            return len(texts)
        raw = envelope.raw("prompt")
        # A list of numbers is one prompt, whatever its length.
        if raw[:1] == b"[" and raw[1:].lstrip()[:1] in (b'"', b"["):
            return len(_list.decode(raw))
        return 1

    def _count(
        self, envelope: Envelope, name: str, what: str, limit: int, setting: str | None, *, least_bytes: int
    ) -> None:
        raw = envelope.raw(name)
        if len(raw) <= least_bytes * limit:
            return
        # Of numbers there are as many as commas, of their biases as colons; texts may have both, and are told apart.
        count = raw.count(b":") if raw[:1] == b"{" else raw.count(b",") + 1 if raw[:1] == b"[" else 1
        if count > limit and b'"' in raw and raw[:1] == b"[":
            count = len(_list.decode(raw))
        if count > limit:
            raise _refused(name, what, count, limit, setting)

    def check_tokenised(self, envelope: Envelope, length: int) -> None:
        """Refuse a text to be tokenised that is far beyond what a model of this length takes, in tokens.

        Raises:
            BadRequest: it names the field, the bound and its setting.
        """
        limit = max(self.chars_per_token * length, ALWAYS_TOKENISED)
        for name in ("prompt", "tokens", "messages", "system"):
            value = getattr(envelope, name)
            size = _size_of(msgspec.json.decode(bytes(value)) if isinstance(value, msgspec.Raw) else value)
            if size > limit:
                what = "token ids" if name == "tokens" else "characters"
                raise BadRequest(
                    f"'{name}' has {size} {what}; {limit} are allowed, {self.chars_per_token} for each of the "
                    f"{length} tokens that the model takes (MODELYARD_TOKENIZE_CHARS_PER_TOKEN): an engine does it "
                    "while others wait. Send the text in parts.",
                    param=name,
                )


#: The bounds where nothing is set.
DEFAULT_LIMITS = Limits.of(Settings.model_construct())


def _size_of(value: Any) -> int:
    """Return how many characters and numbers a value has."""
    size, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()
        elif one is not None:
            size += 1
    return size


def _refused(name: str, what: str, found: object, limit: int, setting: str | None) -> BadRequest:
    bound = f" (MODELYARD_REQUEST_MAX_{setting})" if setting else ""
    return BadRequest(
        f"'{name}' asks for {found} {what}; {limit} are allowed in one request{bound}, since all share the engine.",
        param=name,
    )
