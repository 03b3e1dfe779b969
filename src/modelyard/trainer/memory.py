"""The memory of a training: how much there is, how much it takes, and what would fit.

Without a GPU the trainer limits itself to its share by RLIMIT_DATA, so that what is too much is refused inside it,
where a smaller batch can be tried, instead of ending in the system's killing of whichever process is the largest.
The estimate is arithmetic over the model's shape, for a first guess; what was measured overrules it.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.hardware import available_bytes
from modelyard.trainer import ranks

#: What the system and the other processes keep when the training may take what is free.
MARGIN = 0.05
#: What kernels take that are made for the shapes they see, in bfloat16 on a processor.
KERNEL_BYTES = 128 * 1024**2
#: Of C's mallopt.
_M_MMAP_THRESHOLD = -3
#: Bytes per trained weight: itself, its gradient and two moments, each in float32.
TRAINED_BYTES = 16


@dataclass(frozen=True)
class Budget:
    """The memory that the training may take in all, and what of that was taken when it was asked."""

    total_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.total_bytes - self.used_bytes)


def budget(limit_bytes: int | None) -> Budget:
    """Return the memory for this process of the training on its device: the limit, or what is free if that is less.

    Without a GPU the processes of one training have the same part of both.
    """
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        used = torch.cuda.memory_reserved()
        most = used + int(free * (1 - MARGIN))
        return Budget(min(most, limit_bytes or most, total), torch.cuda.memory_allocated())
    used, sharing = resident_bytes(), ranks.count()
    most = used + int(available_bytes() * (1 - MARGIN)) // sharing
    return Budget(min(most, limit_bytes // sharing if limit_bytes else most), used)


def hold_to(limit_bytes: int | None) -> None:
    """Make what goes beyond the budget fail as an error of this process. May be repeated, as memory was given back."""
    import torch

    allowed = budget(limit_bytes)
    if torch.cuda.is_available():
        share = allowed.total_bytes / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        return
    # Threads that start later would need room for their stacks: those of matrix products start here.
    let_go()
    torch.ones(1 << 20).sum()
    # The kernel counts private memory that may be written, in use or not; we count what is in use.
    private = _status("VmData")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = private + allowed.free_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def be_thrifty() -> None:
    """Give large blocks back to the system as soon as they are free, at the price of some speed.

    Else the C library keeps them, in pieces that the next forward pass of another length cannot use.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1024 * 1024)


def let_go() -> None:
    """Take the limit back, so that a failure for want of memory can be written down."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def collect(limit_bytes: int | None) -> None:
    """Give back what nobody uses any more, after something was tried that may have been too large."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        # What the C library keeps for later would be missing elsewhere.
        ctypes.CDLL(None).malloc_trim(0)
        # It was given back, and yet the kernel counts it on.
        hold_to(limit_bytes)


def resident_bytes() -> int:
    """Return what this process has in memory now, or on its GPU."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def in_use_bytes() -> int:
    """Return what the training's device holds for it now: memory of the GPU, or of its processes, which are alike."""
    import torch

    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else ranks.count() * resident_bytes()


def peak_bytes() -> int:
    """Return the most that it ever held."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else ranks.count() * _status("VmHWM")


def step_bytes(config: Any, dtype_bytes: int, rows: int, length: int) -> int:
    """Estimate what one forward and backward pass takes beside the weights, from the model's configuration."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    inner = getattr(text, "intermediate_size", 0) or 4 * hidden
    # Gemma 3n says one for each layer.
    inner = int(max(inner)) if isinstance(inner, (list, tuple)) else int(inner)
    layers = int(getattr(text, "num_hidden_layers", 0) or 1)
    words = int(getattr(text, "vocab_size", 0) or 0)
    # Each layer keeps its inputs for the base's gradient and, cast to float32, for the adapter's.
    casts = 0 if dtype_bytes == 4 else 7 * 4
    per_layer = hidden * (14 * dtype_bytes + 8 + casts) + inner * (5 * dtype_bytes + (4 if casts else 0))
    # Logits as they are, in float32, their exponentials and their gradients.
    per_token = layers * per_layer + words * (2 * dtype_bytes + 8)
    return rows * length * per_token + (KERNEL_BYTES if casts else 0)


def adapter_bytes(trained_weights: int) -> int:
    """Return what the adapter takes with its gradients and the optimizer's moments."""
    return trained_weights * TRAINED_BYTES


def suggestions(needed: int, free: int, rows: int, length: int) -> Mapping[str, int]:
    """Return settings that should fit, given that so many rows of that length need so much: what is known to scale."""
    fit: dict[str, int] = {}
    if free <= 0 or needed <= 0:
        return fit
    share = 0.9 * free / needed
    if rows > 1 and int(rows * share) >= 1:
        fit["batch_size"] = min(rows - 1, int(rows * share))
    shorter = int(length * share) // 8 * 8
    if shorter >= 32:
        fit["max_seq_len"] = min(length - 1, shorter)
    return fit


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
