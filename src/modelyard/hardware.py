"""This machine's hardware: GPUs, processors, free memory. Reads files and NVML, starts nothing.

NVML is NVIDIA's library of figures; the package nvidia-ml-py (of the gpu extra) speaks to it. Without the package or
without the library there are no GPUs to see, and `has_gpu` says whether a driver is there all the same.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

GIB = 1024**3
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
CUDA_ORDER, CUDA_DEVICES = "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"

log = logging.getLogger(__name__)


def gib(size_bytes: int) -> str:
    """Write bytes as people read them."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB // 10 else f"{size_bytes / 1024**2:.0f} MiB"


@dataclass(frozen=True)
class Gpu:
    """A GPU that this server may use. `index` is its place in the order of the PCI bus; memory is in bytes."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """A machine as an engine sees it. `cpus` are the processors that this server may use; memory is in bytes.

    With `has_gpu` and no `gpus` there is a driver, but nothing tells how much memory is behind it.
    """

    has_gpu: bool
    cpus: tuple[int, ...]
    memory_available_bytes: int
    gpus: tuple[Gpu, ...] = ()


def this_machine(proc: Path = PROC, cgroup: Path = CGROUP) -> Machine:
    """Look at the machine now. Blocks for some milliseconds."""
    has_driver = (proc / "driver/nvidia/version").exists()
    seen = read_gpus(is_expected=has_driver)
    return Machine(
        # Under WSL 2 there are GPUs, and no such file.
        has_gpu=has_driver or bool(seen),
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        memory_available_bytes=available_bytes(proc, cgroup),
        gpus=visible(seen, os.environ.get(CUDA_DEVICES)),
    )


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Return how many bytes are free or could be freed at once; 0 where the system does not tell. Reads files."""
    available = 0
    for line in (proc / "meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    # A container's limit is what counts inside it; page cache that could be dropped is not in use.
    try:
        limit = (cgroup / "memory.max").read_text("ascii").strip()
        used = int((cgroup / "memory.current").read_text("ascii"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text("ascii").splitlines())
    except (OSError, ValueError):
        return available
    if limit == "max":
        return available
    return min(available, max(0, int(limit) - used + int(stat.get("inactive_file", 0))))


def cuda_environment(indexes: Iterable[int]) -> dict[str, str]:
    """Return the variables that show a process these GPUs alone, by their places in the order of the PCI bus."""
    # NVML counts GPUs in that order; CUDA's own would put the fastest first.
    return {CUDA_ORDER: "PCI_BUS_ID", CUDA_DEVICES: ",".join(map(str, sorted(indexes)))}


@dataclass(frozen=True)
class SeenGpu(Gpu):
    """A GPU as NVML tells of it, before it is decided whether this server may use it."""

    uuid: str


def read_gpus(*, is_expected: bool = True) -> tuple[SeenGpu, ...]:
    """Return all GPUs of the machine by NVML; none without it, with a warning where some are expected. Never raises."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.log(logging.WARNING if is_expected else logging.DEBUG, "NVML does not tell about the GPUs: %s", error)
        return ()
    try:
        return tuple(_read_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        log.warning("NVML does not tell about the GPUs: %s", error)
        return ()
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(nvml: ModuleType, index: int) -> SeenGpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return SeenGpu(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
    )


def visible(gpus: Sequence[SeenGpu], cuda_visible_devices: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves: all where it is not set.

    As CUDA does, it stops at the first entry that names no GPU; parts of a GPU (MIG) are such entries.
    """
    chosen: list[SeenGpu] = list(gpus)
    if cuda_visible_devices is not None:
        chosen = []
        for entry in (part.strip() for part in cuda_visible_devices.split(",")):
            named = [
                gpu
                for gpu in gpus
                if (entry.startswith("GPU-") and len(entry) > 4 and gpu.uuid.startswith(entry))
                or (entry.isdecimal() and int(entry) == gpu.index)
            ]
            if len(named) != 1 or named[0] in chosen:
                break
            chosen += named
    return tuple(Gpu(gpu.index, gpu.name, gpu.total_bytes, gpu.free_bytes) for gpu in chosen)
