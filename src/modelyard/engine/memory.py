"""The fit of a model on a machine: the one arithmetic behind the plan, the supervisor's decision and the command.

On a CPU memory is shared out here, because vLLM itself would be killed by the system instead: processes, weights and
room for adapters are counted, and the KV cache gets what is useful of the rest. On a GPU vLLM takes a given part of
each GPU and measures by itself; here it is worked out beforehand whether that part is free and what it leaves for the
cache. Nothing is started or read, nothing is raised for lack of memory; what the model's configuration does not tell
is None. A hint's value has been tried with the same arithmetic: with it, the model does fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from modelyard.engine.options import MOST_TOKENS, EngineOptions
from modelyard.hardware import GIB, Gpu, Machine, gib
from modelyard.models import shape
from modelyard.models.shape import DTYPE_BYTES, ModelFiles
from modelyard.plurals import counted

# Measured for vLLM 0.32.0 on a CPU: its three processes take 1.5 GiB before any weight and cache, and 0.1 to 0.5 GiB
# more when models of 0.7 and 580 million weights are compiled and work.
CPU_PROCESSES_BYTES = int(2.2 * GIB)
CPU_KV_DEFAULT_BYTES = 4 * GIB
KV_LEAST_BYTES = 64 * 1024**2
CPU_SEQUENCES = 64
CPU_BLOCK_TOKENS = 128
#: On each GPU: CUDA's context, compiled graphs and activations. An estimate from vLLM's own default, not measured.
GPU_PROCESS_BYTES = 2 * GIB
GPU_BLOCK_TOKENS = 16
GPU_UTILIZATION = 0.9
MAX_LORAS = 4
MAX_LORA_RANK = 64
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Fit:
    """The memory that an engine takes of a machine, and whether the machine has it. All memory in bytes.

    On a GPU `total_bytes` is all that vLLM takes on its GPUs together (`gpus`: their indexes, each with its bytes), and
    `available_bytes` what is free on those. A sequence is one request of full length. None: nothing tells.
    """

    fits: bool
    weights_bytes: int
    processes_bytes: int
    adapters_bytes: int | None
    kv_cache_bytes: int | None
    kv_cache_tokens: int | None
    sequence_tokens: int | None
    sequence_bytes: int | None
    total_bytes: int
    available_bytes: int | None
    message: str
    hints: tuple[str, ...] = ()
    gpus: Mapping[int, int] = field(default_factory=dict)


def fit(model: ModelFiles, options: EngineOptions, machine: Machine, adapters_rank: int = 0) -> Fit:
    """Work out what an engine with these options takes, and whether it is there.

    Args:
        model: The model in the store.
        options: How the engine runs, the settings already counted in.
        machine: What is free for engines (`capacity.ledger`).
        adapters_rank: The highest rank of the adapters that are wanted; 0 for none.
    """
    need = _Need(model, options, machine, adapters_rank)
    found = need.judge()
    return found if found.fits else replace(found, hints=tuple(_hints(need, found)))


def lora_rank(options: EngineOptions, adapters_rank: int) -> int:
    """Return the highest rank that the engine is to take: the option, raised to what the adapters need."""
    wanted = max(options.max_lora_rank or MAX_LORA_RANK, adapters_rank)
    return next((rank for rank in RANKS if rank >= wanted), RANKS[-1])


class _Need:
    """The memory that a model with its options needs, part by part, whatever the machine has."""

    def __init__(self, model: ModelFiles, options: EngineOptions, machine: Machine, adapters_rank: int) -> None:
        self.model = model
        self.options = options
        self.machine = machine
        self.adapters_rank = adapters_rank
        self.dtype = served_dtype(model, options, machine)
        self.weights = self._weights()
        self.adapters = self._adapters()
        self.block = GPU_BLOCK_TOKENS if machine.has_gpu else CPU_BLOCK_TOKENS
        self.per_token = self._per_token()
        self.length = options.max_model_len or shape.longest(model.config)
        # One whole block more: vLLM keeps one for itself.
        self.sequence = self._in_blocks(self.length) if self.length else None
        #: Of a generative model without a length vLLM itself lowers the length to what there is.
        self.is_bound = options.max_model_len is not None or (
            model.task == "embed" and not shape.is_encoder(model.config)
        )
        self.least = max(KV_LEAST_BYTES, (self.sequence or 0) if self.is_bound else 0)

    def with_options(self, **changes: object) -> _Need:
        options = EngineOptions(**{**self.options.model_dump(), **changes})
        return _Need(self.model, options, self.machine, self.adapters_rank)

    def judge(self) -> Fit:
        """Return what is taken and whether it is there, without hints."""
        return self._on_gpus() if self.machine.has_gpu else self._on_cpu()

    def _on_cpu(self) -> Fit:
        fixed = CPU_PROCESSES_BYTES + self.weights + (self.adapters or 0)
        available = self.machine.memory_available_bytes
        free = available - fixed
        useful = CPU_KV_DEFAULT_BYTES
        if shape.is_encoder(self.model.config):
            useful = KV_LEAST_BYTES
        elif self.sequence:
            # A quarter more, for blocks that are filled in part.
            useful = min(useful, self.sequence * (self.options.max_num_seqs or CPU_SEQUENCES) * 5 // 4)
        cache = max(self.least, min(useful, free // 2))
        if self.options.cpu_kv_cache_gib:
            cache = int(self.options.cpu_kv_cache_gib * GIB)
        tokens = self._tokens(cache, 1)
        needs = f"{self._parts(CPU_PROCESSES_BYTES)} and {gib(cache)} for the KV cache{_in_tokens(tokens)}"
        too_small = self.is_bound and self.sequence is not None and cache < self.sequence
        if too_small:
            message = (
                f"One request of {self.length} tokens needs {gib(self.sequence or 0)} of KV cache, "
                f"but {self.model.model_id} is to get {gib(cache)} (cpu_kv_cache_gib)."
            )
        elif free < cache:
            message = f"{needs}, but {gib(available)} is free."
        else:
            message = f"{needs}; {gib(available)} is free."
        return self._fit(
            not too_small and free >= cache, message, CPU_PROCESSES_BYTES, cache, tokens, fixed + cache, available
        )

    def _on_gpus(self) -> Fit:
        parts = self.options.tensor_parallel_size or 1
        fixed = GPU_PROCESS_BYTES + (self.weights + (self.adapters or 0)) // parts
        processes = GPU_PROCESS_BYTES * parts
        needs = self._parts(processes)
        if not self.machine.gpus:
            message = f"{needs}; the GPUs' memory cannot be seen from here, and vLLM measures it at the start."
            return self._fit(True, message, processes, None, None, fixed * parts, None)
        gpus = sorted(self.machine.gpus, key=lambda gpu: (-gpu.free_bytes, gpu.index))[:parts]
        utilization = self.options.gpu_memory_utilization or GPU_UTILIZATION
        taken = [math.ceil(gpu.total_bytes * utilization) for gpu in gpus]
        cache = max(0, min(taken) - fixed)
        divided = min(parts, shape.kv_heads(self.model.config))
        tokens = self._tokens(cache, divided)
        lacking = [gpu for gpu, part in zip(gpus, taken, strict=True) if gpu.free_bytes < part]
        fits = False
        if len(gpus) < parts:
            message = f"{self.model.model_id} is to run on {counted(parts, 'GPU')}, but only {len(gpus)} can be used."
        elif lacking:
            message = (
                f"The engine is to take {utilization:g} of each GPU, but GPU {lacking[0].index} ({lacking[0].name}) "
                f"has {gib(lacking[0].free_bytes)} of {gib(lacking[0].total_bytes)} free."
            )
        elif cache < max(KV_LEAST_BYTES, self.least // divided):
            message = f"{needs}; of the {gib(sum(taken))} that the engine takes, {gib(cache * parts)} is left" + (
                f" for the KV cache, but one request of {self.length} tokens needs {gib(self.sequence)}."
                if self.is_bound and self.sequence
                else ": too little for the KV cache."
            )
        else:
            fits = True
            message = (
                f"{needs}; of the {gib(sum(taken))} that the engine takes, {gib(cache * parts)} is left for the KV "
                f"cache{_in_tokens(tokens)}."
            )
        available = sum(gpu.free_bytes for gpu in gpus)
        found = self._fit(fits, message, processes, cache * parts, tokens, sum(taken), available)
        return replace(found, gpus={gpu.index: part for gpu, part in sorted(zip(gpus, taken, strict=True), key=_index)})

    def _parts(self, processes: int) -> str:
        adapters = f", {gib(self.adapters)} for adapters" if self.adapters else ""
        weights = f"{self.model.model_id} needs {gib(self.weights)} for its weights"
        return f"{weights}, {gib(processes)} for the engine{adapters}"

    def _fit(
        self, fits: bool, message: str, processes: int, cache: int | None, tokens: int | None, total: int,
        available: int | None,
    ) -> Fit:  # fmt: skip
        length = self.length
        if length and tokens and not self.is_bound:
            length = min(length, tokens)  # to which vLLM lowers it
        return Fit(
            fits=fits,
            weights_bytes=self.weights,
            processes_bytes=processes,
            adapters_bytes=self.adapters,
            kv_cache_bytes=cache,
            kv_cache_tokens=tokens,
            sequence_tokens=length,
            sequence_bytes=self.sequence,
            total_bytes=total,
            available_bytes=available,
            message=message,
        )

    def _weights(self) -> int:
        stored = shape.stored_dtype(self.model.config)
        number_bytes = DTYPE_BYTES[self.dtype or "bfloat16"]
        # On a CPU vLLM keeps the embedding and the output a second time, in the order that its kernels like.
        again = 0 if self.machine.has_gpu else shape.embedding_numbers(self.model.config) * number_bytes
        if shape.is_quantised(self.model.config) or self.dtype is None:
            return self.model.size_bytes + again
        # Where the configuration does not tell, the files may be in 16 bits.
        return self.model.size_bytes * number_bytes // (DTYPE_BYTES[stored] if stored else 2) + again

    def _adapters(self) -> int | None:
        slots = MAX_LORAS if self.options.max_loras is None else self.options.max_loras
        if self.model.task != "generate" or slots == 0:
            return 0
        numbers = shape.adapter_numbers(self.model.config, lora_rank(self.options, self.adapters_rank))
        if numbers is None:
            return None
        held = shape.adapter_numbers(self.model.config, self.adapters_rank) or 0
        # Beside the places for those in use, the engine keeps what it has read of each in its host's memory.
        return slots * (numbers + (0 if self.machine.has_gpu else held)) * DTYPE_BYTES[self.dtype or "bfloat16"]

    def _per_token(self) -> int | None:
        if shape.is_encoder(self.model.config):
            return None
        kept = self.options.kv_cache_dtype or "auto"
        if kept.startswith("fp8"):
            return shape.kv_bytes_per_token(self.model.config, 1)
        return shape.kv_bytes_per_token(self.model.config, DTYPE_BYTES[self.dtype]) if self.dtype else None

    def _in_blocks(self, tokens: int) -> int | None:
        if self.per_token is None:
            return None
        return (math.ceil(tokens / self.block) + 1) * self.block * self.per_token

    def _tokens(self, cache: int, divided: int) -> int | None:
        if self.per_token is None:
            return None
        return max(0, cache * divided // (self.per_token * self.block) - 1) * self.block


def served_dtype(model: ModelFiles, options: EngineOptions, machine: Machine) -> str | None:
    """Return the number format in which the engine will compute; None if the model does not tell its own."""
    dtype = dtype_argument(model, options, machine)
    if dtype != "auto":
        return dtype
    stored = shape.stored_dtype(model.config)
    # vLLM's auto rounds a float32 model to 16 bits.
    return "bfloat16" if stored in ("float32", "float") else stored


def dtype_argument(model: ModelFiles, options: EngineOptions, machine: Machine) -> str:
    """Return what vLLM is told of the number format."""
    dtype = options.dtype or "auto"
    # Rounded to 16 bits, vectors on a CPU differ from what their model was made for.
    return "float32" if dtype == "auto" and model.task == "embed" and not machine.has_gpu else dtype


def _index(gpu_and_bytes: tuple[Gpu, int]) -> int:
    return gpu_and_bytes[0].index


def _in_tokens(tokens: int | None) -> str:
    return f" ({tokens:,} tokens)" if tokens else ""


def _hints(need: _Need, found: Fit) -> Iterator[str]:
    """Yield changes that make it fit, each tried; the last one is always there."""
    yield from _gpu_hints(need) if need.machine.has_gpu else _cpu_hints(need, found)
    length = _longest_that_fits(need)
    if length:
        yield f"Set max_model_len to at most {length}."
    if need.dtype == "float32" and need.with_options(dtype="bfloat16").judge().fits:
        yield "Set dtype to bfloat16."
    if need.adapters:
        if not need.adapters_rank and need.with_options(max_loras=0).judge().fits:
            yield "Set max_loras to 0, if no adapters are to be served."
        lower = [rank for rank in RANKS if need.adapters_rank <= rank < lora_rank(need.options, need.adapters_rank)]
        fitting = [rank for rank in lower if need.with_options(max_lora_rank=rank).judge().fits]
        if fitting:
            yield f"Set max_lora_rank to at most {fitting[-1]}."
    if not shape.is_quantised(need.model.config):
        for bits in (8, 4):
            smaller = need.with_options()
            smaller.weights = need.weights * bits // (8 * DTYPE_BYTES[need.dtype or "bfloat16"])
            if smaller.judge().fits:
                yield f"Choose a version quantised to {bits} bits (about {gib(smaller.weights)} of weights)."
                break
    yield "Choose a smaller model."


def _cpu_hints(need: _Need, found: Fit) -> Iterator[str]:
    available, cache = need.machine.memory_available_bytes, found.kv_cache_bytes or 0
    asked = need.options.cpu_kv_cache_gib
    if asked:
        free = available - found.total_bytes + cache
        least, most = math.ceil(need.least / GIB * 100) / 100, math.floor(free / GIB * 100) / 100
        value, how = (least, "at least") if asked < least else (most, "at most")
        if value > 0 and need.with_options(cpu_kv_cache_gib=value).judge().fits:
            yield f"Set cpu_kv_cache_gib to {how} {value:g}."
    short = math.ceil((found.total_bytes - available) / GIB * 10) / 10
    more = replace(need.machine, memory_available_bytes=available + int(short * GIB) + 1)
    if short > 0 and _Need(need.model, need.options, more, need.adapters_rank).judge().fits:
        yield f"Free {short:.1f} GiB more: end other deployments or programs."


def _gpu_hints(need: _Need) -> Iterator[str]:
    parts, gpus = need.options.tensor_parallel_size or 1, need.machine.gpus
    free = sorted((math.floor(gpu.free_bytes / gpu.total_bytes * 100) / 100 for gpu in gpus), reverse=True)
    if len(gpus) >= parts:
        for value in sorted({min(free[:parts]), 0.95, GPU_UTILIZATION}, reverse=True):
            if 0 < value <= 1 and need.with_options(gpu_memory_utilization=value).judge().fits:
                yield f"Set gpu_memory_utilization to {value:g}."
                break
    for size in range(1, len(gpus) + 1):
        # vLLM divides the heads, so their number must allow it.
        divisible = (shape.heads(need.model.config) or size) % size == 0
        if size != parts and divisible and need.with_options(tensor_parallel_size=size).judge().fits:
            yield f"Set tensor_parallel_size to {size}."
            break


def _longest_that_fits(need: _Need) -> int | None:
    """Return the highest max_model_len with which the model fits, in whole blocks, or None."""
    if need.per_token is None or need.length is None or not need.is_bound:
        return None
    # A configuration may name any number of positions.
    low, high = 0, min(need.length, MOST_TOKENS) // need.block
    while low < high:
        middle = (low + high + 1) // 2
        if need.with_options(max_model_len=middle * need.block).judge().fits:
            low = middle
        else:
            high = middle - 1
    return low * need.block or None
