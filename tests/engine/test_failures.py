"""Causes are found in what real vLLM 0.32.0 wrote as it failed; `logs` has the last lines of each such run."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.engine.failure_table import TABLE
from modelyard.engine.failures import explain, telling_line
from modelyard.processes import Outcome

LOGS = Path(__file__).with_name("logs")
EXITED = Outcome(exit_code=1, signal=None)
RECORDED = [
    ("unknown_model_type", "unsupported_architecture", ["frobnicator"]),
    ("unknown_architecture", "unsupported_architecture", ["FrobnicatorForCausalLM"]),
    ("longer_than_the_model", "model_too_long", ["100000", "2048"]),
    ("cache_too_small", "not_enough_memory", ["2048 tokens"]),
    ("cache_larger_than_memory", "not_enough_memory", ["372.53 GiB", "9.55 of 11.09 GiB"]),
    ("truncated_weights", "broken_weights", ["incomplete metadata"]),
    ("no_tokenizer", "broken_tokenizer", ["tokenizer"]),
    ("unknown_argument", "engine_version", ["--frobnicate"]),
    ("rank_too_high", "adapter_rank_too_high", ["64", "16"]),
    ("no_lora_here", "adapters_unsupported", ["GPT2LMHeadModel", "max_loras"]),
    ("no_weights", "broken_weights", ["no weights"]),
    ("shape_mismatch", "broken_weights", ["other sizes"]),
    ("broken_tokenizer", "broken_tokenizer", ["tokenizer"]),
    ("remote_code", "remote_code", ["code of its own"]),
    ("unknown_quantisation", "quantisation_unsupported", ["frobnicate"]),
    ("dtype_unsupported", "dtype_unsupported", ["gemma2", "float16", "bfloat16 or float32"]),
    ("heads_not_divisible", "bad_tensor_parallel_size", ["2 attention heads", "3 processes"]),
    ("unknown_tool_parser", "unknown_tool_parser", ["frobnicate", "hermes"]),
    ("unknown_reasoning_parser", "unknown_reasoning_parser", ["frobnicate", "deepseek_r1"]),
    ("address_in_use", "address_in_use", ["socket"]),
    ("allocation_refused", "not_enough_memory", ["out of memory"]),
    ("shared_memory_full", "shared_memory_full", ["160 MiB", "2 MiB", "--shm-size"]),
    ("disk_full", "disk_full", ["disk was full"]),
    # SIGKILL to vLLM's worker, as the system does it: vLLM itself says nothing of a signal.
    ("worker_killed", "engine_killed", ["memory ran out"]),
    ("worker_killed_in_service", "engine_killed", ["memory ran out"]),
]
# Of rows for machines that could not be had, the line as vLLM's and PyTorch's sources write it.
LINES = {
    "gpu_taken": (
        "ValueError: Free memory on device cuda:0 (3.22/4.0 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 3.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "not_enough_memory",
        ["3.22", "3.6 GiB", "0.9"],
    ),
    "no_torchvision": (
        "(APIServer pid=1) ERROR [registry.py:1120] Error in inspecting model architecture 'SeesForCausalLM'\n"
        "(APIServer pid=1) ERROR [registry.py:1120] ModuleNotFoundError: No module named 'torchvision'\n"
        "  Value error, Model architectures ['SeesForCausalLM'] failed to be inspected. Please check the logs.",
        "package_missing",
        ["torchvision", "not installed", "cannot answer text either"],
    ),
    "no_submodule_of_torchvision": (
        "ModuleNotFoundError: No module named 'torchvision.transforms'\n"
        "Value error, Model architectures ['SeesForConditionalGeneration'] failed to be inspected.",
        "package_missing",
        ["torchvision"],
    ),
    "no_other_package": (
        "ModuleNotFoundError: No module named 'timm.layers'\n"
        "Value error, Model architectures ['OddForCausalLM'] failed to be inspected. Please check the logs.",
        "package_missing",
        ["timm.layers", "not installed"],
    ),
    "not_inspected_for_another_reason": (
        "ImportError: cannot import name 'x' from 'y'\n"
        "Value error, Model architectures ['OddForCausalLM'] failed to be inspected. Please check the logs.",
        "architecture_not_loaded",
        ["OddForCausalLM"],
    ),
    "a_missing_package_that_did_not_matter": (
        "WARNING No module named 'torchvision'\nRuntimeError: No CUDA GPUs are available",
        "no_gpu",
        ["GPU"],
    ),
    "gpu_full": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
        "23.64 GiB of which 1.10 GiB is free. Including non-PyTorch memory, this process has 22.5 GiB memory in use.",
        "not_enough_memory",
        ["2.00 GiB", "1.10 GiB"],
    ),
    "no_cache_blocks": (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
        "not_enough_memory",
        ["KV cache"],
    ),
    "cpu_memory": (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)",
        "not_enough_memory",
        ["out of memory"],
    ),
    "no_gpu": ("RuntimeError: No CUDA GPUs are available", "no_gpu", ["GPU"]),
    "no_device": (
        "RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG` to "
        "turn on verbose logging to help debug the issue.",
        "no_gpu",
        ["GPU"],
    ),
    "old_driver": (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
        "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx",
        "gpu_driver_too_old",
        ["11040"],
    ),
    "old_gpu_and_bfloat16": (
        "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has "
        "compute capability 7.5. You can use float16 instead by explicitly setting the `dtype` flag in CLI, for "
        "example: --dtype=half.",
        "dtype_unsupported",
        ["Tesla T4", "float16"],
    ),
    "old_gpu_and_quantisation": (
        "ValueError: The quantization method fp8 is not supported for the current GPU. Minimum capability: 75. "
        "Current capability: 70.",
        "quantisation_unsupported",
        ["fp8", "75", "70"],
    ),
    "quantisation_of_other_platform": (
        "ValueError: gptq_marlin quantization is currently not supported in cpu.",
        "quantisation_unsupported",
        ["gptq_marlin"],
    ),
    "quantisation_and_dtype": (
        "ValueError: torch.bfloat16 is not supported for quantization method awq. Supported dtypes: [torch.float16]",
        "dtype_unsupported",
        ["awq", "bfloat16", "one of: float16"],
    ),
    "sampler": (
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try "
        "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
        "not_enough_memory",
        ["256 requests", "max_num_seqs"],
    ),
    "driver_and_cuda": (
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
        "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized",
        "gpu_driver_broken",
        ["Error 802: system not yet initialized", "fabricmanager"],
    ),
    "nccl": (
        "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)",
        "gpus_cannot_talk",
        ["unhandled system error", "--ipc host"],
    ),
    "no_kernels": (
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
        "gpu_unsupported",
        ["GPU"],
    ),
    "too_few_gpus": (
        "ValueError: World size (4) is larger than the number of available GPUs (2) in this node.",
        "too_few_gpus",
        ["4 GPUs", "2 or less"],
    ),
    "cpu_memory_at_startup": (
        "ValueError: Available memory on node 0 (3.1/22.5 GiB) on startup is less than desired CPU memory utilization "
        "(0.9, 20.3 GiB).",
        "not_enough_memory",
        ["3.1 of 22.5 GiB"],
    ),
    "weights_missing": (
        "ValueError: Following weights were not initialized from checkpoint: {'model.norm.weight', 'lm_head.weight'}",
        "broken_weights",
        ["model.norm.weight"],
    ),
    "slow_start": (
        "TimeoutError: Timed out waiting for engine core processes to start. This is often caused by slow weight "
        "loading for large models. Waited 600s (configured by VLLM_ENGINE_READY_TIMEOUT_S).",
        "engine_never_ready",
        ["600 s"],
    ),
    "bus_error": ("Fatal Python error: Bus error", "shared_memory_full", ["/dev/shm"]),
    "illegal_instruction": (
        "Worker proc VllmWorker-0 died unexpectedly (exit code: -4), shutting down executor.",
        "processor_unsupported",
        ["instruction"],
    ),
    "worker_killed": (
        "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.",
        "engine_killed",
        ["memory ran out"],
    ),
    "no_vllm": (
        "/usr/bin/python3: Error while finding module specification for 'vllm.entrypoints.openai.api_server' "
        "(ModuleNotFoundError: No module named 'vllm')",
        "engine_not_installed",
        ["vLLM is not installed"],
    ),
}


@pytest.mark.parametrize(("log", "code", "told"), RECORDED)
def test_a_real_log_is_explained_and_its_telling_lines_are_shown(log: str, code: str, told: list[str]) -> None:
    failure = explain((LOGS / f"{log}.txt").read_text("utf-8"), EXITED)
    assert failure.code == code
    assert all(part in failure.message + failure.hint for part in told), failure.message
    assert failure.hint
    assert 1 <= len(failure.evidence) <= 20
    shown = "\n".join(failure.evidence)
    assert "Engine core initialization failed" not in shown
    assert "site-packages" not in shown


def test_every_recorded_log_is_tested() -> None:
    assert {file.stem for file in LOGS.iterdir()} == {log for log, _, _ in RECORDED}


@pytest.mark.parametrize("name", LINES)
def test_a_known_line_is_explained(name: str) -> None:
    line, code, told = LINES[name]
    failure = explain(f"INFO starting\n(EngineCore pid=7) ERROR 11-20 21:46:07 [core.py:1510] {line}\n", EXITED)
    assert failure.code == code
    assert all(part in failure.message + failure.hint for part in told), failure.message


def test_every_row_of_the_table_has_an_example() -> None:
    examples = [file.read_text("utf-8") for file in LOGS.iterdir()] + [line for line, _, _ in LINES.values()]
    unproven = [row.pattern.pattern for row in TABLE if not any(row.pattern.search(text) for text in examples)]
    assert unproven == []


def test_an_unknown_failure_shows_its_telling_line_and_not_the_farewell() -> None:
    log = (
        "INFO 11-20 21:46:07 [launcher.py:1] fine\n"
        "(EngineCore pid=2801) ERROR 11-20 21:46:07 [core.py:1510] Traceback (most recent call last):\n"
        '(EngineCore pid=2801) ERROR 11-20 21:46:07 [core.py:1510]   File "/srv/lib/python3.11/site-packages/'
        'vllm/a.py", line 7, in rise\n'
        "(EngineCore pid=2801) ERROR 11-20 21:46:07 [core.py:1510]     raise ValueError(moon)\n"
        "(EngineCore pid=2801) ERROR 11-20 21:46:07 [core.py:1510] ValueError: the moon is full\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    )
    failure = explain(log, EXITED)
    assert failure.code == "engine_failed"
    assert failure.message == "The engine ended with exit code 1: ValueError: the moon is full"
    assert failure.evidence == (
        'File "vllm/a.py", line 7, in rise',
        "  raise ValueError(moon)",
        "ValueError: the moon is full",
    )


def test_a_failure_that_each_process_repeats_is_shown_once() -> None:
    line = "ValueError: the moon is full"
    log = "".join(f"(Worker_TP{rank} pid={rank}) ERROR 11-20 21:46:07 [a.py:1] {line}\n" for rank in range(8))
    assert explain(log, EXITED).evidence == (line,)


def test_a_secret_in_a_log_is_not_shown() -> None:
    failure = explain("OSError: cannot read with token hf_AbCdEfGhIjKlMnOp\n", EXITED)
    assert "hf_AbC" not in failure.message + "".join(failure.evidence)


def test_a_silent_death_by_sigkill_points_to_memory_and_shows_the_last_words() -> None:
    failure = explain("INFO 11-20 21:46:07 [a.py:1] loading\n", Outcome(exit_code=None, signal=9))
    assert (failure.code, failure.evidence) == ("engine_killed", ("loading",))


def test_a_silent_death_says_how_it_ended() -> None:
    failure = explain("", Outcome(exit_code=None, signal=4))
    assert "SIGILL" in failure.message
    assert failure.evidence == ()


def test_no_error_has_no_telling_line() -> None:
    assert telling_line("INFO all is well\nWARNING nearly\n") == ""
