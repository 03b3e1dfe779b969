"""The server is killed by SIGKILL in each phase of its work and started again: no loss, no double, no orphan."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelyard.models.store import bytes_below
from tests.eventually import PATIENCE_S
from tests.models import repositories
from tests.server import ENGINE_PYTHON, Server, serving
from tests.servers.engine import read_record
from tests.servers.hub import Fault, Hub

pytestmark = pytest.mark.timeout(180)

MODEL = "local:tiny"
SETTINGS = {
    "MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON),
    "MODELYARD_ENGINE_STOP_TIMEOUT_S": "1",
    "MODELYARD_ENGINE_RESTART_DELAY_S": "0.2",
    "MODELYARD_DISK_RESERVE_GIB": "0",
}


def until(condition: Callable[[], Any], what: str, server: Server, within_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{server.log[-2000:]}"
        time.sleep(0.02)
    return value


class Yard:
    """A server with one model in its store, whose engines behave as told."""

    def __init__(self, server: Server, records: Path) -> None:
        self.server = server
        self.records = records

    def misbehave(self, how: dict[str, Any]) -> None:
        [config] = self.server.data_dir.glob("models/*/*/config.json")
        how = {"record_dir": str(self.records), **how}
        (config.parent / "misbehave.json").write_text(json.dumps(how), "utf-8")

    def record(self, kind: str) -> list[dict[str, Any]]:
        return read_record(self.records, kind)

    def deploy(self) -> str:
        answer = self.server.post("/api/v1/deploy/", {"model_id": MODEL})
        assert answer.status == 200, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def state(self) -> str:
        answer = self.server.get("/api/v1/deploy/")
        return answer.json()["state"] if answer.status == 200 else answer.error_code or ""

    def job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.server.get(f"/api/v1/jobs/{job_id}/status/").json()
        return job

    def is_served(self) -> bool:
        body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        return self.server.post("/v1/chat/completions", body).status == 200

    def engines(self) -> list[str]:
        return [command for command in self.server.processes().values() if "engine.py" in command]


@pytest.fixture
def on_each_database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test's server on a fresh database, once of each kind."""
    monkeypatch.setitem(SETTINGS, "MODELYARD_DATABASE_URL", database_url)


@contextmanager
def yard(tmp_path: Path, **settings: str) -> Iterator[Yard]:
    imports = tmp_path / "imports"
    (imports / "tiny").mkdir(parents=True)
    for name, content in repositories.llama().items():
        (imports / "tiny" / name).parent.mkdir(exist_ok=True)
        (imports / "tiny" / name).write_bytes(content)
    records = tmp_path / "records"
    records.mkdir()
    settings = {**SETTINGS, "MODELYARD_IMPORT_DIR": str(imports), **settings}
    with serving(tmp_path / "data", **settings) as server:
        assert server.post(f"/api/v1/models/add/?model_id={MODEL}").status == 200
        until(lambda: server.get("/api/v1/models/").json(), "the model is in the store", server)
        found = Yard(server, records)
        found.misbehave({})
        yield found


def interrupted_leaves_nothing(yard: Yard, job_id: str) -> None:
    assert yard.server.post("/api/v1/deploy/interrupt/").status == 200
    until(lambda: yard.job(job_id)["status"] == "KILLED", "the job was killed", yard.server)
    until(lambda: not yard.server.processes(), "no process is left", yard.server)


@pytest.mark.usefixtures("on_each_database")
def test_killed_while_it_serves_the_same_engine_goes_on_serving(tmp_path: Path) -> None:
    with yard(tmp_path) as it:
        job_id = it.deploy()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        it.server.kill()
        assert len(it.engines()) == 1, "the engine outlives its server"
        it.server.start()
        assert it.state() == "READY"
        assert it.is_served()
        assert len(it.record("start")) == 1, "no second engine was started"
        assert it.job(job_id)["status"] == "RUNNING"

        def adopted() -> bool:
            events = it.server.get(f"/api/v1/jobs/{job_id}/events?follow=false").json()
            return any("Adopted" in event["message"] for event in events)

        # The engine is served from the first moment; its supervisor takes it up a moment later.
        until(adopted, "the engine was adopted", it.server)
        interrupted_leaves_nothing(it, job_id)


@pytest.mark.parametrize(
    ("phase", "misbehave", "reached"),
    [
        ("before the engine binds", {"start_delay_s": 1.5}, "start"),
        ("while the engine loads", {"never": "healthy", "starts": [1]}, "start"),
        ("in its first generation", {"first_token_ms": 1500}, "request"),
    ],
)
def test_killed_during_a_start_one_engine_comes_up(
    tmp_path: Path, phase: str, misbehave: dict[str, Any], reached: str
) -> None:
    with yard(tmp_path, MODELYARD_ENGINE_START_TIMEOUT_S="4") as it:
        it.misbehave(misbehave)
        job_id = it.deploy()
        until(lambda: it.record(reached), phase, it.server)
        it.server.kill()
        it.server.start()
        if misbehave.get("never"):
            # This engine will never be ready: adopting it must not hide that.
            until(lambda: it.job(job_id)["status"] == "FAILED", "the job failed", it.server)
            until(lambda: not it.server.processes(), "no process is left", it.server)
            return
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        assert len(it.record("start")) == 1, "the engine that was on its way was adopted"
        assert it.is_served()
        interrupted_leaves_nothing(it, job_id)


def test_killed_while_a_restart_is_waited_for_the_engine_comes_back(tmp_path: Path) -> None:
    with yard(tmp_path, MODELYARD_ENGINE_RESTART_DELAY_S="30") as it:
        it.misbehave({"die_after_s": 0.3, "starts": [1]})
        job_id = it.deploy()
        until(lambda: it.state() == "BACKOFF", "the engine died", it.server)
        it.server.kill()
        it.server.start()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        assert len(it.record("start")) == 2
        interrupted_leaves_nothing(it, job_id)


def test_killed_while_an_engine_stops_it_still_ends(tmp_path: Path) -> None:
    with yard(tmp_path, MODELYARD_ENGINE_STOP_TIMEOUT_S="2") as it:
        it.misbehave({"ignore_sigterm": True, "grandchild": True})
        job_id = it.deploy()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        it.server.post("/api/v1/deploy/interrupt/")
        it.server.kill()
        it.server.start()
        until(lambda: it.job(job_id)["status"] == "KILLED", "the job was killed", it.server)
        until(lambda: not it.server.processes(), "no process is left", it.server)
        assert it.state() == "nothing_deployed"


def test_a_job_that_the_server_dies_with_again_and_again_is_not_resumed_for_ever(tmp_path: Path) -> None:
    with yard(tmp_path) as it:
        it.misbehave({"start_delay_s": 60})
        job_id = it.deploy()
        for _ in range(2):
            until(lambda: it.record("start"), "an engine starts", it.server)
            it.server.kill()
            it.server.start()
        until(lambda: it.job(job_id)["status"] == "FAILED", "the job failed", it.server)
        failure = it.job(job_id)["failure"]
        assert failure["code"] == "server_died"
        assert "a deployment is made by another deploy" in failure["hint"]
        until(lambda: not it.server.processes(), "its engine is gone, too", it.server)
        assert it.state() == "nothing_deployed"
        it.misbehave({})
        job_id = it.deploy()
        until(lambda: it.state() == "READY", "another deploy serves", it.server)
        for _ in range(3):
            it.server.kill()
            it.server.start()
            assert it.state() == "READY", "what has served is never suspected"
        interrupted_leaves_nothing(it, job_id)


@pytest.mark.usefixtures("on_each_database")
def test_killed_right_after_the_wish_the_deployment_is_made_or_taken_up_once(tmp_path: Path) -> None:
    with yard(tmp_path) as it:
        job_id = it.deploy()
        it.server.kill()
        it.server.start()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        assert len(it.engines()) == 1
        assert it.job(job_id)["status"] == "RUNNING"
        interrupted_leaves_nothing(it, job_id)


def test_an_engine_that_dies_while_no_server_looks_is_started_again(tmp_path: Path) -> None:
    with yard(tmp_path) as it:
        it.misbehave({"die_after_s": 1.5, "starts": [1]})
        it.deploy()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        it.server.kill()
        until(lambda: not it.engines(), "the engine died by itself", it.server)
        it.server.start()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        assert it.is_served()
        assert len(it.record("start")) == 2


def test_no_server_comes_back_and_the_engine_ends_by_itself(tmp_path: Path) -> None:
    with yard(tmp_path, MODELYARD_GRACE_S="1") as it:
        job_id = it.deploy()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        it.server.kill()
        until(lambda: not it.server.processes(), "keeper and engine have ended", it.server)
        it.server.start()
        until(lambda: it.state() == "READY", "the deployment came back", it.server)
        assert len(it.record("start")) == 2
        interrupted_leaves_nothing(it, job_id)


def test_killed_again_and_again_there_is_always_one_engine(tmp_path: Path) -> None:
    with yard(tmp_path) as it:
        job_id = it.deploy()
        for _ in range(4):
            until(lambda: it.state() == "READY", "the engine is ready", it.server)
            it.server.kill()
            it.server.start()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        assert len(it.engines()) == 1
        assert len(it.record("start")) == 1
        interrupted_leaves_nothing(it, job_id)


@pytest.mark.usefixtures("on_each_database")
def test_stopped_in_good_order_the_deployment_comes_back_with_the_next_start(tmp_path: Path) -> None:
    with yard(tmp_path) as it:
        job_id = it.deploy()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        assert it.server.stop() == 0
        assert it.server.processes() == {}
        it.server.start()
        until(lambda: it.state() == "READY", "the engine is ready", it.server)
        assert it.job(job_id)["status"] == "RUNNING"
        interrupted_leaves_nothing(it, job_id)
        assert it.server.stop() == 0
        it.server.start()
        assert it.state() == "nothing_deployed", "what was interrupted stays out of service"


@pytest.mark.parametrize(
    ("file", "fault", "under_way_bytes"),
    [
        ("config.json", Fault("stall", times=1, after=10), 0),
        ("model.safetensors", Fault("slow", times=1, bytes_per_s=80_000), 50_000),
    ],
    ids=["configuration", "weights"],
)
def test_killed_during_a_download_it_is_finished_once(
    tmp_path: Path, file: str, fault: Fault, under_way_bytes: int
) -> None:
    size = 400_000
    with Hub() as hub:
        hub.add("acme/tiny", repositories.llama(size))
        hub.misbehave("acme/tiny", file, fault)
        settings = {**SETTINGS, "HF_ENDPOINT": hub.endpoint, "MODELYARD_DOWNLOAD_STALL_S": "4"}
        with serving(tmp_path / "data", **settings) as server:
            job_id = server.post("/api/v1/models/add/?model_id=acme/tiny").json()["id"]
            partial = server.data_dir / "models" / ".partial"
            until(lambda: partial.exists() and bytes_below(partial) > under_way_bytes, "it is under way", server)
            server.kill()
            server.start()
            again = server.post("/api/v1/models/add/?model_id=acme/tiny").json()["id"]
            assert again == job_id, "the job goes on; no second one is made"

            def job() -> dict[str, Any]:
                found: dict[str, Any] = server.get(f"/api/v1/jobs/{job_id}/status/").json()
                return found

            until(lambda: job()["status"] not in ("CREATED", "RUNNING"), "the download ended", server, 60)
            assert job()["status"] == "FINISHED", job()
            [model] = server.get("/api/v1/models/").json()
            assert model["model_id"] == "acme/tiny"
            assert hub.sent("acme/tiny", "model.safetensors") < 1.3 * (size + 4096), "it did not start over"
            until(lambda: not server.processes(), "no process is left", server)
