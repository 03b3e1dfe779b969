"""A change of models with real vLLM: side by side under requests, drained, at rest and woken."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import missing
from tests.server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

START_S = 400.0
OLD, NEW = "local:old", "local:new"
#: Quick to start, and small beside another one.
OPTIONS = {"enforce_eager": True, "max_loras": 0, "max_model_len": 512, "max_num_seqs": 8}


def until(condition: Callable[[], Any], what: str, server: Server, within_s: float = START_S) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{server.log[-3000:]}"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if importlib.util.find_spec("vllm") is None:
        missing("engine", "vLLM is not installed: make test installs it")
    imports: Path = tmp_path_factory.mktemp("imports")
    for name in ("old", "new"):
        subprocess.run([sys.executable, "-m", "modelyard.demo.tiny_llama", str(imports / name)], check=True)
    with serving(tmp_path_factory.mktemp("yard") / "data", MODELYARD_IMPORT_DIR=str(imports)) as found:
        for model_id in (OLD, NEW):
            assert found.post(f"/api/v1/models/add/?model_id={model_id}").status == 200
        until(lambda: len(found.get("/api/v1/models/").json()) == 2, "both are in the store", found)
        yield found


def deploy(server: Server, model_id: str, **body: Any) -> str:
    answer = server.post("/api/v1/deploy/", {"model_id": model_id, "options": OPTIONS, **body})
    assert answer.status == 200, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def state_of(server: Server, job_id: str) -> str:
    rows = server.get("/api/v1/deployments/?all=true").json()
    return next((str(row["state"]) for row in rows if row["job_id"] == job_id), "")


def comes_to(server: Server, job_id: str, state: str) -> None:
    until(lambda: state_of(server, job_id) in (state, "FAILED"), f"{job_id} is {state}", server)
    assert state_of(server, job_id) == state, server.get(f"/api/v1/jobs/{job_id}/status/").text


def ask(server: Server, tokens: int) -> tuple[int, str, int]:
    """Ask the current model; return the status, who answered, and how many tokens came."""
    body = {"model": "default", "prompt": "A river", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = server.request("POST", "/v1/completions", json_body=body, timeout_s=START_S)
    said = answer.json()
    return answer.status, said.get("model", str(said)), said.get("usage", {}).get("completion_tokens", 0)


def test_another_model_takes_over_with_no_failed_request_and_the_old_one_drains(server: Server) -> None:
    first = deploy(server, OLD)
    comes_to(server, first, "READY")
    answers: Counter[tuple[int, str, int]] = Counter()
    is_over = threading.Event()

    def client() -> None:
        while not is_over.is_set():
            answers[ask(server, 16)] += 1
            time.sleep(0.2)  # two cores must start the other engine meanwhile

    clients = [threading.Thread(target=client, daemon=True) for _ in range(4)]
    for one in clients:
        one.start()
    second = deploy(server, NEW)
    try:
        comes_to(server, second, "READY")
        comes_to(server, first, "STOPPED")
        until(lambda: answers[200, NEW, 16] > 20, "the new one answers", server)
    finally:
        is_over.set()
        for one in clients:
            one.join(60)
    assert set(answers) == {(200, OLD, 16), (200, NEW, 16)}
    events = server.get(f"/api/v1/jobs/{first}/events?follow=false").text
    assert "Draining" in events
    assert "cut off" not in events
    assert len([one for one in server.processes().values() if " --uds " in one]) == 1


def test_an_idle_engine_rests_and_the_next_request_waits_for_it(server: Server) -> None:
    job_id = deploy(server, NEW, idle_timeout_s=3)
    comes_to(server, job_id, "IDLE")
    assert not [one for one in server.processes().values() if " --uds " in one]
    assert any(card["id"] == NEW for card in server.get("/v1/models").json()["data"])
    assert ask(server, 4) == (200, NEW, 4)
    deploy(server, NEW)
    comes_to(server, job_id, "READY")
