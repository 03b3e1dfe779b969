"""`llm` as its users run it: on the command line, with a model in extra-openai-models.yaml, against real vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.clients.service import LLAMA, Service, openai_client
from tests.fixtures import missing

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

QUESTION = "Name three rivers."
Llm = Callable[..., str]


@pytest.fixture(scope="module")
def llm(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Llm:
    """Run `llm` with what the manual says in its folder, and return what it prints."""
    if importlib.util.find_spec("llm") is None:
        missing("engine", "llm is not installed: make test installs it")
    folder: Path = tmp_path_factory.mktemp("llm")
    address = f"{service.server.address}/v1"
    models = [
        {"model_id": "yard", "model_name": "default", "api_base": address, "supports_schema": True},
        {"model_id": "text", "model_name": LLAMA, "api_base": address, "completion": True},
        {"model_id": "gone", "model_name": "org/other", "api_base": address},
    ]
    (folder / "extra-openai-models.yaml").write_text(yaml.safe_dump(models), "utf-8")

    def run(*arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            # No plugins: that of the small model's package wants what is not installed.
            env={"PATH": os.environ["PATH"], "LLM_USER_PATH": str(folder), "HOME": str(folder), "LLM_LOAD_PLUGINS": ""},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout + (done.stderr if status else "")

    return run


def test_a_question_is_answered_streamed_and_whole_and_remembered(service: Service, llm: Llm) -> None:
    with openai_client(service) as client:
        chat = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": QUESTION}], max_tokens=12, temperature=0
        )
    expected = chat.choices[0].message.content or ""
    options = ("-o", "max_tokens", "12", "-o", "temperature", "0")
    assert llm("-m", "yard", QUESTION, *options).strip() == expected.strip()
    assert llm("-m", "yard", QUESTION, *options, "--no-stream").strip() == expected.strip()
    logged = json.loads(llm("logs", "--json", "-n", "2"))
    assert [entry["response"] for entry in logged] == [expected, expected]
    # The conversation goes on: the second question comes with the first one and its answer.
    assert llm("-m", "yard", "-c", "And lakes?", *options).strip()


def test_an_answer_keeps_to_a_schema(service: Service, llm: Llm) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}},
        "required": ["size"],
        "additionalProperties": False,
    }
    bias = json.dumps(service.no_white_space)
    answer = llm("-m", "yard", QUESTION, "--schema", json.dumps(schema), "-o", "logit_bias", bias)
    jsonschema.validate(json.loads(answer), schema)


def test_a_prompt_is_continued(llm: Llm) -> None:
    assert llm("-m", "text", "The longest river", "-o", "max_tokens", "6").strip()


def test_a_model_that_is_not_there_is_said_in_words(llm: Llm) -> None:
    told = llm("-m", "gone", QUESTION, status=1)
    assert "There is no model 'org/other' in service" in told
    assert LLAMA in told
