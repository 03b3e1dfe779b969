"""The raw-prompt lane's calls to an engine: tokens of a text, the text of tokens, texts that go on, next tokens.

`Asking` holds all calls that one request makes, so that they end together when the client leaves. It knows vLLM's
fields and answers and no more: what a text is and where it stands is for `raw` to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import msgspec

from modelyard.client_watch import ClientGone
from modelyard.errors import BadGateway
from modelyard.gateway.beam_search import ALL, Row
from modelyard.gateway.raw_schemas import Config
from modelyard.gateway.relay import Target, engine_ended
from modelyard.gateway.upstream import Call, EngineBrokeOff, Engines, EngineUnreachable
from modelyard.trainer.model_files import read_settings, stop_ids_of

HEADERS = ((b"Content-Type", b"application/json"),)
#: The last event of a stream.
DONE = b"[DONE]"
#: A longer answer is read in a thread: of a large vocabulary it may be many megabytes.
READ_AT_ONCE_BYTES = 64 << 10
T = TypeVar("T")


class EngineRefused(Exception):
    """The engine answered with an error of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Choice(msgspec.Struct):
    """A text, or the next piece of one. `prompt_token_ids` come with the first piece only."""

    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None

    @property
    def is_finished(self) -> bool:
        """True if the model ended the text by itself."""
        return self.finish_reason == "stop"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that end a text, and how many tokens there are, where that is known."""

    eos_ids: frozenset[int] = frozenset()
    size: int | None = None


class _Completion(msgspec.Struct):
    choices: list[Choice] = msgspec.field(default_factory=list)
    error: Any = None


class _Tokens(msgspec.Struct):
    tokens: list[int]
    max_model_len: int


class _Text(msgspec.Struct):
    prompt: str


class _Logprobs(msgspec.Struct):
    top_logprobs: list[dict[str, float]]


class _Step(msgspec.Struct):
    logprobs: _Logprobs


class _Steps(msgspec.Struct):
    choices: list[_Step]


class _Card(msgspec.Struct):
    id: str
    root: str | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


_completions = msgspec.json.Decoder(_Completion)
_tokens = msgspec.json.Decoder(_Tokens)
_texts = msgspec.json.Decoder(_Text)
_steps = msgspec.json.Decoder(_Steps)
_cards = msgspec.json.Decoder(_Cards)

Take = Callable[[Choice], Awaitable[None]]


def completion_body(
    name: str, prompts: Sequence[str | list[int]], config: Config, max_tokens: int, seed: int | None, *, stream: bool
) -> bytes:
    """Return the request that has these prompts go on, as vLLM reads it."""
    body: dict[str, Any] = {
        "model": name, "prompt": prompts, "max_tokens": max_tokens, "stream": stream,
        "return_token_ids": True, "skip_special_tokens": False, "include_stop_str_in_output": True,
        # All are sent, since a model's own generation_config.json would fill in what is not.
        "temperature": config.temperature if config.do_sample else 0.0, "top_p": config.top_p,
        "top_k": max(config.top_k, 0), "min_p": 0.0, "repetition_penalty": config.repetition_penalty,
    }  # fmt: skip
    return msgspec.json.encode(body if seed is None else {**body, "seed": seed})


class Asking:
    """The calls of one request to its engine."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._calls: set[Call] = set()
        self.is_given_up = False
        #: On `perf_counter`'s clock; 0 before.
        self.first_piece_at = 0.0
        self.target: Target | None = None

    def give_up(self) -> None:
        """End every call, by which the engine stops. Safe to repeat; later calls raise ClientGone."""
        self.is_given_up = True
        for call in self._calls:
            call.give_up()

    async def tokenize(self, text: str, *, adds_special: bool = True) -> tuple[list[int], int]:
        """Return the tokens of a text with those that its model puts around it, and the most that the model takes."""
        body = {"model": self._name, "prompt": text, "add_special_tokens": adds_special}
        found = _tokens.decode(await self._whole("/tokenize", msgspec.json.encode(body)))
        return found.tokens, found.max_model_len

    async def detokenize(self, ids: list[int]) -> str:
        """Return the text of tokens, special ones included."""
        body = msgspec.json.encode({"model": self._name, "tokens": ids})
        return _texts.decode(await self._whole("/detokenize", body)).prompt

    async def complete(self, body: bytes) -> list[Choice]:
        """Return the texts of a request that is not streamed, in the order of its prompts.

        Raises:
            EngineRefused, BadGateway, ClientGone: as `_whole`.
        """
        choices = _completions.decode(await self._whole("/v1/completions", body)).choices
        if any(choice.finish_reason not in ("stop", "length") or choice.token_ids is None for choice in choices):
            # Such as "abort", of an engine that is being stopped.
            raise engine_ended(self._model_id)
        return choices

    async def next_tokens(self, texts: Sequence[list[int]], count: int) -> list[Row]:
        """Return the `count` likeliest next tokens of each text, of ALL every one, by the model's own probabilities.

        No penalty and no temperature is in them. The engine keeps the KV cache of what the texts have in common.

        Raises:
            EngineRefused, BadGateway, ClientGone: as `_whole`.
        """
        body = msgspec.json.encode(
            {"model": self._name, "prompt": texts, "max_tokens": 1, "temperature": 0.0, "repetition_penalty": 1.0,
             "logprobs": count, "return_tokens_as_token_ids": True}
        )  # fmt: skip
        answer = await self._whole("/v1/completions", body)
        try:
            if len(answer) > READ_AT_ONCE_BYTES:
                rows = await asyncio.to_thread(_rows, answer, count)
            else:
                rows = _rows(answer, count)
        except (msgspec.MsgspecError, ValueError, IndexError) as error:
            # Such as of a model that counts to what is no number.
            raise BadGateway(
                f"The engine of '{self._model_id}' gave no log probabilities for a beam search: {error}."
            ) from None
        if len(rows) != len(texts):
            raise engine_ended(self._model_id)
        return rows

    async def vocabulary(self) -> Vocabulary:
        """Return what the model's files say of its tokens: those that end a text, else its tokenizer's own end."""
        cards = _cards.decode(await self._whole("/v1/models", b"", method=b"GET")).data
        root = next((card.root for card in cards if card.id == self._model_id), None)
        if not root:
            return Vocabulary()
        config = await asyncio.to_thread(read_settings, Path(root), "config")
        text = config.get("text_config")
        sizes = [part.get("vocab_size") for part in (config, text) if isinstance(part, dict)]
        size = next((one for one in sizes if type(one) is int and one > 0), None)
        found = await asyncio.to_thread(stop_ids_of, Path(root)) or await self._end_of_tokenizer(Path(root))
        return Vocabulary(frozenset(found), size)

    async def _end_of_tokenizer(self, folder: Path) -> list[int]:
        named = (await asyncio.to_thread(read_settings, folder, "tokenizer_config")).get("eos_token")
        text = named.get("content") if isinstance(named, dict) else named
        if not isinstance(text, str):
            return []
        ids, _ = await self.tokenize(text, adds_special=False)
        return ids if len(ids) == 1 else []

    async def stream(self, body: bytes, take: Take) -> None:
        """Give each piece of a streamed text to `take`, to the text's end.

        Raises:
            EngineRefused: before the first piece.
            BadGateway: no answer came.
            EngineBrokeOff: the text stopped before its end, or the client left.
        """

        async def take_first(choice: Choice) -> None:
            self.first_piece_at = self.first_piece_at or perf_counter()
            await take(choice)

        reading = _Reading(take_first)
        await self._call("/v1/completions", body, reading.write)
        if not reading.is_complete:
            raise EngineBrokeOff("its stream ended before its text")

    @property
    def _name(self) -> str:
        assert self.target is not None
        return self.target.served_name

    @property
    def _model_id(self) -> str:
        assert self.target is not None
        return self.target.model_id

    async def _whole(self, path: str, body: bytes, method: bytes = b"POST") -> bytes:
        parts: list[bytes] = []

        async def write(part: bytes) -> None:
            parts.append(part)

        try:
            await self._call(path, body, write, method)
        except EngineBrokeOff:
            if self.is_given_up:
                raise ClientGone from None
            raise engine_ended(self._model_id) from None
        return b"".join(parts)

    async def _call(
        self, path: str, body: bytes, write: Callable[[bytes], Awaitable[None]], method: bytes = b"POST"
    ) -> None:
        assert self.target is not None
        if self.is_given_up:
            raise ClientGone
        call = self._engines.call(self.target.url)
        self._calls.add(call)
        try:
            await call.start(path, HEADERS, body, method)
            if call.status != 200:
                parts: list[bytes] = []

                async def collect(part: bytes) -> None:
                    parts.append(part)

                await call.hand_on(collect)
                raise EngineRefused(call.status, _message(b"".join(parts)))
            await call.hand_on(write)
        except EngineUnreachable as error:
            raise engine_ended(self._model_id) from error
        finally:
            self._calls.discard(call)
            call.close()


class _Reading:
    """Reads server-sent events, which come in pieces of any length."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._rest = b""
        self.is_complete = False

    async def write(self, data: bytes) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: ") or event.endswith(DONE):
                continue
            answer = _completions.decode(event[6:])
            if answer.error is not None:
                raise EngineBrokeOff(f"it reported an error in its stream: {answer.error}")
            for choice in answer.choices:
                if choice.finish_reason not in (None, "stop", "length"):
                    raise EngineBrokeOff(f"the text ended as '{choice.finish_reason}'")
                await self._take(choice)
                self.is_complete = self.is_complete or choice.finish_reason is not None


def _rows(answer: bytes, count: int) -> list[Row]:
    """Return the next tokens of each text. vLLM writes a token as `token_id:N`, since texts of tokens are ambiguous."""
    return [
        Row({int(token.rpartition(":")[2]): value for token, value in choice.logprobs.top_logprobs[0].items()},
            is_all=count == ALL)
        for choice in _steps.decode(answer).choices
    ]  # fmt: skip


async def together(works: Sequence[Callable[[], Awaitable[T]]], at_once: int) -> list[T]:
    """Do things at the same time and return what they return; the first error ends the others."""
    if len(works) == 1:
        return [await works[0]()]
    gate = asyncio.Semaphore(max(1, at_once))

    async def one(work: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await work()

    running = [asyncio.create_task(one(work)) for work in works]
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _message(body: bytes) -> str:
    """Return what an engine's error says, whatever its form."""
    try:
        said = msgspec.json.decode(body)
        return str(said["error"]["message"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:500]
