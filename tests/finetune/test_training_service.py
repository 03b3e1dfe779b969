"""From a training to service over REST, with the imitation trainer and the imitation engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.finetune.yard import (
    FINETUNE,
    MODEL,
    TRAINER_PYTHON,
    add_dataset,
    ended,
    finished,
    in_phase,
    shown,
    start,
    training_server,
    until,
)
from tests.server import ENGINE_PYTHON, Server
from tests.test_private_files import open_to_others

BETTER = {"alias": "default", "if": "better"}
#: One row of the dataset is held back, so that there may be something to compare.
SPLIT = {"max_steps": 6, "checkpoint_steps": 2, "rank": 4, "validation_split": 0.1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Server]:
    """A server that has the base in service."""
    settings = {"MODELYARD_TRAINER_PYTHON": str(TRAINER_PYTHON), "MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON)}
    with training_server(tmp_path_factory.mktemp("service") / "data", llama, **settings) as found:
        assert found.post("/api/v1/deploy/", {"model_id": MODEL}).status == 200
        until(lambda: found.get("/api/v1/deploy/").json()["state"] == "READY", "the base is in service", 60.0, found)
        yield found


@pytest.fixture(scope="module")
def dataset_id(server: Server) -> str:
    return add_dataset(server)


def served(server: Server) -> list[str]:
    """Return the adapters that clients may name."""
    found: list[str] = server.get("/api/v1/deploy/").json()["served_adapter_ids"]
    return found


def misbehave(server: Server, **how: Any) -> None:
    """Have the engine of the base misbehave as it is told at its next start; nothing: no more."""
    (folder,) = (server.data_dir / "models" / MODEL.replace(":", "@")).iterdir()
    (folder / "misbehave.json").write_text(json.dumps(how))


def take_down(server: Server) -> None:
    """Take the base out of service, if it is in it."""
    answer = server.post("/api/v1/deploy/interrupt/")
    if answer.status == 200:
        path = f"/api/v1/jobs/{answer.json()['id']}/status/"
        until(lambda: server.get(path).json()["status"] == "KILLED", "it is gone", 60.0, server)


def start_again(server: Server) -> None:
    """Deploy the base again, with another engine."""
    take_down(server)
    assert server.post("/api/v1/deploy/", {"model_id": MODEL}).status == 200
    until(lambda: server.get("/api/v1/deploy/").json()["state"] == "READY", "the base is in service", 60.0, server)


def test_an_adapter_that_is_better_is_in_service_and_the_alias_leads_to_it(server: Server, dataset_id: str) -> None:
    wish = start(server, dataset_id, "better=1", hyperparameters=SPLIT, deploy=True, promote=BETTER)
    found = finished(server, wish)
    assert (found["phase"], found["evaluation"]["better"]) == ("DONE", True)
    assert found["adapter_id"] in served(server)
    assert found["checks"] is not None
    assert found["promotion"]["moved"] is True
    assert (found["promotion"]["alias"], found["promotion"]["to"]) == ("default", found["adapter_id"])
    alias = server.get("/api/v1/aliases/default").json()
    assert alias["resolves_to"]["adapter_id"] == found["adapter_id"]
    assert server.get(f"/api/v1/models/{found['adapter_id']}").json()["training"]["checks"] == found["checks"]
    assert server.post("/api/v1/aliases/default/rollback").status == 200
    assert server.get("/api/v1/aliases/default").json()["resolves_to"]["adapter_id"] is None


def test_an_adapter_that_is_no_better_is_in_service_and_the_alias_stays(server: Server, dataset_id: str) -> None:
    wish = start(server, dataset_id, "better=0", hyperparameters=SPLIT, deploy=True, promote=BETTER)
    found = finished(server, wish)
    assert found["adapter_id"] in served(server)
    assert (found["promotion"]["moved"], found["promotion"]["why"]) == (False, "It was said so.")
    assert server.get("/api/v1/aliases/default").json()["resolves_to"]["adapter_id"] is None


def test_without_deploy_an_adapter_is_in_the_store_alone(server: Server, dataset_id: str) -> None:
    found = finished(server, start(server, dataset_id, "Not deployed"))
    assert found["adapter_id"] not in served(server)
    assert (found["checks"], found["promotion"]) == (None, None)


def test_an_adapter_that_the_engine_refuses_stays_in_the_store_and_is_deployed_without_training_again(
    server: Server, dataset_id: str
) -> None:
    misbehave(server, fail_load={"ft:refused": "no room"})
    start_again(server)
    found = ended(server, start(server, dataset_id, "Refused", deploy=True))
    assert (found["job"]["status"], found["phase"]) == ("FAILED", "DEPLOYING")
    assert found["job"]["failure"]["code"] == "adapter_not_deployed"
    assert server.get(f"/api/v1/models/{found['adapter_id']}").status == 200
    misbehave(server)
    start_again(server)
    assert server.post(f"{FINETUNE}{found['id']}/resume/").status == 200
    again = finished(server, shown(server, found))
    assert again["adapter_id"] in served(server)
    assert not list((server.data_dir / "jobs" / again["job"]["id"]).glob("attempt-*"))


def test_a_server_killed_while_the_adapter_is_loaded_goes_on_with_that(server: Server, dataset_id: str) -> None:
    misbehave(server, slow_load=3.0)
    start_again(server)
    finetune = start(server, dataset_id, "Slowly loaded", deploy=True)
    in_phase(server, finetune, "DEPLOYING")
    server.kill()
    server.start()
    found = finished(server, finetune)
    until(lambda: found["adapter_id"] in served(server), "it is in service", 60.0, server)


def test_an_interrupt_while_the_adapter_is_loaded_takes_the_wish_back_and_keeps_the_adapter(
    server: Server, dataset_id: str
) -> None:
    finetune = start(server, dataset_id, "Taken back", deploy=True)
    in_phase(server, finetune, "DEPLOYING")
    assert server.post(f"{FINETUNE}interrupt/").status == 200
    found = ended(server, finetune)
    assert (found["job"]["status"], found["phase"]) == ("KILLED", "DEPLOYING")
    assert server.get(f"/api/v1/models/{found['adapter_id']}").status == 200
    job = server.get("/api/v1/deploy/status").json()["job"]
    assert "ft:taken-back" not in job["name"]


def test_a_base_that_is_not_in_service_is_deployed_with_its_adapter(server: Server, dataset_id: str) -> None:
    misbehave(server)
    take_down(server)
    found = finished(server, start(server, dataset_id, "Alone", deploy=True))
    assert served(server) == [found["adapter_id"]]


def test_all_that_a_download_a_deployment_a_dataset_and_a_training_left_is_for_the_servers_user_alone(
    server: Server, dataset_id: str
) -> None:
    """The others of this module have run by now; alone it makes a training of its own."""
    finished(server, start(server, dataset_id, "Private"))
    found = list(server.data_dir.rglob("*"))
    for part in ("models", "jobs", "objects", "finetunes"):
        assert any(path.is_file() and path.relative_to(server.data_dir).parts[0] == part for path in found), part
    assert open_to_others(server.data_dir) == []
