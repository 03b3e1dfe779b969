"""What configurations tell about memory, and where they are silent. The figures are those of published models."""

from __future__ import annotations

from typing import Any

import pytest

from modelyard.models.shape import adapter_numbers, is_quantised, kv_bytes_per_token, longest, stored_dtype

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}


def test_one_token_takes_keys_and_values_of_every_layer() -> None:
    assert kv_bytes_per_token(LLAMA_8B, 2) == 128 * 1024
    assert kv_bytes_per_token(LLAMA_8B, 1) == 64 * 1024


def test_a_head_may_be_larger_than_its_part_of_the_hidden_size() -> None:
    # Qwen3-0.6B: 28 layers, 8 heads of 128 for keys and values, hidden size 1024.
    qwen = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    assert kv_bytes_per_token({**qwen, "num_hidden_layers": 28}, 2) == 112 * 1024


def test_latent_attention_keeps_one_vector_a_layer() -> None:
    assert kv_bytes_per_token(DEEPSEEK_V2_LITE, 2) == 27 * 576 * 2
    # In 8 bits vLLM keeps it in a layout of its own.
    assert kv_bytes_per_token(DEEPSEEK_V2_LITE, 1) is None


def test_names_of_older_families_are_read() -> None:
    assert kv_bytes_per_token({"n_layer": 12, "n_head": 12, "n_embd": 768}, 2) == 2 * 12 * 768 * 2
    assert longest({"n_positions": 1024}) == 1024


def test_of_a_model_that_also_sees_the_part_that_reads_counts() -> None:
    seeing = {"model_type": "mistral3", "vision_config": {"hidden_size": 1}, "text_config": LLAMA_8B}
    assert kv_bytes_per_token(seeing, 2) == 128 * 1024
    assert longest(seeing) == 131072
    assert stored_dtype(seeing) == "bfloat16"


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"mamba_d_state": 16},
        {"attention_chunk_size": 8192},
        {"num_kv_shared_layers": 10},
        {"multi_query": True},
        {"is_encoder_decoder": True},
        {"num_attention_heads": [8, 16]},
        {"num_hidden_layers": None},
    ],
)
def test_a_cache_that_differs_from_layer_to_layer_is_not_guessed(change: dict[str, Any]) -> None:
    assert kv_bytes_per_token({**LLAMA_8B, **change}, 2) is None
    assert adapter_numbers({**LLAMA_8B, **change}, 16) is None


def test_a_window_that_is_named_but_not_used_changes_nothing() -> None:
    for unused in ({"sliding_window": None}, {"sliding_window": 4096, "use_sliding_window": False}):
        assert kv_bytes_per_token({**LLAMA_8B, **unused}, 2) == 128 * 1024


def test_an_adapter_has_a_place_beside_every_linear_layer_and_both_ends() -> None:
    attention = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096)
    feed_forward = 3 * (4096 + 14336)
    both_ends = 2 * (128256 + 4096)
    assert adapter_numbers(LLAMA_8B, 16) == 16 * (32 * (attention + feed_forward) + both_ends)


def test_an_adapter_has_a_place_beside_every_expert() -> None:
    dense = adapter_numbers(LLAMA_8B, 16)
    experts = adapter_numbers({**LLAMA_8B, "num_experts": 8, "moe_intermediate_size": 14336}, 16)
    assert dense is not None
    assert experts == dense + 16 * 32 * 7 * 3 * (4096 + 14336)


def test_number_formats_are_read_where_they_are_told() -> None:
    assert stored_dtype({"dtype": "float32"}) == "float32"
    assert stored_dtype({"torch_dtype": "torch.float16"}) == "float16"
    assert stored_dtype({}) is None
    assert is_quantised({"quantization_config": {"quant_method": "awq"}})
    assert not is_quantised(LLAMA_8B)
