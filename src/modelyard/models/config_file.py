"""The typed reader of a model's `config.json`: whole numbers within bounds, names, lists of names, objects.

The file is written by strangers, and nobody else in the server may parse it: `read` and `parse` check every fact that
Modelyard reads, on the top level and in the part that describes the language model, and refuse the rest with the key
and its value. What is not read here is left to the engine, so that an honest oddity of a model does no harm (Mamba's
`time_step_limit` holds an Infinity). The download refuses such a file before weights are fetched; a model that was
added before is refused where it is used.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from modelyard.models import mistral_format

CONFIG = "config.json"
#: The largest honest ones, with 21,000 labels or a list of unquantised layers, have 2 MiB.
MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 64
#: The longest integer that is read at all: to turn a longer text into a number and back takes quadratic time.
MAX_DIGITS = 40
NAME_CHARACTERS = 200
MAX_NAMES = 10_000

#: The same figure under the names that families of models have for it.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
#: Experts that each token goes through, chosen among all, and those that all tokens go through.
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "num_shared_expert")
#: Where the language model is described in a model that also sees or hears.
TEXT_PARTS = ("text_config", "llm_config", "language_config")

#: The most that each number may be, far above every model there is. A list of such numbers has one for each layer.
MOST: Mapping[str, int] = {
    **dict.fromkeys(LAYERS, 10_000),
    **dict.fromkeys(HEADS, 1 << 16),
    **dict.fromkeys(HIDDEN, 1 << 20),
    **dict.fromkeys(INNER, 1 << 24),
    **dict.fromkeys(LENGTHS, 1 << 31),
    **dict.fromkeys(EXPERTS, 1 << 16),
    **dict.fromkeys(ACTIVE_EXPERTS, 1 << 16),
    **dict.fromkeys(SHARED_EXPERTS, 1 << 16),
    "shared_expert_intermediate_size": 1 << 24,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "kv_lora_rank": 1 << 20,
    "qk_rope_head_dim": 1 << 16,
    "vocab_size": 1 << 28,
    # "No limit" is 10**30 by custom; `whole` tells such a number from a length.
    "model_max_length": 1 << 128,
}
_NAMES = ("model_type",)
_LISTS_OF_NAMES = ("architectures", "layer_types")
_CLAIMS = ("is_encoder_decoder", "tie_word_embeddings")
_OBJECTS = (*TEXT_PARTS, "quantization_config", "quant_config")
#: A name, or an object with one for each part of the model.
_FORMATS = ("dtype", "torch_dtype")

Config = Mapping[str, Any]


class _Long:
    """An integer of more digits than are read."""

    def __init__(self, digits: str) -> None:
        self.digits = len(digits.lstrip("-"))


def read(folder: Path) -> dict[str, Any]:
    """Return the configuration of the model in a folder, checked; that of Mistral's format in the same names. Blocks.

    Raises:
        JobFailure: `bad_configuration`: it is absent, not readable, or holds what it may not.
    """
    is_mistral = not (folder / CONFIG).exists() and (folder / mistral_format.PARAMS).exists()
    name = mistral_format.PARAMS if is_mistral else CONFIG
    try:
        with open(folder / name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refusal(f"cannot be read ({error.strerror})") from None
    return parse_params(content) if is_mistral else parse(content)


def parse_params(content: bytes) -> dict[str, Any]:
    """Return what the bytes of Mistral's `params.json` say, checked, in the names of `config.json`.

    Raises:
        JobFailure: `bad_configuration`, with the key and the value.
    """
    try:
        config = mistral_format.config_of(_parsed(content))
        _check(config, "")
    except JobFailure as failure:
        message = failure.message.replace(CONFIG, mistral_format.PARAMS, 1)
        raise JobFailure(failure.code, message, failure.hint) from None
    return config


def parse(content: bytes) -> dict[str, Any]:
    """Return the configuration that a file's bytes hold, checked.

    Raises:
        JobFailure: `bad_configuration`, with the key and the value.
    """
    config = _parsed(content)
    _check(config, "")
    for name in TEXT_PARTS:
        if isinstance(config.get(name), dict):
            _check(config[name], f"{name}.")
    return config


def _parsed(content: bytes) -> dict[str, Any]:
    """Return the object that a file's bytes hold, neither too long nor too deep."""
    if len(content) > MAX_BYTES:
        raise _refusal(f"has more than {MAX_BYTES} bytes")
    try:
        config = json.loads(text_of(content), parse_int=_integer, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _refusal(f"is not readable JSON ({str(error)[:200]})") from None
    if not isinstance(config, dict):
        raise _refusal("is not a JSON object")
    _look_through(config)
    return config


def text_of(content: bytes) -> str:
    """Return a file's text as transformers and vLLM read it. What Python's json would guess right, they can't read.

    Raises:
        ValueError: it is not in UTF-8, or begins with a byte order mark, as some editors write it.
    """
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not in UTF-8: {error.reason} (byte {error.start})") from None


def text_part(config: Config) -> Config:
    """Return the part that describes the language model: of a model that also sees or hears it is one of several."""
    for name in TEXT_PARTS:
        part = config.get(name)
        if isinstance(part, Mapping):
            return part
    return config


def whole(config: Config, *names: str) -> int | None:
    """Return the first of these numbers that is there; None where it is no whole number within its bounds."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None or type(config[name]) is not int:
        return None
    found: int = config[name]
    return found if 0 <= found <= min(MOST[name], MOST["max_position_embeddings"]) else None


def longest(config: Config) -> int | None:
    """Return the most tokens that the configuration allows; None where it does not tell."""
    parts = (config, text_part(config))
    found = [whole(part, name) for part in parts for name in (*LENGTHS, "model_max_length")]
    return max((length for length in found if length), default=None)


def names_of(config: Config) -> tuple[str, list[str]]:
    """Return the type of the model, empty where it is not said, and the names of its architectures."""
    kind, named = config.get("model_type"), config.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return kind if isinstance(kind, str) else "", architectures


def _integer(text: str) -> int | _Long:
    return int(text) if len(text) <= MAX_DIGITS else _Long(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Of two values for one key every library would believe another."""
    built = dict(pairs)
    if len(built) != len(pairs):
        for key, value in pairs:
            if not _same(built[key], value):
                raise ValueError(f"{_shown(key)} is there twice, with different values")
    return built


def _same(one: Any, other: Any) -> bool:
    return bool(type(one) is type(other) and one == other)


def _look_through(config: dict[str, Any]) -> None:
    """Refuse what is too deep, and integers of too many digits, wherever they are."""
    waiting: list[tuple[Any, str, int]] = [(config, "", 0)]
    while waiting:
        value, place, depth = waiting.pop()
        if isinstance(value, _Long):
            raise _refusal(f"has a number of {value.digits} digits at {place[:200]}")
        if depth > MAX_DEPTH:
            raise _refusal(f"is nested more than {MAX_DEPTH} deep at {place[:200]}")
        if isinstance(value, dict):
            waiting += [
                (item, f"{place}.{_key(key)}" if place else _key(key), depth + 1) for key, item in value.items()
            ]
        elif isinstance(value, list):
            waiting += [(item, f"{place}[{number}]", depth + 1) for number, item in enumerate(value)]


def _check(config: dict[str, Any], place: str) -> None:
    for name, most in MOST.items():
        _want(config, place, name, f"a whole number from 0 to {most}", partial(_counts, most=most))
    for name in _NAMES:
        _want(config, place, name, f"a name of at most {NAME_CHARACTERS} characters", _is_name)
    for name in _LISTS_OF_NAMES:
        _want(config, place, name, f"a list of at most {MAX_NAMES} names", _are_names)
    for name in _CLAIMS:
        _want(config, place, name, "true or false", lambda value: value in (True, False))
    for name in _OBJECTS:
        _want(config, place, name, "an object", lambda value: isinstance(value, dict))
    for name in _FORMATS:
        _want(
            config, place, name, "the name of a number format", lambda value: isinstance(value, dict) or _is_name(value)
        )


def _want(config: dict[str, Any], place: str, name: str, expected: str, is_right: Callable[[Any], bool]) -> None:
    value = config.get(name)
    if value is not None and not is_right(value):
        raise _refusal(f"says that {place}{name} is {_shown(value)}, where {expected} belongs")


def _counts(value: Any, most: int) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(number is None or (type(number) is int and 0 <= number <= most) for number in numbers)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= NAME_CHARACTERS and value.isprintable()


def _are_names(value: Any) -> bool:
    # An entry may be null: a layer of which nothing is said.
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) <= MAX_NAMES
        and all(name is None or _is_name(name) for name in value)
    )


def _key(key: str) -> str:
    return key if _is_name(key) else _shown(key)


def _shown(value: Any) -> str:
    if isinstance(value, list | dict) and len(value) > 20:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} values"
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _refusal(what: str) -> JobFailure:
    return JobFailure("bad_configuration", f"{CONFIG} {what}.", "Tell the model's authors, or try another revision.")
