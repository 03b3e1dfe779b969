"""Mistral's own formats: which tokenizer vLLM takes for a whole repository, and params.json in transformers' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.models import config_file
from modelyard.models.mistral_format import config_of, has_mistral_tokenizer, is_mistral_format
from modelyard.models.selection import select
from tests.models.repositories import as_json, safetensors

PARAMS = {"dim": 64, "n_layers": 2, "head_dim": 32, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512}


@pytest.mark.parametrize(
    ("paths", "takes"),
    [
        (["config.json", "model.safetensors", "consolidated.safetensors", "tekken.json"], True),
        (["consolidated-00001-of-00002.safetensors", "tokenizer.model.v3"], True),
        (["original/consolidated.safetensors", "tekken.json"], True),
        (["config.json", "model.safetensors", "tekken.json"], False),
        (["consolidated.safetensors", "tokenizer.json", "tokenizer.model"], False),
        (["consolidated.00.pth", "tekken.json"], False),
    ],
)
def test_mistrals_tokenizer_is_taken_where_vllm_would_take_it(paths: list[str], takes: bool) -> None:
    assert has_mistral_tokenizer(paths) is takes


def test_the_tokenizer_is_told_of_the_whole_repository_though_its_second_weights_are_not_chosen() -> None:
    chosen = select(["config.json", "model.safetensors", "consolidated.safetensors", "params.json", "tekken.json"])
    assert chosen.has_mistral_tokenizer
    assert chosen.weights == ("model.safetensors",)
    assert set(chosen.configuration) == {"config.json", "tekken.json"}


def test_shards_in_mistrals_format_come_with_their_index_and_must_all_be_there() -> None:
    names = [f"consolidated-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    others = ["params.json", "tokenizer.model.v7", "consolidated.safetensors.index.json"]
    chosen = select([*names, *others])
    assert list(chosen.weights) == names
    assert set(chosen.configuration) == set(others)
    with pytest.raises(JobFailure) as caught:
        select([*names[:2], *others])
    assert caught.value.code == "incomplete_weights"


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({}, "MistralForCausalLM"),
        ({"moe": {"num_experts": 8}}, "MixtralForCausalLM"),
        ({"moe": {"num_experts": 8, "num_shared_experts": 1}}, "MistralLarge3ForCausalLM"),
        ({"model_type": "mamba"}, "Mamba2ForCausalLM"),
        ({"vision_encoder": {"hidden_size": 8}}, "PixtralForConditionalGeneration"),
        ({"multimodal": {"vision_encoder_args": {}, "whisper_model_args": None}}, "MistralForCausalLM"),
        ({"multimodal": {"vision_encoder_args": {"hidden_size": 8}}}, "PixtralForConditionalGeneration"),
        ({"multimodal": {"whisper_model_args": {"encoder_args": {"dim": 8}}}}, "VoxtralForConditionalGeneration"),
        ({"multimodal": {"whisper_model_args": {"encoder_args": {"causal": True}}}}, "VoxtralRealtimeGeneration"),
    ],
)
def test_the_architecture_is_the_one_that_vllm_makes_of_params(more: dict[str, Any], name: str) -> None:
    assert config_of({**PARAMS, **more})["architectures"] == [name]


def test_a_model_with_params_alone_is_read_in_the_names_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes(as_json({**PARAMS, "max_seq_len": 4096}))
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors(b"12345678"))
    assert is_mistral_format(tmp_path)
    config = config_file.read(tmp_path)
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]) == (64, 2, 2)
    assert (config["intermediate_size"], config_file.longest(config)) == (96, 4096)
    (tmp_path / "config.json").write_bytes(as_json({"architectures": ["MistralForCausalLM"], "hidden_size": 7}))
    assert config_file.read(tmp_path)["hidden_size"] == 7


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", as_json({"dim": "wide"}), as_json({"n_layers": 10**30}), as_json({"n_heads": -1}),
     as_json({"moe": {"num_experts": "many"}}), as_json({"quantization": "fp8"}), b"[" * 100_000],
)  # fmt: skip
def test_params_that_cannot_be_believed_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "params.json").write_bytes(content)
    with pytest.raises(JobFailure) as caught:
        config_file.read(tmp_path)
    assert caught.value.code == "bad_configuration"
    assert caught.value.message.startswith("params.json ")


@pytest.mark.parametrize("more", [{"moe": 7}, {"multimodal": []}, {"multimodal": {"whisper_model_args": [1]}}])
def test_odd_parts_of_params_are_no_crash(tmp_path: Path, more: dict[str, Any]) -> None:
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS, **more}), "utf-8")
    assert config_file.read(tmp_path)["architectures"]
