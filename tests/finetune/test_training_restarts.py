"""Real trainings of the tiny Llama that are killed, interrupted and resumed: the same adapter, byte for byte.

One undisturbed training is what all others are compared with.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.finetune.yard import (
    FINETUNE,
    MODEL,
    QUICK,
    adapter_files,
    add_dataset,
    at_step,
    ended,
    events,
    finished,
    rows,
    shown,
    start,
    training_server,
    until,
)
from tests.fixtures import S3Server
from tests.server import Server
from tests.trainer.runs import rows as long_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 60
#: Dropout, so that the state of chance matters; held-out rows, so that there is something to evaluate.
SETTINGS: dict[str, Any] = QUICK | {
    "max_steps": STEPS, "checkpoint_steps": 7, "dropout": 0.1, "validation_split": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset_id(server: Server) -> str:
    return add_dataset(server, rows(40))


@pytest.fixture(scope="module")
def undisturbed(server: Server, dataset_id: str) -> dict[str, str]:
    """The files of the adapter that nothing has disturbed."""
    found = finished(server, start(server, dataset_id, "Undisturbed", hyperparameters=SETTINGS))
    assert found["evaluation"]["rows"] >= 1
    files = adapter_files(server, found["adapter_id"])
    assert "adapter_model.safetensors" in files
    return files


@pytest.fixture(scope="module", autouse=True)
def _is_left_clean(server: Server) -> Iterator[None]:
    yield
    assert not [pid for pid, command in server.processes().items() if "modelyard.trainer" in command]


def trainer(server: Server) -> int:
    """Wait for the one process that trains, and return it."""

    def found() -> list[int]:
        return [pid for pid, line in server.processes().items() if "-m modelyard.trainer" in line]

    until(lambda: len(found()) == 1, "one trainer runs", 60.0, server)
    return found()[0]


def reports(server: Server, finetune: dict[str, Any], phase: str) -> bool:
    return {"phase": phase} in [event["data"] for event in events(server, finetune)]


@pytest.mark.parametrize("moment", ["loading", "training", "evaluating"])
def test_a_server_killed_in_a_phase_finds_its_trainer_again_and_the_adapter_is_the_same(
    server: Server, dataset_id: str, undisturbed: dict[str, str], moment: str
) -> None:
    finetune = start(server, dataset_id, f"Killed server {moment}", hyperparameters=SETTINGS)
    until(lambda: reports(server, finetune, moment), f"it is {moment}", 240.0, server)
    server.kill()
    server.start()
    found = finished(server, finetune)
    assert adapter_files(server, found["adapter_id"]) == undisturbed
    assert [point["step"] for point in found["curve"] if point["loss"] is not None] == list(range(1, STEPS + 1))


def test_a_trainer_killed_in_the_middle_ends_with_the_same_adapter(
    server: Server, dataset_id: str, undisturbed: dict[str, str]
) -> None:
    finetune = start(server, dataset_id, "Killed trainer", hyperparameters=SETTINGS)
    at_step(server, finetune, 10)
    os.kill(trainer(server), signal.SIGKILL)
    found = finished(server, finetune)
    assert any(event["data"].get("code") == "trainer_killed" for event in events(server, found))
    assert adapter_files(server, found["adapter_id"]) == undisturbed


def test_server_and_trainer_killed_together_end_with_the_same_adapter(
    server: Server, dataset_id: str, undisturbed: dict[str, str]
) -> None:
    finetune = start(server, dataset_id, "All killed", hyperparameters=SETTINGS)
    at_step(server, finetune, 20)
    pid = trainer(server)
    server.kill()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not server.processes(), "nothing of it runs")
    server.start()
    found = finished(server, finetune)
    assert adapter_files(server, found["adapter_id"]) == undisturbed
    assert [point["step"] for point in found["curve"] if point["loss"] is not None] == list(range(1, STEPS + 1))


def test_a_server_that_stops_in_good_order_has_the_trainer_save_and_the_next_one_goes_on(
    server: Server, dataset_id: str, undisturbed: dict[str, str]
) -> None:
    finetune = start(server, dataset_id, "Stopped server", hyperparameters=SETTINGS)
    at_step(server, finetune, 10)
    assert server.stop(60.0) == 0
    assert not server.processes()
    server.start()
    found = finished(server, finetune)
    assert adapter_files(server, found["adapter_id"]) == undisturbed


def test_an_interrupt_in_each_phase_is_resumed_to_the_same_adapter_and_what_it_needs_is_kept_meanwhile(
    server: Server,
) -> None:
    # Long answers, so that each phase lasts long enough to be caught.
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in long_rows(20, longest=200))
    dataset_id, settings = add_dataset(server, lines), SETTINGS | {"max_steps": 12, "checkpoint_steps": 2}
    alone = adapter_files(
        server, finished(server, start(server, dataset_id, "Alone", hyperparameters=settings))["adapter_id"]
    )
    finetune = start(server, dataset_id, "Interrupted", hyperparameters=settings)
    queued = start(server, dataset_id, "Interrupted", hyperparameters=settings)
    assert queued["adapter_id"] != finetune["adapter_id"]
    for phase, shows in (("loading", "TRAINING"), ("training", "TRAINING"), ("evaluating", "EVALUATING")):
        until(partial(reports, server, finetune, phase), f"it is {phase}", 240.0, server)
        for path, code in ((f"datasets/{dataset_id}/", "dataset_in_use"), (f"models/{MODEL}", "model_in_use")):
            refused = server.delete(f"/api/v1/{path}")
            assert (refused.status, refused.error_code) == (409, code), refused.text
        if queued["job"]["status"] == "CREATED":
            assert server.post(f"/api/v1/jobs/{queued['job']['id']}/interrupt/").status == 200
            queued = ended(server, queued)
            assert (queued["job"]["status"], queued["phase"]) == ("KILLED", "QUEUED")
        assert server.post(f"{FINETUNE}interrupt/").status == 200
        found = ended(server, finetune)
        assert (found["job"]["status"], found["phase"]) == ("KILLED", shows)
        assert not [pid for pid, command in server.processes().items() if "modelyard.trainer" in command]
        assert server.post(f"{FINETUNE}{finetune['id']}/resume/").status == 200
        finetune = shown(server, finetune)
    assert adapter_files(server, finished(server, finetune)["adapter_id"]) == alone


@pytest.mark.parametrize("store", ["folder", pytest.param("s3", marks=pytest.mark.s3)])
def test_an_interrupted_training_is_resumed_on_a_machine_that_has_only_the_storage(
    request: pytest.FixtureRequest, imports: Path, tmp_path: Path, undisturbed: dict[str, str], store: str
) -> None:
    settings = {}
    if store == "s3":
        s3: S3Server = request.getfixturevalue("s3_server")
        settings = {
            "MODELYARD_STORAGE_URL": f"s3://{s3.bucket}/test-{uuid.uuid4().hex}",
            "MODELYARD_S3_ENDPOINT_URL": s3.endpoint_url,
            "AWS_ACCESS_KEY_ID": s3.access_key,
            "AWS_SECRET_ACCESS_KEY": s3.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    with training_server(tmp_path / "data", imports, **settings) as server:
        finetune = start(server, add_dataset(server, rows(40)), "Undisturbed", hyperparameters=SETTINGS)
        at_step(server, finetune, 10)
        assert server.post(f"{FINETUNE}interrupt/").status == 200
        found = ended(server, finetune)
        assert (found["job"]["status"], found["phase"]) == ("KILLED", "TRAINING")
        assert found["checkpoint_step"] >= 10
        shutil.rmtree(server.data_dir / "finetunes")
        assert server.post(f"{FINETUNE}{found['id']}/resume/").status == 200
        again = finished(server, shown(server, finetune))
        assert f"The checkpoint of step {found['checkpoint_step']} is here: the training goes on from it." in [
            event["message"] for event in events(server, again)
        ]
        assert adapter_files(server, again["adapter_id"]) == undisturbed
