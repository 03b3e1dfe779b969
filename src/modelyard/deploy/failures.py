"""Why an engine did not start or died, from the end of its log: a table of real errors, most telling first.

vLLM's own last words ('Engine core initialization failed. See root cause above.') say nothing; the cause stands
further up. Each row is tested against a log of that failure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from modelyard.errors import JobFailure
from modelyard.processes import Outcome


@dataclass(frozen=True)
class Row:
    """A telling line and what it means. Groups of the pattern fill the message."""

    pattern: re.Pattern[str]
    code: str
    message: str
    hint: str


def _row(pattern: str, code: str, message: str, hint: str) -> Row:
    return Row(re.compile(pattern), code, message, hint)


TABLE = (
    _row(
        r"Model architectures \[?'?(?P<name>[^\]']+)'?\]? (?:are not supported|failed to be inspected)",
        "unsupported_architecture",
        "vLLM does not support the architecture {name}.",
        "Choose a model of a supported architecture.",
    ),
    _row(
        r"model type `?'?(?P<name>[\w.-]+)'?`? but Transformers does not recognize this architecture",
        "unsupported_architecture",
        "vLLM does not support the model type {name}.",
        "Choose a model of a supported architecture.",
    ),
    _row(
        r"max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len \([^=]*=(?P<limit>[\d.]+)",
        "model_too_long",
        "max_model_len is {asked} tokens, but the model reaches {limit}.",
        "Lower max_model_len, or leave it out.",
    ),
    _row(
        r"To serve at least one request with the model's max seq len \((?P<asked>\d+)\), "
        r"\(?(?P<need>[\d.]+) GiB KV cache is needed, "
        r"which is larger than the available KV cache memory \((?P<have>[\d.]+) GiB\)",
        "not_enough_memory",
        "One request of {asked} tokens needs {need} GiB of KV cache, but {have} GiB is there.",
        "Lower max_model_len, or give the engine more memory.",
    ),
    _row(
        r"Free memory on device \S* ?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\)"
        r".*?utilization \((?P<part>[\d.]+), (?P<want>[\d.]+) GiB",
        "not_enough_memory",
        "The GPU has {free} of {total} GiB free, but the engine was to take {want} GiB.",
        "End what else uses the GPU, or lower gpu_memory_utilization (now {part}).",
    ),
    _row(
        r"Available memory on node \d+ \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on kv cache allocation is less than "
        r"requested memory for kv \((?P<asked>[\d.]+) GiB\)",
        "not_enough_memory",
        "The KV cache was to take {asked} GiB, but {free} of {total} GiB is free.",
        "Lower cpu_kv_cache_gib, max_num_seqs or max_model_len, or free memory.",
    ),
    _row(
        r"No available memory for the cache blocks",
        "not_enough_memory",
        "The weights leave no memory for the KV cache.",
        "Raise gpu_memory_utilization, lower max_model_len, or choose a smaller or quantised model.",
    ),
    _row(
        r"CUDA out of memory\. Tried to allocate (?P<asked>[\d.]+ [KMG]iB).*?of which (?P<free>[\d.]+ [KMG]iB) is free",
        "not_enough_memory",
        "The GPU has {free} free, and the engine needed {asked} more.",
        "Lower gpu_memory_utilization, max_num_seqs or max_model_len, or choose a smaller or quantised model.",
    ),
    _row(
        r"(?:DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|MemoryError)",
        "not_enough_memory",
        "The machine ran out of memory while the engine loaded the model.",
        "Lower cpu_kv_cache_gib or max_model_len, free memory, or choose a smaller model.",
    ),
    _row(
        r"(?:torch\.)?cuda\.is_available\(\).*False|No CUDA GPUs are available|Found no NVIDIA driver",
        "no_gpu",
        "The engine found no usable GPU.",
        "Check the driver with nvidia-smi, or install the engine for CPUs.",
    ),
    _row(
        r"(?P<name>\w+) does not support LoRA",
        "adapters_unsupported",
        "vLLM cannot serve adapters with the architecture {name}.",
        'Deploy with {{"options": {{"max_loras": 0}}}}.',
    ),
    _row(
        r"LoRA rank (?P<rank>\d+) is greater than max_lora_rank (?P<limit>\d+)",
        "adapter_rank_too_high",
        "An adapter has rank {rank}, but the engine takes up to {limit}.",
        "Raise max_lora_rank.",
    ),
    _row(
        r"(?:Error while deserializing header|SafetensorError)(?::? ?(?P<why>[^\n]{0,120}))",
        "broken_weights",
        "A weight file cannot be read: {why}",
        "Delete the model and add it again.",
    ),
    _row(
        r"No module named '?vllm'?",
        "engine_not_installed",
        "vLLM is not installed for the Python that runs engines.",
        "Install it (make demo does), or set MODELYARD_ENGINE_PYTHON.",
    ),
    _row(
        r"Can't load tokenizer|Couldn't instantiate the backend tokenizer|Unable to load vocabulary",
        "broken_tokenizer",
        "The model's tokenizer cannot be loaded.",
        "Check that the repository has tokenizer.json; delete the model and add it again if files are missing.",
    ),
    _row(
        r"error: unrecognized arguments: (?P<arguments>[^\n]+)",
        "engine_version",
        "This vLLM does not know the arguments {arguments}.",
        "Install the vLLM version that the requirements name.",
    ),
)
#: Lines of an unknown failure that are worth showing.
TELLING = re.compile(
    r"^(?:\(.*?\) )?(?:ERROR \S+ \S+ \S+ )?(?P<line>\w*(?:\.\w+)*(?:Error|Exception|Interrupt|Killed)\b.*)$"
)
NOISE = ("Engine core initialization failed", "EngineDeadError", "See root cause above")


def explain(log: str, outcome: Outcome | None) -> JobFailure:
    """Return why the engine that wrote this log failed; `outcome` is None if it still ran."""
    for row in TABLE:
        found = row.pattern.search(log)
        if found:
            groups = {name: (value or "").strip().removesuffix(".0") for name, value in found.groupdict().items()}
            return JobFailure(row.code, row.message.format(**groups), row.hint.format(**groups))
    line = telling_line(log)
    if outcome is not None and outcome.signal == 9 and not line:
        return JobFailure(
            "engine_killed",
            "The engine was killed by SIGKILL, most often by the system because memory ran out.",
            "Look at the kernel's log (dmesg), and lower cpu_kv_cache_gib, max_num_seqs or max_model_len.",
        )
    ended = f"ended with {outcome.describe()}" if outcome is not None else "did not get ready"
    message = f"The engine {ended}" + (f": {line}" if line else ".")
    return JobFailure("engine_failed", message, "GET /api/v1/jobs/<id>/log has all that it wrote.")


def telling_line(log: str) -> str:
    """Return the line of an unknown failure that says most: the last error that is not vLLM's farewell."""
    found = ""
    for line in log.splitlines():
        match = TELLING.match(line.strip())
        if match and not any(noise in line for noise in NOISE):
            found = match["line"]
    return found[:300]
