"""vLLM's command, worked out from a model, options and a machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from modelyard.deploy.machine import GIB, Machine, this_machine
from modelyard.deploy.schemas import EngineOptions
from modelyard.deploy.vllm_args import AdapterFiles, ModelFiles, cpu_kv_cache_bytes, engine_command, kv_bytes_per_token
from modelyard.errors import JobFailure
from tests.deploy.yard import CONFIG, make_settings

CPU = Machine(has_gpu=False, cpus=(0, 1), memory_available_bytes=20 * GIB)
GPU = replace(CPU, has_gpu=True)
MODEL = ModelFiles("org/tiny", Path("/store/tiny"), 1_000_000, CONFIG, "generate")
SCRATCH, CACHE = Path("/run/x"), Path("/data/cache")


def argv(model: ModelFiles = MODEL, machine: Machine = CPU, **options: object) -> list[str]:
    wanted = EngineOptions.model_validate(options)
    return list(engine_command(Path("/python"), model, [], wanted, machine, SCRATCH, CACHE).argv)


def value(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_the_engine_listens_on_a_socket_in_its_private_folder_and_on_no_port() -> None:
    command = engine_command(Path("/python"), MODEL, [], EngineOptions(), CPU, SCRATCH, CACHE)
    assert command.argv[:3] == ("/python", "-m", "vllm.entrypoints.openai.api_server")
    assert value(list(command.argv), "--uds") == "/run/x/engine.sock"
    assert not {"--host", "--port"} & set(command.argv)
    assert command.scratch == SCRATCH


def test_remote_code_is_never_trusted_and_plugins_are_ours_alone() -> None:
    command = engine_command(Path("/python"), MODEL, [], EngineOptions(), GPU, SCRATCH, CACHE)
    assert not any("remote-code" in argument for argument in command.argv)
    assert command.env["VLLM_PLUGINS"] == "modelyard_amx"
    on_cpu = engine_command(Path("/python"), MODEL, [], EngineOptions(), CPU, SCRATCH, CACHE)
    assert on_cpu.env["VLLM_PLUGINS"] == "modelyard_amx,modelyard_sleep"
    assert command.env["HF_HUB_OFFLINE"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in command.env


def test_a_generative_engine_starts_with_room_for_adapters() -> None:
    assert value(argv(), "--max-loras") == "4"
    assert value(argv(max_loras=2, max_lora_rank=16), "--max-lora-rank") == "16"
    assert "--enable-lora" not in argv(max_loras=0)


def test_an_embedding_engine_pools_in_full_precision_on_a_cpu() -> None:
    embedding = replace(MODEL, task="embed")
    arguments = argv(embedding)
    assert (value(arguments, "--runner"), value(arguments, "--dtype")) == ("pooling", "float32")
    assert "--enable-lora" not in arguments
    assert value(argv(embedding, GPU), "--dtype") == "auto"
    assert value(argv(embedding, dtype="bfloat16"), "--dtype") == "bfloat16"


def test_the_length_is_what_fits_unless_it_is_named() -> None:
    assert value(argv(), "--max-model-len") == "-1"
    assert value(argv(max_model_len=512), "--max-model-len") == "512"


def test_a_length_that_the_model_does_not_reach_is_refused_with_both_numbers() -> None:
    with pytest.raises(JobFailure, match=r"4096 tokens.*2048") as refusal:
        argv(max_model_len=4096)
    assert refusal.value.code == "model_too_long"


def test_on_a_gpu_vllm_measures_memory_itself() -> None:
    arguments = argv(machine=GPU, gpu_memory_utilization=0.5, tensor_parallel_size=2)
    assert value(arguments, "--gpu-memory-utilization") == "0.5"
    assert value(arguments, "--tensor-parallel-size") == "2"
    assert "--kv-cache-memory-bytes" not in arguments


def test_every_option_reaches_the_command() -> None:
    arguments = argv(
        enforce_eager=True, enable_prefix_caching=False, kv_cache_dtype="fp8", seed=7, tool_call_parser="hermes",
        reasoning_parser="qwen3", max_num_seqs=3,
    )  # fmt: skip
    assert {"--enforce-eager", "--no-enable-prefix-caching", "--enable-auto-tool-choice"} <= set(arguments)
    named = [value(arguments, f"--{name}") for name in ("kv-cache-dtype", "seed", "tool-call-parser", "max-num-seqs")]
    assert named == ["fp8", "7", "hermes", "3"]
    assert value(arguments, "--reasoning-parser") == "qwen3"


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True},
        {"model": "/etc/passwd"},
        {"tool_call_parser": "/tmp/evil.py"},
        {"tool_call_parser": "--x"},
        {"reasoning_parser": "a b"},
        {"max_lora_rank": 7},
        {"gpu_memory_utilization": 1.5},
        {"max_model_len": 0},
        {"dtype": "float8"},
        {"seed": -1},
    ],
)
def test_an_option_off_the_list_or_out_of_bounds_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EngineOptions.model_validate(options)


def test_options_of_a_request_stand_over_the_settings(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, engine_max_model_len=1024, engine_dtype="float32", engine_max_loras=1)
    options = EngineOptions(max_model_len=512).over(settings)
    assert (options.max_model_len, options.dtype, options.max_loras) == (512, "float32", 1)


def test_adapters_are_named_to_the_engine_with_absolute_paths() -> None:
    adapters = [AdapterFiles("org/poems", Path("/store/poems"))]
    arguments = list(engine_command(Path("/p"), MODEL, adapters, EngineOptions(), CPU, SCRATCH, CACHE).argv)
    assert value(arguments, "--lora-modules") == '{"name": "org/poems", "path": "/store/poems"}'
    with pytest.raises(JobFailure, match="max_loras 0"):
        engine_command(Path("/p"), MODEL, adapters, EngineOptions(max_loras=0), CPU, SCRATCH, CACHE)


def test_one_token_in_the_cache_takes_keys_and_values_of_every_layer() -> None:
    # 2 (keys, values) x 2 layers x 2 heads x 32 numbers x 4 bytes
    assert kv_bytes_per_token(CONFIG, "auto") == 1024
    assert kv_bytes_per_token(CONFIG, "bfloat16") == 512
    assert kv_bytes_per_token({}, "auto") is None


def test_the_cache_on_a_cpu_is_as_large_as_is_useful() -> None:
    # All 64 sequences at 2,048 tokens, and a quarter more.
    assert cpu_kv_cache_bytes(MODEL, EngineOptions(), CPU) == 1024 * 2048 * 64 * 5 // 4
    assert cpu_kv_cache_bytes(MODEL, EngineOptions(max_num_seqs=1), CPU) == 64 * 1024**2
    assert cpu_kv_cache_bytes(MODEL, EngineOptions(cpu_kv_cache_gib=1.5), CPU) == int(1.5 * GIB)


def test_the_cache_on_a_cpu_takes_at_most_half_of_what_is_left() -> None:
    large = replace(MODEL, size_bytes=10 * GIB, config={})
    left = CPU.memory_available_bytes - 10 * GIB - int(2.2 * GIB)
    assert cpu_kv_cache_bytes(large, EngineOptions(), CPU) == left // 2


def test_weights_stored_in_full_precision_and_served_in_half_take_half() -> None:
    large = replace(MODEL, size_bytes=30 * GIB)
    with pytest.raises(JobFailure, match=r"30\.0 GiB for its weights.*20\.0 GiB is free"):
        cpu_kv_cache_bytes(large, EngineOptions(), CPU)
    assert cpu_kv_cache_bytes(large, EngineOptions(dtype="bfloat16"), CPU) > 0


def test_a_cache_larger_than_memory_is_refused_with_the_numbers() -> None:
    with pytest.raises(JobFailure, match=r"100\.0 GiB for the KV cache") as refusal:
        cpu_kv_cache_bytes(MODEL, EngineOptions(cpu_kv_cache_gib=100), CPU)
    assert "cpu_kv_cache_gib" in refusal.value.hint


def test_this_machine_has_processors_and_memory() -> None:
    machine = this_machine()
    assert machine.cpus
    assert machine.memory_available_bytes > 0


def test_a_containers_limit_counts_inside_it(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 33554432 kB\n")
    assert this_machine(tmp_path, tmp_path / "none").memory_available_bytes == 32 * GIB
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    assert this_machine(tmp_path, tmp_path).memory_available_bytes == 6 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert this_machine(tmp_path, tmp_path).memory_available_bytes == 32 * GIB
    assert not this_machine(tmp_path, tmp_path).has_gpu
