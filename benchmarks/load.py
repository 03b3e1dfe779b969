"""A cheap client for streams: raw asyncio protocols in one process, counting chunks without parsing them.

`run` keeps a number of streams busy for some seconds and returns what arrived. All places are asked by the same code,
so that what the client itself costs weighs the same on each.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import cast

MARK = b"data: {"
END = b"0\r\n\r\n"


@dataclass(frozen=True)
class Address:
    """Where to ask: a Unix socket, or a port of loopback; the path, the model's name and further headers."""

    path: str
    model: str
    uds: str | None = None
    port: int = 0
    headers: tuple[tuple[str, str], ...] = ()

    def request(self, max_tokens: int) -> bytes:
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": "Tell me about rivers and the sea. " * 8}],
                "max_tokens": max_tokens,
                "temperature": 1.0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        lines = [f"POST {self.path} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
                 f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in self.headers)]  # fmt: skip
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Result:
    """What arrived: events, tokens (as many as each finished request asked for), and the times to the first token."""

    chunks: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    #: The largest time between two chunks of each stream, if its reader looks at that.
    gaps_s: list[float] = field(default_factory=list)


class Reader(asyncio.Protocol):
    """One client: a request after another on one connection."""

    def __init__(self, request: bytes, max_tokens: int, until: float, result: Result) -> None:
        self.request = request
        self.max_tokens = max_tokens
        self.until = until
        self.result = result
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tail = b""
        self.events = 0
        self.began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.result.failures.append(f"connection lost: {exc}")
            self.ended.set_result(None)
        self.closed.set_result(None)

    def ask(self) -> None:
        self.tail = b""
        self.events = 0
        self.began = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.events < 2:
            if not self.events and not self.tail and not data.startswith(b"HTTP/1.1 200"):
                self.result.failures.append(data[:200].decode("latin-1"))
                self.ended.set_result(None)
                self.transport.close()
                return
            found = (self.tail + data).count(MARK)
            if self.events + found >= 2:
                # The first event carries the role, the second one the first token.
                self.result.first_s.append(time.perf_counter() - self.began)
        else:
            found = (self.tail + data).count(MARK)
        self.events += found
        self.result.chunks += found
        # A mark that is cut in two is found whole the next time, and never counted twice.
        self.tail = data[1 - len(MARK) :] if len(data) >= len(MARK) else (self.tail + data)[1 - len(MARK) :]
        if data.endswith(END) or self.tail.endswith(END):
            self.result.tokens += self.max_tokens
            if time.perf_counter() < self.until:
                self.ask()
            else:
                self.ended.set_result(None)
                self.transport.close()


async def run(address: Address, clients: int, max_tokens: int, seconds: float, kind: type[Reader] = Reader) -> Result:
    """Keep `clients` streams busy: each asks again until `seconds` are over, and ends what it has begun.

    So all that was generated is counted, also by an engine that puts several tokens into one event when it is late.
    """
    loop = asyncio.get_running_loop()
    result = Result()
    request = address.request(max_tokens)
    began = time.perf_counter()

    def reader() -> Reader:
        return kind(request, max_tokens, began + seconds, result)

    readers: list[Reader] = []
    for _ in range(clients):
        if address.uds is not None:
            readers.append((await loop.create_unix_connection(reader, address.uds))[1])
        else:
            readers.append((await loop.create_connection(reader, "127.0.0.1", address.port))[1])
    await asyncio.wait_for(asyncio.gather(*(one.ended for one in readers)), seconds + 240)
    result.seconds = time.perf_counter() - began
    await asyncio.gather(*(one.closed for one in readers))
    return result
