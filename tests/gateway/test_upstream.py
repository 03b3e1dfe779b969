"""The client to engines, against servers that answer byte for byte what a test says, well or badly."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from modelyard.gateway import upstream
from modelyard.gateway.upstream import Call, EngineBrokeOff, Engines, EngineUnreachable

DEADLINE_S = 20.0
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A server on a Unix socket that gives one scripted answer per request and counts its connections."""

    def __init__(self, path: Path, answers: list[Answer]) -> None:
        self.url = f"unix:{path}"
        self.answers = answers
        self.connections = 0
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                await self.answers.pop(0)(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(*answers: Answer) -> AsyncIterator[tuple[Server, Engines]]:
    with tempfile.TemporaryDirectory(prefix="my-up-") as folder:
        path = Path(folder, "s")
        server = Server(path, list(answers))
        listening = await asyncio.start_unix_server(server.serve, path)
        engines = Engines()
        async with asyncio.timeout(DEADLINE_S):
            yield server, engines
        await engines.close()
        listening.close()


def saying(*parts: bytes, close: bool = False) -> Answer:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return answer


async def whole(engines: Engines, url: str, body: bytes = b"{}") -> tuple[int, bytes]:
    call = engines.call(url)
    try:
        await call.start("/v1/x", [(b"A", b"b")], body)
        return call.status, await rest(call)
    finally:
        call.close()


async def rest(call: Call) -> bytes:
    parts: list[bytes] = []

    async def write(part: bytes) -> None:
        parts.append(part)

    await call.hand_on(write)
    return b"".join(parts)


async def test_a_request_is_written_whole_and_an_answer_of_known_length_read_whole() -> None:
    async with serving(saying(OK + b"Content-Length: 5\r\n\r\nhello")) as (server, engines):
        assert await whole(engines, server.url, b'{"a": 1}') == (200, b"hello")
        expected = b'POST /v1/x HTTP/1.1\r\nHost: engine\r\nContent-Length: 8\r\nA: b\r\n\r\n{"a": 1}'
        assert server.requests == [expected]


async def test_chunks_come_out_as_their_bytes_wherever_the_network_cuts_them() -> None:
    dice = random.Random(7)
    body = dice.randbytes(100_000)
    framed = b""
    start = 0
    while start < len(body):
        part = body[start : start + dice.randint(1, 3000)]
        framed += b"%x\r\n%b\r\n" % (len(part), part)
        start += len(part)
    sent = OK + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"
    cuts = sorted(dice.sample(range(len(sent)), 400))
    parts = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    async with serving(saying(*parts)) as (server, engines):
        assert await whole(engines, server.url) == (200, body)


async def test_an_empty_answer_and_an_interim_one_are_understood() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with serving(
        saying(b"HTTP/1.1 204 No Content\r\n\r\n"), saying(interim, OK + b"Content-Length: 2\r\n\r\nhi")
    ) as (server, engines):
        assert await whole(engines, server.url) == (204, b"")
        call = engines.call(server.url)
        await call.start("/", [], b"")
        assert (call.status, await rest(call)) == (200, b"hi")
        assert [name for name, _ in call.headers] == [b"Content-Type", b"Content-Length"]
        call.close()


async def test_one_connection_serves_many_requests() -> None:
    answers = [saying(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n") for _ in range(20)]
    async with serving(*answers) as (server, engines):
        for _ in range(20):
            assert await whole(engines, server.url) == (200, b"hi")
        assert server.connections == 1


async def test_a_connection_that_the_engine_wants_closed_is_not_kept() -> None:
    answer = OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi"
    async with serving(saying(answer), saying(answer)) as (server, engines):
        for _ in range(2):
            assert await whole(engines, server.url) == (200, b"hi")
        assert server.connections == 2


async def test_a_kept_connection_that_is_closed_under_a_request_costs_nothing() -> None:
    good = saying(OK + b"Content-Length: 2\r\n\r\nhi")

    async def close_unanswered(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with serving(good, close_unanswered, good) as (server, engines):
        assert await whole(engines, server.url) == (200, b"hi")
        assert await whole(engines, server.url) == (200, b"hi")
        assert (server.connections, len(server.requests)) == (2, 3)


async def test_a_new_connection_that_is_closed_unanswered_is_not_tried_again() -> None:
    async with serving(saying(close=True), saying(OK + b"Content-Length: 0\r\n\r\n")) as (server, engines):
        with pytest.raises(EngineUnreachable):
            await whole(engines, server.url)
        assert len(server.requests) == 1


async def test_nothing_is_left_of_an_engine_that_is_gone() -> None:
    answer = OK + b"Content-Length: 2\r\n\r\nhi"
    engines = Engines()
    for _ in range(3):
        async with serving(saying(answer)) as (server, _):
            assert await whole(engines, server.url) == (200, b"hi")
        assert list(engines._kept) == [server.url]
    await engines.close()


async def test_a_connection_that_idled_too_long_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "KEEP_ALIVE_S", 0.0)
    good = saying(OK + b"Content-Length: 2\r\n\r\nhi")
    async with serving(good, good) as (server, engines):
        for _ in range(2):
            assert await whole(engines, server.url) == (200, b"hi")
        assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 10\r\n\r\nhello",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nnonsense\r\n",
        OK + b"\r\nan answer that only its connection's end would end",
    ],
)
async def test_an_answer_that_stops_before_its_end_is_never_taken_for_whole(answer: bytes) -> None:
    async with serving(saying(answer, close=True)) as (server, engines):
        with pytest.raises(EngineBrokeOff):
            await whole(engines, server.url)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200", b"HTTP/1.1 2000 OK\r\n\r\n"])
async def test_what_is_no_http_answer_is_no_answer(answer: bytes) -> None:
    async with serving(saying(answer, close=True)) as (server, engines):
        with pytest.raises(EngineUnreachable):
            await whole(engines, server.url)


async def test_no_engine_at_an_address_is_no_answer() -> None:
    engines = Engines()
    for url in ("unix:/nowhere/engine.sock", "http://127.0.0.1:1"):
        with pytest.raises(EngineUnreachable):
            await whole(engines, url)


async def test_an_engine_may_be_reached_over_tcp() -> None:
    server = Server(Path("unused"), [saying(OK + b"Content-Length: 2\r\n\r\nhi")])
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    engines = Engines()
    assert await whole(engines, f"http://127.0.0.1:{port}") == (200, b"hi")
    await engines.close()
    listening.close()


async def test_bytes_that_nobody_asked_for_end_a_kept_connection() -> None:
    good = saying(OK + b"Content-Length: 2\r\n\r\nhi", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    async with serving(good, saying(OK + b"Content-Length: 2\r\n\r\nhi")) as (server, engines):
        assert await whole(engines, server.url) == (200, b"hi")
        assert await whole(engines, server.url) == (200, b"hi")


async def test_giving_up_ends_whoever_waits_and_closes_the_connection() -> None:
    left = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        left.set()

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Content-Length: 10\r\n\r\nhello")
        await hang(reader, writer)

    for answer in (hang, half):
        left.clear()
        async with serving(answer) as (server, engines):
            call = engines.call(server.url)

            async def ask(call: Call = call) -> bytes:
                await call.start("/", [], b"")
                return await rest(call)

            asking = asyncio.create_task(ask())
            while not server.requests:
                await asyncio.sleep(0.001)
            call.give_up()
            call.give_up()
            with pytest.raises(EngineBrokeOff, match="given up"):
                await asking
            await left.wait()
            call.close()


async def test_giving_up_before_the_start_sends_nothing() -> None:
    async with serving(saying(OK + b"Content-Length: 0\r\n\r\n")) as (server, engines):
        call = engines.call(server.url)
        call.give_up()
        with pytest.raises(EngineBrokeOff):
            await call.start("/", [], b"")
        call.close()
        assert not server.requests


async def test_a_slow_reader_holds_the_engine_back_and_loses_nothing() -> None:
    block = b"x" * 65536
    blocks = 400
    sent = 0

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % (len(block) * blocks))
        for _number in range(blocks):
            writer.write(block)
            await writer.drain()
            sent += 1

    async with serving(flood) as (server, engines):
        call = engines.call(server.url)
        await call.start("/", [], b"")
        gate = asyncio.Event()
        taken = 0

        async def write(part: bytes) -> None:
            nonlocal taken
            await gate.wait()
            taken += len(part)

        handing = asyncio.create_task(call.hand_on(write))
        before = -1
        while before != sent:  # until the flood stands still
            before = sent
            await asyncio.sleep(0.2)
        assert sent < blocks // 4
        assert taken == 0
        gate.set()
        await handing
        assert taken == len(block) * blocks
        call.close()
        assert engines._kept


async def test_a_reader_that_fails_ends_the_answer_with_its_error() -> None:
    for waits in (False, True):
        async with serving(saying(OK + b"Content-Length: 10\r\n\r\nhello")) as (server, engines):
            call = engines.call(server.url)
            await call.start("/", [], b"")

            async def write(_: bytes, waits: bool = waits) -> None:
                if waits:
                    await asyncio.sleep(0.001)
                raise ValueError("no more")

            with pytest.raises(ValueError, match="no more"):
                await call.hand_on(write)
            call.close()
            assert not engines._kept
