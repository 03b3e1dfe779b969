"""What is seen of the machine: files of /proc and control groups, and GPUs through NVML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.hardware import GIB, Gpu, SeenGpu, this_machine, visible

SEEN = tuple(SeenGpu(index, "A100", 40 * GIB, 39 * GIB, uuid) for index, uuid in enumerate(["GPU-aa1", "GPU-ab2"]))


def indexes(gpus: tuple[Gpu, ...]) -> list[int]:
    return [gpu.index for gpu in gpus]


def test_this_machine_has_processors_and_memory() -> None:
    machine = this_machine()
    assert machine.cpus
    assert machine.memory_available_bytes > 0


def test_a_containers_limit_counts_inside_it(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 33554432 kB\n")
    assert this_machine(tmp_path, tmp_path / "none").memory_available_bytes == 32 * GIB
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    assert this_machine(tmp_path, tmp_path).memory_available_bytes == 6 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert this_machine(tmp_path, tmp_path).memory_available_bytes == 32 * GIB
    assert not this_machine(tmp_path, tmp_path).has_gpu


@pytest.mark.parametrize(
    ("variable", "left"),
    [
        (None, [0, 1]),
        ("1", [1]),
        ("1,0", [1, 0]),
        (" 0 , 1 ", [0, 1]),
        ("GPU-ab", [1]),
        ("GPU-a", []),  # it could be either
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),
        ("0,0", [0]),
        ("MIG-aa1", []),
    ],
)
def test_only_the_gpus_that_cuda_would_show_are_counted(variable: str | None, left: list[int]) -> None:
    assert indexes(visible(SEEN, variable)) == left


def read_with(folder: Path, **env: str) -> list[dict[str, object]]:
    code = (
        "import json, dataclasses\n"
        "from modelyard.hardware import read_gpus\n"
        "print(json.dumps([dataclasses.asdict(gpu) for gpu in read_gpus()]))\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), **env}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    found: list[dict[str, object]] = json.loads(result.stdout)
    return found


def test_gpus_are_read_through_nvml(nvml: Path) -> None:
    first, second = read_with(nvml)
    assert first == {
        "index": 0,
        "name": "NVIDIA Imitation 0",
        "total_bytes": 80 * GIB,
        "free_bytes": 70 * GIB,
        "uuid": "GPU-00000000-0000-0000-0000-000000000000",
    }
    assert (second["index"], second["free_bytes"]) == (1, 69 * GIB)


@pytest.mark.parametrize("failing", ["init", "count", "memory"])
def test_an_nvml_that_fails_is_no_gpus(nvml: Path, failing: str) -> None:
    assert read_with(nvml, NVML_FAILS=failing) == []


def test_no_nvml_is_no_gpus(tmp_path: Path) -> None:
    assert read_with(tmp_path) == []
