"""The estimate of a training's memory, part by part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelyard.finetune.needs import CPU_PROCESS_BYTES, GPU_PROCESS_BYTES, ROW_MARGIN, estimate, has_amx
from modelyard.finetune.schemas import HyperparametersIn
from modelyard.hardware import GIB
from modelyard.models import config_file, shape
from modelyard.trainer.spec import Mode, Spec

#: Like Qwen3-0.6B: 28 layers of 1,024, heads of 128, a vocabulary of 151,936.
CONFIG: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151_936, "max_position_embeddings": 40_960,
    "dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip
SIZE = 1_192_000_000
SETTINGS = HyperparametersIn(rank=16).filled()


def test_the_parts_of_a_known_model_are_as_worked_out_by_hand() -> None:
    need = estimate(CONFIG, SIZE, SETTINGS, has_gpu=True, longest_tokens=100)
    assert need.processes_bytes == GPU_PROCESS_BYTES
    assert need.weights_bytes == SIZE
    # q 1024+2048, k and v 1024+1024, o 2048+1024, gate, up and down 1024+3072 each; 16 bytes a number
    assert need.adapter_bytes == 16 * 16 * 28 * (3072 + 2048 + 2048 + 3072 + 3 * 4096)
    # inputs 5*1024+2048+3072 in float32; 4*1024+2*2048+2*1024+3*3072 in 16 bits; norms 2*1024 in float32
    layer = 4 * 10_240 + 2 * 19_456 + 8 * 1024
    assert need.row_bytes == int(100 * (28 * layer + 151_936 * 10) * ROW_MARGIN)
    fixed = need.processes_bytes + need.weights_bytes + need.adapter_bytes
    assert (need.needed_bytes, need.useful_bytes) == (fixed + need.row_bytes, fixed + 16 * need.row_bytes)


def test_a_batch_that_is_asked_for_is_counted_whole() -> None:
    settings = replace(SETTINGS, batch_size=4)
    need = estimate(CONFIG, SIZE, settings, has_gpu=True, longest_tokens=100)
    fixed = need.processes_bytes + need.weights_bytes + need.adapter_bytes
    assert need.needed_bytes == need.useful_bytes == fixed + 4 * need.row_bytes


@pytest.mark.parametrize(
    ("change", "smaller"),
    [
        ({"max_seq_len": 512}, True), ({"rank": 8}, True), ({"target_modules": ["q_proj"]}, True),
        ({"quantization": "4bit"}, True), ({"dropout": 0.1}, False), ({"rank": 64}, False), ({"batch_size": 2}, False),
    ],
)  # fmt: skip
def test_each_setting_moves_the_estimate_the_right_way(change: dict[str, Any], smaller: bool) -> None:
    before = estimate(CONFIG, SIZE, SETTINGS, has_gpu=True).needed_bytes
    after = estimate(CONFIG, SIZE, replace(SETTINGS, **change), has_gpu=True).needed_bytes
    assert (after < before) is smaller
    assert after != before


def test_rows_are_never_longer_than_the_settings_the_model_and_the_data() -> None:
    def tokens(longest: int | None = None, **config: Any) -> int:
        settings = replace(SETTINGS, max_seq_len=config.pop("max_seq_len", None))
        return estimate(CONFIG | config, SIZE, settings, has_gpu=True, longest_tokens=longest).row_tokens

    assert tokens() == 4096
    assert tokens(max_position_embeddings=2048) == 2048
    assert tokens(max_seq_len=512) == 512
    assert tokens(300) == 300
    assert tokens(9000) == 4096
    assert tokens(0) == 1


def test_on_a_cpu_weights_are_of_the_format_that_it_computes_in() -> None:
    need = estimate(CONFIG, SIZE, SETTINGS, has_gpu=False, longest_tokens=100)
    assert need.processes_bytes == CPU_PROCESS_BYTES
    assert need.weights_bytes == SIZE * (1 if has_amx() else 2)


def test_processes_that_share_a_processor_want_its_memory_each() -> None:
    for has_gpu, times in ((False, 3), (True, 1)):
        one = estimate(CONFIG, SIZE, SETTINGS, has_gpu=has_gpu)
        three = estimate(CONFIG, SIZE, SETTINGS, has_gpu=has_gpu, processes=3)
        assert three.needed_bytes == times * one.needed_bytes
        assert three.useful_bytes == times * one.useful_bytes


#: Like Qwen3-30B-A3B, cut to four layers: 128 experts of 768, of which each token goes through 8, in every layer.
MIXTURE: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151_936, "dtype": "bfloat16",
}  # fmt: skip


def test_of_a_mixture_of_experts_those_that_a_token_goes_through_are_counted() -> None:
    def need(**config: Any) -> Any:
        return estimate(MIXTURE | config, SIZE, SETTINGS, has_gpu=True, longest_tokens=100)

    plain = need()
    # Adapters are on the attention alone: q 2048+4096, k and v 2048+512, o 4096+2048.
    assert plain.adapter_bytes == 16 * 16 * 4 * (6144 + 2 * 2560 + 6144)
    own = 4 * 2048 + 2 * 4096 + 2 * 512 + 8 * (2 * 2048 + 3 * 768)
    layer = 4 * (3 * 2048 + 4096) + 2 * own + 8 * 2048
    assert plain.row_bytes == int(100 * (4 * layer + 151_936 * 10) * ROW_MARGIN)
    assert need(num_experts_per_tok=16).row_bytes > plain.row_bytes
    # Shared experts and layers without any have adapters.
    assert need(shared_expert_intermediate_size=512).adapter_bytes > plain.adapter_bytes
    assert need(n_shared_experts=2).adapter_bytes > plain.adapter_bytes
    for dense in ({"mlp_only_layers": [0]}, {"first_k_dense_replace": 1}, {"decoder_sparse_step": 2}):
        assert need(**dense).adapter_bytes > plain.adapter_bytes, dense
    assert need(num_experts_per_tok=None).row_bytes == plain.row_bytes, "as many as most have"


def test_the_rows_of_a_dataset_are_counted_as_tokens() -> None:
    one = estimate(CONFIG, SIZE, SETTINGS, has_gpu=False)
    large = estimate(CONFIG, SIZE, SETTINGS, has_gpu=False, characters=100_000_000)
    assert large.dataset_bytes == large.needed_bytes - one.needed_bytes == 400_000_000
    assert "0.4 GiB for the dataset" in large.in_words()
    # On a GPU they are not in its memory.
    assert estimate(CONFIG, SIZE, SETTINGS, has_gpu=True, characters=100_000_000).dataset_bytes == 0


def test_a_configuration_that_does_not_tell_is_counted_from_above() -> None:
    need = estimate({"model_type": "new"}, SIZE, SETTINGS, has_gpu=True)
    assert need.row_bytes == need.weights_bytes == SIZE
    assert need.adapter_bytes > 0
    assert need.needed_bytes < 2 * SIZE + 2 * GIB


def test_it_says_its_parts() -> None:
    said = estimate(CONFIG, SIZE, SETTINGS, has_gpu=True, longest_tokens=100).in_words()
    assert said.startswith("about 3.")
    assert "1.5 GiB for the trainer" in said
    assert "a row of 100 tokens" in said


def test_what_was_measured_is_not_said_to_be_the_sum_of_its_parts() -> None:
    need = replace(estimate(CONFIG, SIZE, SETTINGS, has_gpu=False), needed_bytes=GIB // 2, is_measured=True)
    assert need.in_words() == "about 0.5 GiB, as measured"


def test_a_processor_says_whether_it_has_amx(tmp_path: Path) -> None:
    (tmp_path / "yes").write_text("flags\t\t: fpu avx512f amx_bf16 amx_tile amx_int8\n", "ascii")
    (tmp_path / "no").write_text("flags\t\t: fpu avx512f\n", "ascii")
    assert has_amx(tmp_path / "yes")
    assert not has_amx(tmp_path / "no")
    assert not has_amx(tmp_path / "missing")


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "words"), [(2, 10), (8, 150)])
def test_it_is_above_what_a_real_training_takes_and_not_by_far(
    tmp_path: Path, imports: Path, rows: int, words: int
) -> None:
    settings = replace(SETTINGS, max_steps=2, epochs=None, batch_size=rows, validation_split=0.0, checkpoint_steps=10)
    said = "the river runs to the sea and " * words
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said}]}
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 16, "utf-8")
    base = imports / "tiny-llama"
    spec = Spec(
        mode=Mode.TRAIN, name="it", model_id="local:tiny-llama", model_dir=str(base), adapter_id="ft:it",
        data=str(tmp_path / "data.jsonl"), max_line_bytes=2**20, hyperparameters=settings,
        work_dir=str(tmp_path / "work"), progress=str(tmp_path / "progress.jsonl"),
        result=str(tmp_path / "result.json"),
    )  # fmt: skip
    spec.write(tmp_path / "training.json")
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "modelyard.trainer", str(tmp_path / "training.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert "figures" in result, (result, done.stderr[-2000:])
    reports = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text("utf-8").splitlines()]
    [prepared] = [one for one in reports if one["kind"] == "prepared"]
    config = json.loads((base / "config.json").read_text("utf-8"))
    size = (base / "model.safetensors").stat().st_size
    need = estimate(config, size, settings, has_gpu=False, longest_tokens=prepared["longest"])
    taken = result["figures"]["peak_memory_bytes"]
    assert 0.9 * taken < need.needed_bytes < 2.5 * taken, (need, taken)


#: What memory is worked out from, each of which may be anything in a mapping that nobody has checked.
READ = (
    *config_file.LAYERS, *config_file.HEADS, *config_file.HIDDEN, *config_file.INNER, *config_file.LENGTHS,
    *config_file.EXPERTS, "num_key_value_heads", "head_dim", "kv_lora_rank", "qk_rope_head_dim", "vocab_size",
    "model_type", "layer_types", "text_config", "torch_dtype", "quantization_config", "sliding_window",
)  # fmt: skip


@pytest.mark.parametrize("value", ["many", "", [], [1], {}, {"a": 1}, True, -1, 0, 1.5, float("nan"), 10**400, None])
def test_arithmetic_over_any_value_ends_with_no_figure_or_a_plausible_one(value: Any) -> None:
    for key in READ:
        config = {**CONFIG, key: value}
        for found in (
            shape.kv_bytes_per_token(config, 2),
            shape.adapter_numbers(config, 16),
            shape.longest(config),
            shape.heads(config),
        ):
            assert found is None or 0 <= found < 1 << 62
        assert 1 <= shape.kv_heads(config) < 1 << 31
        assert 0 <= shape.embedding_numbers(config) < 1 << 62
        assert shape.is_encoder(config) is False
        need = estimate(config, SIZE, SETTINGS, has_gpu=False)
        assert 0 < need.needed_bytes < 1 << 62
