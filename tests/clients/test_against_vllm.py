"""Modelyard's answers beside those of the same vLLM asked directly, field by field.

Each case is one request. It is sent to the engine's own socket and through Modelyard, and everything is compared: the
status, every header, every field of the body, every event of a stream. Where the two differ, the case names an entry
of `INTENDED`, and then exactly the places that the entry lists must differ. The manual tells users of each entry.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

import pytest

from modelyard.gateway.envelope import REFUSED
from tests.clients.service import LLAMA, MINILM, Service
from tests.manual import section
from tests.server import Answer

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

#: What is another with every request, wherever it stands; it must be of the same type in both answers.
IDENTITY = frozenset({"id", "item_id", "created", "created_at", "completed_at"})
#: Headers of the connection and the moment; the length is compared with the body's own.
OWN_HEADERS = frozenset({"date", "server", "connection", "transfer-encoding", "keep-alive", "content-length"})
#: Headers that only Modelyard sends: the first with every answer of an engine, the second with streams.
ADDED_HEADERS = frozenset({"x-request-id", "x-accel-buffering"})
ASKED_AGAIN = 4

#: An error of the same status in Modelyard's own words. vLLM adds `Vary: Origin` to every answer.
OWN_WORDS = frozenset({"header vary", "body.error.message", "body.error.type", "body.error.code"})
#: One or the other may also name the field at fault.
MAY_DIFFER = frozenset({"body.error.param"})
#: The form may be another altogether: vLLM has OpenAI's for some errors there, and Anthropic's for others.
OTHER_FORM = OWN_WORDS | {"body.type"}
#: The differences that are meant, by their names in the manual, and where the answers then differ.
INTENDED: dict[str, frozenset[str]] = {
    "errors": OWN_WORDS,
    "fields": OWN_WORDS,
    "media": OWN_WORDS,
    # vLLM's own errors have the form of OpenAI's interface there, or a type that Anthropic's clients do not know.
    "forms": frozenset({"body.error.type"}),
    # Of two answers with different statuses nothing else is compared.
    "types": frozenset({"status"}),
    "bounds": frozenset({"status"}),
}
#: Named in the manual as well, and tested below, in test_openai_errors.py, test_bodies.py or gateway/test_limits.py.
ELSEWHERE = {"names", "headers", "paths", "moments", "bodies", "bounds"}


@dataclass(frozen=True)
class Case:
    """One request: `body` may be bytes, which are sent as they are."""

    name: str
    path: str
    body: Any
    task: str = "generate"
    differs: str | None = None
    kind: str | None = "application/json"


def _chat(name: str, differs: str | None = None, **fields: Any) -> Case:
    body = {"model": LLAMA, "messages": MESSAGES, "temperature": 0, "max_tokens": 8, **fields}
    return Case(f"chat: {name}", "/v1/chat/completions", body, differs=differs)


def _text(name: str, differs: str | None = None, **fields: Any) -> Case:
    body = {"model": LLAMA, "prompt": "The longest river", "temperature": 0, "max_tokens": 8, **fields}
    return Case(f"completions: {name}", "/v1/completions", body, differs=differs)


def _embed(name: str, differs: str | None = None, **fields: Any) -> Case:
    body = {"model": MINILM, "input": "The longest river", **fields}
    return Case(f"embeddings: {name}", "/v1/embeddings", body, "embed", differs)


def _responses(name: str, differs: str | None = None, **fields: Any) -> Case:
    body = {"model": LLAMA, "input": "Hi", "temperature": 0, "max_output_tokens": 6, **fields}
    return Case(f"responses: {name}", "/v1/responses", body, differs=differs)


def _message(name: str, differs: str | None = None, **fields: Any) -> Case:
    body = {"model": LLAMA, "messages": MESSAGES, "temperature": 0, "max_tokens": 6, **fields}
    return Case(f"messages: {name}", "/v1/messages", body, differs=differs)


def _raw(name: str, body: bytes, differs: str | None = None, kind: str | None = "application/json") -> Case:
    return Case(f"raw: {name}", "/v1/chat/completions", body, differs=differs, kind=kind)


MESSAGES = [{"role": "user", "content": "Name three rivers."}]
IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "https://a.test/b.png"}}]
PICKED: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["size", "count"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
LONG = "river " * 3000

CASES = [
    _chat("greedy"),
    _chat("streamed", stream=True),
    _chat("streamed with usage", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    _chat("log-probabilities", logprobs=True, top_logprobs=3),
    _chat("streamed log-probabilities", logprobs=True, top_logprobs=2, stream=True),
    _chat("three choices", n=3, temperature=1, seed=11),
    _chat("stop and penalties", stop=["ab"], presence_penalty=0.5, frequency_penalty=0.5, max_tokens=40),
    _chat("vLLM's own fields", top_k=5, min_p=0.1, seed=3, temperature=0.8, ignore_eos=True, return_token_ids=True),
    _chat("a JSON schema", response_format=FORMAT, max_tokens=40),
    _chat("a named tool", tools=TOOLS, tool_choice=PICKED, max_tokens=40),
    _chat("a named tool, streamed", tools=TOOLS, tool_choice=PICKED, max_tokens=40, stream=True),
    _chat("a tool's result", messages=[
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"image_url": "x"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]),
    _chat("parts of text", messages=[{"role": "user", "content": [{"type": "text", "text": "Name"}, IMAGE[0]]}]),
    _chat("all scripts", messages=[{"role": "user", "content": "Río Дніпро 黄河 🏞️ \u0000 \u2028 \\ \""}]),
    _chat("an unknown field", frobnicate={"deep": [1, 2]}),
    _chat("no model", model=None),
    _chat("no messages", messages=[]),
    _chat("messages of a wrong type", messages="Hi"),
    _chat("an unknown role", messages=[{"role": "potato", "content": "Hi"}]),
    _chat("too many tokens", max_tokens=1_000_000),
    _chat("no tokens", max_tokens=0),
    _chat("a text for a number", temperature="hot"),
    _chat("a bad temperature", temperature=-1),
    _chat("a bad n", n=0),
    _chat("too many log-probabilities", "bounds", logprobs=True, top_logprobs=500),
    _chat("as many log-probabilities as may be", logprobs=True, top_logprobs=20),
    _chat("a bad JSON schema", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}),
    _chat("a prompt that is too long", messages=[{"role": "user", "content": LONG}]),
    _chat("a prompt that is too long, streamed", messages=[{"role": "user", "content": LONG}], stream=True),
    _chat("options of a template", chat_template_kwargs={"enable_thinking": False}),
    _chat("an image", "media", messages=[{"role": "user", "content": IMAGE}]),
    _chat("a template", "fields", chat_template="{{ messages }}"),
    _chat("stream as a text", stream="yes"),
    _chat("model as a number", "errors", model=5),
    _chat("an unknown model", "errors", model="org/other"),
    _text("greedy"),
    _text("streamed", stream=True, stream_options={"include_usage": True}),
    _text("echo", echo=True),
    _text("echo with log-probabilities", echo=True, logprobs=2),
    _text("echo, streamed", echo=True, stream=True),
    _text("token ids", prompt=[300, 301, 302], return_token_ids=True),
    _text("several prompts", prompt=["One", "Two", [303, 304]]),
    _text("beam search", use_beam_search=True, n=2, max_tokens=4),
    _text("beam search, streamed", use_beam_search=True, n=2, stream=True),
    _text("prompt log-probabilities", prompt_logprobs=1),
    _text("all log-probabilities", "bounds", logprobs=-1),
    _text("an empty prompt", prompt=""),
    _text("no prompt", prompt=None),
    _text("token ids that there are not", prompt=[10_000_000]),
    _text("an embedding of the prompt", "fields", prompt_embeds="AAAA"),
    _text("an unknown model", "errors", model="org/other"),
    _embed("one"),
    _embed("several in base64", input=["One", "Two ✓", ""], encoding_format="base64"),
    _embed("token ids", input=[[101, 2146, 102], [101, 102]]),
    _embed("too long", input=LONG),
    _embed("too long, truncated", input=LONG, truncate_prompt_tokens=-1),
    _embed("other dimensions", dimensions=8),
    _embed("a wrong type", input={"text": "x"}),
    _embed("nothing", input=[]),
    _responses("greedy"),
    _responses("streamed", stream=True),
    _responses("a conversation", input=[{"role": "user", "content": "Hi"}], instructions="Be short."),
    _responses("a wrong type", max_output_tokens="many"),
    _message("greedy"),
    _message("streamed", stream=True),
    _message("a system and parts", system="Be short.", messages=[{"role": "user", "content": [IMAGE[0]]}]),
    _message("without max_tokens", "forms", max_tokens=None),
    _message("too many tokens", "forms", max_tokens=1_000_000),
    _message("an unknown model", "forms", model="org/other"),
    Case("messages: counted", "/v1/messages/count_tokens", {"model": LLAMA, "messages": MESSAGES}),
    Case("tokenize", "/tokenize", {"model": LLAMA, "prompt": "The longest river", "return_token_strs": True}),
    Case("tokenize: a conversation", "/tokenize", {"model": LLAMA, "messages": MESSAGES}),
    Case("tokenize: of the embedding model", "/tokenize", {"model": MINILM, "prompt": "a river"}, "embed"),
    Case("tokenize: nothing", "/tokenize", {"model": LLAMA}),
    Case("detokenize", "/detokenize", {"model": LLAMA, "tokens": [300, 301, 302]}),
    Case("detokenize: a wrong type", "/detokenize", {"model": LLAMA, "tokens": "abc"}),
    _raw("no JSON", b'{"model": ', "errors"),
    _raw("no object", b"[1, 2]", "errors"),
    _raw("nothing", b"", "errors"),
    _raw("another type", b"{}", "types", "text/plain"),
    _raw("no type", json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode(), "types", None),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_answer_is_vllms_own_or_differs_as_intended(service: Service, case: Case) -> None:
    ours = case.path if case.path.startswith("/v1") else f"/v1{case.path}"
    intended = INTENDED[case.differs] if case.differs else frozenset()
    may = MAY_DIFFER if intended else frozenset()
    if case.differs == "forms":
        may |= OTHER_FORM - intended
    for _ in range(ASKED_AGAIN):
        # An engine makes its answer's id of the request's.
        headers = {"X-Request-Id": uuid.uuid4().hex} | ({"Content-Type": case.kind} if case.kind else {})
        direct = service.ask_engine(case.task, case.path, case.body, headers)
        passed = service.ask(ours, case.body, headers)
        found = dict(differences(direct, passed))
        # vLLM sends tokens together when it is faster than its reader, so that a stream may be cut elsewhere each time.
        if intended == set(found) or not is_stream(direct):
            break
    assert intended == set(found) - may, found
    if not intended:
        assert passed.headers["x-request-id"] == headers["X-Request-Id"]
        assert passed.headers.get("x-accel-buffering") == ("no" if is_stream(passed) else None)
    if not is_stream(passed):
        assert int(passed.headers["content-length"]) == len(passed.body)


@pytest.mark.parametrize("name", ["default", "Compressa-LLM", "", None])
def test_under_another_name_the_answer_is_the_same(service: Service, name: str | None) -> None:
    body = {"prompt": "Río", "temperature": 0, "max_tokens": 8, "user": "größe"}
    headers = {"X-Request-Id": uuid.uuid4().hex, "Content-Type": "application/json"}
    direct = service.ask_engine("generate", "/v1/completions", {**body, "model": LLAMA}, headers)
    passed = service.ask("/v1/completions", {**body, "model": name}, headers)
    assert differences(direct, passed) == []
    assert passed.json()["model"] == LLAMA


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/v1/chat/completions/batch", "/v1/score", "/pooling", "/metrics/", "/version"]
)
def test_a_path_that_is_not_listed_reaches_no_engine(service: Service, path: str) -> None:
    assert service.ask(path, {"model": LLAMA}, {"Content-Type": "application/json"}).status in (404, 405)


def test_models_are_listed_in_vllms_form_but_for_what_is_said(service: Service) -> None:
    passed = {card["id"]: card for card in service.server.get("/v1/models").json()["data"]}
    [direct] = [card for card in service.engine_models("generate") if card["id"] == LLAMA]
    assert set(direct) - set(passed[LLAMA]) == {"permission", "max_model_len"}
    assert set(passed[LLAMA]) <= set(direct)
    described = section("docs/clients.md", "Differences from vLLM")
    assert "`permission`" in described
    assert "`max_model_len`" in described


def test_the_manual_names_every_difference() -> None:
    described = section("docs/clients.md", "Differences from vLLM")
    assert set(re.findall(r"^- \*\*(\w+)\*\*", described, re.MULTILINE)) == set(INTENDED) | ELSEWHERE
    for field in REFUSED:
        assert f"`{field}`" in described


def is_stream(answer: Answer) -> bool:
    return answer.headers["content-type"].startswith("text/event-stream")


def differences(direct: Answer, passed: Answer) -> list[tuple[str, tuple[Any, Any]]]:
    """Return the places in which two answers differ, with what is there; of another status, only that."""
    if direct.status != passed.status:
        return [("status", (direct.status, passed.status))]
    found: list[tuple[str, tuple[Any, Any]]] = []
    for name in sorted((set(direct.headers) | set(passed.headers)) - OWN_HEADERS - ADDED_HEADERS):
        if direct.headers.get(name) != passed.headers.get(name):
            found.append((f"header {name}", (direct.headers.get(name), passed.headers.get(name))))
    compare(content(direct), content(passed), "body", found)
    return found


def content(answer: Answer) -> Any:
    """Return the JSON of an answer, or the events of a stream, each with its name."""
    if not is_stream(answer):
        return answer.json()
    events = []
    for block in re.split(r"\r?\n\r?\n", answer.text.strip()):
        lines = [line.partition(": ") for line in block.splitlines()]
        data = "\n".join(value for name, _, value in lines if name == "data")
        events.append([data if data == "[DONE]" else json.loads(data), *(v for n, _, v in lines if n != "data")])
    return events


def compare(direct: Any, passed: Any, where: str, found: list[tuple[str, tuple[Any, Any]]]) -> None:
    if isinstance(direct, dict) and isinstance(passed, dict):
        for key in sorted(set(direct) | set(passed)):
            if key in IDENTITY and type(direct.get(key)) is type(passed.get(key)):
                continue
            compare(direct.get(key, ABSENT), passed.get(key, ABSENT), f"{where}.{key}", found)
    elif isinstance(direct, list) and isinstance(passed, list) and len(direct) == len(passed):
        for number, (one, other) in enumerate(zip(direct, passed, strict=True)):
            compare(one, other, f"{where}[{number}]", found)
    elif direct != passed or type(direct) is not type(passed):
        found.append((where, (direct, passed)))


ABSENT = "(absent)"
