"""A real server that has the tiny Llama and a dataset of questions, and the ways to train on them over REST."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.datasets.forms import FORM_HEADERS, upload
from tests.server import Server, serving

FINETUNE = "/api/v1/finetune/"
#: The imitation trainer, for MODELYARD_TRAINER_PYTHON.
TRAINER_PYTHON = Path(__file__).parents[1] / "servers" / "trainer_python"
MODEL = "local:tiny-llama"
#: A busy machine with two cores takes its time to import torch.
TRAINING_S = 240.0
#: Few, small and quick steps; every figure is given, so that two runs are the same.
QUICK: dict[str, Any] = {
    "max_steps": 6, "batch_size": 4, "learning_rate": 0.005, "rank": 4, "checkpoint_steps": 2, "validation_split": 0,
}  # fmt: skip
#: Long enough to be caught in the middle.
LONG: dict[str, Any] = QUICK | {"max_steps": 400, "checkpoint_steps": 5}
ENDED = ("FINISHED", "FAILED", "KILLED")


def rows(count: int = 24) -> bytes:
    """Return a dataset of questions and answers."""
    pairs = [(f"What is the number {number}?", f"It is {number * 7} and no other.") for number in range(count)]
    made = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in made)


@contextmanager
def training_server(data_dir: Path, imports: Path, **settings: str) -> Iterator[Server]:
    """Start a server that has the tiny Llama in its store."""
    settings = {"MODELYARD_IMPORT_DIR": str(imports), "OMP_NUM_THREADS": "1"} | settings
    with serving(data_dir, **settings) as server:
        add_model(server)
        yield server


def add_model(server: Server, model_id: str = MODEL) -> None:
    """Bring a folder of the import directory into the store."""
    assert server.post(f"/api/v1/models/add/?model_id={model_id}").status == 200
    until(lambda: model_id in {one["model_id"] for one in server.get("/api/v1/models/").json()}, "the model is there")


def add_dataset(server: Server, content: bytes | None = None) -> str:
    """Upload a dataset and return its id."""
    answer = server.request(
        "POST", "/api/v1/datasets/upload/", body=upload(content or rows(), "train.jsonl"), headers=FORM_HEADERS
    )
    assert answer.status == 200, answer.text
    found: str = answer.json()["id"]
    return found


def start(server: Server, dataset_id: str, name: str = "My Adapter Training", **more: Any) -> dict[str, Any]:
    """Start a training and return it as the server shows it."""
    body = {"name": name, "model_id": MODEL, "dataset_id": dataset_id, "hyperparameters": QUICK} | more
    answer = server.post(FINETUNE, body)
    assert answer.status == 200, answer.text
    job = answer.json()
    assert job["status"] == "CREATED"
    for one in server.get(FINETUNE).json():
        if one["job"]["id"] == job["id"]:
            found: dict[str, Any] = one
            return found
    raise AssertionError("the training is in no list")


def shown(server: Server, finetune: dict[str, Any]) -> dict[str, Any]:
    """Return a training as it is now."""
    found: dict[str, Any] = server.get(f"{FINETUNE}{finetune['id']}").json()
    return found


def ended(server: Server, finetune: dict[str, Any], within_s: float = TRAINING_S) -> dict[str, Any]:
    """Wait for the end of a training's job and return it as it is then."""
    until(lambda: shown(server, finetune)["job"]["status"] in ENDED, "the training ends", within_s, server)
    return shown(server, finetune)


def finished(server: Server, finetune: dict[str, Any], within_s: float = TRAINING_S) -> dict[str, Any]:
    """Wait for the good end of a training."""
    found = ended(server, finetune, within_s)
    assert found["job"]["status"] == "FINISHED", (found["job"], log(server, found))
    return found


def log(server: Server, finetune: dict[str, Any]) -> str:
    """Return what the trainer wrote."""
    return server.get(f"/api/v1/jobs/{finetune['job']['id']}/log/?tail=60").text


def events(server: Server, finetune: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what happened to a training so far."""
    found: list[dict[str, Any]] = server.get(f"/api/v1/jobs/{finetune['job']['id']}/events/?follow=false").json()
    return found


def at_step(server: Server, finetune: dict[str, Any], step: int, within_s: float = TRAINING_S) -> dict[str, Any]:
    """Wait until a training has done so many steps, and has not ended."""

    def so_far() -> dict[str, Any] | None:
        found = shown(server, finetune)
        assert found["job"]["status"] not in ENDED, (found["job"], log(server, found))
        return found if any(point["step"] >= step for point in found["curve"]) else None

    found: dict[str, Any] = until(so_far, f"step {step} is done", within_s, server)
    return found


def in_phase(server: Server, finetune: dict[str, Any], *phases: str, within_s: float = TRAINING_S) -> dict[str, Any]:
    """Wait until a training is in one of these phases."""

    def is_so() -> dict[str, Any] | None:
        found = shown(server, finetune)
        assert found["phase"] in phases or found["job"]["status"] not in ENDED, (found["job"], log(server, found))
        return found if found["phase"] in phases else None

    found: dict[str, Any] = until(is_so, f"it is {phases}", within_s, server)
    return found


def adapter_files(server: Server, adapter_id: str) -> dict[str, str]:
    """Return the hashes of an adapter's files in the store, but for its card, which has how long things took."""
    folder = server.data_dir / "models" / adapter_id.replace(":", "@")
    (commit,) = folder.iterdir()
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(commit.iterdir())
        if path.name != "README.md"
    }


def until(condition: Callable[[], Any], what: str, within_s: float = 60.0, server: Server | None = None) -> Any:
    """Wait for a condition, and say what did not come."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, (
            f"not within {within_s:g} s: {what}\n{server.log[-3000:] if server is not None else ''}"
        )
        time.sleep(0.05)
    return value
