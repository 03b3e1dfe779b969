"""vLLM's command, worked out from a model, options and a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from modelyard.engine.command import AdapterFiles, ModelFiles, engine_command
from modelyard.engine.memory import fit
from modelyard.engine.options import EngineOptions
from modelyard.errors import JobFailure
from modelyard.hardware import GIB, Gpu, Machine
from tests.deploy.yard import CONFIG, make_settings

CPU = Machine(has_gpu=False, cpus=(0, 1), memory_available_bytes=20 * GIB)
GPU = replace(CPU, has_gpu=True)
MODEL = ModelFiles("org/tiny", Path("/store/tiny"), 1_000_000, CONFIG, "generate")
SCRATCH, CACHE = Path("/run/x"), Path("/data/cache")


def argv(
    model: ModelFiles = MODEL, machine: Machine = CPU, adapters: Sequence[AdapterFiles] = (), **options: object
) -> list[str]:
    wanted = EngineOptions.model_validate(options)
    return list(engine_command(Path("/python"), model, adapters, wanted, machine, SCRATCH, CACHE).argv)


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
    assert command.env["VLLM_PLUGINS"] == "modelyard_amx,modelyard_lora,modelyard_alone"
    on_cpu = engine_command(Path("/python"), MODEL, [], EngineOptions(), CPU, SCRATCH, CACHE)
    assert on_cpu.env["VLLM_PLUGINS"] == "modelyard_amx,modelyard_sleep,modelyard_lora,modelyard_alone"
    assert command.env["MODELYARD_ENGINE_CURES"] == str(SCRATCH / "cures.jsonl")
    assert {command.env[f"{library}_SOCKET_IFNAME"] for library in ("GLOO", "NCCL")} == {"lo"}
    assert command.env["HF_HUB_OFFLINE"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in command.env


def test_mistrals_tokenizer_is_told_where_its_weights_are_not_there_to_tell_it() -> None:
    assert "--tokenizer-mode" not in argv()
    assert value(argv(replace(MODEL, has_mistral_tokenizer=True)), "--tokenizer-mode") == "mistral"


def test_a_model_that_sees_is_served_for_text_alone_where_its_package_is_missing() -> None:
    command = engine_command(
        Path("/python"), replace(MODEL, is_for_text_alone=True), [], EngineOptions(), CPU, SCRATCH, CACHE
    )
    assert "--language-model-only" in command.argv
    assert command.env["VLLM_PLUGINS"].endswith(",modelyard_vision")
    assert "--language-model-only" not in argv()


def test_a_model_in_mistrals_own_format_has_no_adapters() -> None:
    model = replace(MODEL, is_mistral_format=True)
    assert "--enable-lora" not in argv(model)
    with pytest.raises(JobFailure, match="Mistral's own format") as caught:
        argv(model, adapters=[AdapterFiles("a", Path("/a"), 8)])
    assert caught.value.code == "adapters_unsupported"


def test_a_model_without_a_chat_template_is_given_one() -> None:
    def arguments(model: ModelFiles, template: str | None) -> tuple[str, ...]:
        return engine_command(Path("/python"), model, [], EngineOptions(), CPU, SCRATCH, CACHE, template).argv

    assert value(list(arguments(MODEL, "{{ messages }}")), "--chat-template") == "{{ messages }}"
    assert "--chat-template" not in arguments(MODEL, None)
    assert "--chat-template" not in arguments(replace(MODEL, task="embed"), "{{ messages }}")


def test_vllm_does_not_give_up_a_start_before_the_supervisor_does() -> None:
    command = engine_command(Path("/python"), MODEL, [], EngineOptions(), CPU, SCRATCH, CACHE)
    assert int(command.env["VLLM_ENGINE_READY_TIMEOUT_S"]) >= 86400


def test_a_generative_engine_starts_with_room_for_adapters() -> None:
    assert value(argv(), "--max-loras") == "4"
    assert value(argv(max_loras=2, max_lora_rank=16), "--max-lora-rank") == "16"
    assert "--enable-lora" not in argv(max_loras=0)


def test_an_engine_whose_model_is_not_compiled_compiles_nothing_while_it_serves() -> None:
    def compiles(machine: Machine, **options: object) -> bool:
        wanted = EngineOptions.model_validate(options)
        env = engine_command(Path("/python"), MODEL, [], wanted, machine, SCRATCH, CACHE).env
        return "TORCH_COMPILE_DISABLE" not in env

    assert not compiles(CPU)
    assert compiles(CPU, max_loras=0)
    assert compiles(GPU)


def test_an_embedding_engine_pools_in_full_precision_on_a_cpu() -> None:
    embedding = replace(MODEL, task="embed")
    arguments = argv(embedding)
    assert (value(arguments, "--runner"), value(arguments, "--dtype")) == ("pooling", "float32")
    assert "--enable-lora" not in arguments
    assert value(argv(embedding, GPU), "--dtype") == "auto"
    assert value(argv(embedding, dtype="bfloat16"), "--dtype") == "bfloat16"


def test_beam_searches_may_look_at_every_token_of_what_generates() -> None:
    assert value(argv(), "--max-logprobs") == "-1"
    assert "--max-logprobs" not in argv(replace(MODEL, task="embed"))


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


def test_adapters_are_left_to_be_loaded_when_the_engine_stands() -> None:
    adapters = [AdapterFiles("org/poems", Path("/store/poems"), rank=16)]
    assert not any("poems" in argument for argument in argv(adapters=adapters))
    with pytest.raises(JobFailure, match="max_loras 0"):
        argv(adapters=adapters, max_loras=0)


def test_the_highest_rank_is_raised_to_what_the_adapters_need() -> None:
    adapters = [AdapterFiles("org/poems", Path("/store/poems"), rank=100), AdapterFiles("org/b", Path("/b"), rank=8)]
    assert value(argv(adapters=adapters), "--max-lora-rank") == "128"
    assert value(argv(adapters=adapters, max_lora_rank=256), "--max-lora-rank") == "256"
    assert value(argv(adapters=adapters[1:], max_lora_rank=16), "--max-lora-rank") == "16"


def test_more_adapters_are_held_than_one_batch_has() -> None:
    assert value(argv(max_loras=2), "--max-cpu-loras") == "64"
    many = [AdapterFiles(f"org/{number}", Path(f"/{number}")) for number in range(50)]
    assert value(argv(adapters=many), "--max-cpu-loras") == "100"


def test_a_cpu_engine_gets_the_cache_that_was_worked_out() -> None:
    worked_out = fit(MODEL, EngineOptions(max_num_seqs=8), CPU)
    assert value(argv(max_num_seqs=8), "--kv-cache-memory-bytes") == str(worked_out.kv_cache_bytes)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers_and_what_would_help() -> None:
    with pytest.raises(JobFailure, match=r"100\.0 GiB for the KV cache.*20\.0 GiB is free") as refusal:
        argv(cpu_kv_cache_gib=100)
    assert refusal.value.code == "not_enough_memory"
    assert "cpu_kv_cache_gib" in refusal.value.hint


def test_the_gpus_with_most_free_memory_are_taken() -> None:
    gpus = tuple(Gpu(index, "H100", 80 * GIB, free * GIB) for index, free in enumerate([10, 79, 60, 78]))
    machine = replace(GPU, gpus=gpus)
    command = engine_command(Path("/p"), MODEL, [], EngineOptions(tensor_parallel_size=2), machine, SCRATCH, CACHE)
    assert command.env["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert command.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    with pytest.raises(JobFailure, match=r"GPU 2 .* 60\.0 GiB of 80\.0 GiB free"):
        argv(machine=machine, tensor_parallel_size=3)
