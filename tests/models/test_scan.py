"""What the scanner refuses and what it lets through, as tables, hostile files included."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
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
    ("config.json", {"sbert_ce_default_activation_function": "os.system"}, "sbert_ce_default_activation_function"),
    ("config.json", {"sentence_transformers": {"activation_fn": "torch.nn.modules.module.os.abort"}},
     "sentence_transformers.activation_fn"),
    ("2_Dense/config.json", {"activation_function": "torch.hub.load"}, "activation_function"),
    ("config.json", {"architectures": ["LlamaForCausalLM", "os.path"]}, "architectures"),
    ("config.json", {"architectures": ["../evil/modeling.Model"]}, "architectures"),
    ("tokenizer_config.json", {"tokenizer_class": "evil--repo.Tokenizer"}, "tokenizer_class"),
    ("preprocessor_config.json", {"image_processor_type": "a.b"}, "image_processor_type"),
    ("processor_config.json", {"image_processor": {"image_processor_type": "a/b"}},
     "image_processor.image_processor_type"),
    ("adapter_config.json", {"auto_mapping": {"base_model_class": "os.system", "parent_library": "transformers"}},
     "auto_mapping.base_model_class"),
]  # fmt: skip
ELSEWHERE: list[tuple[str, Any, str]] = [
    ("config.json", {"speculators_config": {"verifier": {"name_or_path": "evil/model"}}}, "speculators_config"),
    ("config.json", {"audio_model_id": "openai/whisper-tiny"}, "audio_model_id"),
    ("config.json", {"text_config": {"text_model_id": "evil/model"}}, "text_config.text_model_id"),
    ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "evil/model"}},
     "audio_tokenizer.audio_tokenizer_name_or_path"),
    ("audio_tokenizer_config.json", {"audio_tokenizer_name_or_path": "/etc"}, "audio_tokenizer_name_or_path"),
    ("config.json", {"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ("config.json", {"vision_config": {"architecture": "hf-hub:evil/timm"}}, "vision_config.architecture"),
    ("config.json", {"backbone": ["local-dir:/srv/other"]}, "backbone[0]"),
    ("config.json", {"configuration_files": ["config.4.0.0.json", "../../other/config.json"]}, "configuration_files"),
    ("tokenizer_config.json", {"fast_tokenizer_files": "tokenizer.json"}, "fast_tokenizer_files"),
    ("modules.json", [{"type": "sentence_transformers.models.Pooling", "path": "../../other/1_Pooling"}], "[0].path"),
    ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "/srv/other"}], "[0].path"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "where"), ELSEWHERE)
def test_configuration_that_would_load_from_elsewhere_is_refused_with_its_place(
    name: str, value: Any, where: str
) -> None:
    failure = refusal(name, value)
    assert failure.code == "loads_from_elsewhere"
    assert f": {where} is " in failure.message


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
    ("config.json", {"_name_or_path": "/home/me/checkpoint-7", "name_or_path": "org/base", "architectures": None}),
    ("config.json", {"speculators_config": None, "audio_model_id": None, "sbert_ce_default_activation_function": None}),
    ("config.json", {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}),
    ("config.json", {"configuration_files": ["config.json", "config.4.9.0.json"]}),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.9.0.json"]}),
    ("tokenizer_config.json", {"special_tokens_map_file": "/x/.cache/y.json", "tokenizer_class": "LlamaTokenizer"}),
    ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh", "in_features": 8}),
    ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": ""},
                      {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]),
]  # fmt: skip


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


READ_AS_UTF8 = ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json", "modules.json"]


@pytest.mark.parametrize("name", [*READ_AS_UTF8, "chat_template.jinja"])
@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (lambda text: text.encode("utf-8-sig"), "byte order mark: save it as UTF-8 without one"),
        (lambda text: text.encode("utf-16"), "not in UTF-8: invalid start byte (byte 0)"),
        (lambda text: text.replace("a", "\xe4").encode("latin-1"), "not in UTF-8"),
    ],
)
def test_a_file_in_an_encoding_that_the_engine_cannot_read_is_refused(
    name: str, encode: Callable[[str], bytes], said: str
) -> None:
    with pytest.raises(JobFailure) as caught:
        scan.scan_configuration(name, encode('{"a": 1}'))
    assert caught.value.code == "bad_configuration"
    assert caught.value.message.startswith(name)
    assert said in caught.value.message


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_list_in_the_place_of_settings_is_refused(name: str) -> None:
    with pytest.raises(JobFailure, match=f"{name} is not a JSON object"):
        scan.scan_configuration(name, b"[]")


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
    ],
)
def test_an_adapter_that_could_not_be_served_is_refused(config: dict[str, Any], code: str) -> None:
    with pytest.raises(JobFailure) as caught:
        scan.scan_adapter(config)
    assert caught.value.code == code


@pytest.mark.parametrize("base", [None, "/data/models/tiny-v2", "../tiny", "models/acme/tiny", 7, [], {}, "x" * 500])
def test_what_names_no_model_as_base_is_no_hint(base: object) -> None:
    assert scan.scan_adapter({"peft_type": "LORA", "base_model_name_or_path": base}) is None


def test_an_adapter_names_its_base() -> None:
    assert scan.scan_adapter({"peft_type": "LORA", "base_model_name_or_path": "acme/tiny"}) == "acme/tiny"
