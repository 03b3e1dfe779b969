"""An engine's own errors, as clients of this server get them."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.engine.options import EngineOptions
from modelyard.gateway.engine_words import OURS, explain, in_our_words
from modelyard.settings import Settings
from tests.fixtures import missing
from tests.gateway.conftest import Running
from tests.gateway.test_relay import CHAT, ask

TOOLS = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'


def body(message: str) -> bytes:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return json.dumps({"error": error}).encode()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (TOOLS, "On this server options.tool_call_parser of POST /api/v1/deploy/ sets --enable-auto-tool-choice and "
                "--tool-call-parser."),
        ("Please set --reasoning-parser and/or --reasoning-config to use it.", "options.reasoning_parser of POST"),
        ("Set VLLM_MAX_N_SEQUENCES to increase this limit.", "On this server MODELYARD_REQUEST_MAX_N takes the place"),
        ("Set max_logprobs (--max-logprobs) to at least 7.", "--max-logprobs cannot be set on this server."),
        ("You must set `--enable-mm-embeds` to input `image_embeds`", "--enable-mm-embeds cannot be set on this"),
        ("Decrease it, or set `--max-model-len`.", "options.max_model_len of POST /api/v1/deploy/ sets"),
    ],
)  # fmt: skip
def test_a_switch_of_vllms_gains_its_name_here_and_the_words_stay(message: str, said: str) -> None:
    assert explain(message).startswith(message)
    assert said in explain(message)
    changed = json.loads(in_our_words(400, body(message), for_anthropic=False))["error"]
    assert changed == {"message": explain(message), "type": "BadRequestError", "param": None, "code": 400}


@pytest.mark.parametrize("message", ["too few.", "a -- b", "--dry-run is not a temperature", "x--max-model-len", "---"])
def test_other_words_are_handed_on_as_they_came(message: str) -> None:
    odd = body(message).replace(b", ", b" ,  ")
    assert in_our_words(400, odd, for_anthropic=False) == odd


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize("for_anthropic", [False, True])
def test_an_error_without_words_says_where_the_cause_is(empty: str, for_anthropic: bool) -> None:
    for odd in (body(empty), body(empty).replace(b": ", b":")):
        told = json.loads(in_our_words(500, odd, for_anthropic=for_anthropic))["error"]
        assert "GET /api/v1/deployments/{id}/attempts/{number}/log/" in told["message"]


@pytest.mark.parametrize("odd", [b"", b"--", b"[1]", b'{"error": "--dtype"}', b'{"error": {"message": 5, "a": "--x"}}'])
def test_what_is_no_error_is_handed_on_and_has_anthropics_form_where_that_is_spoken(odd: bytes) -> None:
    assert in_our_words(500, odd, for_anthropic=False) == odd
    told = json.loads(in_our_words(500, odd, for_anthropic=True))
    assert (told["type"], told["error"]["type"]) == ("error", "api_error")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "not_found_error"), (413, "request_too_large"),
     (422, "invalid_request_error"), (429, "rate_limit_error"), (500, "api_error"), (501, "api_error"),
     (503, "overloaded_error")],
)  # fmt: skip
@pytest.mark.parametrize("form", ["OpenAI's", "Anthropic's"])
def test_anthropics_types_go_by_the_status(status: int, kind: str, form: str) -> None:
    own = {"type": "error", "error": {"type": "BadRequestError", "message": TOOLS}}
    sent = body(TOOLS) if form == "OpenAI's" else json.dumps(own).encode()
    told = json.loads(in_our_words(status, sent, for_anthropic=True))
    assert told == {"type": "error", "error": {"type": kind, "message": explain(TOOLS)}}


def test_every_name_of_ours_is_there() -> None:
    names = {name for name in OURS.values() if name}
    assert len(names) > 10
    for ours in names:
        kind, _, field = ours.partition(".")
        if kind == "options":
            assert field in EngineOptions.model_fields, ours
        else:
            assert ours.removeprefix("MODELYARD_").lower() in Settings.model_fields, ours


def test_a_long_message_is_looked_at_quickly() -> None:
    began = time.process_time()
    for part in ("-", "--a", "VLLM_", "--tool-call-parser "):
        explain(part * (256 * 1024 // len(part)))
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/v1/messages/count_tokens"])
def test_through_the_gateway_the_error_is_whole_and_of_its_length(gateway: Running, path: str) -> None:
    gateway.engine(misbehave={"fail": {"status": 400, "message": TOOLS, "from_request": 1}})
    status, data, headers = ask(gateway, path, CHAT)
    if path.endswith("count_tokens"):
        return
    assert (status, int(headers["content-length"]), headers["content-type"]) == (400, len(data), "application/json")
    told: dict[str, Any] = json.loads(data)
    assert told["error"]["message"] == explain(TOOLS)
    assert ("type" in told) == path.endswith("messages")


def vllm_messages() -> list[str]:
    """Return the switches in the texts of that module of vLLM's which refuses tools."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        missing("engine", "vLLM is not installed")
    text = (Path(found.origin).parent / "renderers" / "online_renderer.py").read_text("utf-8")
    return re.findall(r'"[^"]*(--[a-z-]{4,})[^"]*"', text)


@pytest.mark.engine
def test_the_switches_that_vllm_names_to_clients_are_known() -> None:
    found = set(vllm_messages())
    assert "--tool-call-parser" in found
    assert found <= set(OURS)
