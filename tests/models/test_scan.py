"""What the scanner refuses and what it lets through, as tables, hostile files included."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.models import scan
from tests.models.repositories import CONFIG, as_json, noise, safetensors


def refusal(name: str, value: object) -> JobFailure:
    with pytest.raises(JobFailure) as caught:
        scan.scan_configuration(name, as_json(value))
    assert caught.value.hint
    return caught.value


REMOTE_CODE: list[tuple[str, Any, str]] = [
    ("config.json", {"auto_map": {"AutoConfig": "configuration_x.X"}}, "auto_map"),
    ("config.json", {"text_config": {"auto_map": {"AutoModel": "a/b--m.M"}}}, "text_config.auto_map"),
    ("config.json", {"parts": [{}, {"auto_map": ["x"]}]}, "parts[1].auto_map"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}}, "auto_map"),
    ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "p.P"}}, "auto_map"),
    ("config.json", {"custom_pipelines": {"p": {"impl": "x.Y"}}}, "custom_pipelines"),
    ("generation_config.json", {"custom_generate": "acme/generate"}, "custom_generate"),
    ("config.json", {"trust_remote_code": True}, "trust_remote_code"),
    ("config.json", {"model_file": "model.py"}, "model_file"),
    ("config.json", {"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
    ("config.json", {"attn_implementation": "paged|evil/kernel@main:f"}, "attn_implementation"),
    ("config.json", {"_attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}}, "_attn_implementation"),
    ("config.json", {"attn_implementation": ["eager", "evil/kernel"]}, "attn_implementation"),
    ("config.json", {"_experts_implementation": "evil/experts"}, "_experts_implementation"),
    ("adapter_config.json", {"auto_mapping": {"parent_library": "os.path"}}, "auto_mapping.parent_library"),
    ("modules.json", [{"type": "custom.module.Layer"}], "[0].type"),
    ("modules.json", {"type": "sentence_transformers.models.Pooling"}, "[0].type"),
]


@pytest.mark.parametrize(("name", "value", "where"), REMOTE_CODE)
def test_configuration_that_would_run_code_is_refused_with_its_place(name: str, value: Any, where: str) -> None:
    failure = refusal(name, value)
    assert failure.code == "remote_code"
    assert f": {where} is " in failure.message


HARMLESS: list[tuple[str, Any]] = [
    ("config.json", {**CONFIG, "auto_map": None, "trust_remote_code": False, "custom_pipelines": {}}),
    ("config.json", {"_attn_implementation": "flash_attention_2", "attn_implementation": None}),
    ("config.json", {"_attn_implementation": {"": "sdpa", "vision_config": "eager"}}),
    ("config.json", {"_attn_implementation_autoset": True, "cache_implementation": "static"}),
    ("added_tokens.json", {"<|auto_map|>": 5, "auto_map": 6}),
    ("adapter_config.json", {"auto_mapping": {"parent_library": "transformers.models.llama.modeling_llama"}}),
    ("adapter_config.json", {"megatron_core": "megatron.core", "megatron_config": None}),
    ("modules.json", [{"type": "sentence_transformers.models.Pooling"}]),
    ("tokenizer.json", {"model": {"vocab": {"auto_map": 17, "trust_remote_code": 18}}}),
    ("vocab.json", {"auto_map": 17}),
]


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_configuration_of_honest_models_passes(name: str, value: Any) -> None:
    scan.scan_configuration(name, as_json(value))


def test_a_chat_template_is_no_configuration() -> None:
    scan.scan_configuration("chat_template.jinja", b"{{ auto_map }}")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 90 + b"1" + b"}" * 90, b"NaN["])
def test_configuration_that_cannot_be_read_is_refused_not_crashed_on(content: bytes) -> None:
    with pytest.raises(JobFailure) as caught:
        scan.scan_configuration("config.json", content)
    assert caught.value.code == "bad_configuration"


def test_a_configuration_that_must_be_an_object_is_one() -> None:
    with pytest.raises(JobFailure, match="not a JSON object"):
        scan.read_json("config.json", b"[1]")


def entry(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


GOOD_HEADERS: list[tuple[dict[str, Any], int]] = [
    ({"a": entry(0, 8), "b": entry(8, 16)}, 16),
    ({"b": entry(8, 16), "a": entry(0, 8), "__metadata__": {"format": "pt"}}, 16),
    ({"a": entry(0, 8, "F32", [2])}, 8),
    ({"a": entry(0, 4, "F4", [8])}, 4),
    ({"scalar": entry(0, 2, "BF16", []), "empty": entry(2, 2, "F32", [0, 7])}, 2),
    ({}, 0),
]


@pytest.mark.parametrize(("header", "size"), GOOD_HEADERS)
def test_weights_whose_header_covers_the_file_pass(header: dict[str, Any], size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(noise(size), header))
    scan.scan_safetensors(path, path.name)


BAD_HEADERS: list[tuple[str, dict[str, Any], int]] = [
    ("ends beyond the file", {"a": entry(0, 900)}, 100),
    ("ends before the file does", {"a": entry(0, 90)}, 100),
    ("overlaps", {"a": entry(0, 60), "b": entry(40, 100)}, 100),
    ("leaves a hole", {"a": entry(0, 40), "b": entry(60, 100)}, 100),
    ("does not start at zero", {"a": entry(10, 100)}, 100),
    ("ends before it begins", {"a": entry(100, 0, shape=[100])}, 100),
    ("has a shape that is not its size", {"a": entry(0, 100, "F32", [100])}, 100),
    ("has a negative shape", {"a": entry(0, 100, shape=[-1, -100])}, 100),
    ("has a shape beyond counting", {"a": entry(0, 100, shape=[2**61] * 16)}, 100),
    ("has a shape of too many dimensions", {"a": entry(0, 100, shape=[1] * 1000 + [100])}, 100),
    ("has a shape of words", {"a": entry(0, 100, shape=["100"])}, 100),
    ("has a shape of truths", {"a": entry(0, 1, shape=[True])}, 1),
    ("has an unknown number format", {"a": entry(0, 100, "PICKLE")}, 100),
    ("has a number format that is a list", {"a": {**entry(0, 100), "dtype": ["U8"]}}, 100),
    ("has three offsets", {"a": {**entry(0, 100), "data_offsets": [0, 50, 100]}}, 100),
    ("has no offsets", {"a": {"dtype": "U8", "shape": [100]}}, 100),
    ("has a tensor that is a number", {"a": 1}, 0),
]


@pytest.mark.parametrize(("why", "header", "size"), BAD_HEADERS, ids=[case[0] for case in BAD_HEADERS])
def test_weights_that_lie_about_themselves_are_refused(
    why: str, header: dict[str, Any], size: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(noise(size), header))
    with pytest.raises(JobFailure) as caught:
        scan.scan_safetensors(path, path.name)
    assert caught.value.code == "bad_weights"
    assert path.name in caught.value.message


DOUBLE = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
BAD_FILES = {
    "empty": b"",
    "shorter than a header": b"\x01\x00\x00",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "a header longer than memory": struct.pack("<Q", 2**63) + b"{}",
    "a header that is not JSON": struct.pack("<Q", 4) + b"\x80\x04pq",
    "a header that is a list": struct.pack("<Q", 2) + b"[]",
    "a header nested beyond reason": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "a name that appears twice": struct.pack("<Q", len(DOUBLE)) + DOUBLE + b"data",
    "a pickle": b"\x80\x04\x95" + noise(200),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_safetensors_is_refused_quickly(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_FILES[name])
    started = time.monotonic()
    with pytest.raises(JobFailure) as caught:
        scan.scan_safetensors(path, path.name)
    assert caught.value.code == "bad_weights"
    assert time.monotonic() - started < 5


def test_what_safetensors_itself_writes_passes(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    tensors = {"a": numpy.zeros((3, 4), numpy.float16), "b": numpy.ones(5), "c": numpy.array(7, numpy.int8)}
    save_file(tensors, str(path), metadata={"format": "pt"})
    scan.scan_safetensors(path, path.name)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "a/b"}, "unsupported_adapter"),
        ({"base_model_name_or_path": "a/b"}, "unsupported_adapter"),
        ({"peft_type": "LORA"}, "adapter_without_base"),
        ({"peft_type": "LORA", "base_model_name_or_path": "/home/me/llama"}, "adapter_without_base"),
        ({"peft_type": "LORA", "base_model_name_or_path": 7}, "adapter_without_base"),
    ],
)
def test_an_adapter_that_could_not_be_served_is_refused(config: dict[str, Any], code: str) -> None:
    with pytest.raises(JobFailure) as caught:
        scan.scan_adapter(config)
    assert caught.value.code == code


def test_an_adapter_names_its_base() -> None:
    assert scan.scan_adapter({"peft_type": "LORA", "base_model_name_or_path": "acme/tiny"}) == "acme/tiny"
