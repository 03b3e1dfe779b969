"""The main job with real vLLM, as its users do it: curl and the official client against a real server."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.clients.service import API, LLAMA, LLAMA_OPTIONS, Service, curl, until

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

ACCEPT = ("-H", "accept: application/json")
JSON = (*ACCEPT, "-H", "Content-Type: application/json")


def test_the_documents_curl_examples_of_models_jobs_and_deploy_work(service: Service) -> None:
    models = curl(service.server, "-X", "GET", f"{API}/models/", *ACCEPT)
    [listed] = [model for model in models if model["model_id"] == LLAMA]
    assert (listed["adapter"], listed["base_model_id"]) == (False, None)
    job = curl(service.server, "-X", "POST", f"{API}/models/add/?model_id={LLAMA}", *ACCEPT, "-d", "")
    assert job["name"] == f"DOWNLOAD_{LLAMA}"
    assert {"id", "name", "status", "started_at"} <= job.keys()
    deployed = curl(service.server, "-X", "GET", f"{API}/deploy/", *ACCEPT)
    assert (deployed["model_id"], deployed["adapter_ids"]) == (LLAMA, [])
    job_id = service.job_of(LLAMA)
    wanted = json.dumps({"model_id": LLAMA, "adapter_ids": [], "options": LLAMA_OPTIONS})
    again = curl(service.server, "-X", "POST", f"{API}/deploy/", *JSON, "-d", wanted)
    assert again["id"] == job_id
    status = curl(service.server, "-X", "GET", f"{API}/deploy/status/", *ACCEPT)
    assert (status["model_id"], status["job"]["status"]) == (LLAMA, "RUNNING")
    jobs = curl(service.server, "-X", "GET", f"{API}/jobs/", *ACCEPT)
    assert job_id in [listed["id"] for listed in jobs]
    one = curl(service.server, "-X", "GET", f"{API}/jobs/{job_id}/status/", *ACCEPT)
    assert one["name"] == f"DEPLOY_{LLAMA}"


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_documents_curl_examples_of_the_openai_like_api_work(service: Service, slash: str) -> None:
    asked = {"model": "Compressa-LLM", "max_tokens": 16, "temperature": 0.5, "stream": False}
    prompt = json.dumps({**asked, "prompt": "Who won the world series in 2020?"})
    text = curl(service.server, "-X", "POST", f"{API}/completions{slash}", *JSON, "-d", prompt)
    assert text["object"] == "text_completion"
    assert text["usage"]["completion_tokens"] <= 16
    messages = [{"role": "user", "content": "Who won the world series in 2020?"}]
    chat = json.dumps({**asked, "messages": messages})
    answer = curl(service.server, "-X", "POST", f"{API}/chat/completions{slash}", *JSON, "-d", chat)
    assert answer["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("base", ["/v1", "/api/v1"])
def test_the_official_client_lists_chats_and_streams(service: Service, base: str) -> None:
    with openai.OpenAI(base_url=service.server.address + base, api_key="none", max_retries=0) as client:
        assert {LLAMA, "default", "Compressa-LLM"} <= {model.id for model in client.models.list()}
        messages: Any = [{"role": "user", "content": "Name three rivers."}]
        whole = client.chat.completions.create(
            model="default", messages=messages, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
        parts = client.chat.completions.create(
            model=LLAMA, messages=messages, max_tokens=12, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        streamed = "".join(part.choices[0].delta.content or "" for part in parts)
        assert streamed == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="in service"):
            client.chat.completions.create(model="org/other", messages=messages)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="default", messages=messages, max_tokens=100_000)


def test_the_other_interfaces_of_the_engine_answer(service: Service) -> None:
    tokens = service.server.post("/v1/tokenize", {"model": "default", "prompt": "The longest river"}).json()["tokens"]
    text = service.server.post("/api/v1/detokenize", {"model": "default", "tokens": tokens}).json()["prompt"]
    assert "The longest river" in text
    response = service.server.post("/v1/responses", {"model": "default", "input": "Hi", "max_output_tokens": 4})
    assert response.json()["object"] == "response"
    message = {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
    assert service.server.post("/v1/messages", message).json()["type"] == "message"


def test_the_first_request_for_log_probabilities_keeps_nobody_waiting(service: Service) -> None:
    # vLLM would compile what counts them then, and answer nobody for 14 s.
    assert service.first_logprobs_s < 5.0


def test_the_engines_figures_stand_beside_the_servers_own(service: Service) -> None:
    figures = service.server.get("/metrics").text
    assert "modelyard_gateway_requests_total" in figures
    assert f'vllm:num_requests_running{{deployment="{LLAMA}"' in figures


def test_a_client_that_goes_away_ends_its_generation(service: Service) -> None:
    body = {"model": "default", "prompt": "Hi", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with service.server.opened("POST", "/v1/completions", json_body=body) as response:
        assert response.read(100)
        until(lambda: service.running_requests() == 1, "the engine generates", service.server)
    until(lambda: service.running_requests() == 0, "the generation has ended", service.server, 3.0)
