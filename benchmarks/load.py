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
        lines = [f"POST {self.path} HTTP/1.1", "Host: bench", "Content-Type: application/json",
                 f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in self.headers)]  # fmt: skip
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Result:
    """What arrived in the measured window; `first_s` are the times to the first token of the requests begun in it."""

    chunks: int = 0
    requests: int = 0
    seconds: float = 0.0
    first_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Reader(asyncio.Protocol):
    """One client: a request after another on one connection."""

    def __init__(self, request: bytes, result: Result) -> None:
        self.request = request
        self.result = result
        self.tail = b""
        self.events = 0
        self.began = 0.0
        self.is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_over:
            self.result.failures.append(f"connection lost: {exc}")

    def ask(self) -> None:
        self.tail = b""
        self.events = 0
        self.began = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.events < 2:
            if not self.events and not self.tail and not data.startswith(b"HTTP/1.1 200"):
                self.result.failures.append(data[:200].decode("latin-1"))
                self.is_over = True
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
            self.result.requests += 1
            self.ask()


async def run(address: Address, clients: int, max_tokens: int, seconds: float, warm_up_s: float = 0.3) -> Result:
    """Keep `clients` streams busy; what came in the warm-up is not counted."""
    loop = asyncio.get_running_loop()
    result = Result()
    request = address.request(max_tokens)
    readers: list[Reader] = []
    for _ in range(clients):
        if address.uds is not None:
            _, reader = await loop.create_unix_connection(lambda: Reader(request, result), address.uds)
        else:
            _, reader = await loop.create_connection(lambda: Reader(request, result), "127.0.0.1", address.port)
        readers.append(reader)
    await asyncio.sleep(warm_up_s)
    result.chunks = result.requests = 0
    result.first_s.clear()
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    result.seconds = time.perf_counter() - began
    final = Result(result.chunks, result.requests, result.seconds, list(result.first_s), list(result.failures))
    for reader in readers:
        reader.is_over = True
        reader.transport.abort()
    await asyncio.sleep(0.05)
    return final
