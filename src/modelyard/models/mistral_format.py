"""Mistral's own formats, beside transformers': `params.json`, `consolidated*.safetensors`, `tekken.json`.

vLLM 0.32 takes Mistral's tokenizer for a repository that has consolidated weights and a tokenizer in Mistral's form
(`tokenizers/registry.py`), and reads `params.json` where there is no `config.json` (`transformers_utils/config.py`).
Since the same weights are not fetched twice, the first is decided here from the whole repository's list of files and
told to vLLM by its arguments. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

PARAMS = "params.json"
INDEX = "consolidated.safetensors.index.json"
TOKENIZER_FILES = ("tekken.json", "tokenizer.model.v*")
#: vLLM's, where params.json does not say.
MAX_POSITIONS = 128_000
_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "tied_embeddings": "tie_word_embeddings",
}


def is_consolidated(path: str) -> bool:
    """True if a file holds weights in Mistral's format, as vLLM tells them."""
    return fnmatchcase(path.rpartition("/")[2], "consolidated*.safetensors")


def has_mistral_tokenizer(paths: Collection[str]) -> bool:
    """True if vLLM would take Mistral's tokenizer for the repository with these files."""
    has_tokenizer = any(fnmatchcase(path, pattern) for path in paths for pattern in TOKENIZER_FILES)
    return has_tokenizer and any(is_consolidated(path) for path in paths)


def is_mistral_format(folder: Path) -> bool:
    """True if the weights of the model in a folder are in Mistral's format, which vLLM then sees by itself. Blocks."""
    return (folder / PARAMS).exists() and any(folder.glob("consolidated*.safetensors"))


def config_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `params.json` says in the names of transformers, as vLLM does (`configs/mistral.py`)."""
    config = {_NAMES.get(key, key): value for key, value in params.items()}
    config.setdefault("max_position_embeddings", config.get("max_seq_len") or MAX_POSITIONS)
    multimodal = config.get("multimodal")
    multimodal = multimodal if isinstance(multimodal, Mapping) else {}
    moe = config.get("moe")
    if multimodal.get("whisper_model_args"):
        args = multimodal["whisper_model_args"]
        encoder = args.get("encoder_args") if isinstance(args, Mapping) else None
        is_causal = isinstance(encoder, Mapping) and encoder.get("causal")
        name = "VoxtralRealtimeGeneration" if is_causal else "VoxtralForConditionalGeneration"
    elif multimodal.get("vision_encoder_args") or config.get("vision_encoder"):
        name = "PixtralForConditionalGeneration"
    elif config.get("model_type") == "mamba":
        name = "Mamba2ForCausalLM"
    elif isinstance(moe, Mapping) and moe:
        name = "MistralLarge3ForCausalLM" if moe.get("num_shared_experts") else "MixtralForCausalLM"
        config["num_local_experts"] = moe.get("num_experts")
    else:
        name = "MistralForCausalLM"
    if config.get("quantization"):
        config["quantization_config"] = config["quantization"]
    windows = config.get("sliding_window")
    if isinstance(windows, list):
        config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return {**config, "architectures": [name], "model_type": str(config.get("model_type") or "mistral")}
