"""The table of real errors of engines: what a telling line looks like, and what it means, most telling first.

Each row is tested against a log of that failure, or, where no machine could be had to provoke it, against the line as
the sources write it. Written for vLLM 0.32 and the PyTorch that it runs on; `failures.explain` reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A telling line and what it means. Groups of the pattern fill the message. The log must hold `needs`, too."""

    pattern: re.Pattern[str]
    code: str
    message: str
    hint: str
    needs: str = ""


def _row(pattern: str, code: str, message: str, hint: str, needs: str = "") -> Row:
    return Row(re.compile(pattern), code, message, hint, needs)


KILLED_HINT = "Look at the kernel's log (dmesg), and lower cpu_kv_cache_gib, max_num_seqs or max_model_len."
#: vLLM imports an architecture's module before anything else, and says so when that fails.
NOT_INSPECTED = "failed to be inspected"
TABLE = (
    _row(
        r"No module named '(?P<package>torchvision|torchaudio|torchcodec)\b",
        "package_missing",
        "The model also sees or hears, and vLLM's code for that imports {package}, which is not installed where "
        "engines run; without it the model cannot answer text either.",
        "The install for CPUs leaves {package} out, since its usual build needs CUDA. Serve the model on a GPU, or "
        "install the CPU build that fits the torch there (from PyTorch's own index of CPU builds), or take a model for "
        "text alone.",
        needs=NOT_INSPECTED,
    ),
    _row(
        r"No module named '(?P<package>[\w.]{1,100})'",
        "package_missing",
        "vLLM's code for this architecture imports {package}, which is not installed where engines run.",
        "Install {package} for the Python that runs engines (MODELYARD_ENGINE_PYTHON), and deploy again.",
        needs=NOT_INSPECTED,
    ),
    _row(
        r"Model architectures \[?'?(?P<name>[^\]']+)'?\]? are not supported",
        "unsupported_architecture",
        "vLLM does not support the architecture {name}.",
        "Choose a model of a supported architecture.",
    ),
    _row(
        r"Model architectures \[?'?(?P<name>[^\]']+)'?\]? failed to be inspected",
        "architecture_not_loaded",
        "vLLM knows the architecture {name}, and could not load its own code for it.",
        "The evidence says why; GET /api/v1/jobs/<id>/log has all of it.",
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
        r"CUDA out of memory occurred when warming up (?:sampler|pooler \(.*?\)) with (?P<requests>\d+) dummy",
        "not_enough_memory",
        "The GPU has no memory left for {requests} requests at the same time.",
        "Lower max_num_seqs, or gpu_memory_utilization.",
    ),
    _row(
        r"CUDA out of memory\. Tried to allocate (?P<asked>[\d.]+ [KMG]iB).*?of which (?P<free>[\d.]+ [KMG]iB) is free",
        "not_enough_memory",
        "The GPU has {free} free, and the engine needed {asked} more.",
        "Lower gpu_memory_utilization, max_num_seqs or max_model_len, or choose a smaller or quantised model.",
    ),
    _row(
        r"Available memory on node \d+ \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less than",
        "not_enough_memory",
        "{free} of {total} GiB is free, which is less than the engine was to take.",
        "Free memory (other deployments hold some), or set cpu_kv_cache_gib.",
    ),
    _row(
        r"(?:DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|MemoryError)",
        "not_enough_memory",
        "The machine ran out of memory while the engine loaded the model.",
        "Lower cpu_kv_cache_gib or max_model_len, free memory, or choose a smaller model.",
    ),
    _row(
        r"(?:torch\.)?cuda\.is_available\(\).*False|No CUDA GPUs are available|Found no NVIDIA driver"
        r"|Failed to infer device type|libcuda\.so\.1: cannot open shared object file",
        "no_gpu",
        "The engine found no usable GPU.",
        "Check the driver with nvidia-smi, or install the engine for CPUs.",
    ),
    _row(
        r"NVIDIA driver on your system is too old \(found version (?P<version>\w+)\)",
        "gpu_driver_too_old",
        "The NVIDIA driver is too old for this engine (it knows CUDA up to {version}).",
        "Update the driver.",
    ),
    _row(
        r"(?P<error>Error 80[0-9]: [\w /]+)",
        "gpu_driver_broken",
        "CUDA cannot use the GPUs: {error}.",
        "Driver and CUDA do not fit one another, or a service of the driver does not run: see nvidia-smi, and for "
        "error 802 nvidia-fabricmanager.",
    ),
    _row(
        r"NCCL error: (?P<error>[\w ]+)",
        "gpus_cannot_talk",
        "The GPUs cannot talk to one another: NCCL says {error}.",
        "Give a container --ipc host or more shared memory, run with NCCL_DEBUG=WARN to learn more, or set "
        "tensor_parallel_size to 1.",
    ),
    _row(
        r"Bfloat16 is only supported on GPUs with compute capability of at least [\d.]+\. "
        r"Your (?P<name>.+?) GPU",
        "dtype_unsupported",
        "{name} cannot compute in bfloat16.",
        "Deploy with dtype float16.",
    ),
    _row(
        r"quantization method (?P<method>[\w.-]+) is not supported for the current GPU\. "
        r"Minimum capability: (?P<least>\d+)\. Current capability: (?P<have>\d+)",
        "quantisation_unsupported",
        "The quantisation {method} needs a GPU of compute capability {least}; this one has {have}.",
        "Choose a version of the model in another quantisation, or a newer GPU.",
    ),
    _row(
        r"no kernel image is available for execution on the device",
        "gpu_unsupported",
        "This vLLM has no code for the GPU of this machine.",
        "The GPU is too old, or newer than this vLLM: use another GPU or another version of vLLM.",
    ),
    _row(
        r"World size \((?P<asked>\d+)\) is larger than the number of available GPUs \((?P<have>\d+)\)",
        "too_few_gpus",
        "The model is to run on {asked} GPUs, but {have} can be used.",
        "Lower tensor_parallel_size to {have} or less.",
    ),
    _row(
        r"Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size "
        r"\((?P<parts>\d+)\)",
        "bad_tensor_parallel_size",
        "The model's {heads} attention heads cannot be divided among {parts} processes.",
        "Set tensor_parallel_size to a divisor of {heads}, or leave it out.",
    ),
    _row(
        r"Unknown quantization method: (?P<method>[\w.-]+?)\. Must be one of"
        r"|(?<![\w.-])(?P<method2>[\w.-]+) quantization is currently not supported in (?P<where>\w+)",
        "quantisation_unsupported",
        "This vLLM cannot serve the quantisation {method}{method2}.",
        "Choose a version of the model that is not quantised, or in a quantisation that this machine can serve.",
    ),
    _row(
        r"The model type '(?P<name>[\w.-]+)' does not support (?P<dtype>\w+)\. Reason: (?P<why>[^.]+)\."
        r"(?: Please use (?P<instead>[\w ]+?) instead)?",
        "dtype_unsupported",
        "Models of the type {name} cannot be served in {dtype}: {why}.",
        "Set dtype to {instead}.",
    ),
    _row(
        r"torch\.(?P<dtype>\w+) is not supported for quantization method (?P<method>[\w.-]+)\. "
        r"Supported dtypes: \[(?P<instead>[^\]]*)\]",
        "dtype_unsupported",
        "The quantisation {method} cannot be served in {dtype}.",
        "Set dtype to one of: {instead}.",
    ),
    _row(
        r"invalid tool call parser: (?P<name>\w+) \(chose from \{ ?(?P<known>[^}]*?) ?\}",
        "unknown_tool_parser",
        "vLLM has no tool call parser {name}.",
        "Set tool_call_parser to one of: {known}.",
    ),
    _row(
        r"Reasoning parser '(?P<name>\w+)' not found\. Available parsers: (?P<known>[\w, -]+)",
        "unknown_reasoning_parser",
        "vLLM has no reasoning parser {name}.",
        "Set reasoning_parser to one of: {known}.",
    ),
    _row(
        r"contains custom code which must be executed to correctly load the model",
        "remote_code",
        "The model brings program code of its own, which is not run here.",
        "Choose a version of the model in an architecture that vLLM has itself.",
    ),
    _row(
        r"(?<!\w)(?P<name>\w+) does not support LoRA",
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
        r"Following weights were not initialized from checkpoint: \{'(?P<name>[^']+)'",
        "broken_weights",
        "The model's files lack weights that its configuration asks for, such as {name}.",
        "The repository is incomplete, or config.json is of another model: choose another revision.",
    ),
    _row(
        r"Attempted to load weight \((?P<have>[^)]*\]?)\) into parameter \((?P<want>[^)]*\]?)\)"
        r"|start \(\d+\) \+ length \(\d+\) exceeds dimension size \(\d+\)",
        "broken_weights",
        "The model's weights have other sizes than its configuration says.",
        "config.json and the weights are of different models: choose another revision.",
    ),
    _row(
        r"Cannot find any model weights with",
        "broken_weights",
        "The model's folder has no weights.",
        "Delete the model and add it again.",
    ),
    _row(
        r"No module named '?vllm'?",
        "engine_not_installed",
        "vLLM is not installed for the Python that runs engines.",
        "Install it (make demo does), or set MODELYARD_ENGINE_PYTHON.",
    ),
    _row(
        r"Can't load tokenizer|Couldn't instantiate the backend tokenizer|Unable to load vocabulary"
        # Whatever goes wrong inside, this is what was being done.
        r"|vllm/tokenizers/\w+\.py\", line \d+, in from_pretrained",
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
    _row(
        r"\[Errno 98\] Address already in use",
        "address_in_use",
        "The engine's socket is taken by another process.",
        "Deploy again: each start gets a new one. If it happens again, report it as a bug.",
    ),
    _row(
        r"No space left on device",
        "disk_full",
        "A disk was full while the engine started.",
        "Make room in the data folder, in the folder for temporary files and in /dev/shm, then deploy again.",
    ),
    _row(
        r"Timed out waiting for engine core processes to start\..*?Waited (?P<seconds>\d+)",
        "engine_never_ready",
        "vLLM itself gave up waiting for its processes after {seconds} s.",
        "Loading is too slow: check the disk, or choose a smaller or quantised model.",
    ),
    _row(
        r"Insufficient space in /dev/shm for shared-memory allocation: (?P<asked>[\d.]+ \w+) required, "
        r"(?P<free>[\d.]+ \w+) free",
        "shared_memory_full",
        "The engine needs {asked} of shared memory (/dev/shm), but {free} is free.",
        "Give the container more of it: docker run --shm-size 2g, or --ipc host.",
    ),
    _row(
        r"Fatal Python error: Bus error|Worker proc \S+ died unexpectedly \(exit code: -7\)",
        "shared_memory_full",
        "The engine's shared memory (/dev/shm) was full.",
        "Give the container more of it: docker run --shm-size 2g, or --ipc host.",
    ),
    _row(
        r"Fatal Python error: Illegal instruction|Worker proc \S+ died unexpectedly \(exit code: -4\)",
        "processor_unsupported",
        "The engine used an instruction that this processor does not have, or may not use.",
        "vLLM for CPUs needs AVX-512 or AVX2; a container or a virtual machine may hide what the processor has.",
    ),
    _row(
        r"Worker proc \S+ died unexpectedly \(exit code: -9\)",
        "engine_killed",
        "The engine's worker was killed by SIGKILL, most often by the system because memory ran out.",
        KILLED_HINT,
    ),
)
