"""What vLLM can serve as an adapter, decided from the adapter's files before an engine sees them.

vLLM 0.32 refuses much of what PEFT can train, often as an HTTP 500; and some of what it does load it serves wrongly
without a word: weights too small for their base are padded, names that its model lacks are passed over, an adapter
without weights answers as the base does. So `check_adapter` reads the configuration, the header of the weights and
the headers of the base's, and refuses with what is wrong and what to do.
Of the weights themselves it looks only for numbers that are none. It loads nothing and trusts no name in the files:
`base_model_name_or_path` is often a path on the machine of the training, and the store knows the base.
What only the engine knows (whether this architecture takes adapters on its embeddings) it is asked by loading.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from modelyard.deploy.base_layers import FLOATS, BaseLayers, base_layers, header_of, tail_of
from modelyard.errors import JobFailure, Unprocessable
from modelyard.models import scan

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: What vLLM takes as --max-lora-rank.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Weights above this size are not read for numbers that are none: a request waits for the check.
MAX_READ_BYTES = 256 * 1024**2
#: Of a configuration: the language model is one part of several.
PARTS = ("text_config", "vision_config", "audio_config", "thinker_config")
_MAX_CONFIG_BYTES = 1024**2
_MOST_ALPHA = 1_000_000_000
# Small, since nothing else of the server runs while a block is looked at.
_READ_BYTES = 512 * 1024

_MERGE = "Merge it into its base (PEFT: merge_and_unload) and deploy the result, or train it again without."
_DAMAGED = "Save or download it again."
_OTHER_BASE = "It was made for another base: deploy it on that."
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


@dataclass(frozen=True)
class AdapterFacts:
    """What an engine must have room for. `rank` is the highest of all layers'; the modules are names of layers."""

    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int


def smallest_max_rank(ranks: Iterable[int]) -> int:
    """Return the smallest --max-lora-rank that takes adapters of all these ranks.

    Raises:
        ValueError: there is none.
    """
    highest = max(ranks, default=1)
    found = next((rank for rank in MAX_RANKS if rank >= highest), None)
    if found is None:
        raise ValueError(f"vLLM takes ranks up to {MAX_RANKS[-1]}, not {highest}")
    return found


def check_adapter(
    folder: Path, base_config: Mapping[str, Any], *, adapter_id: str = "", base_folder: Path | None = None
) -> AdapterFacts:
    """Return what an adapter needs, or refuse what vLLM cannot serve on its base. Blocks: it reads files.

    With `base_folder` the adapter's layers are held against the base's own weights, else only against `base_config`.

    Raises:
        Unprocessable: param `adapter_ids`, code `unsupported_adapter` or, if the files are broken, `bad_weights`.
    """
    return _Check(folder, base_config, adapter_id or folder.name, base_folder).run()


@dataclass
class _Pair:
    """The two matrices of one adapted layer: A is rank times input, B is output times rank."""

    a: list[int] | None = None
    b: list[int] | None = None
    is_embedding: bool = False


class _Check:
    """One adapter being checked."""

    def __init__(self, folder: Path, base: Mapping[str, Any], adapter_id: str, base_folder: Path | None) -> None:
        self.folder = folder
        text = base.get("text_config")
        self.base = {**base, **text} if isinstance(text, dict) else dict(base)
        self.has_parts = any(isinstance(base.get(part), dict) for part in PARTS)
        self.adapter_id = adapter_id
        self.base_folder = base_folder

    def run(self) -> AdapterFacts:
        config = self._config()
        ranks = self._ranks(config)
        path = self._weights()
        header = header_of(path)
        pairs = self._pairs(header)
        for module, pair in pairs.items():
            self._check_rank(module, pair, ranks)
        self._check_layers(pairs)
        size = path.stat().st_size
        if size <= MAX_READ_BYTES:
            self._check_numbers(path, header)
        kinds = sorted({module.rpartition(".")[2] for module in pairs})
        return AdapterFacts(rank=max(ranks), target_modules=tuple(kinds), size_bytes=size)

    def _refuse(self, what: str, to_do: str, code: str = "unsupported_adapter") -> NoReturn:
        raise Unprocessable(f"The adapter '{self.adapter_id}' {what}. {to_do}", param="adapter_ids", code=code)

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
            raise Unprocessable(
                f"The adapter '{self.adapter_id}' is damaged: {failure.message} {_DAMAGED}",
                param="adapter_ids",
                code=failure.code,
            ) from None
        return path

    def _pairs(self, header: Mapping[str, Any]) -> dict[str, _Pair]:
        pairs: dict[str, _Pair] = {}
        for name, entry in header.items():
            if name.endswith(_COPIES):
                continue
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

    def _check_rank(self, module: str, pair: _Pair, ranks: set[int]) -> None:
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

    def _check_layers(self, pairs: Mapping[str, _Pair]) -> None:
        known = base_layers(self.base_folder)
        for module, pair in pairs.items():
            if ".experts" in module:
                continue  # one tensor for each expert in one library is one for all in another
            assert pair.a is not None
            assert pair.b is not None
            if module.split(".", 1)[0] in ("layers", "h", "blocks"):
                self._refuse(
                    f"was trained on a model without its head ({module[:120]!r}), and vLLM would pass its weights over",
                    "Train it on the whole model (AutoModelForCausalLM), or put 'model.' before these names.",
                )
            self._check_place(module, known)
            self._check_name(module, known)
            given = [pair.a[1], pair.b[0]]
            fitting = known.shapes.get(tail_of(module)) or self._shapes_by_config(module, given)
            if pair.is_embedding:
                fitting = [shape[::-1] for shape in fitting]
            # A layer of GPT-2's kind stores its weight the other way round.
            if fitting and given[::-1] not in fitting and not (given in fitting and self._is_turned()):
                shown = " or ".join(f"{shape[1]} to {shape[0]}" for shape in fitting)
                self._refuse(
                    f"leads from {given[0]} to {given[1]} numbers at {module[:120]!r}, and its base from {shown}",
                    _OTHER_BASE,
                )

    def _check_place(self, module: str, known: BaseLayers) -> None:
        kind, tail = module.rpartition(".")[2], tail_of(module)
        number = re.match(r"^\w+\.(\d+)\.", tail)
        if known.kinds:
            if kind not in known.kinds and kind != "lm_head":
                self._refuse(f"adapts {module[:120]!r}, and its base has no {kind[:40]!r}", _OTHER_BASE)
            absent = number is not None and number[0] not in known.numbered
        else:
            layers = self.base.get("num_hidden_layers")
            is_text = "vis" not in module
            absent = number is not None and is_text and isinstance(layers, int) and int(number[1]) >= layers
        if absent:
            self._refuse(f"adapts {module[:120]!r}, a layer that its base does not have", _OTHER_BASE)

    def _check_name(self, module: str, known: BaseLayers) -> None:
        # How vLLM renames the layers of a model that also sees only the engine knows, which is asked by loading.
        if self.has_parts or known.has(module):
            return
        instead = ", ".join(repr(name[:120]) for name in known.like(module)[:2])
        self._refuse(
            f"adapts {module[:120]!r}, a name that its base does not have, so that vLLM would pass it over; the base "
            f"has {instead or 'no such layer'}",
            "It was made inside another model (one that also sees, or one wrapped by a compiler or for several GPUs): "
            "save it with the base's own names.",
        )

    def _shapes_by_config(self, module: str, given: list[int]) -> list[list[int]]:
        """Return what a usual layer's shape must be, as far as the configuration tells, in the form of a weight's."""
        kind, hidden = module.rpartition(".")[2], self.base.get("hidden_size")
        if not isinstance(hidden, int) or "vis" in module:
            return []
        if kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            return [[given[1], hidden]]
        return [[hidden, given[0]]] if kind in ("o_proj", "down_proj") else []

    def _is_turned(self) -> bool:
        return str(self.base.get("model_type")) in ("gpt2", "openai-gpt")

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
    """Whether a NaN or an infinity is in the block. Some hundred megabytes a second, without a library."""
    if dtype == "F16":
        return 1 in block[1::2].translate(_SET["half"])
    width, second = {"F32": (4, "top1"), "BF16": (2, "top1"), "F64": (8, "next4")}[dtype]
    high = block[width - 1 :: width].translate(_SET["top7"])
    low = block[width - 2 :: width].translate(_SET[second])
    return bool(int.from_bytes(high, "little") & int.from_bytes(low, "little"))
