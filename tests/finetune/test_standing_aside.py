"""Over REST: a deployment makes room for a training, and is back, whatever becomes of the server meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.finetune import yard
from tests.finetune.yard import MODEL, QUICK, TRAINER_PYTHON, add_dataset, training_server
from tests.server import ENGINE_PYTHON, Server

pytestmark = [pytest.mark.timeout(240)]

OPTIONS = {"max_loras": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Server]:
    """A server with imitations of engine and trainer, whose budget is enough for one of them at a time."""
    settings = {
        "MODELYARD_TRAINER_PYTHON": str(TRAINER_PYTHON),
        "MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON),
        "MODELYARD_ENGINE_MEMORY_GIB": "2.8",
        "MODELYARD_ENGINE_CPU_KV_CACHE_GIB": "0.1",
        "MODELYARD_ENGINE_STOP_TIMEOUT_S": "1",
    }
    with training_server(tmp_path_factory.mktemp("aside") / "data", llama, **settings) as found:
        yield found


@pytest.fixture(scope="module")
def dataset_id(server: Server) -> str:
    return add_dataset(server)


@pytest.fixture
def deployed(server: Server) -> Iterator[dict[str, Any]]:
    """The model in service; nothing is afterwards."""
    answer = server.post("/api/v1/deploy/", {"model_id": MODEL, "options": OPTIONS})
    assert answer.status == 200, answer.text
    yield ready(server)
    for one in server.get("/api/v1/deployments/").json():
        server.delete(f"/api/v1/deployments/{one['id']}?drain=false")
    yard.until(lambda: not server.get("/api/v1/deployments/").json(), "nothing is in service", server=server)


def ready(server: Server, *adapter_ids: str) -> dict[str, Any]:
    def so() -> dict[str, Any] | None:
        one: dict[str, Any] = server.get("/api/v1/deploy/").json()
        return one if one.get("state") == "READY" and one["served_adapter_ids"] == list(adapter_ids) else None

    found: dict[str, Any] = yard.until(so, "the model is in service", server=server)
    return found


def train(server: Server, dataset_id: str, name: str, on_busy: str, steps: int = 6, **more: Any) -> dict[str, Any]:
    settings = QUICK | {"max_steps": steps}
    return yard.start(server, dataset_id, name, on_busy=on_busy, hyperparameters=settings, **more)


def check_it_stood_aside(server: Server, before: dict[str, Any], finetune: dict[str, Any]) -> None:
    """Check that the deployment left for the training and is back as it was."""
    [entry] = finetune["stopped"]
    assert (entry["deployment_id"], entry["note"]) == (before["id"], None)
    assert entry["back_at"] > entry["left_at"]
    assert finetune["unavailable_s"] > 0
    now = ready(server)
    assert now["id"] == entry["back_deployment_id"] != before["id"]
    answer = server.post("/v1/completions", {"model": "default", "prompt": "Hi", "max_tokens": 1})
    assert answer.status == 200, answer.text


def test_a_busy_accelerator_fails_a_training_that_would_not_wait(
    server: Server, dataset_id: str, deployed: dict[str, Any]
) -> None:
    found = yard.ended(server, train(server, dataset_id, "at once", "fail"))
    assert found["job"]["status"] == "FAILED"
    assert found["job"]["failure"]["code"] == "accelerator_busy"
    assert f"held by: {MODEL} (2.3 GiB)" in found["job"]["failure"]["message"]
    assert ready(server)["id"] == deployed["id"]


def test_a_training_waits_until_the_deployment_is_gone(
    server: Server, dataset_id: str, deployed: dict[str, Any]
) -> None:
    waiting = train(server, dataset_id, "patient", "wait")
    yard.in_phase(server, waiting, "WAITING")
    assert server.delete(f"/api/v1/deployments/{deployed['id']}").status == 200
    found = yard.finished(server, waiting)
    assert (found["stopped"], found["unavailable_s"]) == ([], None)


def test_a_deployment_stands_aside_and_then_serves_the_new_adapter_too(
    server: Server, dataset_id: str, deployed: dict[str, Any]
) -> None:
    started = train(server, dataset_id, "aside", "stop_deployment", deploy=True)
    found = yard.finished(server, started)
    assert found["phase"] == "DONE"
    now = ready(server, found["adapter_id"])
    assert now["id"] == found["stopped"][0]["back_deployment_id"]
    assert found["unavailable_s"] > 0
    assert any("come back when it has ended" in event["message"] for event in yard.events(server, found))
    assert server.get(f"/api/v1/deployments/{deployed['id']}").json()["state"] == "STOPPED"


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_server_that_ends_meanwhile_goes_on_with_the_training_and_brings_it_back(
    server: Server, dataset_id: str, deployed: dict[str, Any], how: str
) -> None:
    started = train(server, dataset_id, f"{how} pace=0.2", "stop_deployment", steps=20)
    yard.at_step(server, started, 2)
    assert server.get("/api/v1/deploy/").status == 404, "it has left"
    if how == "killed":
        server.kill()
    else:
        assert server.stop() == 0
    server.start()
    found = yard.finished(server, started)
    check_it_stood_aside(server, deployed, found)


@pytest.mark.parametrize("how", ["interrupted", "failed", "interrupted while no server runs"])
def test_a_training_that_ends_otherwise_brings_it_back_as_well(
    server: Server, dataset_id: str, deployed: dict[str, Any], how: str
) -> None:
    word = "fail=loss_not_a_number" if how == "failed" else "hold=training"
    started = train(server, dataset_id, f"{how} {word}", "stop_deployment")
    if how != "failed":
        yard.at_step(server, started, 1)
        assert server.post(f"/api/v1/jobs/{started['job']['id']}/interrupt/").status == 200
        if how != "interrupted":
            server.kill()
            server.start()
    found = yard.ended(server, started)
    assert found["job"]["status"] == ("FAILED" if how == "failed" else "KILLED")
    check_it_stood_aside(server, deployed, found)
