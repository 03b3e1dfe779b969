"""The plugin that puts adapters where they belong: its operations, and the names that it refuses.

What it does for the log probabilities of prompts is in tests/clients/test_beside_others.py and test_engine_adapters.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from modelyard.engine.plugins.lora import passed_over
from tests.servers.programs import Programs

PLUGIN = "from modelyard.engine.plugins.lora import keep_adapters_off_the_base\n"
#: Two slots, both taken; a row for the first, one for the base and one for the second, of one number each.
OPERATIONS = """
import json, torch
from vllm.lora.punica_wrapper import punica_cpu
weights, slots = torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([0, -1, 1])
rows, lengths = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([1, 1, 1])
found = []
for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice", "sgmv_shrink", "sgmv_expand", "sgmv_expand_slice"):
    output = torch.tensor([[10.0], [10.0], [10.0]])
    given = [None, lengths, slots, 3, 1, 3] if name.startswith("s") else [slots]
    after = {"shrink": [1.0], "expand": [True], "slice": [0, 1, True]}[name.rpartition("_")[2]]
    getattr(punica_cpu, name)(rows, weights, output, *given, *after)
    found.append([row[0] for row in output.tolist()])
print(json.dumps(found))
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_vllm_finds_the_plugin_among_the_installed_entry_points() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins")["modelyard_lora"]
    assert found.value == "modelyard.engine.plugins.lora:keep_adapters_off_the_base"
    assert callable(found.load())


def test_without_vllm_it_warns_and_does_not_raise() -> None:
    hide = "import sys; sys.modules['vllm'] = None\n"
    done = run_python(hide + PLUGIN + "keep_adapters_off_the_base(); print('alive')")
    assert done.stdout == "alive\n", done.stderr
    assert "The cure modelyard_lora does not take effect" in done.stderr


@pytest.mark.engine
@pytest.mark.parametrize("when", ["before", "after"])
def test_where_there_is_no_adapter_nothing_is_added(vllm_programs: Programs, when: str) -> None:
    """Without the plugin the middle row, which is the base's, gets the weights of the last slot."""
    early = "from vllm.lora.punica_wrapper import punica_cpu\n" if when == "after" else ""
    done = vllm_programs.run(
        early + PLUGIN + "keep_adapters_off_the_base(); keep_adapters_off_the_base()\n" + OPERATIONS
    )
    assert done.returncode == 0, done.stderr
    shrunk, expanded = [2.0, 0.0, 3.0], [12.0, 10.0, 13.0]
    assert json.loads(done.stdout.splitlines()[-1]) == [shrunk, expanded, expanded] * 2


@pytest.mark.engine
def test_vllm_still_needs_it(vllm_programs: Programs) -> None:
    done = vllm_programs.run(OPERATIONS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])[1] == [12.0, 13.0, 13.0], "vLLM is cured: the plugin can go"


def manager(*modules: str, is_pooling_model: bool = False, spread: bool = False) -> SimpleNamespace:
    """Return what vLLM knows of a model's layers; those that are packed of three have their parts beside them."""
    packed = {name: [name.replace("qkv", part) for part in "qkv"] for name in modules if name.endswith("qkv_proj")}
    parts = [type("PPMissingLayer", (), {})()] if spread else []
    return SimpleNamespace(
        modules=dict.fromkeys(modules),
        packed_modules=packed,
        is_pooling_model=is_pooling_model,
        model=SimpleNamespace(modules=lambda: parts),
    )


LLAMA = manager("model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj", "lm_head")


@pytest.mark.parametrize(
    "layers",
    [
        ["model.layers.0.self_attn.q_proj"],
        ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "lm_head"],
        ["model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"],
    ],
)
def test_layers_that_the_model_has_whole_or_as_parts_are_used(layers: list[str]) -> None:
    assert passed_over(layers, LLAMA) == ""


@pytest.mark.parametrize(
    "odd",
    [
        "language_model.model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "transformer.layers.0.self_attn.q_proj",
        "_orig_mod.model.layers.0.self_attn.q_proj",
        "model._orig_mod.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.attn.self_attn.q_proj",
        "layers.0.self_attn.q_proj",
        "q_proj",
    ],
)
@pytest.mark.parametrize("others", [[], ["model.layers.0.self_attn.o_proj"]], ids=["all", "half"])
def test_layers_that_would_be_passed_over_are_named_beside_those_of_the_model(odd: str, others: list[str]) -> None:
    said = passed_over([odd, *others], LLAMA)
    layers = "2 layers" if others else "1 layer"
    assert said.startswith(f"of the adapter's {layers} the model lacks 1, which would be passed over")
    assert f"such as '{odd}'" in said
    assert said.endswith("the model has 'model.layers.0.self_attn.q_proj'")


def test_a_pooling_models_layers_may_lack_the_first_part_of_their_names() -> None:
    pooling = manager("model.layers.0.self_attn.o_proj", is_pooling_model=True)
    assert passed_over(["layers.0.self_attn.o_proj"], pooling) == ""


def test_what_experts_consist_of_is_left_to_vllm_where_there_are_experts() -> None:
    experts = manager("model.layers.0.mlp.experts")
    assert passed_over(["model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.experts"], experts) == ""
    assert "would be passed over" in passed_over(["model.layers.1.mlp.experts.3.up_proj"], experts)
    assert "would be passed over" in passed_over(["model.layers.0.mlp.experts.3.up_proj"], LLAMA)


def test_a_worker_that_has_some_of_the_layers_judges_nothing() -> None:
    assert (
        passed_over(["model.layers.7.self_attn.o_proj"], manager("model.layers.0.self_attn.o_proj", spread=True)) == ""
    )
