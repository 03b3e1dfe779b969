"""Readers that see whether a stream stood still or ended short, and clients that keep asking and judge every answer.

`Watched` is for load.py: it adds to each stream the largest time between two of its chunks, after the first token, and
counts a stream without its whole answer as a failure. `Askers` ask a server for short answers, streamed and not in
turn, until they are told to stop; what counts as failed is any status but 200, a transfer that broke, and an answer
with fewer tokens than were asked for. Nothing is tried again.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.load import END, Reader

#: The last event of a stream and the one before it, which says why it ended, are within so many bytes of its end.
LAST_BYTES = 2048
WHOLE = re.compile(rb'"finish_reason": ?"length"')
TIMEOUT_S = 120.0


class Watched(Reader):
    """A reader that looks at the time between chunks, and at the end of each answer."""

    last_at = 0.0
    gap_s = 0.0
    end = b""

    def ask(self) -> None:
        self.gap_s, self.end = 0.0, b""
        super().ask()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.events >= 2:
            self.gap_s = max(self.gap_s, now - self.last_at)
        self.last_at = now
        self.end = (self.end + data)[-LAST_BYTES:]
        if self.end.endswith(END):
            self.result.gaps_s.append(self.gap_s)
            if not WHOLE.search(self.end) or b"data: [DONE]" not in self.end:
                self.result.failures.append(f"ended short: {self.end[-200:].decode('latin-1')}")
        super().data_received(data)


@dataclass(frozen=True)
class Answered:
    """One request and what became of it. `model` is who answered; `failure` is empty if the answer was whole."""

    began: float
    seconds: float
    model: str
    failure: str


@dataclass
class Askers:
    """Clients that ask one after the other, each with a short rest between two requests."""

    port: int
    name: str
    clients: int = 16
    tokens: int = 32
    rest_s: float = 0.2
    answers: list[Answered] = field(default_factory=list)
    is_over: bool = False

    async def run(self) -> None:
        """Ask until `is_over`; requests that have begun are read to their end."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        # Each keeps its connection, as real clients do: a server that drops one fails a request.
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{self.port}", timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        ) as session:
            await asyncio.gather(*(self._client(session, number) for number in range(self.clients)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        asked = 0
        while not self.is_over:
            began = time.perf_counter()
            try:
                model = await self._ask(session, f"Question {asked} of {number}:", is_streamed=asked % 2 == 0)
                failure = ""
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError) as error:
                model, failure = "", f"{type(error).__name__}: {error}"
            self.answers.append(Answered(began, time.perf_counter() - began, model, failure))
            asked += 1
            await asyncio.sleep(self.rest_s)

    async def _ask(self, session: aiohttp.ClientSession, prompt: str, *, is_streamed: bool) -> str:
        """Return the model that answered.

        Raises:
            ValueError, KeyError, IndexError: the answer is not a whole one.
        """
        body: dict[str, Any] = {
            "model": self.name, "prompt": prompt, "max_tokens": self.tokens, "temperature": 1.0, "ignore_eos": True,
        }  # fmt: skip
        if is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with session.post("/v1/completions", json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise ValueError(f"status {response.status}: {text[:200]}")
        if is_streamed:
            *events, last = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
            if last != "[DONE]":
                raise ValueError(f"the stream ended with {last[:200]!r}")
            answer = json.loads(events[-1])
        else:
            answer = json.loads(text)
        if (tokens := answer["usage"]["completion_tokens"]) != self.tokens:
            raise ValueError(f"{tokens} tokens instead of {self.tokens}")
        model: str = answer["model"]
        return model
