"""Clients that say their last word with the request, and clients that go: the same at first, told apart in time."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.models import repositories
from tests.server import ENGINE_PYTHON, Server, serving
from tests.servers.engine import read_record

FIRST_TOKEN_S = 2.5
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}).encode()
CHAT = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a model in service that takes its time."""
    folder = tmp_path_factory.mktemp("half")
    for path, content in repositories.llama().items():
        target = folder / "imports" / "tiny" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    settings = {
        "MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON),
        "MODELYARD_IMPORT_DIR": str(folder / "imports"),
        "MODELYARD_DISK_RESERVE_GIB": "0",
        "MODELYARD_ENGINE_STOP_TIMEOUT_S": "1",
    }
    with serving(folder / "data", **settings) as server:
        server.post("/api/v1/models/add/?model_id=local:tiny")
        within(lambda: server.get("/api/v1/models/").json(), "the model is there")
        for config in (folder / "data" / "models").rglob("config.json"):
            how = json.dumps(MISBEHAVE | {"record_dir": str(folder)})
            (config.parent / "misbehave.json").write_text(how, "utf-8")
        assert server.post("/api/v1/deploy/", {"model_id": "local:tiny"}).status == 200
        within(lambda: server.get("/api/v1/deploy/").json().get("state") == "READY", "it is in service")
        yield server


MISBEHAVE = {"first_token_ms": int(FIRST_TOKEN_S * 1000)}


def within(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.05)


def said_last_word(server: Server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_client_that_sends_no_more_gets_its_answer(server: Server) -> None:
    for _ in range(20):
        answer = said_last_word(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b'"status":"ok"' in answer


def test_one_that_waits_long_is_told_to_wait_and_then_gets_its_answer(server: Server) -> None:
    answer = said_last_word(server, CHAT)
    interim, _, final = answer.rpartition(b"HTTP/1.1 200 OK\r\n")
    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n" * (len(interim) // 25)
    assert 1 <= len(interim) // 25 <= 5
    assert json.loads(final.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == " tok0 tok1 tok2"


def test_python_s_own_client_reads_over_it(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(CHAT)
        connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, len(json.loads(response.read())["choices"])) == (200, 1)


def test_one_that_went_ends_its_generation_soon(server: Server, tmp_path: Path) -> None:
    folder = server.data_dir.parent
    before = len(read_record(folder, "cancelled"))
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(CHAT)
    time.sleep(0.2)
    connection.close()
    began = time.monotonic()
    within(lambda: len(read_record(folder, "cancelled")) > before, "the engine was told")
    assert time.monotonic() - began < FIRST_TOKEN_S


def test_half_a_request_is_none(server: Server) -> None:
    with suppress(ConnectionResetError):
        assert said_last_word(server, CHAT[:-10]) == b""
    assert said_last_word(server, b"GET /health HTTP/1.1\r\nHost: local") == b""
    assert said_last_word(server, b"") == b""
