"""The typed reader of config.json: what is wrong is refused with its key and value, honest oddities are not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.models import config_file, scan

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}


def raw(**changes: Any) -> bytes:
    return json.dumps({**LLAMA, **changes}).encode()


def refusal(content: bytes) -> str:
    with pytest.raises(JobFailure) as caught:
        scan.scan_configuration("config.json", content)
    assert (caught.value.code, bool(caught.value.hint)) == ("bad_configuration", True)
    assert len(caught.value.message) < 500
    return caught.value.message


WRONG: list[tuple[str, Any, str]] = [
    ("num_hidden_layers", 10**400, "has a number of 401 digits at num_hidden_layers"),
    ("num_hidden_layers", 10**30, "num_hidden_layers is 1000000000000000000000000000000"),
    ("num_hidden_layers", "many", 'num_hidden_layers is "many", where a whole number from 0 to 10000 belongs'),
    ("num_hidden_layers", True, "num_hidden_layers is true"),
    ("num_hidden_layers", 2.5, "num_hidden_layers is 2.5"),
    ("num_attention_heads", -4, "num_attention_heads is -4"),
    ("num_key_value_heads", float("nan"), "num_key_value_heads is NaN"),
    ("vocab_size", float("inf"), "vocab_size is Infinity"),
    ("hidden_size", {"size": 64}, 'hidden_size is {"size": 64}'),
    ("intermediate_size", [128, -1], "intermediate_size is [128, -1]"),
    ("max_position_embeddings", 1 << 40, "max_position_embeddings is 1099511627776"),
    ("model_type", [], "model_type is []"),
    ("model_type", {"a": 1}, "model_type is {"),
    ("model_type", "x" * 1000, 'model_type is "xxx'),
    ("model_type", "\ud800", 'model_type is "\\ud800"'),
    ("architectures", "LlamaForCausalLM", 'architectures is "LlamaForCausalLM"'),
    ("architectures", [["a"]], 'architectures is [["a"]]'),
    ("architectures", ["\x00"], "architectures is ["),
    ("layer_types", [1, 2], "layer_types is [1, 2]"),
    ("tie_word_embeddings", "false", 'tie_word_embeddings is "false"'),
    ("quantization_config", "awq", 'quantization_config is "awq"'),
    ("torch_dtype", 16, "torch_dtype is 16"),
    ("text_config", {"hidden_size": "64"}, 'text_config.hidden_size is "64"'),
    ("text_config", [], "text_config is []"),
    ("language_config", {"n_layer": -1}, "language_config.n_layer is -1"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG)
def test_a_wrong_value_is_refused_at_download_with_its_key_and_itself(key: str, value: Any, said: str) -> None:
    assert said in refusal(raw(**{key: value}))


def test_integers_of_too_many_digits_are_refused_without_reading_them() -> None:
    content = raw(num_hidden_layers=0, other={"deep": [1]}).replace(b"[1]", b"[" + b"7" * 3_000_000 + b"]")
    before = time.monotonic()
    assert "has a number of 3000000 digits at other.deep[0]" in refusal(content)
    assert time.monotonic() - before < 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not readable JSON"),
        (b"{", "is not readable JSON"),
        (b"\xff\xfe\x00", "is not readable JSON"),
        (b"[" * 200_000, "is not readable JSON"),
        (b'{"a":' * 200_000, "is not readable JSON"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "is nested more than 64 deep at a.a.a"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b'{"hidden_size": 64, "hidden_size": 65}', '"hidden_size" is there twice, with different values'),
        (b'{"hidden_size": 1, "hidden_size": true}', '"hidden_size" is there twice, with different values'),
        (b'{"a": "' + b"x" * config_file.MAX_BYTES + b'"}', "has more than 4194304 bytes"),
    ],
    ids=range(11),
)
def test_what_is_no_configuration_at_all_is_refused(content: bytes, said: str) -> None:
    assert said in refusal(content)


@pytest.mark.parametrize(
    "odd",
    [
        {"time_step_limit": [0.0, float("inf")]},  # Mamba 2
        {"intermediate_size": [16384, 8192]},  # Gemma 3n
        {"num_attention_heads": [1, 2, 4]},
        {"num_key_value_heads": None, "head_dim": None, "text_config": None, "architectures": None},
        {"model_max_length": 10**30},
        {"num_experts": 0},
        {"torch_dtype": {"text_config": "bfloat16"}},
        {"sliding_window": [None, 4096], "rope_theta": 1e6, "pad_token_id": -1, "eos_token_id": [1, 2]},
        {"id2label": {str(number): f"label {number}" for number in range(20_000)}},
        {"tie_word_embeddings": 0},
    ],
)
def test_an_honest_oddity_is_let_through(odd: dict[str, Any]) -> None:
    scan.scan_configuration("config.json", raw(**odd))


def test_a_key_that_is_there_twice_with_one_value_does_no_harm() -> None:
    config_file.parse(b'{"torch_dtype": "float32", "torch_dtype": "float32"}')


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"n_positions": 1024, "text_config": None}, 1024),
        ({"model_max_length": 512}, 512),
        ({"model_max_length": 10**30}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": -5}, None),
        ({"max_position_embeddings": "many"}, None),
        ({}, None),
    ],
)
def test_how_long_a_model_may_read_is_in_its_configuration(config: dict[str, Any], expected: int | None) -> None:
    assert config_file.longest(config) == expected


def test_a_folder_without_its_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFailure, match=r"config\.json cannot be read \(No such file or directory\)"):
        config_file.read(tmp_path)
