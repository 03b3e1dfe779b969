"""The main job with real vLLM, as its users do it: curl and the official client against a real server.

One server for the whole module, one engine for most of it: a start of vLLM takes most of a minute here.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fixtures import missing
from tests.server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

START_S = 300.0
MODEL = "local:tiny-llama"
EMBEDDING = "local:tiny-bert"


def until(condition: Callable[[], Any], what: str, server: Server, within_s: float = 60.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{server.log[-3000:]}"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, a tiny BERT, and a Llama of an architecture that nobody knows."""
    folder = tmp_path_factory.mktemp("imports")
    make = [sys.executable, "-m", "modelyard.demo.tiny_llama"]
    subprocess.run([*make, str(folder / "tiny-llama")], check=True)
    subprocess.run([*make, str(folder / "tiny-bert"), "--tiny-bert"], check=True)
    subprocess.run([*make, str(folder / "odd")], check=True)
    config = folder / "odd" / "config.json"
    config.write_text(config.read_text("utf-8").replace("LlamaForCausalLM", "FrobnicatorForCausalLM"), "utf-8")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, imports: Path) -> Iterator[Server]:
    if importlib.util.find_spec("vllm") is None:
        missing("engine", "vLLM is not installed: make test installs it")
    settings = {"MODELYARD_IMPORT_DIR": str(imports), "MODELYARD_ENGINE_MAX_RESTARTS": "2"}
    with serving(tmp_path_factory.mktemp("yard") / "data", **settings) as found:
        for name in ("tiny-llama", "tiny-bert", "odd"):
            found.post(f"/api/v1/models/add/?model_id=local:{name}")
        until(lambda: len(found.get("/api/v1/models/").json()) == 3, "three models are in the store", found)
        yield found


def deploy(server: Server, model_id: str, **body: Any) -> str:
    answer = server.post("/api/v1/deploy/", {"model_id": model_id, **body})
    assert answer.status == 200, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def is_ready(server: Server, task: str = "generate") -> bool:
    answer = server.get(f"/api/v1/deploy/?task={task}")
    return answer.status == 200 and bool(answer.json()["state"] == "READY")


def job_of(server: Server, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = server.get(f"/api/v1/jobs/{job_id}/status/").json()
    return job


@pytest.fixture(scope="module")
def llama(server: Server) -> str:
    """The id of the job that serves the tiny Llama."""
    job_id = deploy(server, MODEL)
    until(
        lambda: is_ready(server) or job_of(server, job_id)["failure"],
        "the engine is ready",
        server,
        START_S,
    )
    assert is_ready(server), job_of(server, job_id)
    return job_id


def curl(server: Server, *arguments: str) -> Any:
    """Run curl as a user would type it, and return the JSON that it prints."""
    filled = [argument.replace("http://localhost:8080", server.address) for argument in arguments]
    done = subprocess.run(["curl", "-s", "-S", *filled], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


ACCEPT = ("-H", "accept: application/json")
JSON = (*ACCEPT, "-H", "Content-Type: application/json")
API = "http://localhost:8080/api/v1"


def test_the_documents_curl_examples_of_models_jobs_and_deploy_work(server: Server, llama: str) -> None:
    models = curl(server, "-X", "GET", f"{API}/models/", *ACCEPT)
    [listed] = [model for model in models if model["model_id"] == MODEL]
    assert (listed["adapter"], listed["base_model_id"]) == (False, None)
    job = curl(server, "-X", "POST", f"{API}/models/add/?model_id={MODEL}", *ACCEPT, "-d", "")
    assert job["name"] == f"DOWNLOAD_{MODEL}"
    assert {"id", "name", "status", "started_at"} <= job.keys()
    deployed = curl(server, "-X", "GET", f"{API}/deploy/", *ACCEPT)
    assert (deployed["model_id"], deployed["adapter_ids"]) == (MODEL, [])
    again = curl(
        server, "-X", "POST", f"{API}/deploy/", *JSON, "-d", json.dumps({"model_id": MODEL, "adapter_ids": []})
    )
    assert again["id"] == llama
    status = curl(server, "-X", "GET", f"{API}/deploy/status/", *ACCEPT)
    assert (status["model_id"], status["job"]["status"]) == (MODEL, "RUNNING")
    jobs = curl(server, "-X", "GET", f"{API}/jobs/", *ACCEPT)
    assert llama in [listed["id"] for listed in jobs]
    one = curl(server, "-X", "GET", f"{API}/jobs/{llama}/status/", *ACCEPT)
    assert one["name"] == f"DEPLOY_{MODEL}"


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_documents_curl_examples_of_the_openai_like_api_work(server: Server, llama: str, slash: str) -> None:
    asked = {"model": "Compressa-LLM", "max_tokens": 16, "temperature": 0.5, "stream": False}
    prompt = json.dumps({**asked, "prompt": "Who won the world series in 2020?"})
    text = curl(server, "-X", "POST", f"{API}/completions{slash}", *JSON, "-d", prompt)
    assert text["object"] == "text_completion"
    assert text["usage"]["completion_tokens"] <= 16
    messages = [{"role": "user", "content": "Who won the world series in 2020?"}]
    chat = json.dumps({**asked, "messages": messages})
    answer = curl(server, "-X", "POST", f"{API}/chat/completions{slash}", *JSON, "-d", chat)
    assert answer["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("base", ["/v1", "/api/v1"])
def test_the_official_client_lists_chats_and_streams(server: Server, llama: str, base: str) -> None:
    with openai.OpenAI(base_url=server.address + base, api_key="none", max_retries=0) as client:
        assert {MODEL, "default", "Compressa-LLM"} <= {model.id for model in client.models.list()}
        messages: Any = [{"role": "user", "content": "Name three rivers."}]
        whole = client.chat.completions.create(
            model="default", messages=messages, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
        parts = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=12, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        streamed = "".join(part.choices[0].delta.content or "" for part in parts)
        assert streamed == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="in service"):
            client.chat.completions.create(model="org/other", messages=messages)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="default", messages=messages, max_tokens=100_000)


def test_the_other_interfaces_of_the_engine_answer(server: Server, llama: str) -> None:
    tokens = server.post("/v1/tokenize", {"model": "default", "prompt": "The longest river"}).json()["tokens"]
    text = server.post("/api/v1/detokenize", {"model": "default", "tokens": tokens}).json()["prompt"]
    assert "The longest river" in text
    response = server.post("/v1/responses", {"model": "default", "input": "Hi", "max_output_tokens": 4})
    assert response.json()["object"] == "response"
    message = {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
    assert server.post("/v1/messages", message).json()["type"] == "message"


def test_the_first_request_for_log_probabilities_keeps_nobody_waiting(server: Server, llama: str) -> None:
    # vLLM would compile what counts them now, and answer nobody for seconds.
    body = {"model": "default", "prompt": "The longest river", "max_tokens": 4, "temperature": 0}
    assert server.post("/v1/completions", body).status == 200
    began = time.monotonic()
    found = server.post("/v1/completions", body | {"logprobs": 1}).json()["choices"][0]
    assert len(found["logprobs"]["token_logprobs"]) == 4
    assert time.monotonic() - began < 1.5


def test_the_engines_figures_stand_beside_the_servers_own(server: Server, llama: str) -> None:
    figures = server.get("/metrics").text
    assert "modelyard_gateway_requests_total" in figures
    assert f'vllm:num_requests_running{{deployment="{MODEL}"' in figures


def running_requests(server: Server) -> float:
    for line in server.get("/metrics").text.splitlines():
        if line.startswith("vllm:num_requests_running{"):
            return float(line.rpartition(" ")[2])
    raise AssertionError("the engine does not say how many requests run")


def test_a_client_that_goes_away_ends_its_generation(server: Server, llama: str) -> None:
    body = {"model": "default", "prompt": "Hi", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with server.opened("POST", "/v1/completions", json_body=body) as response:
        assert response.read(100)
        until(lambda: running_requests(server) == 1, "the engine generates", server)
    until(lambda: running_requests(server) == 0, "the generation has ended", server, within_s=3.0)


def test_a_server_killed_in_service_comes_back_to_the_same_engine(server: Server, llama: str) -> None:
    engines = set(server.processes())
    server.kill()
    server.start()
    assert is_ready(server)
    assert set(server.processes()) == engines
    assert server.post("/v1/completions", {"model": "default", "prompt": "Hi", "max_tokens": 1}).status == 200


def test_an_engine_and_its_workers_listen_for_this_machine_alone(server: Server, llama: str) -> None:
    processes = server.processes()
    assert len(processes) >= 4, "a keeper, and vLLM's API server, core and worker"
    engines = [pid for pid in processes if b"VLLM_PLUGINS=" in Path(f"/proc/{pid}/environ").read_bytes()]
    assert len(engines) >= 3
    for pid in engines:
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


def test_an_embedding_model_stands_beside_the_generative_one(server: Server, llama: str) -> None:
    job_id = deploy(server, EMBEDDING)
    until(lambda: is_ready(server, "embed") or job_of(server, job_id)["failure"], "it is ready", server, START_S)
    assert is_ready(server, "embed"), job_of(server, job_id)
    asked = json.dumps({"model": "Compressa-Embedding", "input": "Who won the world series in 2020?"})
    answer = curl(server, "-X", "POST", f"{API}/embeddings", *JSON, "-d", asked)
    assert len(answer["data"][0]["embedding"]) > 0
    assert is_ready(server), "the generative one serves on"
    assert server.post("/api/v1/deploy/interrupt/?task=embed").json()["id"] == job_id
    until(lambda: job_of(server, job_id)["status"] == "KILLED", "the embedding model is out of service", server)


def test_an_engine_whose_worker_is_killed_is_started_again_and_then_leaves_nothing(server: Server, llama: str) -> None:
    shared_memory = set(os.listdir("/dev/shm"))
    before = server.processes()
    [core] = [pid for pid, command in before.items() if "EngineCore" in command or "EngineCore" in name_of(pid)]
    os.kill(core, signal.SIGKILL)
    until(lambda: not is_ready(server), "the death was seen", server)
    until(lambda: is_ready(server), "the engine is back", server, START_S)
    assert not set(before) & set(server.processes()), "nothing of the first engine is left"
    assert server.post("/v1/completions", {"model": "default", "prompt": "Hi", "max_tokens": 1}).status == 200
    interrupted = curl(server, "-X", "POST", f"{API}/deploy/interrupt/", *ACCEPT, "-d", "")
    assert interrupted["id"] == llama
    until(lambda: job_of(server, llama)["status"] == "KILLED", "it is out of service", server)
    assert server.processes() == {}
    left = {name for name in set(os.listdir("/dev/shm")) - shared_memory if not name.startswith("PostgreSQL")}
    assert left == set(), "no shared memory is left"


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text("utf-8")


def test_an_architecture_that_vllm_does_not_know_is_named_in_the_failure(server: Server) -> None:
    job_id = deploy(server, "local:odd")
    until(lambda: job_of(server, job_id)["status"] == "FAILED", "the job failed", server, START_S)
    assert job_of(server, job_id)["failure"]["code"] == "unsupported_architecture"
    assert "FrobnicatorForCausalLM" in job_of(server, job_id)["failure"]["message"]
    until(lambda: not server.processes(), "no process is left", server)
