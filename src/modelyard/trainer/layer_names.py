"""Names of layers that adapters are put on, by the kind of model, for the trainer and for the server.

`KNOWN` is what docs/families.md found (a test compares). A model of the kind with other settings may have others,
which its files tell. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Layers that choose among others (experts): engines do not take adapters on them.
ROUTERS = frozenset(
    {"gate", "router", "shared_expert_gate", "score", "classifier", "wg", "modality_router", "weights_proj"}
)
#: Latent attention: the engine multiplies this layer's weight into others once, and asks the layer only for prompts.
_ABSORBED = ("kv_b_proj",)
#: Layers, by the kind of model, that transformers has and vLLM 0.32 serves no adapter on: it has them under another
#: name, in other pieces, or reads their weights past them. A test holds this against vLLM.
UNSERVED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _ABSORBED),
    "hy_v4": _ABSORBED,
    "glm4": ("gate_up_proj",),
    "gpt_bigcode": ("c_attn",),
    "granitemoe_swa": ("input_linear",),
    "granitemoeshared": ("input_linear",),
    "hy_v3": ("shared_experts",),
    "laguna": ("shared_experts",),
    "longcat_flash": (*_ABSORBED, "q_a_proj", "kv_a_proj_with_mqa"),
}
#: Kinds of model whose routed experts vLLM 0.32 serves adapters on in PEFT's form: one tensor for all of a layer. (Of
#: others it takes one for each expert.)
EXPERTS_SERVED = frozenset({"gpt_oss"})
#: The name for all routed experts of a layer.
EXPERTS = "experts"
#: A layer of one expert.
ROUTED = re.compile(r"\.experts\.\d+\.")

_TABLE = """
afmoe cohere cohere2 cohere2_moe cwm ernie4_5 ernie4_5_moe exaone4 exaone_moe gemma gemma2 gemma3 gemma3_text
  gemma4_unified glm4_moe granite granite_swa hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax llama
  llama4_text mimo_v2_flash ministral3 mistral olmo olmo2 olmo3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
  stablelm vaultgemma: down_proj gate_proj k_proj o_proj q_proj up_proj v_proj
apertus arcee jais2 nemotron: down_proj k_proj o_proj q_proj up_proj v_proj
axk1 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4: down_proj gate_proj kv_a_proj_with_mqa
  o_proj q_a_proj q_b_proj up_proj
falcon_h1: down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj
flex_olmo gpt_oss granitemoe mellum minimax_m2 mixtral olmoe: k_proj o_proj q_proj v_proj
gemma4 gemma4_text: down_proj gate_proj k_proj o_proj per_layer_input_gate per_layer_model_projection
  per_layer_projection q_proj up_proj v_proj
glm: down_proj gate_up_proj k_proj o_proj q_proj v_proj
glm4: down_proj k_proj o_proj q_proj v_proj
gpt_bigcode: c_fc c_proj
bloom falcon gpt_neox: dense dense_4h_to_h dense_h_to_4h query_key_value
granitemoe_swa granitemoeshared: k_proj o_proj output_linear q_proj v_proj
granitemoehybrid: in_proj input_linear k_proj o_proj output_linear q_proj v_proj
inkling_text: k_proj o_proj q_proj r_proj v_proj
jamba: down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj x_proj
laguna: down_proj g_proj gate_proj k_proj o_proj q_proj up_proj v_proj
lfm2 lfm2_moe: in_proj k_proj out_proj q_proj v_proj w1 w2 w3
longcat_flash: down_proj gate_proj o_proj q_b_proj up_proj
minicpm3: down_proj gate_proj kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj up_proj
nemotron_h: down_proj in_proj k_proj o_proj q_proj up_proj v_proj
olmo_hybrid: a_proj b_proj down_proj g_proj gate_proj k_proj o_proj q_proj up_proj v_proj
opt: fc1 fc2 k_proj out_proj q_proj v_proj
phi: dense fc1 fc2 k_proj q_proj v_proj
phi3: down_proj gate_up_proj o_proj qkv_proj
qwen3_5_moe_text qwen3_5_text: down_proj gate_proj in_proj_a in_proj_b in_proj_qkv in_proj_z k_proj o_proj out_proj
  q_proj up_proj v_proj
qwen3_next: down_proj gate_proj in_proj_ba in_proj_qkvz k_proj o_proj out_proj q_proj up_proj v_proj
qwen4_exp_text: block_inject_weight down_proj gate_proj in_proj_a in_proj_b in_proj_qkv in_proj_z
  input_mix_weight_down input_mix_weight_up k_proj o_proj out_proj q_proj up_proj v_proj
starcoder2: c_fc c_proj k_proj o_proj q_proj v_proj
gemma3n_text: altup_projections altup_unembed_projections down_proj gate_proj k_proj linear_left linear_right o_proj
  per_layer_input_gate per_layer_model_projection per_layer_projection prediction_coefs q_proj up_proj v_proj
gptj: fc_in fc_out k_proj out_proj q_proj v_proj
zamba2: down_proj gate_up_proj gate_up_proj_adapter_list in_proj k_proj linear o_proj q_proj v_proj
"""


def _read(table: str) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for line in table.replace("\n  ", " ").strip().splitlines():
        kinds, _, names = line.partition(":")
        found |= dict.fromkeys(kinds.split(), frozenset(names.split()))
    return found


#: The last parts of the names, by `model_type`.
KNOWN: Mapping[str, frozenset[str]] = _read(_TABLE)
#: Of any kind.
ALL_KNOWN = frozenset[str]().union(*KNOWN.values())


def is_named(layer: str, name: str) -> bool:
    """Return True if a name that a request has stands for a layer of this full name."""
    return layer == name or layer.endswith(f".{name}")


def is_unserved(kind: str, layer: str) -> bool:
    """Return True if vLLM serves models of this `model_type` with adapters, and yet none (or by half) on this layer."""
    return any(f".{part}." in f".{layer}." for part in UNSERVED.get(kind, ()))
