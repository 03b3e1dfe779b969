"""The gateway over real sockets, before real engines that behave and misbehave."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.conftest import Running, wait_until
from tests.no_files import no_files_left

CHAT = {"model": "acme/tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
STREAM = {**CHAT, "stream": True}


def ask(
    gateway: Running, path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, bytes, http.client.HTTPMessage]:
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    try:
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def ask_engine(path: Path, target: str, body: Any) -> bytes:
    connection = http.client.HTTPConnection("engine")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    try:
        connection.request("POST", target, json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse().read()
    finally:
        connection.close()


def error_of(answer: tuple[int, bytes, http.client.HTTPMessage]) -> tuple[int, str]:
    return answer[0], json.loads(answer[1])["error"]["code"]


def send_head(gateway: Running, path: str, *headers: str) -> socket.socket:
    link = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    lines = [f"POST {path} HTTP/1.1", "Host: gateway", "Content-Type: application/json", *headers]
    link.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    return link


def send(gateway: Running, path: str, body: Any) -> socket.socket:
    data = json.dumps(body).encode()
    link = send_head(gateway, path, f"Content-Length: {len(data)}")
    link.sendall(data)
    return link


def read_all(link: socket.socket) -> bytes:
    parts = []
    with link:
        while part := link.recv(65536):
            parts.append(part)
    return b"".join(parts)


def without_identity(data: bytes) -> bytes:
    return re.sub(rb'"(id|created|created_at)":\s?("[^"]*"|\d+)', b"", data)


@pytest.mark.parametrize("base", ["/v1", "/api/v1"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_an_answer_is_the_engines_own_bytes_on_every_path(gateway: Running, base: str, slash: str) -> None:
    engine = gateway.engine()
    embedder = gateway.engine("acme/embedder", pooling=True)
    for path, body in [
        ("chat/completions", CHAT),
        ("chat/completions", STREAM),
        ("completions", {"model": "acme/tiny", "prompt": "hi", "stream": True}),
        ("responses", {"model": "acme/tiny", "input": "hi", "stream": True}),
        ("messages", {**STREAM, "max_tokens": 3}),
    ]:
        status, data, headers = ask(gateway, f"{base}/{path}{slash}", body)
        assert status == 200, data
        assert without_identity(data) == without_identity(ask_engine(engine.socket, f"/v1/{path}", body))
        is_stream = body.get("stream", False)
        assert headers["content-type"] == ("text/event-stream; charset=utf-8" if is_stream else "application/json")
        assert headers["x-accel-buffering"] == ("no" if is_stream else None)
    asked = {"model": "acme/embedder", "input": ["a", "bb"]}
    status, data, _ = ask(gateway, f"{base}/embeddings{slash}", asked)
    assert status == 200
    assert without_identity(data) == without_identity(ask_engine(embedder.socket, "/v1/embeddings", asked))
    status, data, _ = ask(gateway, f"{base}/tokenize{slash}", {"model": "acme/embedder", "prompt": "hi"})
    assert (status, json.loads(data)["tokens"]) == (200, [104, 105])
    status, data, _ = ask(gateway, f"{base}/detokenize{slash}", {"tokens": [104, 105]})
    assert (status, json.loads(data)) == (200, {"prompt": "hi"})


def test_tokens_arrive_one_by_one_as_the_engine_makes_them(gateway: Running) -> None:
    gateway.engine(misbehave={"chunk_ms": 50})
    link = send(gateway, "/v1/chat/completions", {**STREAM, "max_tokens": 200})
    data = b""
    while b"tok1" not in data:
        data += link.recv(65536)
    assert b"tok19" not in data
    link.close()


def test_a_client_that_leaves_in_mid_stream_ends_its_generation(gateway: Running) -> None:
    engine = gateway.engine(misbehave={"chunk_ms": 10})
    link = send(gateway, "/v1/chat/completions", {**STREAM, "max_tokens": 2000})
    assert link.recv(65536)
    link.close()
    wait_until(lambda: bool(engine.record("cancelled")), "the engine to notice")
    assert engine.record("cancelled")[0]["tokens"] < 2000
    assert not engine.record("finished")
    wait_until(lambda: gateway.sample("modelyard_gateway_requests_in_flight") == 0, "the gateway to count the end")
    labels = {"endpoint": "chat/completions", "model": "acme/tiny", "status": "499"}
    assert gateway.sample("modelyard_gateway_requests_total", **labels) == 1


def test_a_client_that_leaves_before_the_first_byte_ends_its_generation(gateway: Running) -> None:
    engine = gateway.engine(misbehave={"first_token_ms": 60_000})
    link = send(gateway, "/v1/chat/completions", CHAT)
    wait_until(lambda: bool(engine.record("request")), "the request to arrive")
    link.close()
    wait_until(lambda: bool(engine.record("cancelled")), "the engine to notice")
    wait_until(lambda: gateway.sample("modelyard_gateway_requests_in_flight") == 0, "the gateway to count the end")


def test_a_request_is_open_until_its_answer_has_ended_however_it_ends(gateway: Running) -> None:
    """An engine that leaves is ended when none is open."""
    engine = gateway.engine(misbehave={"chunk_ms": 10})
    link = send(gateway, "/v1/chat/completions", {**STREAM, "max_tokens": 30})
    assert link.recv(65536)
    assert gateway.board.open_requests == 1
    assert b"[DONE]" in read_all(link)
    wait_until(lambda: gateway.board.open_requests == 0, "the end of a whole answer")
    link = send(gateway, "/v1/chat/completions", {**STREAM, "max_tokens": 2000})
    assert link.recv(65536)
    assert gateway.board.open_requests == 1
    link.close()
    wait_until(lambda: gateway.board.open_requests == 0, "the end of a client")
    assert ask(gateway, "/v1/embeddings", {"model": "acme/tiny", "input": "x"})[0] == 400
    engine.kill()
    assert ask(gateway, "/v1/chat/completions", CHAT)[0] == 502
    assert gateway.board.open_requests == 0


def test_a_client_that_leaves_within_its_own_body_reaches_no_engine(gateway: Running) -> None:
    engine = gateway.engine()
    link = send_head(gateway, "/v1/chat/completions", "Content-Length: 1000")
    link.sendall(b'{"model":')
    link.close()
    assert ask(gateway, "/v1/chat/completions", CHAT)[0] == 200
    assert len(engine.record("request")) == 1


def test_an_engine_that_dies_in_mid_stream_breaks_the_transfer(gateway: Running) -> None:
    gateway.engine(misbehave={"die_mid_stream": 5, "chunk_ms": 5, "signal": 9})
    data = read_all(send(gateway, "/v1/chat/completions", {**STREAM, "max_tokens": 50}))
    assert b"tok4" in data
    assert b"[DONE]" not in data
    assert not data.endswith(b"0\r\n\r\n")
    labels = {"endpoint": "chat/completions", "model": "acme/tiny", "status": "599"}
    wait_until(lambda: gateway.sample("modelyard_gateway_requests_total", **labels) == 1, "the break to be counted")


def test_an_engine_that_dies_before_the_first_byte_is_a_502(gateway: Running) -> None:
    engine = gateway.engine(misbehave={"die_on_request": 2})
    assert ask(gateway, "/v1/chat/completions", CHAT)[0] == 200
    for _ in range(2):
        assert error_of(ask(gateway, "/v1/chat/completions", CHAT)) == (502, "engine_failed")
    assert engine.process.wait(20) == 1


def test_an_engine_that_is_not_there_is_a_502(gateway: Running) -> None:
    gateway.engine().kill()
    status, data, _ = ask(gateway, "/v1/chat/completions", STREAM)
    assert (status, json.loads(data)["error"]["type"]) == (502, "server_error")
    assert "acme/tiny" in json.loads(data)["error"]["message"]


def test_a_server_without_a_file_for_the_engines_connection_says_so_and_blames_no_engine(gateway: Running) -> None:
    gateway.engine()
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/no/such/path")
        assert connection.getresponse().read()
        with no_files_left():
            connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.status, response.read(), response.headers
    assert error_of(answer) == (503, "too_many_open_files")
    assert answer[2]["Retry-After"]
    assert ask(gateway, "/v1/chat/completions", CHAT)[0] == 200


def test_an_engine_that_came_back_is_used_again(gateway: Running) -> None:
    first = gateway.engine()
    assert ask(gateway, "/v1/chat/completions", CHAT)[0] == 200
    first.kill()
    assert ask(gateway, "/v1/chat/completions", CHAT)[0] == 502
    second = gateway.engine()
    assert ask(gateway, "/v1/chat/completions", CHAT)[0] == 200
    assert len(second.record("request")) == 1


def test_the_engines_own_errors_are_passed_on(gateway: Running) -> None:
    gateway.engine(misbehave={"fail": {"status": 500, "message": "CUDA error", "from_request": 2}})
    status, data, _ = ask(gateway, "/v1/chat/completions", {**CHAT, "max_tokens": 0})
    assert status == 400
    assert json.loads(data)["error"]["param"] == "max_completion_tokens"
    status, data, _ = ask(gateway, "/v1/chat/completions", STREAM)
    assert (status, json.loads(data)["error"]["message"]) == (500, "CUDA error")


def test_a_body_that_is_not_json_is_refused_and_reaches_no_engine(gateway: Running) -> None:
    engine = gateway.engine()
    assert error_of(ask(gateway, "/v1/chat/completions", b"model=acme/tiny")) == (400, "invalid_json")
    assert error_of(ask(gateway, "/v1/chat/completions", {**CHAT, "chat_template": "{{ x }}"})) == (400, "bad_request")
    plain = {"Content-Type": "text/plain"}
    assert error_of(ask(gateway, "/v1/chat/completions", CHAT, plain)) == (403, "content_type_not_allowed")
    assert not engine.record("request")


def test_a_body_that_announces_too_much_is_refused_unread(gateway: Running) -> None:
    gateway.engine()
    link = send_head(gateway, "/v1/chat/completions", f"Content-Length: {2 << 20}", "Connection: close")
    assert b" 413 " in link.recv(65536).split(b"\r\n")[0]
    link.close()


def test_a_body_of_unknown_length_is_refused_while_it_comes(gateway: Running) -> None:
    engine = gateway.engine()
    link = send_head(gateway, "/v1/chat/completions", "Transfer-Encoding: chunked")
    block = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    for _ in range(17):
        link.sendall(block)
    # Its end was never sent, and still there is an answer.
    assert b" 413 " in link.recv(65536).split(b"\r\n")[0]
    link.close()
    assert not engine.record("request")


def test_a_chunked_body_within_the_limit_passes(gateway: Running) -> None:
    engine = gateway.engine()
    data = json.dumps({**CHAT, "user": "é" * 1000}, ensure_ascii=False).encode()
    link = send_head(gateway, "/v1/chat/completions", "Transfer-Encoding: chunked", "Connection: close")
    for start in range(0, len(data), 100):
        part = data[start : start + 100]
        link.sendall(b"%x\r\n%b\r\n" % (len(part), part))
    link.sendall(b"0\r\n\r\n")
    assert read_all(link).startswith(b"HTTP/1.1 200")
    assert engine.record("request")[0]["body"].encode() == data


def test_a_model_that_is_not_in_service_is_a_404_that_names_what_is(gateway: Running) -> None:
    gateway.engine("acme/tiny", "default")
    answer = ask(gateway, "/v1/chat/completions", {**CHAT, "model": "acme/huge"})
    assert error_of(answer) == (404, "model_not_found")
    message = json.loads(answer[1])["error"]["message"]
    assert "acme/huge" in message
    assert "acme/tiny" in message
    assert "default" in message


def test_a_starting_engine_is_a_503_that_says_when_to_come_back(gateway: Running) -> None:
    engine = gateway.engine(state="STARTING")
    answer = ask(gateway, "/v1/chat/completions", CHAT)
    assert error_of(answer) == (503, "engine_starting")
    assert answer[2]["retry-after"] == "7"
    gateway.change("acme/tiny", state="DRAINING")
    assert error_of(ask(gateway, "/v1/chat/completions", CHAT)) == (503, "engine_starting")
    gateway.change("acme/tiny", state="READY")
    assert ask(gateway, "/v1/chat/completions", CHAT)[0] == 200
    assert len(engine.record("request")) == 1


def test_a_model_for_another_task_says_so(gateway: Running) -> None:
    gateway.engine()
    gateway.engine("acme/embedder", pooling=True)
    status, data, _ = ask(gateway, "/v1/chat/completions", {**CHAT, "model": "acme/embedder"})
    assert (status, "embeddings only" in json.loads(data)["error"]["message"]) == (400, True)
    status, data, _ = ask(gateway, "/v1/embeddings", {"model": "acme/tiny", "input": "a"})
    assert (status, "no embeddings" in json.loads(data)["error"]["message"]) == (400, True)


def test_an_alias_and_a_missing_model_reach_the_engine_under_its_own_name(gateway: Running) -> None:
    engine = gateway.engine("acme/tiny", "default", names=("tiny-served",))
    for body in ({**CHAT, "model": "default"}, {k: v for k, v in CHAT.items() if k != "model"}, {**CHAT, "model": ""}):
        status, data, _ = ask(gateway, "/v1/chat/completions", body)
        assert (status, json.loads(data)["model"]) == (200, "tiny-served")
    assert {json.loads(request["body"])["model"] for request in engine.record("request")} == {"tiny-served"}


def test_a_request_that_needs_no_rename_arrives_byte_for_byte(gateway: Running) -> None:
    engine = gateway.engine()
    body = b'{ "messages":[{"role":"user","content":"caf\\u00e9 \xc3\xa9"}] ,\n"model":"acme/tiny","top_p":1.0 }'
    assert ask(gateway, "/v1/chat/completions", body)[0] == 200
    assert engine.record("request")[0]["body"].encode() == body


def test_keys_and_cookies_never_reach_an_engine_and_request_ids_do(gateway: Running) -> None:
    engine = gateway.engine()
    secrets = {"Authorization": "Bearer s3cret", "X-API-KEY": "s3cret", "Cookie": "a=s3cret", "X-Forwarded-For": "1"}
    wanted = {"X-Request-Id": "trace-17", "traceparent": "00-1-2-01", "Accept": "text/event-stream"}
    _, _, headers = ask(gateway, "/v1/chat/completions?api_key=s3cret", CHAT, {**secrets, **wanted})
    assert headers["x-request-id"] == "trace-17"
    assert [name.lower() for name in headers].count("x-request-id") == 1
    seen = engine.record("request")[0]
    assert "s3cret" not in json.dumps(seen)
    for name, value in wanted.items():
        assert seen["headers"][name.lower()] == value
    allowed = {"host", "content-type", "content-length", *(name.lower() for name in wanted)}
    assert set(seen["headers"]) <= allowed

    _, _, headers = ask(gateway, "/v1/chat/completions", CHAT, {"X-Request-Id": "no good\t" + "x" * 500})
    made = engine.record("request")[1]["headers"]["x-request-id"]
    assert made == headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/v1/chat/completions/../load_lora_adapter"),
        ("POST", "/v1/chat/completions/%2e%2e/load_lora_adapter"),
        ("POST", "/pooling"),
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models/acme/tiny"),
        ("GET", "/metrics"),
        ("GET", "/version"),
    ],
)
def test_nothing_else_of_an_engine_can_be_reached(gateway: Running, method: str, path: str) -> None:
    engine = gateway.engine()
    status, _, _ = ask(gateway, path, CHAT if method == "POST" else None, method=method)
    assert status in {404, 405}
    assert not engine.record("request")


def test_connections_are_kept_for_the_next_request_on_both_sides(gateway: Running) -> None:
    engine = gateway.engine()
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    for body in (CHAT, STREAM, {**CHAT, "model": "nope"}, STREAM, CHAT):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        first = connection.sock
        response = connection.getresponse()
        response.read()
        assert connection.sock is first
        assert response.status == (404 if body["model"] == "nope" else 200)
    connection.close()
    assert len({request["connection"] for request in engine.record("request")}) == 1


def test_metrics_count_requests_and_time_the_first_byte(gateway: Running) -> None:
    gateway.engine(misbehave={"first_token_ms": 60})
    ask(gateway, "/v1/chat/completions", CHAT)
    ask(gateway, "/v1/chat/completions", {**CHAT, "model": "x" * 50})
    labels = {"endpoint": "chat/completions", "model": "acme/tiny", "status": "200"}
    wait_until(lambda: gateway.sample("modelyard_gateway_requests_total", **labels) == 1, "the end to be counted")
    assert gateway.sample("modelyard_gateway_requests_total", **{**labels, "model": "", "status": "404"}) == 1
    assert gateway.sample("modelyard_gateway_first_byte_seconds_count", endpoint="chat/completions") == 1
    assert gateway.sample("modelyard_gateway_first_byte_seconds_sum", endpoint="chat/completions") >= 0.06
    assert gateway.sample("modelyard_gateway_requests_in_flight") == 0
