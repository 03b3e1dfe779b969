"""The service's engines leave, die and come back: the last tests of the one service (tests/clients/service.py).

Each begins with what the one before has left, and brings about what it needs where that did not run.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.clients.service import API, LLAMA, MINILM, START_S, Service, curl, until
from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

NEW = "local:new"
#: Quick to start, and small beside another one.
OPTIONS = {"enforce_eager": True, "max_loras": 0, "max_model_len": 512, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def server(service: Service) -> Server:
    """The service's server, with a copy of the Llama under another name in its store."""
    shutil.copytree(service.llama, service.llama.with_name("new"))
    assert service.add("new") == NEW
    return service.server


def deploy(server: Server, model_id: str, **body: Any) -> str:
    answer = server.post("/api/v1/deploy/", {"model_id": model_id, "options": OPTIONS, **body})
    assert answer.status == 200, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def job_of(server: Server, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = server.get(f"/api/v1/jobs/{job_id}/status/").json()
    return job


def is_ready(server: Server, task: str = "generate") -> bool:
    answer = server.get(f"/api/v1/deploy/?task={task}")
    return answer.status == 200 and bool(answer.json()["state"] == "READY")


def new_one(server: Server) -> str:
    """Return the job that serves the new model, at work for good, which leaves no other."""
    if server.get("/api/v1/deploy/?task=embed").status == 200:
        server.post("/api/v1/deploy/interrupt/?task=embed")
    job_id = deploy(server, NEW)
    comes_to(server, job_id, "READY")
    until(lambda: len(engines(server)) == 1, "it is the only one", server)
    return job_id


def engines(server: Server) -> list[str]:
    return [one for one in server.processes().values() if " --uds " in one]


def state_of(server: Server, job_id: str) -> str:
    rows = server.get("/api/v1/deployments/?all=true").json()
    return next((str(row["state"]) for row in rows if row["job_id"] == job_id), "")


def comes_to(server: Server, job_id: str, state: str) -> None:
    until(lambda: state_of(server, job_id) in (state, "FAILED"), f"{job_id} is {state}", server, START_S)
    assert state_of(server, job_id) == state, server.get(f"/api/v1/jobs/{job_id}/status/").text


def ask(server: Server, tokens: int) -> tuple[int, str, int]:
    """Ask the current model; return the status, who answered, and how many tokens came."""
    body = {"model": "default", "prompt": "A river", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = server.request("POST", "/v1/completions", json_body=body, timeout_s=START_S)
    said = answer.json()
    return answer.status, said.get("model", str(said)), said.get("usage", {}).get("completion_tokens", 0)


def test_a_server_killed_in_service_comes_back_to_the_same_engine(server: Server) -> None:
    running = set(server.processes())
    server.kill()
    server.start()
    assert is_ready(server)
    assert set(server.processes()) == running
    assert server.post("/v1/completions", {"model": "default", "prompt": "Hi", "max_tokens": 1}).status == 200


def test_an_engine_and_its_workers_listen_for_this_machine_alone(server: Server) -> None:
    processes = server.processes()
    assert len(processes) >= 4, "a keeper, and vLLM's API server, core and worker"
    of_engines = [pid for pid in processes if b"VLLM_PLUGINS=" in Path(f"/proc/{pid}/environ").read_bytes()]
    assert len(of_engines) >= 3
    for pid in of_engines:
        # Where the host's name leads to is the machine's to say, and may be loopback by chance.
        assert b"GLOO_SOCKET_IFNAME=lo\0" in Path(f"/proc/{pid}/environ").read_bytes()
    listening = listening_sockets(set(processes))
    assert listening, "the workers' own library listens, even for one worker"
    assert {address for _, address in listening} <= {"127.0.0.1", "::1"}, listening


def listening_sockets(pids: set[int]) -> list[tuple[int, str]]:
    """Return process and address of each TCP or UDP socket that takes what others send."""
    inodes = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(link)
                if target.startswith("socket:["):
                    inodes[target[8:-1]] = pid
    found = []
    for name, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/self/net/{name}").read_text("ascii").splitlines()[1:]:
            words = line.split()
            if words[3] == state and words[9] in inodes:
                raw = bytes.fromhex(words[1].partition(":")[0])
                # The kernel writes each 32 bits in the machine's own order.
                packed = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
                found.append((inodes[words[9]], str(ipaddress.ip_address(packed))))
    return found


def test_an_embedding_model_leaves_and_the_generative_one_serves_on(service: Service, server: Server) -> None:
    job_id = service.job_of(MINILM)
    assert is_ready(server, "embed")
    assert server.post("/api/v1/deploy/interrupt/?task=embed").json()["id"] == job_id
    until(lambda: job_of(server, job_id)["status"] == "KILLED", "the embedding model is out of service", server)
    assert is_ready(server), "the generative one serves on"
    assert len(engines(server)) == 1


def test_another_model_takes_over_with_no_failed_request_and_the_old_one_drains(
    service: Service, server: Server
) -> None:
    first = service.job_of(LLAMA)
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
        until(lambda: answers[200, NEW, 16] > 20, "the new one answers", server, START_S)
    finally:
        is_over.set()
        for one in clients:
            one.join(60)
    assert set(answers) == {(200, LLAMA, 16), (200, NEW, 16)}
    events = server.get(f"/api/v1/jobs/{first}/events?follow=false").text
    assert "Draining" in events
    assert "cut off" not in events
    new_one(server)


def test_an_idle_engine_rests_and_the_next_request_waits_for_it(server: Server) -> None:
    job_id = deploy(server, NEW, idle_timeout_s=3)
    comes_to(server, job_id, "IDLE")
    assert not engines(server)
    assert any(card["id"] == NEW for card in server.get("/v1/models").json()["data"])
    assert ask(server, 4) == (200, NEW, 4)
    deploy(server, NEW)
    comes_to(server, job_id, "READY")


def test_an_engine_whose_worker_is_killed_is_started_again_and_then_leaves_nothing(server: Server) -> None:
    job_id = new_one(server)
    shared_memory = set(os.listdir("/dev/shm"))
    before = server.processes()
    [core] = [pid for pid, command in before.items() if "EngineCore" in command or "EngineCore" in name_of(pid)]
    os.kill(core, signal.SIGKILL)
    until(lambda: not is_ready(server), "the death was seen", server)
    until(lambda: is_ready(server), "the engine is back", server, START_S)
    assert not set(before) & set(server.processes()), "nothing of the first engine is left"
    assert server.post("/v1/completions", {"model": "default", "prompt": "Hi", "max_tokens": 1}).status == 200
    interrupted = curl(server, "-X", "POST", f"{API}/deploy/interrupt/", "-d", "")
    assert interrupted["id"] == job_id
    until(lambda: job_of(server, job_id)["status"] == "KILLED", "it is out of service", server)
    until(lambda: not server.processes(), "no process is left", server)
    left = {name for name in set(os.listdir("/dev/shm")) - shared_memory if not name.startswith("PostgreSQL")}
    assert left == set(), "no shared memory is left"


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text("utf-8")


def test_an_architecture_that_vllm_does_not_know_is_named_in_the_failure(service: Service, server: Server) -> None:
    odd = service.llama.with_name("odd")
    shutil.copytree(service.llama, odd)
    config = (odd / "config.json").read_text("utf-8")
    (odd / "config.json").write_text(config.replace("LlamaForCausalLM", "FrobnicatorForCausalLM"), "utf-8")
    job_id = deploy(server, service.add("odd"))
    until(lambda: job_of(server, job_id)["status"] == "FAILED", "the job failed", server, START_S)
    assert job_of(server, job_id)["failure"]["code"] == "unsupported_architecture"
    assert "FrobnicatorForCausalLM" in job_of(server, job_id)["failure"]["message"]
    until(lambda: not server.processes(), "no process is left", server)
