"""The way to engines: HTTP/1.1 on the engine's Unix socket or HTTP address, over connections that are kept for reuse.

`Engines.call` gives a `Call`; `start` sends the request and returns when the engine's status and headers are there,
`hand_on` passes the body on in the pieces in which it arrives. There is no time limit: how long a generation may take
is for the client and the supervisor to say. `give_up` closes the connection at once, by which the engine stops.

This is an `asyncio.Protocol` of our own on httptools' parser: measured alone (`benchmarks/engine_client.py`), a chunk
costs half the processor time that aiohttp's client takes for it, and a request a quarter. It knows what a gateway to an
engine needs and no more: requests with a body of known length; answers that are framed, by a length or in chunks; no
redirects, compression, cookies or proxies.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from modelyard.errors import OutOfFiles, is_out_of_files

#: Engines drop a connection that idles for 5 s; one that is given up sooner is not dropped under a new request.
KEEP_ALIVE_S = 3.0
CONNECT_TIMEOUT_S = 10.0

Headers = Sequence[tuple[bytes, bytes]]
Write = Callable[[bytes], Awaitable[None]]


class EngineUnreachable(Exception):
    """The engine answered nothing at all: it is not there, or it died before the first byte."""


class EngineBrokeOff(Exception):
    """The engine died, or the call was given up, before the end of the answer."""


class _Connection(asyncio.Protocol):
    """One connection, with at most one request on it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.first_byte_at = 0.0
        self.is_complete = True
        self.is_lost = False
        self.idle_since = 0.0
        self._is_answered = False
        self._is_kept_alive = False
        self._is_surplus = False
        self._asked_for = 0
        self._chunks: list[bytes] = []
        # The parser calls this for every chunk: without a frame of Python in between.
        self.on_body = self._chunks.append
        self._write: Write | None = None
        self._writing: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        self.parser = httptools.HttpResponseParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if not self.is_complete:
            self.fail(EngineBrokeOff(f"the connection was closed: {exc}" if exc else "the connection was closed"))

    def data_received(self, data: bytes) -> None:
        if self.is_complete:
            self.transport.abort()  # nobody asked
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(EngineBrokeOff(f"its answer is not HTTP: {error}"))
            self.transport.abort()
        if self._is_surplus:
            del self._chunks[self._asked_for :]
        if self._write is not None:
            self._advance()
        elif self._is_answered:
            self._wake()

    # The parser's side.

    def on_message_begin(self) -> None:
        # A second answer behind the one that was asked for: nobody gets it, and the connection is not used again.
        if self.is_complete:
            self._is_surplus = True
            self._asked_for = len(self._chunks)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_surplus:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._is_surplus:
            return
        self.status = self.parser.get_status_code()
        if self.status < 200:
            self.headers.clear()
        else:
            self._is_answered = True

    def on_message_complete(self) -> None:
        if self._is_answered and not self._is_surplus:
            self.is_complete = True
            self._is_kept_alive = self.parser.should_keep_alive()  # afterwards the parser has forgotten it

    # The call's side.

    async def ask(self, request: bytes) -> None:
        self.headers.clear()
        self.is_complete = self._is_answered = False
        self.first_byte_at = 0.0
        self.transport.write(request)
        await self._until(lambda: self._is_answered)

    async def hand_on(self, write: Write) -> None:
        self._write = write
        try:
            self._advance()
            await self._until(lambda: self.is_complete and not self._chunks and self._writing is None)
        finally:
            self._write = None
            if self._writing is not None:
                self._writing.cancel()

    async def _until(self, claim: Callable[[], bool]) -> None:
        while not claim():
            if self._error is not None:
                raise self._error
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _advance(self) -> None:
        """Write what has come. No task is woken for it: most writes end at once, and a stream is thousands of them."""
        chunks = self._chunks
        if chunks and self._writing is None:
            assert self._write is not None
            if not self.first_byte_at:
                self.first_byte_at = perf_counter()
            data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            chunks.clear()
            steps = self._write(data).__await__()
            try:
                waits_for = next(steps)
            except StopIteration:
                pass
            except Exception as error:  # noqa: BLE001  # raised again in `hand_on`, where the caller waits
                self.fail(error)
            else:
                # The client reads slower than the engine writes: so nothing is read until it has caught up.
                self.transport.pause_reading()
                self._writing = self.loop.create_task(_rest(waits_for, steps))
                self._writing.add_done_callback(self._written)
        if self.is_complete and not chunks and self._writing is None:
            self._wake()

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writing = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            self.fail(error)
        if not self.is_lost:
            self.transport.resume_reading()
        if self._write is not None:
            self._advance()

    def fail(self, error: BaseException) -> None:
        """End whatever waits with an error. The first one counts."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def is_reusable(self) -> bool:
        is_clean = self.is_complete and self._is_kept_alive and not self._is_surplus
        return is_clean and not self.is_lost and self._error is None


@types.coroutine
def _rest(waits_for: Any, steps: Iterator[Any]) -> Generator[Any, Any, None]:
    """Go on, in a task, with an awaitable that was driven to its first wait outside of one."""
    yield waits_for
    yield from steps


class Call:
    """One request to an engine and its answer."""

    def __init__(self, engines: Engines, url: str) -> None:
        self._engines = engines
        self._url = url
        self._connection: _Connection | None = None
        self.is_given_up = False

    @property
    def status(self) -> int:
        """The answer's status, after `start`."""
        assert self._connection is not None
        return self._connection.status

    @property
    def headers(self) -> Headers:
        """The answer's headers, after `start`, as the engine wrote them."""
        assert self._connection is not None
        return self._connection.headers

    @property
    def first_byte_at(self) -> float:
        """When the first byte of the body was handed on, on `perf_counter`'s clock; 0 before."""
        return self._connection.first_byte_at if self._connection is not None else 0.0

    async def start(self, path: str, headers: Headers, body: bytes, method: bytes = b"POST") -> None:
        """Send the request; returns when the answer's headers are there.

        Raises:
            EngineUnreachable: no answer came.
            EngineBrokeOff: the call was given up meanwhile.
            OutOfFiles: this server has no file left for a connection.
        """
        request = b"".join(
            (method, b" ", path.encode(), b" HTTP/1.1\r\nHost: engine\r\nContent-Length: ", str(len(body)).encode(),
             *(part for name, value in headers for part in (b"\r\n", name, b": ", value)), b"\r\n\r\n", body)
        )  # fmt: skip
        connection = self._engines.kept(self._url)
        if connection is not None:
            try:
                return await self._ask(connection, request)
            except EngineBrokeOff:
                # The engine may close a kept connection just as we write to it. Nothing was answered then, so the
                # request goes out once more, on a new one; an engine that is really gone refuses that.
                connection.transport.abort()
                if self.is_given_up:
                    raise
        try:
            connection = await _connect(self._url)
        except (OSError, TimeoutError) as error:
            if is_out_of_files(error):
                raise OutOfFiles from error  # this says nothing of the engine
            raise EngineUnreachable(str(error) or "it took no connection in time") from error
        try:
            await self._ask(connection, request)
        except EngineBrokeOff as error:
            connection.transport.abort()
            if self.is_given_up:
                raise
            raise EngineUnreachable(str(error)) from error

    async def _ask(self, connection: _Connection, request: bytes) -> None:
        self._connection = connection
        if self.is_given_up:
            raise EngineBrokeOff("given up")
        await connection.ask(request)

    async def hand_on(self, write: Write) -> None:
        """Give the answer's body to `write`, in the pieces in which it comes, to its end.

        While `write` waits for its reader, no more than a bounded part of the answer is read from the engine.

        Raises:
            EngineBrokeOff: the answer stopped before its end, or the call was given up.
        """
        assert self._connection is not None
        await self._connection.hand_on(write)

    def give_up(self) -> None:
        """Close the connection now. What waits in `start` or `read` raises EngineBrokeOff. Safe to repeat."""
        self.is_given_up = True
        if (connection := self._connection) is not None and not connection.is_complete:
            connection.fail(EngineBrokeOff("given up"))
            connection.transport.abort()

    def close(self) -> None:
        """End the call: a whole answer leaves its connection for the next call, any other is given up."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if connection.is_reusable():
            self._engines.keep(self._url, connection)
        else:
            connection.transport.abort()


async def _connect(url: str) -> _Connection:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        if url.startswith("unix:"):
            _, connection = await loop.create_unix_connection(_Connection, url.removeprefix("unix:"))
        else:
            parts = urlsplit(url)
            _, connection = await loop.create_connection(_Connection, parts.hostname or "", parts.port or 80)
    return connection


class Engines:
    """Connections to all engines that are kept for the next call, by the engines' URLs."""

    def __init__(self) -> None:
        self._kept: dict[str, list[_Connection]] = {}

    def call(self, url: str) -> Call:
        """Return a call to the engine at `unix:PATH` or `http://HOST:PORT`."""
        return Call(self, url)

    def kept(self, url: str) -> _Connection | None:
        """Take the connection that was used last, if one is there that is still good."""
        connections = self._kept.get(url)
        while connections:
            connection = connections.pop()
            if not connections:
                del self._kept[url]
            if connection.is_reusable() and connection.loop.time() - connection.idle_since < KEEP_ALIVE_S:
                return connection
            connection.transport.abort()
        return None

    def keep(self, url: str, connection: _Connection) -> None:
        """Keep a connection whose answer was read to its end."""
        connection.idle_since = connection.loop.time()
        if url not in self._kept:
            # An engine that was started again has another address: what is left of the old one is forgotten here.
            for other in [other for other, kept in self._kept.items() if not any(one.is_reusable() for one in kept)]:
                del self._kept[other]
        connections = self._kept.setdefault(url, [])
        # Those that were used least lie at the front; the engine has closed them, or will.
        while connections and not (
            connections[0].is_reusable() and connection.idle_since - connections[0].idle_since < KEEP_ALIVE_S
        ):
            connections.pop(0).transport.abort()
        connections.append(connection)

    async def close(self) -> None:
        """Close all kept connections."""
        for connections in self._kept.values():
            for connection in connections:
                connection.transport.abort()
        self._kept.clear()
        await asyncio.sleep(0)
