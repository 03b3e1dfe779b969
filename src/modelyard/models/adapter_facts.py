"""Adapter facts: what a LoRA adapter's own files say of it, read once and kept with its row.

`read` looks at the configuration, at the header of the weights, and at the weights for NaN and infinity. It loads
nothing and trusts no name in the files: `base_model_name_or_path` is often a path on the machine of the training. An
adapter that vLLM cannot serve on any base has a `refusal`; whether it fits one base is `adapter_checks`'s to say, from
`layers`. Nothing here knows the database. Blocks on the disk.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from modelyard.errors import JobFailure
from modelyard.models import scan
from modelyard.models.scan import FLOATS, header_of
from modelyard.models.selection import ADAPTER_CONFIG as CONFIG
from modelyard.models.selection import ADAPTER_WEIGHTS as WEIGHTS

#: Counts the changes of what is looked at here: the files of rows with facts of another version are read again.
VERSION = 2
#: What vLLM takes as --max-lora-rank.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Weights above this size are not read for NaN and infinity: for a row from before there were facts, a request waits.
MAX_READ_BYTES = 256 * 1024**2
#: Adapted layers, without experts. The largest models have some thousands; a row must not take many MiB.
MOST_LAYERS = 10_000
#: Of a tensor's name.
MOST_NAME_LETTERS = 300
_MAX_CONFIG_BYTES = 1024**2
_MOST_ALPHA = 1_000_000_000
# Small, since nothing else of the server runs while a block is looked at.
_READ_BYTES = 512 * 1024

_MERGE = "Merge it into its base (PEFT: merge_and_unload) and deploy the result, or train it again without."
_DAMAGED = "Save or download it again."
# Each of these, unless empty or false, changes what an adapter computes in a way that vLLM does not follow.
_UNSERVED = {
    "use_dora": "is a DoRA",
    "lora_bias": "has trained biases (lora_bias)",
    "modules_to_save": "has whole layers trained beside the LoRA weights (modules_to_save)",
    "trainable_token_indices": "has trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "is an activated LoRA (alora_invocation_tokens)",
    "layer_replication": "repeats layers of its base (layer_replication)",
    "use_bdlora": "is a block-diagonal LoRA (use_bdlora)",
    "use_qalora": "is a QA-LoRA (use_qalora)",
    "arrow_config": "routes between other adapters (arrow_config)",
    "kasa_config": "changes its base's weights (kasa_config)",
    "monteclora_config": "samples its weights (monteclora_config)",
    "megatron_config": "was made for Megatron's layers (megatron_config)",
}
# The others change the base's weights when PEFT loads them (PiSSA, OLoRA, CorDA, LoftQ), or are not known.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_NAME = re.compile(r"^(?:base_model\.model\.)?(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))")
# PEFT keeps a copy of the base's own embedding beside an adapter on it; vLLM passes it over.
_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


class Refusal(msgspec.Struct, frozen=True):
    """The reason why an adapter cannot be served: a sentence after "The adapter X", without its point, and the cure."""

    what: str
    to_do: str
    code: str


class Layer(msgspec.Struct, frozen=True, array_like=True):
    """One adapted layer, by the name that the adapter has for it: A leads from `inputs` to the rank, B to `outputs`."""

    name: str
    inputs: int
    outputs: int
    is_embedding: bool = False


class AdapterFacts(msgspec.Struct, frozen=True):
    """The facts of one adapter.

    `rank` is the highest that its configuration names, `target_modules` are the last parts of all its layers' names.
    `layers` lack experts: one tensor for each of them in one library is one for all in another. With a `refusal` these
    are empty. `size_bytes` is the size of the weights, 0 where there are none.
    """

    version: int
    rank: int
    target_modules: tuple[str, ...]
    layers: tuple[Layer, ...]
    size_bytes: int
    refusal: Refusal | None = None

    def are_of(self, folder: Path) -> bool:
        """True if the weights in a folder can be those that were read. Opens no file."""
        return self.size_bytes == _size_of(folder / WEIGHTS)


def read(folder: Path) -> AdapterFacts:
    """Return the facts of the adapter in a folder. Reads all of its weights."""
    try:
        return _Reader(folder).run()
    except _Refused as refused:
        return AdapterFacts(VERSION, 0, (), (), _size_of(folder / WEIGHTS), refused.refusal)


def from_json(value: object) -> AdapterFacts | None:
    """Return facts as `as_json` made them; None where they are not, or of another version: then they are read again."""
    try:
        facts = msgspec.convert(value, AdapterFacts)
    except msgspec.ValidationError:
        return None
    return facts if facts.version == VERSION else None


def as_json(facts: AdapterFacts) -> dict[str, Any]:
    """Return facts as a row and a child's result keep them."""
    found: dict[str, Any] = msgspec.to_builtins(facts)
    return found


def _size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


class _Refused(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.what)
        self.refusal = refusal


@dataclass
class _Pair:
    """The two matrices of one adapted layer: A is rank times input, B is output times rank."""

    a: list[int] | None = None
    b: list[int] | None = None
    is_embedding: bool = False


class _Reader:
    """One adapter being read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self) -> AdapterFacts:
        config = self._config()
        ranks = self._ranks(config)
        path = self._weights()
        header = header_of(path)
        pairs = self._pairs(header)
        layers = [layer for module, pair in pairs.items() if (layer := self._layer(module, pair, ranks)) is not None]
        if len(layers) > MOST_LAYERS:
            self._refuse(f"adapts {len(layers)} layers, and {MOST_LAYERS} are the most", _MERGE)
        size = path.stat().st_size
        if size <= MAX_READ_BYTES:
            self._check_numbers(path, header)
        kinds = sorted({module.rpartition(".")[2] for module in pairs})
        return AdapterFacts(VERSION, max(ranks), tuple(kinds), tuple(layers), size)

    def _refuse(self, what: str, to_do: str, code: str = "unsupported_adapter") -> NoReturn:
        raise _Refused(Refusal(what, to_do, code))

    def _config(self) -> dict[str, Any]:
        try:
            with open(self.folder / CONFIG, "rb") as file:
                content = file.read(_MAX_CONFIG_BYTES + 1)
            config = json.loads(content) if len(content) <= _MAX_CONFIG_BYTES else None
        except FileNotFoundError:
            self._refuse(f"has no {CONFIG}", "Add it again: its folder is not whole.", "bad_weights")
        except (ValueError, RecursionError) as error:
            self._refuse(f"has a {CONFIG} that cannot be read ({str(error)[:80]})", _DAMAGED, "bad_weights")
        if not isinstance(config, dict):
            self._refuse(f"has a {CONFIG} that is no JSON object of at most 1 MiB", _DAMAGED, "bad_weights")
        try:
            scan.scan_configuration(CONFIG, content)
        except JobFailure as failure:
            self._refuse(f"is not used: its {failure.message.rstrip('.')}", failure.hint, failure.code)
        kind = config.get("peft_type")
        if kind != "LORA":
            self._refuse(f"is of type {str(kind)[:40]}, and only LORA can be served", _MERGE)
        for key, words in _UNSERVED.items():
            if config.get(key):
                self._refuse(f"{words}, which vLLM cannot serve", _MERGE)
        if config.get("bias", "none") != "none":
            self._refuse(f"has trained biases (bias is {str(config['bias'])[:40]!r}), which vLLM cannot serve", _MERGE)
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
            self._refuse(
                f"fits a base that PEFT has changed (init_lora_weights is {start[:40]!r}), and vLLM would put it on "
                "the unchanged one",
                "Save it as a plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion).",
            )
        return config

    def _ranks(self, config: Mapping[str, Any]) -> set[int]:
        """Return the ranks that layers may have, after checking what vLLM computes the scale from."""
        absent = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
        if absent:
            self._refuse(f"says nothing of {' and '.join(absent)} in {CONFIG}", _DAMAGED)
        by_layer, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        if not isinstance(by_layer, dict) or not isinstance(alphas, dict):
            self._refuse(f"has a rank_pattern or alpha_pattern in {CONFIG} that is no object", _DAMAGED)
        ranks = [config["r"], *by_layer.values()]
        for rank in ranks:
            if type(rank) is not int or rank < 1:
                self._refuse(f"has a rank of {str(rank)[:40]!r} in {CONFIG}", "A rank is a whole number, at least 1.")
        for alpha in (config["lora_alpha"], *alphas.values()):
            # Compared, not converted: an integer may have hundreds of digits. NaN is in no order.
            if type(alpha) not in (int, float) or not -_MOST_ALPHA <= alpha <= _MOST_ALPHA:
                self._refuse(
                    f"has a lora_alpha of {str(alpha)[:40]!r} in {CONFIG}",
                    f"It must be a number between {-_MOST_ALPHA} and {_MOST_ALPHA}.",
                )
        if max(ranks) > MAX_RANKS[-1]:
            self._refuse(f"has rank {max(ranks)}, and vLLM serves ranks up to {MAX_RANKS[-1]}", _MERGE)
        return set(ranks)

    def _weights(self) -> Path:
        path = self.folder / WEIGHTS
        if not path.is_file():
            others = [name for name in ("adapter_model.bin", "adapter_model.pt") if (self.folder / name).is_file()]
            self._refuse(
                f"has no {WEIGHTS}" + (f" but {others[0]}, which can run code when it is loaded" if others else ""),
                "Save it with PEFT's save_pretrained, whose weights are one file of safetensors.",
            )
        try:
            scan.scan_safetensors(path, WEIGHTS, scan.MAX_ADAPTER_HEADER_BYTES)
        except JobFailure as failure:
            self._refuse(f"is damaged: {failure.message.rstrip('.')}", _DAMAGED, failure.code)
        return path

    def _pairs(self, header: Mapping[str, Any]) -> dict[str, _Pair]:
        pairs: dict[str, _Pair] = {}
        for name, entry in header.items():
            if name.endswith(_COPIES):
                continue
            if len(name) > MOST_NAME_LETTERS or not name.isprintable():
                self._refuse(f"has weights whose name no layer has: {name[:120]!r}", _DAMAGED)
            match = _NAME.fullmatch(name)
            if match is None:
                self._refuse(f"has weights that are no LoRA's: {name[:120]!r}", _MERGE)
            if entry["dtype"] not in FLOATS or len(entry["shape"]) != 2:
                kind = f"{entry['dtype']} {entry['shape']}"[:80]
                self._refuse(f"has weights of an unknown form at {name[:120]!r}: {kind}", "They must be matrices.")
            pair = pairs.setdefault(match[1], _Pair())
            pair.is_embedding |= match[3] is not None
            if (match[2] or match[3]) == "A":
                pair.a = entry["shape"]
            else:
                pair.b = entry["shape"]
        if not pairs:
            self._refuse("has no LoRA weights: it would answer as its base does", "Train it, and save it again.")
        return pairs

    def _layer(self, module: str, pair: _Pair, ranks: set[int]) -> Layer | None:
        """Return a layer after checking its ranks; None for experts."""
        if pair.a is None or pair.b is None:
            self._refuse(f"lacks lora_{'B' if pair.a else 'A'} of {module[:120]!r}", _DAMAGED, "bad_weights")
        rank = pair.a[0]
        if rank != pair.b[1]:
            self._refuse(f"has ranks {rank} and {pair.b[1]} at {module[:120]!r}", _DAMAGED, "bad_weights")
        # All experts of a layer may be in one matrix, one rank after the other.
        known = any(rank % each == 0 for each in ranks) if ".experts" in module else rank in ranks
        if not known:
            said = ", ".join(str(each) for each in sorted(ranks))
            self._refuse(
                f"has rank {rank} at {module[:120]!r}, but {CONFIG} says {said}: its scale would be wrong",
                "Use the adapter_config.json that was saved with these weights.",
            )
        return None if ".experts" in module else Layer(module, pair.a[1], pair.b[0], pair.is_embedding)

    def _check_numbers(self, path: Path, header: Mapping[str, Any]) -> None:
        with open(path, "rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                file.seek(start + begin)
                for position in range(begin, end, _READ_BYTES):
                    block = file.read(min(_READ_BYTES, end - position))
                    if _has_no_number(block, entry["dtype"]):
                        self._refuse(
                            f"has weights that are no numbers (NaN or infinite) at {name[:120]!r}",
                            "Its training went astray: use an earlier checkpoint, or train it with a lower rate.",
                            "bad_weights",
                        )


# A number is none if all bits of its exponent are set. Each table maps a byte to 1 where its part of them is set.
_SET = {
    "top7": bytes(int(byte & 0x7F == 0x7F) for byte in range(256)),
    "top1": bytes(int(byte & 0x80 == 0x80) for byte in range(256)),
    "next4": bytes(int(byte & 0xF0 == 0xF0) for byte in range(256)),
    "half": bytes(int(byte & 0x7C == 0x7C) for byte in range(256)),
}


def _has_no_number(block: bytes, dtype: str) -> bool:
    """True if a NaN or an infinity is in the block. Some hundred megabytes a second, without a library."""
    if dtype == "F16":
        return 1 in block[1::2].translate(_SET["half"])
    width, second = {"F32": (4, "top1"), "BF16": (2, "top1"), "F64": (8, "next4")}[dtype]
    high = block[width - 1 :: width].translate(_SET["top7"])
    low = block[width - 2 :: width].translate(_SET[second])
    return bool(int.from_bytes(high, "little") & int.from_bytes(low, "little"))
