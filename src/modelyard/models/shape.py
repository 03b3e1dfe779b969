"""The shape of a model, by its `config.json`, that tells how much memory serving it takes.

Every function answers None where the configuration does not tell, so that nobody counts on a guess: layers of more
than one kind (sliding windows, state spaces, shared caches) and families whose fields are read nowhere here are such
cases. vLLM itself is the judge of those. What vLLM allocates was read in its 0.32.0 sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelyard.models.config_file import EXPERTS, HEADS, HIDDEN, LAYERS, Config, longest, names_of, text_part, whole

__all__ = ["Config", "longest", "text_part"]

DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}

#: Fields of models whose cache is not the same for every layer and token, or is counted in a way unknown here.
UNEVEN = (
    "attention_chunk_size", "attn_config", "attn_layer_period", "block_configs", "full_attention_interval",
    "hybrid_override_pattern", "index_topk", "layers_block_type", "linear_num_key_heads", "mamba_d_state",
    "multi_query", "multi_query_attention", "n_head_kv", "num_kv_heads", "num_kv_shared_layers", "rwkv_hidden_size",
    "ssm_cfg", "ssm_state_size", "state_size",
)  # fmt: skip
#: Models that read their input once, and cache nothing.
ENCODERS = frozenset(
    {
        "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "gte", "modernbert",
        "mpnet", "new", "nomic_bert", "roberta", "xlm-roberta",
    }
)  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: its folder, the bytes of its files, its `config.json`, and generate or embed."""

    model_id: str
    path: Path
    size_bytes: int
    config: Config
    task: str
    #: Whether Mistral's tokenizer renders its chats, and whether its weights are in Mistral's format.
    has_mistral_tokenizer: bool = False
    is_mistral_format: bool = False
    #: Whether it also sees or hears, and the engine's Python lacks what that takes: it is served for text alone.
    is_for_text_alone: bool = False


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA adapter on disk; `rank` and `size_bytes` are 0 where nobody looked."""

    adapter_id: str
    path: Path
    rank: int = 0
    size_bytes: int = 0


def stored_dtype(config: Config) -> str | None:
    """Return the number format of the weights in the files."""
    for part in (config, text_part(config)):
        dtype = part.get("dtype") or part.get("torch_dtype")
        if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPE_BYTES:
            return dtype.removeprefix("torch.")
    return None


def is_quantised(config: Config) -> bool:
    """True if the weights are kept in a format of their own, whatever the number format of the arithmetic is."""
    return any(part.get(key) for part in (config, text_part(config)) for key in ("quantization_config", "quant_config"))


def is_encoder(config: Config) -> bool:
    """True if the model is known to need no KV cache."""
    return names_of(config)[0] in ENCODERS


def kv_bytes_per_token(config: Config, number_bytes: int) -> int | None:
    """Return the bytes that one token takes in the KV cache, over all layers.

    Args:
        config: The model's configuration.
        number_bytes: The size of one number in the cache.
    """
    config = text_part(config)
    layers, head_count, hidden = whole(config, *LAYERS), whole(config, *HEADS), whole(config, *HIDDEN)
    if not (layers and head_count and hidden) or _is_uneven(config):
        return None
    if config.get("kv_lora_rank"):
        # Multi-head latent attention: one vector for keys and values together, and the rotary part of the keys.
        latent, rotary = whole(config, "kv_lora_rank"), whole(config, "qk_rope_head_dim")
        return layers * (latent + rotary) * number_bytes if latent and rotary is not None and number_bytes > 1 else None
    cached, size = _or(config, "num_key_value_heads", head_count), _or(config, "head_dim", hidden // head_count)
    return 2 * layers * cached * size * number_bytes if cached and size else None


def kv_heads(config: Config) -> int:
    """Return among how many GPUs the cache of one token can be divided."""
    config = text_part(config)
    if config.get("kv_lora_rank"):
        return 1
    return _or(config, "num_key_value_heads", whole(config, *HEADS)) or 1


def heads(config: Config) -> int | None:
    """Return the number of attention heads."""
    return whole(text_part(config), *HEADS)


def embedding_numbers(config: Config) -> int:
    """Return how many numbers the embedding and the output have; 0 where the configuration does not tell."""
    config = text_part(config)
    hidden, vocabulary = whole(config, *HIDDEN), whole(config, "vocab_size")
    if not (hidden and vocabulary):
        return 0
    return hidden * vocabulary * (1 if config.get("tie_word_embeddings") or is_encoder(config) else 2)


def adapter_numbers(config: Config, rank: int) -> int | None:
    """Return how many numbers vLLM sets aside for one LoRA adapter of that rank.

    It makes room beside every linear layer, the embedding and the output, whatever an adapter then fills.
    """
    config = text_part(config)
    layers, head_count, hidden = whole(config, *LAYERS), whole(config, *HEADS), whole(config, *HIDDEN)
    inner, vocabulary = whole(config, "intermediate_size"), whole(config, "vocab_size")
    if not (layers and head_count and hidden and inner is not None and vocabulary is not None):
        return None
    if _is_uneven(config) or config.get("kv_lora_rank"):
        return None
    size, cached = _or(config, "head_dim", hidden // head_count), _or(config, "num_key_value_heads", head_count)
    experts = whole(config, *EXPERTS) or 1
    if experts > 1:
        inner = _or(config, "moe_intermediate_size", inner)
    if size is None or cached is None or inner is None:
        return None
    queries, keys = head_count * size, cached * size
    attention = 3 * hidden + queries + 2 * keys + queries + hidden
    feed_forward = 3 * (hidden + inner) * experts
    return rank * (layers * (attention + feed_forward) + 2 * (vocabulary + hidden))


def _is_uneven(config: Config) -> bool:
    if any(config.get(key) for key in UNEVEN) or config.get("is_encoder_decoder"):
        return True
    kinds = config.get("layer_types")
    if isinstance(kinds, Sequence) and not isinstance(kinds, str):
        return any(kind != "full_attention" for kind in kinds)
    return bool(config.get("sliding_window")) and config.get("use_sliding_window") is not False


def _or(config: Config, name: str, otherwise: int | None) -> int | None:
    """Return a number; `otherwise` where it is absent, null or 0, and None where it is no number."""
    return whole(config, name) if config.get(name) else otherwise
