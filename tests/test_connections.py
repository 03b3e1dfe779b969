"""What a client may send before its key was looked at: bounded in bytes, in time and in number, on a real server."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import select
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from modelyard.connection_register import Connections, Limits
from modelyard.connections import Connection
from tests.server import Server, running, serving

KEY = "a-key-of-the-tests"
HOST = b"Host: 127.0.0.1\r\n"
GET = b"GET /health HTTP/1.1\r\n" + HOST
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Patient for half a second, so that the tests are."""
    with serving(
        tmp_path_factory.mktemp("server") / "data",
        MODELYARD_ADMIN_KEY=KEY,
        MODELYARD_HEADER_TIMEOUT_S="0.5",
        MODELYARD_BODY_TIMEOUT_S="0.5",
        MODELYARD_KEEP_ALIVE_S="0.5",
    ) as started:
        yield started


@contextmanager
def connected(server: Server, timeout_s: float = 10.0) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as connection:
        yield connection


def send_all(connection: socket.socket, data: bytes) -> None:
    """Send as much as the server takes; one that has refused may close before the end."""
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(data)


def everything(connection: socket.socket) -> bytes:
    """Return all that comes until the server closes, or resets the connection; fails when it does not."""
    received = b""
    with suppress(ConnectionResetError):
        while block := connection.recv(65536):
            received += block
    return received


def answered(connection: socket.socket) -> bytes:
    """Return one answer of a connection that stays."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1) or pytest.fail(f"closed after {received!r}")
    length = int(received.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    return received + connection.recv(length, socket.MSG_WAITALL)


def refusal(answer: bytes) -> tuple[int, str]:
    """Return the status and the code of an answer, which is in the envelope and ends the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head, head
    assert f"\r\ncontent-length: {len(body)}".encode() in head, head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split(b" ")[1]), error["code"]


def memory_mib(server: Server) -> float:
    pages = int(Path(f"/proc/{server.pid}/statm").read_text("utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def processor_s(server: Server) -> float:
    fields = Path(f"/proc/{server.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(GET + b"X: ", id="one header"),
        pytest.param(b"GET /", id="an address"),
        pytest.param(b"GET /?", id="a query"),
        pytest.param(b"", id="a method"),
        pytest.param(GET, id="a header's name"),
    ],
)
def test_headers_without_an_end_are_refused_at_64_kib_at_no_cost(server: Server, start: bytes) -> None:
    before, used = memory_mib(server), processor_s(server)
    with connected(server) as connection, ThreadPoolExecutor(1) as pool:
        # In one piece: this server waits for half a second, and a busy machine may pause between two. Read meanwhile,
        # as clients do: what was not read before the connection is reset is lost.
        answer = pool.submit(everything, connection)
        send_all(connection, start + b"x" * (64 * MIB))
        expected = (431, "headers_too_large") if start else (400, "malformed_request")
        assert refusal(answer.result()) == expected
    assert processor_s(server) - used < 1.0
    assert memory_mib(server) - before < 32


@pytest.mark.parametrize("begun", [b"", GET[:20]], ids=["idle", "begun"])
async def test_what_came_in_time_is_answered_though_the_loop_was_held_up(begun: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})

    connections = Connections(Limits(8, 64 * 1024, 0.3, 0.3, 0.3))
    protocol: Any = partial(Connection, connections)
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_config=None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(begun)
            await asyncio.sleep(0.1)
            client.sendall((GET + b"Connection: close\r\n\r\n")[len(begun) :])
            time.sleep(0.4)
            connections.sweep()
            assert (await asyncio.to_thread(everything, client)).startswith(b"HTTP/1.1 200 ")
        server.should_exit = True
        await serving


def test_many_small_headers_are_refused_by_their_number_and_by_their_size(server: Server) -> None:
    few = b"".join(b"x%d: y\r\n" % number for number in range(200))
    assert b" 200 " in server.send_bytes(GET + b"Connection: close\r\n" + few + b"\r\n").splitlines()[0]
    for many in (257, 1_000_000):
        request = GET + b"".join(b"x%d: y\r\n" % number for number in range(many)) + b"\r\n"
        with connected(server) as connection:
            send_all(connection, request)
            assert refusal(everything(connection)) == (431, "headers_too_large")


def test_headers_just_within_the_limit_are_read(server: Server) -> None:
    for size, expected in ((60_000, b" 200 "), (70_000, b" 431 ")):
        answer = server.send_bytes(GET + b"Connection: close\r\nX: " + b"x" * size + b"\r\n\r\n")
        assert expected in answer.splitlines()[0]
        answer = server.send_bytes(
            b"GET /health?" + b"x" * size + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
        )
        assert expected in answer.splitlines()[0]


@pytest.mark.parametrize("drip", [b"X: y\r\n", b"x", b""])
def test_headers_that_do_not_end_in_time_are_refused_however_slowly_they_come(server: Server, drip: bytes) -> None:
    began = time.monotonic()
    with connected(server) as connection:
        connection.sendall(GET)
        while not select.select([connection], [], [], 0.1)[0]:
            connection.sendall(drip)
            assert time.monotonic() - began < 5, "nothing ended it"
        assert refusal(everything(connection)) == (408, "request_timeout")


def test_blank_lines_before_a_request_are_no_way_to_stay(server: Server) -> None:
    began = time.monotonic()
    with connected(server) as connection:
        connection.sendall(GET + b"\r\n")
        assert answered(connection).startswith(b"HTTP/1.1 200 ")
        while not select.select([connection], [], [], 0.1)[0]:
            connection.sendall(b"\r\n")
            assert time.monotonic() - began < 5, "nothing ended it"
        assert refusal(everything(connection)) == (408, "request_timeout")


@pytest.mark.parametrize("first", [b"", GET + b"\r\n"], ids=["never used", "used once"])
def test_a_connection_without_a_request_is_closed_without_a_word(server: Server, first: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(first)
        answer = everything(connection)
        assert answer.count(b"HTTP/1.1") == (1 if first else 0)


@pytest.mark.parametrize("drip", [b"", b" "], ids=["nothing", "a byte now and then"])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/api/v1/deploy/", "/api/v1/datasets/upload/", "/api/generate-one"]
)
def test_a_body_that_stalls_ends_on_every_kind_of_route(server: Server, path: str, drip: bytes) -> None:
    kind = "multipart/form-data; boundary=x" if "upload" in path else "application/json"
    head = f"POST {path} HTTP/1.1\r\nX-API-KEY: {KEY}\r\nContent-Type: {kind}\r\nContent-Length: 9000\r\n".encode()
    began = time.monotonic()
    with connected(server) as connection:
        part = (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
            if "upload" in path
            else b""
        )
        connection.sendall(head + HOST + b"\r\n" + part)
        while not select.select([connection], [], [], 0.1)[0]:
            connection.sendall(drip)
            assert time.monotonic() - began < 5, "nothing ended it"
        assert refusal(everything(connection)) == (408, "request_timeout")


def test_a_body_that_comes_slowly_but_comes_is_read_to_its_end(server: Server) -> None:
    body = b'{"model": "no", "messages": []' + b" " * 6000 + b"}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nX-API-KEY: {KEY}\r\nContent-Length: {len(body)}\r\n".encode()
    with connected(server) as connection:
        connection.sendall(head + HOST + b"Content-Type: application/json\r\nConnection: close\r\n\r\n")
        for start in range(0, len(body), 1500):
            connection.sendall(body[start : start + 1500])
            time.sleep(0.2)
        assert everything(connection).startswith(b"HTTP/1.1 404 ")


def test_a_client_that_waits_for_100_continue_is_not_kept_waiting_for_ever(server: Server) -> None:
    head = f"POST /api/v1/deploy/ HTTP/1.1\r\nX-API-KEY: {KEY}\r\nContent-Length: 2\r\nExpect: 100-continue\r\n"
    with connected(server) as connection:
        connection.sendall(head.encode() + HOST + b"Content-Type: application/json\r\nConnection: close\r\n\r\n")
        assert answered(connection).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert everything(connection).startswith(b"HTTP/1.1 422 ")


def test_the_rest_of_a_body_behind_its_answer_is_no_way_to_stay(server: Server) -> None:
    began = time.monotonic()
    with connected(server) as connection:
        connection.sendall(b"POST /api/v1/models/add/ HTTP/1.1\r\nContent-Length: 50\r\n" + HOST + b"\r\n")
        assert answered(connection).startswith(b"HTTP/1.1 401 ")
        connection.sendall(b"x" * 50)
        assert everything(connection) == b""
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.0, HTTP/1.1"])
def test_a_request_that_offers_another_protocol_keeps_its_body(server: Server, upgrade: str) -> None:
    body = b'{"model_id": 7}'
    offered = (
        f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    )
    head = f"POST /api/v1/deploy/ HTTP/1.1\r\nX-API-KEY: {KEY}\r\nContent-Type: application/json\r\n{offered}"
    for framing, sent in (
        (f"Content-Length: {len(body)}\r\n", body),
        ("Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)),
    ):
        whole = head.encode() + framing.encode() + HOST + b"\r\n" + sent
        for pieces in ((whole,), (whole[: -len(sent)], sent), (whole[:-5], whole[-5:])):
            with connected(server) as connection:
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(0.05)
                answer = answered(connection)
                assert answer.startswith(b"HTTP/1.1 422 "), answer
                assert b'"param":"model_id"' in answer
                # The connection goes on in HTTP/1.1.
                connection.sendall(GET + b"Connection: close\r\n\r\n")
                assert everything(connection).startswith(b"HTTP/1.1 200 ")


def test_the_body_of_a_request_that_offers_another_protocol_is_no_request_of_its_own(server: Server) -> None:
    hidden = GET + b"Connection: close\r\n\r\n"
    head = (
        f"POST /api/v1/models/add/ HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: {len(hidden)}\r\n"
    )
    answer = server.send_bytes(head.encode() + HOST + b"\r\n" + hidden)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_requests_in_a_row_are_answered_in_order_and_only_so_many_wait(server: Server) -> None:
    for sent, answered in ((10, 10), (5000, 17)):
        with connected(server) as connection:
            send_all(connection, (GET + b"\r\n") * (sent - 1) + GET + b"Connection: close\r\n\r\n")
            answer = everything(connection)
        assert answer.count(b"HTTP/1.1 200 ") == answered == answer.count(b"HTTP/1.1")


def test_trailers_and_chunk_extensions_without_an_end_are_refused(server: Server) -> None:
    head = f"POST /api/v1/deploy/ HTTP/1.1\r\nX-API-KEY: {KEY}\r\nTransfer-Encoding: chunked\r\n".encode()
    for endless in (b"0\r\nX: " + b"x" * (8 * MIB), b"5;x=" + b"y" * (8 * MIB)):
        with connected(server) as connection:
            send_all(connection, head + HOST + b"Content-Type: application/json\r\n\r\n")
            send_all(connection, endless)
            assert refusal(everything(connection)) == (431, "headers_too_large")


def test_a_trailer_is_no_header(server: Server) -> None:
    head = b"POST /api/v1/models/add/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n" + HOST
    answer = server.send_bytes(head + f"\r\n2\r\n{{}}\r\n0\r\nX-API-KEY: {KEY}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_what_was_refused_is_in_the_log_in_a_line_or_two(tmp_path: Path) -> None:
    with serving(tmp_path / "data", MODELYARD_ADMIN_KEY=KEY) as server:
        for _ in range(300):
            assert refusal(server.send_bytes(b"GET / HTTP/2.0\r\n\r\n")) == (400, "http_version")
        deadline = time.monotonic() + 5
        while "refused connections or requests: http_version" not in server.log:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(server.log.splitlines()) < 5


def test_connections_beyond_the_limit_get_503_and_the_others_are_served(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path / "data", MODELYARD_MAX_CONNECTIONS="8"))
        held = [stack.enter_context(connected(server)) for _ in range(8)]
        deadline = time.monotonic() + 5
        refused = b""
        while not refused.startswith(b"HTTP/1.1 503"):
            assert time.monotonic() < deadline
            refused = server.send_bytes(GET + b"Connection: close\r\n\r\n")
        assert refusal(refused) == (503, "too_many_connections")
        assert b"\r\nretry-after: " in refused
        for connection in held:
            connection.sendall(GET + b"Connection: close\r\n\r\n")
            assert everything(connection).startswith(b"HTTP/1.1 200 ")
        assert server.get("/health").status == 200


def test_idle_connections_by_the_thousand_do_not_end_the_service(tmp_path: Path) -> None:
    """Only so many files may be open: the server keeps some for itself, and says how many clients that leaves."""
    with ExitStack() as stack:
        server = stack.enter_context(running(Server(tmp_path / "data", {"MODELYARD_HEADER_TIMEOUT_S": "2"}, files=400)))
        assert "at most 72 client connections" in server.log
        for _ in range(600):
            stack.enter_context(connected(server))
        deadline = time.monotonic() + 10
        while True:
            try:
                if server.get("/health").status == 200:
                    break
            except OSError:
                pass
            assert time.monotonic() < deadline, "the idle connections were not ended"
            time.sleep(0.05)
        # What needs files of its own works, too.
        assert server.get("/ready").json() == {"ready": True, "reasons": []}
        assert "too_many_connections" in server.log


def test_the_limit_of_open_files_is_raised_to_what_is_allowed(server: Server) -> None:
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    assert soft == min(hard, 1 << 20)
