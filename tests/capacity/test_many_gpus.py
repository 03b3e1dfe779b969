"""A whole server on four GPUs (an imitation of NVML), with engines of one and of two of them and a training beside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelyard.hardware import GIB
from tests.deploy.live import A, B, LiveYard, live_yard
from tests.finetune import yard as trainings
from tests.finetune.yard import MODEL, QUICK, TRAINER_PYTHON, add_dataset

pytestmark = [pytest.mark.timeout(240)]

GPU_GIB, BUDGET_GIB = 80, 40
#: Of each of its GPUs an engine takes 36 GiB: two of them are within the memory, but not within the budget.
SHARE, ENGINE_BYTES = 0.45, 36 * GIB


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the imitation keeps its GPUs."""
    folder = tmp_path_factory.mktemp("gpus")
    for index in range(4):
        (folder / f"gpu-{index}").write_text(str(GPU_GIB * GIB))
    return folder


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, nvml: Path, gpus: Path, llama: Path) -> Iterator[LiveYard]:
    folder = tmp_path_factory.mktemp("many")
    shutil.copytree(llama, folder / "imports")
    settings = {
        "LD_LIBRARY_PATH": str(nvml),
        "NVML_GPUS": str(gpus),
        "MODELYARD_ENGINE_MEMORY_GIB": str(BUDGET_GIB),
        "MODELYARD_TRAINER_PYTHON": str(TRAINER_PYTHON),
    }
    with live_yard(folder, **settings) as yard:
        trainings.add_model(yard.server)
        for model_id in (A, B, MODEL):
            yard.misbehave(model_id, takes={"folder": str(gpus), "bytes": ENGINE_BYTES})
        yield yard


def options(count: int, seed: int) -> dict[str, Any]:
    """Return options of an engine on so many GPUs; another seed is another engine."""
    return {"tensor_parallel_size": count, "gpu_memory_utilization": SHARE, "seed": seed}


def shown(deployment: dict[str, Any]) -> tuple[list[int], int]:
    return deployment["gpus"], deployment["memory_bytes"]


def visible(live: LiveYard, word: str) -> list[str]:
    """Return which GPUs each process sees whose command has a word in it."""
    found = []
    for pid, command in live.server.processes().items():
        if word in command:
            variables = dict(
                entry.partition(b"=")[::2] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            )
            assert variables[b"CUDA_DEVICE_ORDER"] == b"PCI_BUS_ID"
            found.append(variables[b"CUDA_VISIBLE_DEVICES"].decode())
    return sorted(found)


def test_each_run_has_gpus_of_its_own_and_the_budget_holds_for_each(live: LiveYard) -> None:
    server = live.server
    one = live.deploy(A, options=options(1, 1), keep_others=True)
    assert shown(one) == ([0], ENGINE_BYTES)
    two = live.deploy(B, options=options(2, 2), keep_others=True)
    assert shown(two) == ([1, 2], 2 * ENGINE_BYTES)
    plan = server.post("/api/v1/deploy/plan/", {"model_id": A, "options": options(1, 3), "keep_others": True}).json()
    assert (plan["fits_beside"], plan["memory"]["gpus"]) == (True, [3])
    three = live.deploy(A, options=options(1, 3), keep_others=True)
    assert shown(three) == ([3], ENGINE_BYTES)
    assert visible(live, "servers/engine.py") == ["0", "1,2", "3"]

    # Each GPU has 44 GiB free, and 4 of its budget.
    refused = server.post("/api/v1/deploy/plan/", {"model_id": A, "options": options(1, 4), "keep_others": True}).json()
    assert (refused["fits"], refused["fits_beside"]) == (False, False)
    assert "has 4.0 GiB of 80.0 GiB free" in refused["failure"]["message"]

    # A training of the tiny model fits beside them.
    dataset_id = add_dataset(server)
    settings = QUICK | {"max_steps": 1000}
    training = trainings.start(server, dataset_id, "pace=0.1", hyperparameters=settings)
    trainings.at_step(server, training, 1)
    assert visible(live, "servers/trainer.py") == ["0"]

    # The one in the middle goes: both of its GPUs, and no others, are given to the next of two.
    assert server.delete(f"/api/v1/deployments/{two['id']}?drain=false").status == 200
    live.becomes(two["id"], "STOPPED")
    gone = server.get(f"/api/v1/deployments/{two['id']}").json()
    assert (gone["gpus"], gone["memory_bytes"]) == ([], None)
    four = live.deploy(B, options=options(2, 5), keep_others=True)
    assert shown(four) == ([1, 2], 2 * ENGINE_BYTES)
    assert server.post(f"/api/v1/jobs/{training['job']['id']}/interrupt/").status == 200
    trainings.ended(server, training)
