"""Causes are found in what real vLLM 0.32.0 wrote as it failed; `logs` has the last lines of each such run."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.deploy.failures import TABLE, explain, telling_line
from modelyard.processes import Outcome

LOGS = Path(__file__).with_name("logs")
EXITED = Outcome(exit_code=1, signal=None)
# Of rows for machines that could not be had, the line as vLLM's and PyTorch's sources write it.
LINES = {
    "gpu_taken": (
        "ValueError: Free memory on device cuda:0 (3.22/4.0 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 3.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "not_enough_memory",
        ["3.22", "3.6 GiB", "0.9"],
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
    "no_lora": (
        "ValueError: WhisperForConditionalGeneration does not support LoRA yet.",
        "adapters_unsupported",
        ["WhisperForConditionalGeneration"],
    ),
    "no_vllm": (
        "/usr/bin/python3: Error while finding module specification for 'vllm.entrypoints.openai.api_server' "
        "(ModuleNotFoundError: No module named 'vllm')",
        "engine_not_installed",
        ["vLLM is not installed"],
    ),
}


@pytest.mark.parametrize(
    ("log", "code", "told"),
    [
        ("unknown_model_type", "unsupported_architecture", ["frobnicator"]),
        ("unknown_architecture", "unsupported_architecture", ["FrobnicatorForCausalLM"]),
        ("longer_than_the_model", "model_too_long", ["100000", "2048"]),
        ("cache_too_small", "not_enough_memory", ["2048 tokens"]),
        ("cache_larger_than_memory", "not_enough_memory", ["372.53 GiB", "9.55 of 11.09 GiB"]),
        ("truncated_weights", "broken_weights", ["incomplete metadata"]),
        ("no_tokenizer", "broken_tokenizer", ["tokenizer"]),
        ("unknown_argument", "engine_version", ["--frobnicate"]),
        ("rank_too_high", "adapter_rank_too_high", ["64", "16"]),
    ],
)
def test_a_real_log_is_explained(log: str, code: str, told: list[str]) -> None:
    failure = explain((LOGS / f"{log}.txt").read_text("utf-8"), EXITED)
    assert failure.code == code
    assert all(part in failure.message + failure.hint for part in told), failure.message
    assert failure.hint


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
        "(EngineCore pid=2801) ERROR 11-20 21:46:07 [core.py:1510] ValueError: the moon is full\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    )
    failure = explain(log, EXITED)
    assert failure.code == "engine_failed"
    assert failure.message == "The engine ended with exit code 1: ValueError: the moon is full"


def test_a_silent_death_by_sigkill_points_to_memory() -> None:
    assert explain("", Outcome(exit_code=None, signal=9)).code == "engine_killed"


def test_a_silent_death_says_how_it_ended() -> None:
    assert "SIGILL" in explain("", Outcome(exit_code=None, signal=4)).message


def test_no_error_has_no_telling_line() -> None:
    assert telling_line("INFO all is well\nWARNING nearly\n") == ""
