"""An engine that costs next to nothing: prepared Server-Sent Events, replayed to every request.

    python benchmarks/replay.py --uds PATH [--port N] [--chunks 200] [--rate 0]

Every POST is answered with as many chunks as its `max_tokens` says (else `--chunks`), in vLLM's form, one per write, as
an engine's step hands one token to each of its streams. With `--rate R` each stream gets R chunks a second; with 0 each
gets one per turn of the event loop, for as long as its reader keeps up. GET answers a list with one model, `replay`.
It runs until SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
from typing import cast

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
MAX_TOKENS = re.compile(rb'"max_tokens": ?(\d+)')
MODELS = json.dumps({"object": "list", "data": [{"id": "replay", "object": "model", "created": 0}]}).encode()


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}
    body = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "object": "chat.completion.chunk",
            "created": 1763596800, "model": "replay", "choices": [choice]}  # fmt: skip
    return _framed(b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n")


FIRST = _event({"role": "assistant", "content": ""})
TOKEN = _event({"content": " token"})
LAST = _event({"content": ""}, "length") + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Steps:
    """The engine's step: one chunk to every stream that can take one."""

    def __init__(self, rate: float) -> None:
        self.interval_s = 1 / rate if rate else 0.0
        self.streams: set[Stream] = set()
        self.is_running = False
        self.due = 0.0

    def add(self, stream: Stream) -> None:
        self.streams.add(stream)
        if not self.is_running:
            self.is_running = True
            loop = asyncio.get_running_loop()
            self.due = loop.time()
            loop.call_soon(self.step)

    def step(self) -> None:
        for stream in tuple(self.streams):
            stream.step()
        if not self.streams:
            self.is_running = False
            return
        loop = asyncio.get_running_loop()
        if self.interval_s:
            # An engine that falls behind does not catch up in bursts.
            self.due = max(self.due + self.interval_s, loop.time() - self.interval_s)
            loop.call_at(self.due, self.step)
        else:
            loop.call_soon(self.step)


class Stream(asyncio.Protocol):
    """One connection: its request is read to the end, and then it takes part in every step."""

    def __init__(self, steps: Steps, chunks: int) -> None:
        self.steps = steps
        self.chunks = chunks
        self.left = 0
        self.buffer = b""
        self.is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        self.steps.streams.discard(self)

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        if head.startswith(b"GET"):
            self.buffer = rest
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(MODELS), MODELS))
            return
        at = head.lower().find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        asked = MAX_TOKENS.search(rest, 0, length)
        self.left = int(asked[1]) if asked else self.chunks
        self.transport.write(HEAD + FIRST)
        self.steps.add(self)

    def step(self) -> None:
        if self.is_paused:
            return
        if self.left:
            self.left -= 1
            self.transport.write(TOKEN)
        else:
            self.steps.streams.discard(self)
            self.transport.write(LAST)


async def serve(uds: str, port: int | None, chunks: int, rate: float) -> None:
    """Serve on a Unix socket, and on a TCP port of loopback for proxies that know no other way."""
    loop = asyncio.get_running_loop()
    steps = Steps(rate)
    servers = [await loop.create_unix_server(lambda: Stream(steps, chunks), uds, backlog=1024)]
    if port is not None:
        servers.append(await loop.create_server(lambda: Stream(steps, chunks), "127.0.0.1", port, backlog=1024))
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.0)
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(given.uds, given.port, given.chunks, given.rate))


if __name__ == "__main__":
    main()
