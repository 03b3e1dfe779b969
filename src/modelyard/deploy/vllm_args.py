"""The one place that knows vLLM's command line: from a model, options and a machine to a command.

Everything is worked out from arguments that a test can make; nothing is started or read here. Memory on a CPU is
shared out before the start, with the numbers in the refusal: vLLM itself would be killed by the system instead.
On a GPU vLLM measures by itself, and `failures` explains what it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.deploy.machine import GIB, Machine
from modelyard.deploy.schemas import EngineOptions
from modelyard.errors import JobFailure
from modelyard.processes import Command, child_environment

# Measured for vLLM 0.32.0 on a CPU: three processes, before any weight and cache.
CPU_PROCESSES_BYTES = int(2.2 * GIB)
CPU_KV_DEFAULT_BYTES = 4 * GIB
CPU_KV_LEAST_BYTES = 64 * 1024**2
CPU_SEQUENCES = 64
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: its folder, the bytes of its files, its `config.json`, and generate or embed."""

    model_id: str
    path: Path
    size_bytes: int
    config: Mapping[str, Any]
    task: str


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA adapter on disk."""

    adapter_id: str
    path: Path


def engine_command(
    python: Path,
    model: ModelFiles,
    adapters: Sequence[AdapterFiles],
    options: EngineOptions,
    machine: Machine,
    scratch: Path,
    cache: Path,
) -> Command:
    """Return the command of an engine that serves the model on `scratch/engine.sock`.

    Raises:
        JobFailure: `not_enough_memory` or `model_too_long`, with the numbers.
    """
    argv = [
        str(python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model.path), "--served-model-name", model.model_id,
        "--uds", str(socket_path(scratch)), "--uvicorn-log-level", "warning",
        "--dtype", _dtype_argument(model, options, machine), *_option_arguments(options),
    ]  # fmt: skip
    check_length(model, options)
    argv += ["--max-model-len", str(options.max_model_len or -1)] if model.task == "generate" else []
    if model.task == "embed":
        argv += ["--runner", "pooling"]
        argv += ["--max-model-len", str(options.max_model_len)] if options.max_model_len else []
    elif options.max_loras != 0:
        argv += ["--enable-lora", "--max-loras", str(options.max_loras or 4)]
        argv += ["--max-lora-rank", str(options.max_lora_rank or 64)]
        if adapters:
            argv += ["--lora-modules", *(_lora_module(adapter) for adapter in adapters)]
    elif adapters:
        raise JobFailure(
            "no_room_for_adapters",
            "The options say max_loras 0, but the deployment names adapters.",
            "Leave max_loras out, or give at least as many as there are adapters.",
        )
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Only our own plugins: what else is installed must not run inside an engine unasked.
        "VLLM_PLUGINS": "modelyard_amx" if machine.has_gpu else "modelyard_amx,modelyard_sleep",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        # vLLM's own sockets lie beside ours, so that they go when the engine goes, however it goes.
        "VLLM_RPC_BASE_PATH": str(scratch),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    if machine.has_gpu:
        argv += ["--gpu-memory-utilization", str(options.gpu_memory_utilization or 0.9)]
        argv += ["--tensor-parallel-size", str(options.tensor_parallel_size or 1)]
        argv += ["--max-num-seqs", str(options.max_num_seqs)] if options.max_num_seqs else []
    else:
        argv += ["--max-num-seqs", str(options.max_num_seqs or CPU_SEQUENCES)]
        argv += ["--kv-cache-memory-bytes", str(cpu_kv_cache_bytes(model, options, machine))]
        # vLLM's own choice binds every engine on the machine to the same core.
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, machine.cpus))
    return Command(tuple(argv), child_environment(env), cwd=scratch, scratch=scratch)


def socket_path(scratch: Path) -> Path:
    """Return where an engine with this private folder listens."""
    return scratch / "engine.sock"


def _dtype_argument(model: ModelFiles, options: EngineOptions, machine: Machine) -> str:
    dtype = options.dtype or "auto"
    # vLLM's auto rounds a float32 model to 16 bits; vectors on a CPU then differ from what their model was made for.
    return "float32" if dtype == "auto" and model.task == "embed" and not machine.has_gpu else dtype


def _option_arguments(options: EngineOptions) -> list[str]:
    argv = []
    if options.enforce_eager:
        argv.append("--enforce-eager")
    if options.enable_prefix_caching is not None:
        argv.append("--enable-prefix-caching" if options.enable_prefix_caching else "--no-enable-prefix-caching")
    if options.kv_cache_dtype:
        argv += ["--kv-cache-dtype", options.kv_cache_dtype]
    if options.seed is not None:
        argv += ["--seed", str(options.seed)]
    if options.tool_call_parser:
        argv += ["--enable-auto-tool-choice", "--tool-call-parser", options.tool_call_parser]
    if options.reasoning_parser:
        argv += ["--reasoning-parser", options.reasoning_parser]
    return argv


def _lora_module(adapter: AdapterFiles) -> str:
    return json.dumps({"name": adapter.adapter_id, "path": str(adapter.path)})


def longest(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a model's configuration allows, or None if it does not say."""
    lengths = [config.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length")]
    known = [length for length in lengths if isinstance(length, int) and length > 0]
    return max(known) if known else None


def check_length(model: ModelFiles, options: EngineOptions) -> None:
    """Refuse a length that the model's positions do not reach.

    Raises:
        JobFailure: `model_too_long`, with both numbers.
    """
    limit = longest(model.config)
    if options.max_model_len and limit and options.max_model_len > limit:
        raise JobFailure(
            "model_too_long",
            f"max_model_len is {options.max_model_len} tokens, but {model.model_id} reaches {limit}.",
            f"Set max_model_len to {limit} or less, or leave it out.",
        )


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int | None:
    """Return the bytes that one token takes in the KV cache, or None if the configuration does not tell."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int) and heads):
        return None
    size = DTYPE_BYTES.get(_dtype(config, dtype), 2)
    return (
        2 * layers * (config.get("num_key_value_heads") or heads) * (config.get("head_dim") or hidden // heads) * size
    )


def _dtype(config: Mapping[str, Any], dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def cpu_kv_cache_bytes(model: ModelFiles, options: EngineOptions, machine: Machine) -> int:
    """Return the memory for the KV cache on a CPU: what was asked for, or what is useful and free.

    Useful is as much as all sequences at full length take; free is half of what the processes and weights leave.

    Raises:
        JobFailure: `not_enough_memory`, with the numbers.
    """
    dtype = options.dtype or "auto"
    stored = str(model.config.get("dtype") or model.config.get("torch_dtype") or "float32")
    weights = model.size_bytes * DTYPE_BYTES.get(_dtype(model.config, dtype), 2) // DTYPE_BYTES.get(stored, 4)
    free = machine.memory_available_bytes - CPU_PROCESSES_BYTES - weights
    asked = int(options.cpu_kv_cache_gib * GIB) if options.cpu_kv_cache_gib else None
    if free < (asked or CPU_KV_LEAST_BYTES):
        raise JobFailure(
            "not_enough_memory",
            f"{model.model_id} needs {_gib(weights)} for its weights, {_gib(CPU_PROCESSES_BYTES)} for the engine and "
            f"{_gib(asked or CPU_KV_LEAST_BYTES)} for the KV cache, "
            f"but {_gib(machine.memory_available_bytes)} is free.",
            "Free memory (other deployments hold some), choose a smaller or quantised model"
            + (", or lower cpu_kv_cache_gib." if asked else "."),
        )
    if asked:
        return asked
    per_token = kv_bytes_per_token(model.config, dtype)
    length = options.max_model_len or longest(model.config)
    useful = CPU_KV_DEFAULT_BYTES
    if per_token and length:
        # A quarter more, for blocks that are filled in part.
        useful = min(useful, per_token * length * (options.max_num_seqs or CPU_SEQUENCES) * 5 // 4)
    return max(CPU_KV_LEAST_BYTES, min(useful, free // 2))


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
