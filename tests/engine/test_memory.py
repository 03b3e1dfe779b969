"""The arithmetic of what fits: it adds up, says so in its message, and its hints are true."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelyard.engine.memory import CPU_PROCESSES_BYTES, GPU_PROCESS_BYTES, KV_LEAST_BYTES, Fit, fit, lora_rank
from modelyard.engine.options import EngineOptions
from modelyard.hardware import GIB, Gpu, Machine
from modelyard.models.shape import ModelFiles
from tests.models.test_shape import LLAMA_8B

CPU = Machine(has_gpu=False, cpus=(0, 1), memory_available_bytes=64 * GIB)
H100 = Gpu(0, "H100", 80 * GIB, 79 * GIB)
GPU = Machine(has_gpu=True, cpus=(0,), memory_available_bytes=500 * GIB, gpus=(H100, replace(H100, index=1)))
MODEL = ModelFiles("org/llama", Path("/store/llama"), 16 * GIB, LLAMA_8B, "generate")
TOKEN = 128 * 1024
#: The embedding and the output, each 128256 x 4096 numbers of 16 bits, which a CPU holds twice.
ENDS = 2 * 128256 * 4096 * 2


def fitted(model: ModelFiles = MODEL, machine: Machine = CPU, rank: int = 0, **options: Any) -> Fit:
    return fit(model, EngineOptions(**options), machine, rank)


def with_memory(gib: float) -> Machine:
    return replace(CPU, memory_available_bytes=int(gib * GIB))


def of(model: ModelFiles = MODEL, **config: Any) -> ModelFiles:
    return replace(model, config={**model.config, **config})


def test_the_parts_add_up_and_the_message_has_them() -> None:
    found = fitted()
    assert found.fits
    assert found.weights_bytes == 16 * GIB + ENDS
    assert found.adapters_bytes is not None
    assert found.kv_cache_bytes == 4 * GIB
    parts = found.weights_bytes + found.processes_bytes + found.adapters_bytes + found.kv_cache_bytes
    assert parts == found.total_bytes < 64 * GIB
    assert found.available_bytes == 64 * GIB
    assert "18.0 GiB for its weights" in found.message
    assert f"{found.kv_cache_tokens:,} tokens" in found.message
    assert "64.0 GiB is free" in found.message
    assert found.hints == ()


def test_the_tokens_are_what_the_cache_holds_without_the_block_that_vllm_keeps() -> None:
    assert fitted(cpu_kv_cache_gib=1).kv_cache_tokens == GIB // TOKEN - 128


def test_the_cache_of_a_small_model_is_as_large_as_is_useful() -> None:
    small = of(num_hidden_layers=1, max_position_embeddings=256)
    # 64 sequences in three blocks of 128 tokens each (one more than they fill), and a quarter more.
    assert fitted(small).kv_cache_bytes == 3 * 128 * (TOKEN // 32) * 64 * 5 // 4
    assert fitted(small, max_num_seqs=1).kv_cache_bytes == KV_LEAST_BYTES


def test_the_cache_takes_at_most_half_of_what_is_left() -> None:
    found = fitted(machine=with_memory(26))
    assert found.adapters_bytes is not None
    left = 26 * GIB - CPU_PROCESSES_BYTES - 16 * GIB - ENDS - found.adapters_bytes
    assert found.kv_cache_bytes == left // 2


def test_a_length_that_was_asked_for_is_served_from_memory_that_would_be_spared_otherwise() -> None:
    found = fitted(machine=with_memory(37), max_model_len=100_000)
    assert found.fits
    assert found.kv_cache_bytes is not None
    assert found.kv_cache_bytes >= 100_000 * TOKEN
    assert found.kv_cache_tokens is not None
    assert found.kv_cache_tokens >= 100_000


def test_weights_take_the_memory_of_the_format_that_they_are_served_in() -> None:
    assert fitted(dtype="float32").weights_bytes == 2 * (16 * GIB + ENDS)
    # vLLM rounds a model in float32 to 16 bits unless it is told not to.
    assert fitted(of(torch_dtype="float32")).weights_bytes == 8 * GIB + ENDS
    assert fitted(of(torch_dtype="float32"), dtype="float32").weights_bytes == 16 * GIB + 2 * ENDS
    assert fitted(of(quantization_config={"quant_method": "awq"}), dtype="float16").weights_bytes == 16 * GIB + ENDS


def test_a_cpu_holds_the_two_ends_of_a_model_twice_and_a_gpu_does_not() -> None:
    assert fitted(of(tie_word_embeddings=True)).weights_bytes == 16 * GIB + ENDS // 2
    assert fitted(machine=GPU).weights_bytes == 16 * GIB


def test_a_quantised_cache_holds_twice_the_tokens() -> None:
    assert fitted(cpu_kv_cache_gib=2, kv_cache_dtype="fp8").kv_cache_tokens == 2 * GIB // (TOKEN // 2) - 128


def test_what_the_configuration_does_not_tell_is_not_made_up() -> None:
    found = fitted(of(sliding_window=4096))
    assert (found.kv_cache_tokens, found.sequence_bytes, found.adapters_bytes) == (None, None, None)
    assert found.kv_cache_bytes == 4 * GIB
    assert "tokens" not in found.message
    silent = fitted(replace(MODEL, config={}))
    assert (silent.weights_bytes, silent.kv_cache_tokens) == (16 * GIB, None)


def test_room_for_adapters_is_counted_by_how_many_and_how_large() -> None:
    four, eight = fitted().adapters_bytes, fitted(max_loras=8).adapters_bytes
    assert four is not None
    assert eight == 2 * four
    assert fitted(max_lora_rank=128).adapters_bytes == 2 * four
    assert fitted(max_loras=0).adapters_bytes == 0
    # Rank 64 in the places, and 16 for those that are held beside them.
    assert fitted(rank=16).adapters_bytes == four + four // 4
    assert fitted(rank=65).adapters_bytes == fitted(rank=65, max_lora_rank=128).adapters_bytes


def test_the_rank_is_the_next_that_vllm_knows() -> None:
    assert lora_rank(EngineOptions(), 0) == 64
    assert lora_rank(EngineOptions(max_lora_rank=8), 9) == 16
    assert lora_rank(EngineOptions(), 300) == 320


def test_an_encoder_needs_no_cache() -> None:
    bert = replace(of(model_type="bert"), task="embed", size_bytes=GIB)
    found = fitted(bert, machine=with_memory(10))
    assert (found.kv_cache_bytes, found.kv_cache_tokens, found.adapters_bytes) == (KV_LEAST_BYTES, None, 0)
    # On a CPU vectors are computed in full precision.
    assert found.weights_bytes == 2 * GIB + ENDS


def test_a_decoder_that_embeds_needs_the_cache_of_its_whole_length() -> None:
    decoder = replace(MODEL, task="embed", size_bytes=GIB)
    found = fitted(decoder, machine=with_memory(20))
    assert not found.fits
    assert any("max_model_len" in hint for hint in found.hints)


def test_too_little_memory_is_said_with_the_numbers() -> None:
    found = fitted(machine=with_memory(10))
    assert not found.fits
    assert "18.0 GiB for its weights" in found.message
    assert "10.0 GiB is free" in found.message


NUMBER = r"(\d+(?:\.\d+)?)"


def changes_of(hint: str) -> dict[str, Any]:
    found = re.match(rf"Set (\w+) to (?:at most |at least )?(?:{NUMBER}|(\w+))", hint)
    if found is None:
        return {}
    return {found[1]: float(found[2]) if "gib" in found[1] or "utilization" in found[1] else found[3] or int(found[2])}


@pytest.mark.parametrize(
    ("model", "machine", "options", "rank", "helps"),
    [
        (MODEL, with_memory(30), {"cpu_kv_cache_gib": 20}, 0, {"cpu_kv_cache_gib"}),
        (
            MODEL, with_memory(30), {"cpu_kv_cache_gib": 1, "max_model_len": 16384}, 0,
            {"cpu_kv_cache_gib", "max_model_len"},
        ),
        (MODEL, with_memory(30), {"max_model_len": 131072}, 0, {"max_model_len"}),
        (MODEL, with_memory(25), {"dtype": "float32"}, 0, {"dtype"}),
        (MODEL, with_memory(30), {"max_loras": 64, "max_lora_rank": 512}, 0, {"max_loras", "max_lora_rank"}),
        (MODEL, with_memory(30), {"max_loras": 16, "max_lora_rank": 512}, 8, {"max_lora_rank"}),
        (MODEL, replace(GPU, gpus=(replace(H100, free_bytes=40 * GIB),)), {}, 0, {"gpu_memory_utilization"}),
        (MODEL, GPU, {"gpu_memory_utilization": 0.2}, 0, {"gpu_memory_utilization", "tensor_parallel_size"}),
        (MODEL, GPU, {"tensor_parallel_size": 4}, 0, {"tensor_parallel_size"}),
        (replace(MODEL, size_bytes=100 * GIB), GPU, {}, 0, {"tensor_parallel_size"}),
        (
            replace(MODEL, size_bytes=60 * GIB), replace(GPU, gpus=(H100,)), {"max_model_len": 131072}, 0,
            {"max_model_len"},
        ),
    ],
)  # fmt: skip
def test_each_hint_with_a_value_makes_it_fit(
    model: ModelFiles, machine: Machine, options: dict[str, Any], rank: int, helps: set[str]
) -> None:
    found = fitted(model, machine, rank, **options)
    assert not found.fits, found.message
    changed = [changes_of(hint) for hint in found.hints]
    assert helps <= {name for change in changed for name in change}, found.hints
    for change in changed:
        if change:
            assert fitted(model, machine, rank, **{**options, **change}).fits, (found.hints, change)


def test_the_length_that_is_hinted_at_is_the_longest() -> None:
    found = fitted(machine=with_memory(30), max_model_len=131072)
    hinted = next(change["max_model_len"] for hint in found.hints if "max_model_len" in (change := changes_of(hint)))
    assert not fitted(machine=with_memory(30), max_model_len=hinted + 128).fits


def test_memory_that_is_to_be_freed_is_enough() -> None:
    found = fitted(machine=with_memory(10))
    missing = next(float(m[1]) for hint in found.hints if (m := re.match(rf"Free {NUMBER} GiB more", hint)))
    assert fitted(machine=with_memory(10 + missing)).fits
    assert not fitted(machine=with_memory(10 + missing - 0.3)).fits


def test_a_quantised_version_is_hinted_at_only_where_it_would_fit() -> None:
    assert any("quantised to 4 bits" in hint for hint in fitted(machine=with_memory(9)).hints)
    assert any("quantised to 8 bits" in hint for hint in fitted(machine=with_memory(14)).hints)
    assert not any("quantised" in hint for hint in fitted(machine=with_memory(5)).hints)


def test_on_a_gpu_the_engine_takes_its_part_of_the_gpu() -> None:
    found = fitted(machine=GPU)
    assert found.fits
    assert found.total_bytes == 72 * GIB
    assert found.available_bytes == 79 * GIB
    assert found.gpus == {0: 72 * GIB}
    assert found.adapters_bytes is not None
    assert found.kv_cache_bytes == 72 * GIB - 16 * GIB - GPU_PROCESS_BYTES - found.adapters_bytes
    assert found.kv_cache_tokens == (found.kv_cache_bytes // (TOKEN * 16) - 1) * 16


def test_a_model_is_divided_among_gpus() -> None:
    one, two = fitted(machine=GPU), fitted(machine=GPU, tensor_parallel_size=2)
    assert two.gpus == {0: 72 * GIB, 1: 72 * GIB}
    assert two.total_bytes == 144 * GIB
    assert two.kv_cache_tokens is not None
    assert one.kv_cache_tokens is not None
    assert two.kv_cache_tokens > 2 * one.kv_cache_tokens


def test_a_gpu_that_others_use_is_named_with_its_numbers() -> None:
    found = fitted(machine=replace(GPU, gpus=(replace(H100, free_bytes=30 * GIB),)))
    assert not found.fits
    assert "GPU 0 (H100) has 30.0 GiB of 80.0 GiB free" in found.message


def test_of_gpus_that_cannot_be_seen_nothing_is_claimed() -> None:
    found = fitted(machine=replace(GPU, gpus=()))
    assert found.fits
    assert (found.kv_cache_bytes, found.available_bytes) == (None, None)
    assert "cannot be seen" in found.message
