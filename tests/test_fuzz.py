"""A minute of files that are bent a little: whatever a repository holds ends in a refusal with its reason, in time.

The same examples in each run (`derandomize`): what is found once is found by everybody. MODELYARD_TEST_FUZZ=100 tries
a hundred times as many.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modelyard.engine.memory import fit
from modelyard.engine.options import EngineOptions
from modelyard.errors import JobFailure, ModelyardError
from modelyard.filters import Limits
from modelyard.finetune.needs import estimate
from modelyard.finetune.schemas import HyperparametersIn
from modelyard.hardware import GIB, Machine
from modelyard.models import config_file, scan, selection, shape, trainable
from modelyard.models.adapter_checks import check_adapter
from modelyard.models.listing import BadListing, parse
from modelyard.models.shape import ModelFiles
from modelyard.models.tokenizer_child import TokenizerChildren
from tests.hostile_tokenizers import tokenizer
from tests.mutations import bent_bytes, bent_json, bent_values

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FACTOR = float(os.environ.get("MODELYARD_TEST_FUZZ") or 1)
#: Processor time that one file may take.
MOST_S = 1.0
SETTINGS = HyperparametersIn(rank=16).filled()
MACHINE = Machine(has_gpu=False, cpus=(0, 1), memory_available_bytes=48 * GIB)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    "max_position_embeddings": 256, "torch_dtype": "float32", "tie_word_embeddings": False, "eos_token_id": [2, 3],
    "layer_types": ["full_attention", "full_attention"], "num_experts": 2, "moe_intermediate_size": 32,
    "quantization_config": {"quant_method": "awq", "bits": 4}, "rope_scaling": {"factor": 8.0, "type": "linear"},
}  # fmt: skip
NESTED: dict[str, Any] = {"model_type": "llava", "text_config": CONFIG, "vision_config": {"hidden_size": 64}}
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA", "base_model_name_or_path": "acme/tiny", "r": 4, "lora_alpha": 8, "bias": "none",
    "target_modules": ["q_proj"], "rank_pattern": {"layers.0": 4}, "alpha_pattern": {"layers.0": 8},
    "init_lora_weights": True, "modules_to_save": None, "use_dora": False, "layers_to_transform": None,
}  # fmt: skip
BASE = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2}
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    **{
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{matrix}.weight": {
            "dtype": "F32",
            "shape": [4, 16] if matrix == "A" else [16, 4],
            "data_offsets": [256 * place, 256 * (place + 1)],
        }
        for place, (layer, matrix) in enumerate([(0, "A"), (0, "B"), (1, "A"), (1, "B")])
    },
}
SHA = "0123456789abcdef" * 4
LISTING: dict[str, Any] = {
    "id": "acme/tiny",
    "sha": SHA[:40],
    "siblings": [
        {"rfilename": "config.json", "size": 300, "blobId": SHA[:40]},
        {"rfilename": "tokenizer.json", "size": 300, "blobId": SHA[:40]},
        {"rfilename": "model-00001-of-00002.safetensors", "size": 9, "lfs": {"sha256": SHA, "size": 9}},
        {"rfilename": "model-00002-of-00002.safetensors", "size": 9, "lfs": {"sha256": SHA, "size": 9}},
        {"rfilename": "model.safetensors.index.json", "size": 80, "blobId": SHA[:40]},
        {"rfilename": "1_Pooling/config.json", "size": 80, "blobId": SHA[:40]},
    ],
}
INDEX: dict[str, Any] = {
    "metadata": {"total_size": 18},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}


def fuzz(count: int) -> settings:
    """Return how a target is tried: the same examples each time, so many of them."""
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=max(10, int(count * FACTOR)),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@contextmanager
def refused_or_right() -> Iterator[None]:
    """Let a refusal pass, of which the words can be shown and stored; nothing else, and nothing slow."""
    before, said = time.thread_time(), "nothing"
    try:
        yield
    except (JobFailure, ModelyardError) as error:
        said = error.message
    assert time.thread_time() - before < MOST_S
    assert 0 < len(said.encode()) < 2000
    assert "\x00" not in said


@fuzz(600)
@given(bent_json(CONFIG) | bent_json(NESTED))
@example(b"{" * 100_000)
@example(json.dumps({**CONFIG, "num_hidden_layers": 10**400}).encode())
@example(json.dumps({**CONFIG, "max_position_embeddings": 10**8}).encode())
def test_a_bent_config_ends_in_figures_within_reason_or_a_refusal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with refused_or_right():
        scan.scan_configuration("config.json", content)
    with refused_or_right():
        trainable.check("acme/tiny", tmp_path)
    with refused_or_right():
        config = config_file.read(tmp_path)
        for task in ("generate", "embed"):
            files = ModelFiles("acme/tiny", tmp_path, 1 << 20, config, task)
            found = fit(files, EngineOptions(), MACHINE, 16)
            assert found.weights_bytes > 0
            assert 0 < found.total_bytes < 1 << 62
            json.dumps(found.message).encode()
        need = estimate(config, 1 << 20, SETTINGS, has_gpu=False)
        assert 0 < need.needed_bytes < 1 << 62
        assert shape.kv_heads(config) > 0


@fuzz(200)
@given(bent_values(CONFIG) | bent_values(NESTED))
def test_no_arithmetic_trips_over_what_nobody_has_checked(config: Any) -> None:
    if isinstance(config, dict):
        for found in (shape.kv_bytes_per_token(config, 2), shape.adapter_numbers(config, 16)):
            assert found is None or 0 <= found < 1 << 62
        assert 0 < estimate(config, 1 << 20, SETTINGS, has_gpu=True).needed_bytes < 1 << 62
        assert shape.kv_heads(config) > 0


@fuzz(400)
@given(bent_json(ADAPTER), bent_json(HEADER), st.integers(0, 4))
@example(json.dumps(ADAPTER | {"lora_alpha": 10**400}).encode(), b"", 2)
@example(json.dumps(ADAPTER | {"alpha_pattern": {"layers.0": 10**400}}).encode(), b"", 2)
def test_a_bent_adapter_is_refused_or_has_facts(tmp_path: Path, config: bytes, header: bytes, which: int) -> None:
    whole = (json.dumps(ADAPTER).encode(), json.dumps(HEADER).encode())
    # The one, the other, or both are bent.
    config, header = (config if which != 1 else whole[0]), (header if which in (0, 1) else whole[1])
    (tmp_path / "adapter_config.json").write_bytes(config)
    weights = struct.pack("<Q", len(header)) + header + b"\x00\x00\x80\x3e" * 256
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with refused_or_right():
        facts = check_adapter(tmp_path, BASE, adapter_id="acme/odd")
        assert facts.rank > 0
    with refused_or_right():
        scan.scan_configuration("adapter_config.json", config)
        scan.scan_adapter(scan.read_json("adapter_config.json", config))


@fuzz(300)
@given(bent_bytes(struct.pack("<Q", len(json.dumps(HEADER))) + json.dumps(HEADER).encode() + bytes(1024)))
def test_bent_weights_are_refused_or_whole(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with refused_or_right():
        scan.scan_safetensors(tmp_path / "adapter_model.safetensors", "adapter_model.safetensors")


@fuzz(300)
@given(bent_json(LISTING), bent_json(INDEX))
def test_a_bent_answer_of_a_hub_names_safe_files_or_is_refused(answer: bytes, index: bytes) -> None:
    listing = None
    with refused_or_right(), suppress(BadListing):
        listing = parse(answer)
    if listing is None:
        return
    assert len(listing.commit) == 40
    assert all(entry.size is None or 0 <= entry.size < 1 << 62 for entry in listing.files.values())
    with refused_or_right():
        chosen = selection.choose(list(listing.files), lambda path: index)
        for path in (*chosen.configuration, *chosen.weights):
            assert not path.startswith("/")
            assert ".." not in path.split("/")


OTHERS = {
    "generation_config.json": {"eos_token_id": [2], "temperature": 0.7},
    "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"0": {"content": "<s>"}}},
    "preprocessor_config.json": {"image_size": 224, "crop_size": {"height": 224}},
    "modules.json": [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}],
}


@fuzz(200)
@given(st.sampled_from(sorted(OTHERS)).flatmap(lambda name: st.tuples(st.just(name), bent_json(OTHERS[name]))))
def test_other_bent_files_of_settings_are_refused_or_harmless(named: tuple[str, bytes]) -> None:
    with refused_or_right():
        scan.scan_configuration(*named)


@fuzz(30)
@given(bent_json(json.loads(tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}))))
def test_a_bent_tokenizer_ends_in_an_answer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    program = f"from modelyard.trainer.tokenizer_trial import main; main({str(tmp_path)!r})"
    limits = Limits(memory_bytes=4 * GIB, cpu_s=20, stall_s=20.0)
    with refused_or_right():
        found = asyncio.run(TokenizerChildren(limits).ask("acme/odd", program))
        assert set(found) <= {"template", "refusal"}
    with refused_or_right():
        scan.scan_configuration("tokenizer.json", content)
