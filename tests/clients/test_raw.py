"""Raw prompts on real vLLM, beside what transformers says of the same models.

Two models on one server: the demo's random Llama, whose tokens are bytes of any kind, and one that recites a text with
a tokenizer of SentencePiece's kind (`tests.reciter`). Both count in float32, in which vLLM and transformers agree.
"""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.service import LLAMA, LLAMA_OPTIONS, PAGE, Service, until
from tests.reciter import PROMPT, TEXT, token_ids, write_reciter
from tests.server import Answer, Server

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

START_S = 400.0
RECITER = "local:reciter"
ONE, BATCH = "/api/generate-one", "/api/generate-batch"
END, TORN = "</s>", "\N{REPLACEMENT CHARACTER}"
PROMPTS = ["[INST] Name three rivers. [/INST]", "Hello", "The longest river is", "été 日本 🙂"]
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def server(service: Service) -> Iterator[Server]:
    """The service's server, on which the reciter stands beside the Llama for the time of these tests."""
    write_reciter(service.llama.with_name("reciter"))
    assert service.add("reciter") == RECITER
    found = service.server
    options = {"dtype": "float32", "cpu_kv_cache_gib": 0.2}
    beside = {"model_id": RECITER, "keep_others": True, "options": options}
    job_id = found.post("/api/v1/deploy/", beside).json()["id"]
    until(lambda: serves(found, job_id), "the reciter serves", found, START_S)
    # The one that was asked for last is the current one.
    found.post("/api/v1/deploy/", {"model_id": LLAMA, "keep_others": True, "options": LLAMA_OPTIONS})
    until(lambda: found.get("/api/v1/deploy/").json()["model_id"] == LLAMA, "the Llama is the current one", found)
    yield found
    assert found.post(f"/api/v1/jobs/{job_id}/interrupt/").status == 200
    until(lambda: not serves(found, job_id), "the reciter is out of service", found)


def serves(server: Server, job_id: str) -> bool:
    job = server.get(f"/api/v1/jobs/{job_id}/status/").json()
    assert not job["failure"], job
    deployments = server.get("/api/v1/deployments/").json()
    return any(one["job_id"] == job_id and one["state"] == "READY" for one in deployments)


class Reference:
    """transformers' own answers of the random Llama."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def greedy(self, prompt: str, tokens: int) -> tuple[str, str]:
        """Return the prompt and what follows it, special tokens included and in whole characters."""
        given = self.tokenizer(prompt, return_tensors="pt")
        [ids] = self.model.generate(**given, max_new_tokens=tokens, do_sample=False)
        before = self.tokenizer.decode(given["input_ids"][0], skip_special_tokens=False)
        whole = self.tokenizer.decode(ids, skip_special_tokens=False)
        return before, whole[len(before) :].rstrip(TORN)


@pytest.fixture(scope="module")
def reference(service: Service) -> Reference:
    return Reference(service.llama)


def one(server: Server, request_id: str, prompt: str | None, config: dict[str, Any], **more: Any) -> str:
    body = {"request_id": request_id, "generation_config": config, **more}
    answer = server.post(ONE, body if prompt is None else {**body, "prompt": prompt})
    assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8"), answer.text
    return answer.text


def batch(server: Server, prompts: dict[str, str | None], config: dict[str, Any], **more: Any) -> Answer:
    items = [{"request_id": name} | ({} if text is None else {"prompt": text}) for name, text in prompts.items()]
    return server.post(BATCH, {"prompts": items, "generation_config": config, **more})


@pytest.mark.parametrize("streams", [True, False])
def test_greedy_text_is_that_of_transformers(server: Server, reference: Reference, streams: bool) -> None:
    config = {**GREEDY, "max_new_tokens": 48}
    for number, prompt in enumerate(PROMPTS):
        before, after = reference.greedy(prompt, 48)
        assert one(server, f"greedy{number}{streams}", prompt, config, stream_response=streams) == after
        full = one(server, f"full{number}{streams}", prompt, config, stream_response=streams, only_new_tokens=False)
        assert full == before + after


def test_a_greedy_batch_is_that_of_transformers_and_says_that_it_stopped(server: Server, reference: Reference) -> None:
    asked: dict[str, str | None] = {f"b{number}": prompt for number, prompt in enumerate(PROMPTS)}
    answer = batch(server, asked, {**GREEDY, "max_new_tokens": 24}, only_new_tokens=False)
    assert answer.status == 206
    for (name, prompt), said in zip(asked.items(), answer.json(), strict=True):
        before, after = reference.greedy(prompt or "", 24)
        assert said == {"request_id": name, "prompt": before, "response": after}


def test_a_continued_text_is_that_of_one_long_run(server: Server) -> None:
    for prompt in PROMPTS:
        whole = one(server, f"long{prompt}", prompt, {**GREEDY, "max_new_tokens": 30}, model=LLAMA)
        pieces: list[str] = []
        for number, tokens in enumerate((1, 2, 3, 4, 5, 5, 4, 3, 2, 1)):
            config = {**GREEDY, "max_new_tokens": tokens}
            told = {"stream_response": number % 3 != 0, "model": LLAMA}
            pieces.append(one(server, f"short{prompt}", None if pieces else prompt, config, **told))
        assert "".join(pieces) == whole


def test_a_finished_text_ends_with_the_ending_token_and_a_stopped_one_does_not(server: Server) -> None:
    said = one(server, "end", PROMPT, GREEDY, model=RECITER)
    assert said == TEXT + END, "its first space included"
    assert one(server, "end", PROMPT, GREEDY, model=RECITER, only_new_tokens=False) == "<s> " + PROMPT + TEXT + END
    assert (
        one(server, "stop", PROMPT, {**GREEDY, "max_new_tokens": 4}, model=RECITER) == TEXT[: len(" Soft paws at dawn")]
    )
    assert one(server, "stop", None, GREEDY, model=RECITER) == TEXT[len(" Soft paws at dawn") :] + END


@pytest.mark.parametrize("streams", [True, False])
def test_a_text_may_stop_at_any_token_also_inside_a_character(server: Server, streams: bool) -> None:
    length = len(token_ids()) - 2
    assert length > 10
    for tokens in range(1, length):
        name, told = f"torn{tokens}{streams}", {"model": RECITER, "stream_response": streams}
        first = one(server, name, PROMPT, {**GREEDY, "max_new_tokens": tokens}, **told)
        shown = one(server, name, None, {**GREEDY, "max_new_tokens": 1}, only_new_tokens=False, **told)
        rest = one(server, name, None, GREEDY, **told) if not shown.endswith(END) else ""
        assert TORN not in first + shown + rest
        assert (f"<s> {PROMPT}" + TEXT).startswith(f"<s> {PROMPT}" + first)
        assert shown + rest == f"<s> {PROMPT}" + TEXT + END, tokens


def test_a_batch_is_206_until_every_text_has_ended_and_what_ended_is_not_extended(server: Server) -> None:
    asked: dict[str, str | None] = {"long": PROMPT, "short": PROMPT + TEXT.removesuffix(".")}
    first = batch(server, asked, {**GREEDY, "max_new_tokens": 4}, model=RECITER)
    assert (first.status, [said["response"] for said in first.json()]) == (206, [" Soft paws at dawn", "." + END])
    rest = batch(server, dict.fromkeys(asked), GREEDY, only_new_tokens=False)
    assert rest.status == 200
    assert [said["prompt"] + said["response"] for said in rest.json()] == [f"<s> {PROMPT}{TEXT}{END}"] * 2


def test_an_empty_prompt_is_a_text_of_its_own_in_a_batch(server: Server) -> None:
    answer = batch(server, {"empty": ""}, {**GREEDY, "max_new_tokens": 3}, model=RECITER, only_new_tokens=False)
    assert answer.status == 206
    assert answer.json()[0]["prompt"] == "<s>"
    refused = batch(server, {"empty": ""}, GREEDY, model=LLAMA)
    assert (refused.status, "prompts[0].prompt is empty" in refused.text) == (400, True), "it has no first token"


def test_beams_are_searched_and_go_on(server: Server) -> None:
    beams = {"num_beams": 3, "length_penalty": 0.5}
    said = one(server, "beams", PROMPT, {**beams, "max_new_tokens": 20}, model=RECITER)
    assert said == TEXT + END
    first = one(server, "beams", PROMPT, {**beams, "max_new_tokens": 7}, model=RECITER)
    assert first + one(server, "beams", None, {**beams, "max_new_tokens": 20}, model=RECITER) == TEXT + END
    asked: dict[str, str | None] = {"x": PROMPT, "y": PROMPT + " Soft"}
    answer = batch(server, asked, {**beams, "max_new_tokens": 20}, model=RECITER)
    assert (answer.status, [said["response"] for said in answer.json()]) == (
        200, [TEXT + END, TEXT.removeprefix(" Soft") + END],
    )  # fmt: skip
    most = one(server, "most", "Hello", {"num_beams": 10, "max_new_tokens": 2}, model=LLAMA)
    assert most, "as many as a request may ask for"


def test_what_vllm_would_refuse_is_refused_with_the_fields_name(server: Server) -> None:
    for config, field in (({"temperature": 2.01}, "temperature"), ({"max_new_tokens": 2049}, "max_new_tokens")):
        answer = server.post(ONE, {"request_id": "bad", "prompt": "Hi", "generation_config": config})
        assert (answer.status, f"generation_config.{field} must be" in answer.text) == (400, True)
    for config in ({"temperature": 0}, {"temperature": 2, "top_k": -1, "top_p": 0.001}, {"top_k": 1_000_000_000},
                   {"repetition_penalty": 100, "length_penalty": -10}, {"repetition_penalty": 0.01}):  # fmt: skip
        assert one(server, f"edge{config}", "Hello", {**config, "max_new_tokens": 2})
    for penalty in (-10, 10):
        config = {"num_beams": 2, "length_penalty": penalty, "max_new_tokens": 2}
        assert one(server, f"penalty{penalty}", "Hello", config)
    long = server.post(ONE, {"request_id": "bad", "prompt": "river " * 4000})
    assert (long.status, long.text.startswith("prompt has ")) == (400, True), long.text


def generated(server: Server) -> float:
    """Return how many tokens the engines have generated; those of beams, which are many short requests, too."""
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:generation_tokens_total{"))


@pytest.mark.parametrize(
    "body",
    [
        {"request_id": "gone", "prompt": "Hello"},
        {"prompts": [{"request_id": "gone1", "prompt": "Hello"}, {"request_id": "gone2", "prompt": "Hi"}]},
        {"request_id": "gone3", "prompt": "Hello", "generation_config": {"num_beams": 4}},
    ],
    ids=["streamed", "batch", "beams"],
)
def test_a_client_that_goes_away_ends_its_generation(server: Server, body: dict[str, Any]) -> None:
    before = generated(server)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", BATCH if "prompts" in body else ONE, json.dumps({**body, "model": LLAMA}).encode())
    until(lambda: generated(server) > before + 3, "the engine generates", server)
    connection.close()
    until(lambda: len({generated(server) for _ in range(15)}) == 1, "it has stopped", server, within_s=15.0)
    assert generated(server) < before + 2000 * len(body.get("prompts", "1")), "before its length"


#: The document's two payloads, as they are printed there.
PRINTED_ONE = """{
  "request_id": "YmFzZTY0",
  "prompt": "[INST] Generate a very long poem about 1000 cats [/INST]\\n\\n",
  "only_new_tokens": true,
  "stream_response": true,
  "generation_config": {
    "num_beams": 1,
    "do_sample": true,
    "temperature": 1,
    "top_p": 1,
    "top_k": 50,
    "max_new_tokens": 2048,
    "repetition_penalty": 1,
    "length_penalty": 1
  }
}"""
PRINTED_BATCH = """{
  "prompts": [
    {
      "request_id": "YmFzZTY0",
      "prompt": "[INST] Generate a very long poem about 1000 cats [/INST]\\n\\n"
    },
    {
      "request_id": "rFERfgE",
      "prompt": "[INST] Generate a short poem about 1000 dogs [/INST]\\n\\n"
    }
  ],
  "only_new_tokens": false,
  "generation_config": {
    "num_beams": 1,
    "do_sample": true,
    "temperature": 1,
    "top_p": 1,
    "top_k": 50,
    "max_new_tokens": 100,
    "repetition_penalty": 1,
    "length_penalty": 1
  }
}"""


def as_a_page(server: Server, path: str, body: str) -> subprocess.CompletedProcess[str]:
    """Send what a browser sends for the document's `fetch(url, {method: 'POST', body: JSON.stringify(postData)})`."""
    headers = ("Content-Type: text/plain;charset=UTF-8", f"Origin: {PAGE}", "Sec-Fetch-Site: cross-site")
    told = [part for header in headers for part in ("-H", header)]
    command = ["curl", "-sS", "-N", "-i", "-X", "POST", *told, "--data-binary", body, server.address + path]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def test_the_documents_examples_work_as_printed_from_a_page_that_may_call(server: Server) -> None:
    head, _, text = as_a_page(server, ONE, PRINTED_ONE).stdout.partition("\n\n")
    assert head.startswith("HTTP/1.1 200 ")
    assert f"access-control-allow-origin: {PAGE}" in head
    assert text  # how long it gets is chance
    head, _, said = as_a_page(server, BATCH, PRINTED_BATCH).stdout.partition("\n\n")
    assert head.startswith("HTTP/1.1 206 ")
    assert [list(answer) for answer in json.loads(said)] == [["request_id", "prompt", "response"]] * 2
    assert [answer["request_id"] for answer in json.loads(said)] == ["YmFzZTY0", "rFERfgE"]
    assert json.loads(said)[1]["prompt"] == "[INST] Generate a short poem about 1000 dogs [/INST]\n\n"
