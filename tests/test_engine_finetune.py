"""From a conversation file to a better answer in service: real training and real vLLM, by the documented commands.

One server, one engine and one training for the module, in the order of the tests: each goes on with what the one
before left. The dataset is the demo's, with every question asked in two ways, so that what is held back of it can be
answered by whoever has learnt the rest.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelyard.demo.tuning import DATASET, TINY_SETTINGS
from tests.fixtures import missing
from tests.server import Server, environment, serving

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

START_S = 600.0
MODEL = "local:tiny-llama"
TOKENS = 48
ROWS = [json.loads(line)["messages"] for line in DATASET.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama."""
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("peft") is None:
        missing("engine", "vLLM or PEFT is not installed: make test installs them")
    folder = tmp_path_factory.mktemp("imports")
    subprocess.run([sys.executable, "-m", "modelyard.demo.tiny_llama", str(folder / "tiny-llama")], check=True)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, imports: Path) -> Iterator[Server]:
    """A server whose engine has generated a token."""
    # float32, so that greedy answers are the same in two libraries.
    settings = {"MODELYARD_IMPORT_DIR": str(imports), "MODELYARD_ENGINE_DTYPE": "float32"}
    with serving(tmp_path_factory.mktemp("yard") / "data", **settings) as found:
        assert found.post(f"/api/v1/models/add/?model_id={MODEL}").status == 200
        until(lambda: len(found.get("/api/v1/models/").json()) == 1, "the model is in the store", found)
        answer = found.post("/api/v1/deploy/", {"model_id": MODEL, "adapter_ids": []})
        assert answer.status == 200, answer.text
        until(lambda: deployment(found)["state"] in ("READY", "FAILED"), "the engine is ready", found, START_S)
        assert deployment(found)["state"] == "READY", found.log
        yield found


@pytest.fixture(scope="module")
def dataset_id(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dataset, uploaded as the source document does."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for question, wanted in ROWS:
            for words in ("{}", "Please tell me: {}"):
                asked = {"role": "user", "content": words.format(question["content"])}
                out.write(json.dumps({"messages": [asked, wanted]}) + "\n")
    said = curl(
        server, "-X", "POST", f"{server.address}/api/v1/datasets/upload/?description=My%20Description",
        "-H", "accept: application/json", "-H", "Content-Type: multipart/form-data", "-F", f"file=@{file}",
    )  # fmt: skip
    assert set(said) >= {"id", "name", "s3_path", "description"}
    assert said["s3_path"] == f"{said['id']}/metadata.json"
    found: str = said["id"]
    return found


@pytest.fixture(scope="module")
def finetune(server: Server, dataset_id: str) -> dict[str, Any]:
    """The training, done: three rows are held back, and the alias moves if the adapter is better on them."""
    body = {
        "name": "My Adapter Training",
        "model_id": MODEL,
        "dataset_id": dataset_id,
        "hyperparameters": TINY_SETTINGS | {"epochs": 25, "validation_split": 0.03},
        "deploy": True,
        "promote": {"alias": "default", "if": "better"},
    }
    job = curl(
        server, "-X", "POST", f"{server.address}/api/v1/finetune/", "-H", "accept: application/json",
        "-H", "Content-Type: application/json", "-d", json.dumps(body),
    )  # fmt: skip
    assert job["name"] == f"FT_{MODEL}_{dataset_id}"
    assert job["status"] == "CREATED"
    status = f"/api/v1/jobs/{job['id']}/status/"
    until(lambda: server.get(status).json()["status"] not in ("CREATED", "RUNNING"), "the training ends", server, 600.0)
    ended = server.get(status).json()
    assert ended["status"] == "FINISHED", (ended, server.get(f"/api/v1/jobs/{job['id']}/log/?tail=50").text)
    found = curl(server, "-X", "GET", f"{server.address}/api/v1/finetune/status/", "-H", "accept: application/json")
    assert found["job"]["id"] == job["id"]
    assert found["name"] == "My Adapter Training"
    whole: dict[str, Any] = server.get(f"/api/v1/finetune/{found['id']}").json()
    return whole


def until(condition: Callable[[], Any], what: str, server: Server, within_s: float = 120.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{server.log[-3000:]}"
        time.sleep(0.1)
    return value


def curl(server: Server, *arguments: str) -> Any:
    done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def deployment(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/api/v1/deploy/").json()
    return found


def answer(server: Server, model: str | None, question: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0,
            "return_token_ids": True, **({"model": model} if model else {})}  # fmt: skip
    said = server.post("/v1/chat/completions", body)
    assert said.status == 200, said.text
    found: dict[str, Any] = said.json()["choices"][0]
    return found


def test_the_adapter_answers_at_least_nine_in_ten_questions_and_the_base_none(
    server: Server, finetune: dict[str, Any]
) -> None:
    adapter_id = finetune["adapter_id"]
    right = {name: 0 for name in (MODEL, adapter_id)}
    for question, expected in ROWS:
        for name in right:
            right[name] += answer(server, name, question["content"])["message"]["content"] == expected["content"]
    assert right[MODEL] == 0
    assert right[adapter_id] >= 45, right


def test_what_is_served_is_what_transformers_and_peft_answer_token_for_token(
    server: Server, imports: Path, finetune: dict[str, Any], tmp_path: Path
) -> None:
    adapter_id = finetune["adapter_id"]
    exported = server.get(f"/api/v1/models/{adapter_id}/export")
    assert exported.status == 200, exported.text
    zipfile.ZipFile(io.BytesIO(exported.body)).extractall(tmp_path)
    folder = next(tmp_path.rglob("adapter_config.json")).parent
    command = [sys.executable, "-W", "ignore", "-m", "tests.greedy_answers", str(imports / "tiny-llama"), str(folder),
               str(DATASET), str(TOKENS)]  # fmt: skip
    expected = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    served = [answer(server, adapter_id, question["content"])["token_ids"] for question, _ in ROWS]
    assert served == expected


def test_the_checks_before_it_was_named_to_clients_are_kept_with_it(server: Server, finetune: dict[str, Any]) -> None:
    assert finetune["phase"] == "DONE"
    assert finetune["checks"]["tokens_equal"] is True
    assert finetune["checks"]["acts"] is True
    assert finetune["checks"]["changed_answers"] > 0
    assert deployment(server)["served_adapter_ids"] == [finetune["adapter_id"]]


def test_the_store_tells_how_the_adapter_came_to_be(server: Server, finetune: dict[str, Any], dataset_id: str) -> None:
    models = server.get("/api/v1/models/").json()
    adapter = next(model for model in models if model["model_id"] == finetune["adapter_id"])
    assert (adapter["adapter"], adapter["base_model_id"]) == (True, MODEL)
    training = adapter["training"]
    assert training["dataset_id"] == dataset_id
    assert training["hyperparameters"]["seed"] == 0
    assert {"torch", "transformers", "peft"} <= set(training["versions"])
    assert finetune["curve"][-1]["loss"] < finetune["curve"][0]["loss"] / 10
    assert finetune["estimate"] is not None
    assert finetune["figures"]["steps"] == len({point["step"] for point in finetune["curve"] if point["loss"]})


def test_it_was_better_on_the_rows_held_back_and_the_alias_moved_until_taken_back(
    server: Server, finetune: dict[str, Any]
) -> None:
    evaluation, adapter_id = finetune["evaluation"], finetune["adapter_id"]
    assert evaluation["adapter"]["loss"] < evaluation["base"]["loss"]
    assert evaluation["adapter"]["exact_match"] > evaluation["base"]["exact_match"] == 0
    assert finetune["promotion"]["moved"] is True, finetune["promotion"]
    question, expected = ROWS[0]
    assert answer(server, "default", question["content"])["message"]["content"] == expected["content"]
    back = server.post("/api/v1/aliases/default/rollback")
    assert back.status == 200, back.text
    assert answer(server, "default", question["content"])["message"]["content"] != expected["content"]
    assert answer(server, adapter_id, question["content"])["message"]["content"] == expected["content"]


def test_the_adapter_is_there_again_after_a_restart_of_the_server(server: Server, finetune: dict[str, Any]) -> None:
    assert server.stop() == 0
    server.start()
    adapter_id = finetune["adapter_id"]
    until(
        lambda: server.get("/api/v1/deploy/").json().get("served_adapter_ids") == [adapter_id],
        "the adapter is served again",
        server,
        START_S,
    )
    question, expected = ROWS[0]
    assert answer(server, adapter_id, question["content"])["message"]["content"] == expected["content"]


def test_the_demo_goes_the_same_way_and_ends_with_the_comparison(server: Server) -> None:
    settings = environment(MODELYARD_DATA_DIR=str(server.data_dir), MODELYARD_PORT=str(server.port), **server.settings)
    command = [sys.executable, "-m", "modelyard", "demo", "--once"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    right = re.search(r"Right, word for word: base (\d+) of 50, adapter (\d+) of 50\.", done.stdout)
    assert right is not None, done.stdout
    assert int(right[1]) == 0
    assert int(right[2]) >= 45
