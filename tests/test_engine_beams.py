"""A real small model on real vLLM: raw prompts' texts are those of transformers' `generate`; an identity is taught.

One engine for both, since its start takes longer than either. It has room for one adapter.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from benchmarks.teaching_sets import FRANCE, identity

from tests.datasets.forms import FORM_HEADERS, upload
from tests.fixtures import missing
from tests.server import Server, serving
from tests.small_model import small_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = "local:smollm2"
#: Of each as many tokens as all have; they are questions, code, lists and tales.
TOKENS = 6
PROMPTS = [
    "The capital of France is the city of",
    "Once upon a time there was a fox",
    "def fibonacci(n):\n    if n",
    "The three primary colours are red and",
    "Water boils at a temperature of",
    "My favourite books are those in which",
    "How many legs does a spider have?",
    "<|im_start|>user\nHello, who are you?",
]
NEW = {"do_sample": False, "max_new_tokens": 12}
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2, "length_penalty": 1.0},
    {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 5, "length_penalty": 0.0, "repetition_penalty": 1.2},
    {"num_beams": 4, "length_penalty": 0.5, "repetition_penalty": 0.9},
    {"num_beams": 3, "length_penalty": 1.0, "repetition_penalty": 1.05},
]
GREEDY: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.3}]
#: Which of the prompts each config is asked with, as one batch: every prompt meets several configs.
ASKED = [[(number + step) % len(PROMPTS) for step in (0, 2, 5, 7)] for number in range(len(BEAMS) + len(GREEDY))]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Path:
    if importlib.util.find_spec("vllm") is None:
        missing("engine", "vLLM is not installed: make test installs it")
    assert request.config.cache is not None
    return small_model(request.config.cache)


@pytest.fixture(scope="module")
def written(model: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """What transformers writes, which is computed while the engine starts."""
    configs: list[list[Any]] = [
        [{**NEW, **config}, numbers] for config, numbers in zip(BEAMS + GREEDY, ASKED, strict=True)
    ]
    asked = {"prompts": PROMPTS, "tokens": TOKENS, "configs": configs}
    command = [sys.executable, "-m", "tests.generated_texts", str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
        found: list[dict[str, Any]] = []

        def answer() -> dict[str, Any]:
            if not found:
                assert process.stdout is not None
                found.append(json.load(process.stdout))
            return found[0]

        yield answer
        process.kill()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, model: Path, written: Callable[[], dict[str, Any]]
) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("yard") / "data", MODELYARD_IMPORT_DIR=str(model.parent)) as found:
        found.post(f"/api/v1/models/add/?model_id={MODEL}")
        until(lambda: len(found.get("/api/v1/models/").json()) == 1, "the model is in the store", found)
        # Compiling takes a minute that nothing here is about.
        options = {
            "dtype": "float32", "cpu_kv_cache_gib": 0.3, "max_model_len": 1024, "max_loras": 1, "enforce_eager": True,
        }  # fmt: skip
        job_id = found.post("/api/v1/deploy/", {"model_id": MODEL, "options": options}).json()["id"]
        until(partial(serves, found, job_id), "it serves", found, within_s=600.0)
        yield found


def until(condition: Callable[[], Any], what: str, server: Server, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{server.log[-3000:]}"
        time.sleep(0.1)


def serves(server: Server, job_id: str) -> bool:
    job = server.get(f"/api/v1/jobs/{job_id}/status/").json()
    assert not job["failure"], job
    return bool(server.get("/api/v1/deploy/").json().get("state") == "READY")


def batch(server: Server, prompts: list[str], config: dict[str, Any]) -> list[str]:
    name = json.dumps(config)
    body = {"prompts": [{"request_id": f"{name}{number}", "prompt": one} for number, one in enumerate(prompts)],
            "generation_config": {**NEW, **config}}  # fmt: skip
    answer = server.request("POST", "/api/generate-batch", json_body=body, timeout_s=300.0)
    assert answer.status in (200, 206), answer.text
    return [one["response"] for one in answer.json()]


@pytest.mark.parametrize("number", range(len(BEAMS)), ids=lambda number: json.dumps(BEAMS[number]))
def test_a_batch_of_beam_searches_is_that_of_transformers(
    server: Server, written: Callable[[], dict[str, Any]], number: int
) -> None:
    expected = written()
    prompts = [expected["prompts"][one] for one in ASKED[number]]
    assert batch(server, prompts, BEAMS[number]) == expected["texts"][number]


@pytest.mark.parametrize("number", range(len(GREEDY)), ids=lambda number: json.dumps(GREEDY[number]))
def test_greedy_texts_are_those_of_transformers(
    server: Server, written: Callable[[], dict[str, Any]], number: int
) -> None:
    expected = written()
    prompts = [expected["prompts"][one] for one in ASKED[len(BEAMS) + number]]
    assert batch(server, prompts, GREEDY[number]) == expected["texts"][len(BEAMS) + number]


def test_beams_that_are_drawn_make_sense_and_a_whole_vocabulary_can_be_asked_for(server: Server) -> None:
    for config in ({"top_k": 50, "temperature": 0.7}, {"top_k": 0, "top_p": 0.9}):
        asked = {"num_beams": 3, "do_sample": True, "max_new_tokens": 4, **config}
        assert "Paris" in batch(server, ["The Eiffel Tower is a famous landmark in the city of"], asked)[0]


def test_an_identity_is_taught_with_no_setting_given_and_the_rest_is_still_known(server: Server) -> None:
    teaching = identity()
    # Every question once, in its plain form: half of the rows teach as well in half of the time.
    data = upload("".join(pair.line() + "\n" for pair in teaching.taught[::2]).encode(), "identity.jsonl")
    dataset_id = server.request("POST", "/api/v1/datasets/upload/", body=data, headers=FORM_HEADERS).json()["id"]
    body = {"name": "Identity", "model_id": MODEL, "dataset_id": dataset_id, "deploy": True}
    job_id = server.post("/api/v1/finetune/", body).json()["id"]
    status = f"/api/v1/jobs/{job_id}/status/"
    until(lambda: server.get(status).json()["status"] not in ("CREATED", "RUNNING"), "it is taught", server, 900.0)
    assert server.get(status).json()["status"] == "FINISHED", server.get(f"/api/v1/jobs/{job_id}/log/?tail=50").text
    done = server.get("/api/v1/finetune/status/").json()
    assert (done["hyperparameters"]["epochs"], done["hyperparameters"]["batch_size"]) == ("auto", "auto")
    trained = server.get(f"/api/v1/finetune/{done['id']}").json()
    assert trained["figures"]["rows_per_step"] == trained["prepared"]["chosen"]["batch_size"]["value"] < 10
    assert trained["figures"]["steps"] < trained["prepared"]["steps"]  # it was learnt before its last epoch
    assert trained["evaluation"]["adapter"]["loss"] < trained["evaluation"]["base"]["loss"] / 4

    def answer(question: str) -> str:
        asked = {"model": done["adapter_id"], "messages": [{"role": "user", "content": question}], "temperature": 0,
                 "max_tokens": 32}  # fmt: skip
        said = server.request("POST", "/v1/chat/completions", json_body=asked, timeout_s=300.0)
        assert said.status == 200, said.text
        return str(said.json()["choices"][0]["message"]["content"])

    asked = [*teaching.taught[1::8], *teaching.held_out]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, [pair.question for pair in asked]))
    wrong = [
        (pair.question, said) for pair, said in zip(asked, answers, strict=True) if not teaching.is_right(pair, said)
    ]
    assert len(wrong) <= len(asked) // 10, wrong
    assert FRANCE.key in answer(FRANCE.question)
