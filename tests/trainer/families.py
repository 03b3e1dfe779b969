"""Tiny models of the families that transformers has and vLLM serves, of random weights: `model_of(family)`.

A family is a `model_type`. `SERVED` are those that vLLM 0.32 serves with adapters, `OTHERS` those that it serves
without; a test holds both against the installed packages. What a real repository's config.json says and transformers'
own classes leave out, vLLM asks for: such fields stand here, too.
"""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 32}
SPARSE: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
SHARED: dict[str, Any] = {**SPARSE, "shared_expert_intermediate_size": 32}
LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
INDEXED: dict[str, Any] = {**SPARSE, **LATENT, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 64}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 128, "n_positions": 512}
PER_LAYER: dict[str, Any] = {**WINDOW, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 2048}
GEMMA_4: dict[str, Any] = {**PER_LAYER, "global_head_dim": 16, "num_kv_shared_layers": 0}
GEMMA_3N: dict[str, Any] = {
    **PER_LAYER, "laurel_rank": 8, "num_kv_shared_layers": 2, "activation_sparsity_pattern": None,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "image_size": 56, "patch_size": 14,
}  # fmt: skip
IMAGES: dict[str, Any] = {
    "mm_tokens_per_image": 4, "boi_token_index": 2045, "eoi_token_index": 2046, "image_token_index": 2047,
}  # fmt: skip

SERVED: dict[str, dict[str, Any]] = {
    "afmoe": {**SPARSE, "num_dense_layers": 1, "score_func": "sigmoid", "route_norm": True},
    "apertus": {},
    "arcee": {},
    "axk1": {**SPARSE, **LATENT},
    "cohere": {},
    "cohere2": WINDOW,
    "cwm": {**WINDOW, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "deepseek_v2": {**SPARSE, **LATENT},
    "deepseek_v3": {**SPARSE, **LATENT},
    "deepseek_v32": INDEXED,
    "ernie4_5": {},
    "ernie4_5_moe": {**SPARSE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone4": WINDOW,
    "exaone_moe": {**SPARSE, "num_shared_experts": 1},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    },
    "flex_olmo": SPARSE,
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3": {"text_config": WINDOW, "vision_config": TOWER, **IMAGES},
    "gemma3_text": WINDOW,
    "gemma4": {"text_config": GEMMA_4, "vision_config": TOWER, "audio_config": None},
    "gemma4_text": GEMMA_4,
    "gemma4_unified": {
        "text_config": GEMMA_4, "vision_config": {**TOWER, "mm_embed_dim": 32, "output_proj_dims": 32},
        "audio_config": None,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": SPARSE,
    "glm4_moe_lite": {**SPARSE, **LATENT},
    "glm_moe_dsa": INDEXED,
    "gpt_bigcode": GPT,
    "gpt_neox": {},
    "gpt_oss": {**SPARSE, **WINDOW},
    "granite": {},
    "granite_swa": WINDOW,
    "granitemoe": SPARSE,
    "granitemoe_swa": {**SPARSE, **WINDOW, "shared_intermediate_size": 32},
    "granitemoehybrid": {
        **SPARSE, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    },
    "granitemoeshared": {**SPARSE, "shared_intermediate_size": 32},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {**SPARSE, "moe_topk": 2},
    "hy_v3": {**SPARSE, "expert_hidden_dim": 32, "num_shared_experts": 1, "route_norm": True},
    "hy_v4": SPARSE,
    "hyperclovax": {},
    "inkling_text": {**SPARSE, "padded_vocab_size": 2048, "use_embed_norm": False},
    "jais2": {},
    "jamba": {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4,
        "mamba_d_state": 16,
    },
    "laguna": SPARSE,
    "lfm2": {"full_attn_idxs": [1, 3], "block_ff_dim": 128, "block_dim": 64, "conv_dim": 64},
    "lfm2_moe": {**SPARSE, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {**SPARSE, "intermediate_size_mlp": 128, "attention_chunk_size": 64},
    "longcat_flash": {
        **LATENT, "n_routed_experts": 4, "moe_topk": 2, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 32,
        "zero_expert_num": 1, "num_layers": 2, "num_hidden_layers": 4, "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True, "zero_expert_type": "identity",
    },
    "mellum": SPARSE,
    "minicpm3": LATENT,
    "minimax_m2": {**SPARSE, "rotary_dim": 16, "scoring_func": "sigmoid"},
    "ministral3": {},
    "mistral": WINDOW,
    "mixtral": SPARSE,
    "nemotron": {},
    "nemotron_h": {
        **SPARSE, "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "olmoe": SPARSE,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {**SHARED, "mlp_only_layers": [0]},
    "qwen3": {},
    "qwen3_5_moe_text": {**SHARED, **DELTA},
    "qwen3_5_text": DELTA,
    "qwen3_moe": {**SPARSE, "mlp_only_layers": [0]},
    "qwen3_next": {**SHARED, **DELTA},
    "qwen4_exp_text": {
        **SHARED, **DELTA, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
        "indexer_compress_ratio": 4, "output_gate_type": "sigmoid",
    },
    "seed_oss": {},
    "smollm3": {},
    "starcoder2": {},
    "vaultgemma": WINDOW,
}  # fmt: skip

OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 4, "n_head": 4},
    "cohere2_moe": SPARSE,
    "falcon": {"head_dim": ..., "num_kv_heads": 2},
    "gemma3n_text": GEMMA_3N,
    "gptj": {**GPT, "rotary_dim": 8},
    "hrm_text": {},
    "mimo_v2_flash": SPARSE,
    "stablelm": {},
    "zamba2": {
        "mamba_d_state": 16, "mamba_headdim": 16, "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"] * 2,
        "adapter_rank": 8, "num_mem_blocks": 1, "attention_head_dim": 32, "attention_hidden_size": 128,
        "mamba_ngroups": 1,
    },
}  # fmt: skip

FAMILIES = SERVED | OTHERS
#: Those of both packages that are not tried, each with its reason.
UNTRIED: dict[str, str] = {
    "dbrx": "transformers 5.19 cannot make its model",
    "deepseek_v4": "vLLM serves it without adapters, and its configuration is not settled",
    "falcon_mamba": "no layers that an adapter could be served on",
    "gemma3n": "its tower needs a package that is not installed; its text model is tried",
    "gpt2": "no layers that an adapter could be served on",
    "gpt-sw3": "as gpt2",
    "kimi_linear": "its layers take 20 s without a GPU",
    "llama4": "its text model is tried",
    "mamba": "no layers that an adapter could be served on",
    "mamba2": "no layers that an adapter could be served on",
    "qwen3_5": "its text model is tried",
    "qwen3_5_moe": "its text model is tried",
    "qwen4_exp": "its text model is tried",
}


def config_of(family: str) -> Any:
    """Return the configuration of a family's tiny model; `...` leaves a field of `TEXT` out."""
    from transformers import AutoConfig

    changes = FAMILIES[family]
    given = {"text_config": TEXT | changes["text_config"]} if "text_config" in changes else TEXT
    values = {**given, **{name: value for name, value in changes.items() if name != "text_config"}}
    return AutoConfig.for_model(family, **{name: value for name, value in values.items() if value is not ...})


def model_of(family: str) -> Any:
    """Return a tiny model of a family, the same each time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family))
