"""The body of a request for raw text: fields, types, ranges, defaults.

The types are checked as by the interface that this one succeeds: whatever has a wrong type is "Invalid Data Format",
unknown keys are ignored, and a flag that is no boolean counts as true. That a number must also be one which an engine
can work with is new: the error names the field and its range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from modelyard.errors import BadRequest, InvalidJson
from modelyard.settings import Settings

BAD_JSON = "Invalid JSON format"
BAD_DATA = "Invalid Data Format"
DUPLICATES = "Duplicate request_ids"
#: Each is a prompt of its own to the engine, at every token.
MOST_BEAMS = 32


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes: from `least` (or above it) to `most`."""

    kind: type
    least: float
    most: float
    is_above: bool = False

    def holds(self, value: float) -> bool:
        """True if the value is one of them."""
        return (self.least < value if self.is_above else self.least <= value) and value <= self.most

    def __str__(self) -> str:
        return f"{'above' if self.is_above else 'at least'} {_shown(self.least)} and at most {_shown(self.most)}"


#: The penalties' ranges are wider than any use. Beyond them an engine's numbers overflow.
RANGES = {
    "num_beams": Range(int, 1, MOST_BEAMS),
    "temperature": Range(float, 0, 2),
    "top_p": Range(float, 0, 1, is_above=True),
    "top_k": Range(int, -1, 1_000_000_000),
    "max_new_tokens": Range(int, 1, 1_000_000_000),
    "repetition_penalty": Range(float, 0.01, 100),
    "length_penalty": Range(float, -10, 10),
}


#: A beam search is not the engine's, and takes what transformers takes: a top_p of 1 or more is off.
RANGES_OF_BEAMS = {
    **RANGES,
    "temperature": Range(float, 0, 1_000_000_000),
    "top_p": Range(float, 0, 1_000_000_000),
    "repetition_penalty": Range(float, 0, 1_000_000_000, is_above=True),
}


@dataclass(frozen=True)
class Config:
    """Generation settings. `sent` names those of the request; the rest are defaults, which bend where they must."""

    num_beams: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    repetition_penalty: float
    length_penalty: float
    sent: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def of_settings(cls, settings: Settings) -> Config:
        """Return the server's defaults."""
        return cls(**{name: getattr(settings, f"generate_{name}") for name in CONFIG_FIELDS})

    @classmethod
    def of_kept(cls, kept: Mapping[str, Any], defaults: Config) -> Config:
        """Return a configuration that was stored with `stored`."""
        return cls(**{**defaults.stored(), **{name: kept[name] for name in CONFIG_FIELDS if name in kept}})

    def stored(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {name: value for name, value in asdict(self).items() if name != "sent"}


CONFIG_FIELDS = ("num_beams", "do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "repetition_penalty",
                 "length_penalty")  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One text that is asked for. None: nothing was sent, so there must be something to continue."""

    request_id: str
    text: str | None
    #: What the client calls it.
    field: str


@dataclass(frozen=True)
class RawRequest:
    """A request of either route. `config` is None where none was sent."""

    prompts: tuple[Prompt, ...]
    only_new_tokens: bool
    stream_response: bool
    config: Config | None
    model: str | None

    @property
    def request_ids(self) -> list[str]:
        """The ids in their order."""
        return [prompt.request_id for prompt in self.prompts]


def parse_one(body: bytes, defaults: Config) -> RawRequest:
    """Read a request for one text.

    Raises:
        BadRequest: in the words of the source, or naming the field that is out of its range.
    """
    data = _object(body)
    prompt = _prompt(data, "prompt")
    if prompt.text == "":
        raise BadRequest(BAD_DATA, param="prompt")
    return _request((prompt,), data, defaults)


def parse_batch(body: bytes, defaults: Config) -> RawRequest:
    """Read a request for several texts. Here a prompt may be empty.

    Raises:
        BadRequest: in the words of the source, or naming the field that is out of its range.
    """
    data = _object(body)
    items = data.get("prompts")
    if not isinstance(items, list) or not items:
        raise BadRequest(BAD_DATA, param="prompts")
    prompts = tuple(_prompt(item, f"prompts[{number}].prompt") for number, item in enumerate(items))
    if len({prompt.request_id for prompt in prompts}) < len(prompts):
        raise BadRequest(DUPLICATES, param="prompts")
    return _request(prompts, data, defaults)


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson(BAD_JSON) from None
    if not isinstance(data, dict):
        raise BadRequest(BAD_DATA)
    return data


def _prompt(data: object, field: str) -> Prompt:
    if not isinstance(data, dict):
        raise BadRequest(BAD_DATA, param="prompts")
    request_id, text = data.get("request_id"), data.get("prompt")
    if not isinstance(request_id, str) or not request_id:
        raise BadRequest(BAD_DATA, param="request_id")
    if "prompt" in data and not isinstance(text, str):
        raise BadRequest(BAD_DATA, param="prompt")
    return Prompt(request_id, text, field)


def _request(prompts: tuple[Prompt, ...], data: dict[str, Any], defaults: Config) -> RawRequest:
    model, given = data.get("model"), data.get("generation_config")
    if not isinstance(model, str | None):
        raise BadRequest(BAD_DATA, param="model")
    return RawRequest(
        prompts,
        only_new_tokens=data.get("only_new_tokens") is not False,
        stream_response=data.get("stream_response") is not False,
        config=None if given is None else _config(given, defaults),
        model=model or None,
    )


def _config(given: object, defaults: Config) -> Config:
    if not isinstance(given, dict):
        raise BadRequest(BAD_DATA, param="generation_config")
    sent = {name: value for name, value in given.items() if name in CONFIG_FIELDS}
    beams = sent.get("num_beams", defaults.num_beams)
    ranges = RANGES_OF_BEAMS if isinstance(beams, int) and beams > 1 else RANGES
    for name, value in sent.items():
        _check(name, value, ranges.get(name))
    return Config(**{**defaults.stored(), **sent}, sent=frozenset(sent))


def _check(name: str, value: object, range_: Range | None) -> None:
    if range_ is None:
        is_right = isinstance(value, bool)
    else:
        is_right = isinstance(value, range_.kind | int) and not isinstance(value, bool)
    if not is_right:
        raise BadRequest(BAD_DATA, param=f"generation_config.{name}")
    if range_ is not None and not range_.holds(value):  # type: ignore[arg-type]  # a number, as was just checked
        raise out_of_range(name, f"must be {range_}; it is {_shown(value)}")  # type: ignore[arg-type]  # likewise


def _shown(value: float) -> str:
    # Not as 1e+09, and not by the thousand digits that a whole number may have.
    return str(int(value) if value == int(value) else value)[:40]


def out_of_range(name: str, problem: str) -> BadRequest:
    """Return the error for a field of `generation_config` whose value cannot be had."""
    return BadRequest(f"generation_config.{name} {problem}.", param=f"generation_config.{name}")
