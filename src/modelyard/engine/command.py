"""The one place that knows vLLM's command line: from a model, options and a machine to a command.

Everything is worked out from arguments that a test can make; nothing is started or read here. What an engine may take
of the machine's memory is worked out by `memory`, and a model that does not fit is refused with its numbers. Adapters
are not named in the command: they are loaded over HTTP when the engine stands, so that a bad one cannot keep it from
starting.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from modelyard.child_environment import child_environment
from modelyard.engine.memory import CPU_SEQUENCES, GPU_UTILIZATION, MAX_LORAS, dtype_argument, fit, lora_rank
from modelyard.engine.options import EngineOptions
from modelyard.engine.plugins import cures
from modelyard.errors import JobFailure
from modelyard.hardware import Machine, cuda_environment
from modelyard.models.chat_template import GUESSED_HINT, GUESSED_WARNING, TemplateSource
from modelyard.models.shape import AdapterFiles, ModelFiles, longest
from modelyard.processes import Command

__all__ = ["AdapterFiles", "ModelFiles", "check_length", "engine_command", "plugins", "socket_path"]

#: Adapters that an engine keeps in its host's memory: above this it reads one from disk again when its turn comes,
#: and every stream waits. Nothing is set aside for them, an adapter takes its memory when it is loaded.
HELD_ADAPTERS = 64
LOOPBACK = "127.0.0.1"


def engine_command(
    python: Path,
    model: ModelFiles,
    adapters: Sequence[AdapterFiles],
    options: EngineOptions,
    machine: Machine,
    scratch: Path,
    cache: Path,
    chat_template: str | None = None,
) -> Command:
    """Return the command of an engine that serves the model on `scratch/engine.sock`, with room for the adapters.

    `chat_template` is for a model that has none, on one line: vLLM would refuse every chat.

    Raises:
        JobFailure: `not_enough_memory` or `model_too_long`, with the numbers.
    """
    argv = [
        str(python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model.path), "--served-model-name", model.model_id,
        "--uds", str(socket_path(scratch)), "--uvicorn-log-level", "warning",
        "--dtype", dtype_argument(model, options, machine), *_option_arguments(options),
    ]  # fmt: skip
    check_length(model, options)
    rank = max((adapter.rank for adapter in adapters), default=0)
    taken = fit(model, options, machine, rank)
    if not taken.fits:
        raise JobFailure("not_enough_memory", taken.message, " ".join(taken.hints))
    argv += ["--max-model-len", str(options.max_model_len or -1)] if model.task == "generate" else []
    if model.task == "embed":
        argv += ["--runner", "pooling"]
        argv += ["--max-model-len", str(options.max_model_len)] if options.max_model_len else []
    elif model.is_mistral_format and adapters:
        raise JobFailure(
            "adapters_unsupported",
            f"The weights of {model.model_id} are in Mistral's own format, by whose names no adapter can be checked.",
            "Deploy it without adapters, or add a repository of the model in the format of transformers.",
        )
    elif options.max_loras != 0 and not model.is_mistral_format:
        slots = options.max_loras or MAX_LORAS
        argv += ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(lora_rank(options, rank))]
        # While an adapter is exchanged, its old and its new version are held.
        argv += ["--max-cpu-loras", str(max(HELD_ADAPTERS, slots, 2 * len(adapters)))]
    elif adapters:
        raise JobFailure(
            "no_room_for_adapters",
            "The options say max_loras 0, but the deployment names adapters.",
            "Leave max_loras out, or give at least as many as there are adapters.",
        )
    # Beam searches of raw prompts look at as many tokens as they need; the gateway keeps others to vLLM's bound.
    argv += ["--max-logprobs", "-1"] if model.task == "generate" else []
    argv += ["--language-model-only"] if model.is_for_text_alone else []
    # vLLM would see it from the consolidated weights, which are not fetched beside the others.
    argv += ["--tokenizer-mode", "mistral"] if model.has_mistral_tokenizer else []
    argv += ["--chat-template", chat_template] if chat_template and model.task == "generate" else []
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Only our own plugins: what else is installed must not run inside an engine unasked.
        "VLLM_PLUGINS": ",".join(plugins(machine, is_for_text_alone=model.is_for_text_alone)),
        cures.VARIABLE: str(scratch / cures.FILE),
        # The library by which workers form groups, even a worker alone, would listen where the host's name leads.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": LOOPBACK,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        # How long a start may take is the supervisor's to say: vLLM itself would give up after ten minutes.
        "VLLM_ENGINE_READY_TIMEOUT_S": "86400",
        # vLLM's own sockets lie beside ours, so that they go when the engine goes, however it goes.
        "VLLM_RPC_BASE_PATH": str(scratch),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    if machine.has_gpu:
        argv += ["--gpu-memory-utilization", str(options.gpu_memory_utilization or GPU_UTILIZATION)]
        argv += ["--tensor-parallel-size", str(options.tensor_parallel_size or 1)]
        argv += ["--max-num-seqs", str(options.max_num_seqs)] if options.max_num_seqs else []
        if taken.gpus:
            # Those with most free memory: vLLM would take the first.
            env |= cuda_environment(taken.gpus)
    else:
        argv += ["--max-num-seqs", str(options.max_num_seqs or CPU_SEQUENCES)]
        argv += ["--kv-cache-memory-bytes", str(taken.kv_cache_bytes)]
        # vLLM's own choice binds every engine on the machine to the same core.
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, machine.cpus))
        if "--enable-lora" in argv:
            # vLLM compiles no model then, but still what counts log probabilities, when they are first asked for: for
            # 14 s (measured) in which nobody gets a token. Uncompiled that takes no longer than compiled.
            env["TORCH_COMPILE_DISABLE"] = "1"
    return Command(tuple(argv), child_environment(env), cwd=scratch, scratch=scratch)


def plugins(machine: Machine, *, is_for_text_alone: bool = False) -> tuple[str, ...]:
    """Return the names of our plugins that an engine on this machine runs."""
    on_a_cpu = () if machine.has_gpu else ("modelyard_sleep",)
    vision = ("modelyard_vision",) if is_for_text_alone else ()
    return ("modelyard_amx", *on_a_cpu, "modelyard_lora", "modelyard_alone", *vision)


def socket_path(scratch: Path) -> Path:
    """Return where an engine with this private folder listens."""
    return scratch / "engine.sock"


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


class StartWarning(NamedTuple):
    """A failure code of an event, and what it says."""

    code: str
    message: str


def start_warnings(model_id: str, argv: Sequence[str], source: TemplateSource | None) -> list[StartWarning]:
    """Return what an engine with this command serves otherwise than might be expected."""
    found = []
    if "--language-model-only" in argv:
        message = f"{model_id} also sees or hears, and is served for text alone: torchvision is not installed."
        found.append(StartWarning("text_alone", message))
    if source == TemplateSource.GUESSED:
        message = f"{GUESSED_WARNING.format(model_id=model_id)} {GUESSED_HINT}"
        found.append(StartWarning("chat_template_guessed", message))
    return found
