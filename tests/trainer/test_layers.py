"""Adapters are put on the layers that text reaches, named in full, and what PEFT makes is what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from modelyard.errors import JobFailure
from tests.trainer.families import model_of
from tests.trainer.runs import needs_training

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn of themselves


def with_adapter(model: Any, wanted: list[str] | None = None, rank: int = 4) -> tuple[Any, list[str]]:
    """Return a model with an adapter as the trainer makes it, and the layers that it was to have."""
    from peft import LoraConfig

    from modelyard.trainer.layers import adapted, layers_to_adapt

    layers = layers_to_adapt(model, wanted, "a-model")
    return adapted(model, LoraConfig(r=rank, task_type="CAUSAL_LM"), layers), layers


def of_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Return the ranks of an adapter's layers, of their first and their second matrix."""
    from modelyard.trainer.model import adapter_weights

    weights = adapter_weights(model)
    names = {name.partition(".lora_")[0] for name in weights}
    return {
        name.removeprefix("base_model.model."): (
            weights[f"{name}.lora_A.weight"].shape[0],
            weights[f"{name}.lora_B.weight"].shape[1],
        )
        for name in names
    }


def kinds(layers: Any) -> set[str]:
    """Return the last parts of layers' names."""
    return {name.rpartition(".")[2] for name in layers}


def test_a_vision_tower_gets_no_adapters_and_the_language_model_all() -> None:
    needs_training()
    adapter, layers = with_adapter(model_of("gemma3"))
    assert [".language_model." in name for name in layers] == [True] * len(layers) != []
    assert of_layers(adapter) == dict.fromkeys(layers, (4, 4))
    assert len(layers) == 7 * 4
    # Short names would also mean the tower's.
    targets = adapter.peft_config["default"].target_modules
    assert "down_proj" in targets
    assert "q_proj" not in targets
    assert "model.language_model.layers.0.self_attn.q_proj" in targets


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "qwen3_next", "glm4_moe"])
def test_dense_layers_of_mixtures_of_experts_are_adapted_and_no_experts(family: str) -> None:
    needs_training()
    adapter, layers = with_adapter(model_of(family))
    assert of_layers(adapter) == dict.fromkeys(layers, (4, 4))
    assert {"gate_proj", "up_proj", "down_proj", "o_proj"} <= kinds(layers)
    assert not [name for name in layers if ".experts." in name]
    assert not adapter.peft_config["default"].rank_pattern


def test_one_of_the_dense_layers_of_a_mixture_of_experts_can_be_asked_for() -> None:
    needs_training()
    adapter, layers = with_adapter(model_of("qwen3_moe"), ["gate_proj"], rank=64)
    assert layers == ["model.layers.0.mlp.gate_proj"]
    assert of_layers(adapter) == {"model.layers.0.mlp.gate_proj": (64, 64)}


def test_experts_can_be_asked_for_where_the_engine_serves_them() -> None:
    needs_training()
    import torch

    model = model_of("gpt_oss")
    experts, rank, inner = 4, 4, model.get_submodule("model.layers.0.mlp.experts").down_proj.shape
    adapter, layers = with_adapter(model, ["q_proj", "experts"], rank)
    routed = [name for name in layers if name.endswith(".experts")]
    assert len(routed) == 4
    found = of_layers(adapter)
    assert found.keys() == {*layers, *(f"{name}.base_layer" for name in routed)}
    assert {name: ranks for name, ranks in found.items() if ".experts" in name} == dict.fromkeys(
        [name for name in found if ".experts" in name], (experts * rank, experts * rank)
    )
    assert {name: ranks for name, ranks in found.items() if ".experts" not in name} == dict.fromkeys(
        [name for name in layers if name not in routed], (rank, rank)
    )
    # As vLLM reads them: the inner adapter is that of the first step, from the hidden size to twice the inner one.
    weights = dict(adapter.named_parameters())
    name = f"base_model.model.{routed[0]}"
    hidden, halves = 64, 2 * (inner.numel() // experts // 64)
    assert weights[f"{name}.base_layer.lora_A.default.weight"].shape == (experts * rank, hidden)
    assert weights[f"{name}.base_layer.lora_B.default.weight"].shape == (halves, experts * rank)
    assert weights[f"{name}.lora_B.default.weight"].shape == (hidden, experts * rank)
    adapter(input_ids=torch.arange(3, 67)[None], use_cache=False).logits.sum().backward()
    assert not [name for name, each in adapter.named_parameters() if each.requires_grad and each.grad is None]


def test_experts_that_the_engine_does_not_serve_are_refused_and_so_is_dropout_on_them() -> None:
    needs_training()
    from peft import LoraConfig

    from modelyard.trainer.layers import adapted, layers_to_adapt

    with pytest.raises(JobFailure) as refused:
        with_adapter(model_of("qwen3_moe"), ["experts"])
    assert refused.value.code == "unknown_target_modules"
    assert "routed experts are served without adapters" in refused.value.message
    model = model_of("gpt_oss")
    layers = layers_to_adapt(model, ["experts"], "a-model")
    with pytest.raises(JobFailure) as refused:
        adapted(model, LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM"), layers)
    assert refused.value.code == "experts_without_dropout"


@pytest.mark.parametrize("family", ["falcon_h1", "nemotron_h", "zamba2"])
def test_mamba_hybrids_are_adapted_where_peft_can(family: str) -> None:
    needs_training()
    adapter, layers = with_adapter(model_of(family))
    assert of_layers(adapter) == dict.fromkeys(layers, (4, 4))
    assert "in_proj" in kinds(layers)
    assert "out_proj" not in kinds(layers)


def test_layers_that_are_computed_without_gradients_get_no_adapters() -> None:
    needs_training()
    _, layers = with_adapter(model_of("deepseek_v32"))
    assert not [name for name in layers if ".indexer." in name]
    assert {"q_a_proj", "q_b_proj", "o_proj"} <= kinds(layers)


def test_layers_can_be_named_by_any_end_of_their_names() -> None:
    needs_training()
    _, layers = with_adapter(model_of("llama"), ["self_attn.q_proj", "layers.1.mlp.up_proj"])
    assert layers == [
        *(f"model.layers.{number}.self_attn.q_proj" for number in range(2)),
        "model.layers.1.mlp.up_proj",
        *(f"model.layers.{number}.self_attn.q_proj" for number in range(2, 4)),
    ]
    for wrong in ("proj", "lm_head", "layers", "0"):
        with pytest.raises(JobFailure) as refused:
            with_adapter(model_of("llama"), [wrong])
        assert refused.value.code == "unknown_target_modules"


def test_trying_which_layers_text_reaches_changes_nothing() -> None:
    needs_training()
    import torch

    from modelyard.trainer.layers import trainable_layers

    model = model_of("llama")
    model.eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    chance = torch.get_rng_state()
    trainable_layers(model)
    assert torch.equal(chance, torch.get_rng_state())
    assert not model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not [name for name, each in model.named_parameters() if each.grad is not None]
    assert not [name for name, module in model.named_modules() if module._forward_hooks]


def test_an_adapter_that_is_not_the_one_asked_for_is_refused() -> None:
    """As PEFT makes it of plain names: the routed experts instead of the dense layers, of twice the rank."""
    needs_training()
    from peft import LoraConfig, get_peft_model

    from modelyard.trainer.layers import check, layers_to_adapt

    model = model_of("qwen3_moe")
    layers = layers_to_adapt(model, None, "a-model")
    made = get_peft_model(model, LoraConfig(r=4, target_modules=sorted(kinds(layers))))
    with pytest.raises(JobFailure) as refused:
        check(made, dict.fromkeys(layers, 4))
    assert refused.value.code == "adapter_not_as_asked"
    assert "model.layers.0.mlp.gate_proj" in refused.value.message
    assert "mlp.experts" in refused.value.message
