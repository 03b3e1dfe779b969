"""What the raw-prompt lane asks of an engine: tokens of a text, the text of tokens, and texts that go on.

`Asking` holds all calls that one request makes, so that they end together when the client leaves. It knows vLLM's
fields and answers and no more: what a text is and where it stands is for `raw` to say.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Any

import msgspec

from modelyard.gateway.envelope import ClientGone
from modelyard.gateway.raw_schemas import Config
from modelyard.gateway.relay import Target, engine_ended
from modelyard.gateway.upstream import Call, EngineBrokeOff, Engines, EngineUnreachable

HEADERS = ((b"Content-Type", b"application/json"),)
#: The last event of a stream.
DONE = b"[DONE]"


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
        """Whether the model ended the text by itself."""
        return self.finish_reason == "stop"


class _Completion(msgspec.Struct):
    choices: list[Choice] = msgspec.field(default_factory=list)
    error: Any = None


class _Tokens(msgspec.Struct):
    tokens: list[int]
    max_model_len: int


class _Text(msgspec.Struct):
    prompt: str


_completions = msgspec.json.Decoder(_Completion)
_tokens = msgspec.json.Decoder(_Tokens)
_texts = msgspec.json.Decoder(_Text)

Take = Callable[[Choice], Awaitable[None]]


def completion_body(
    name: str, prompts: Sequence[str | list[int]], config: Config, max_tokens: int, seed: int | None, *, stream: bool
) -> bytes:
    """Return the request that has these prompts go on, as vLLM reads it."""
    body: dict[str, Any] = {
        "model": name, "prompt": prompts, "max_tokens": max_tokens, "stream": stream,
        "return_token_ids": True, "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    if config.num_beams > 1:
        # Temperature 0: beam search draws a token beside the likeliest ones, and with 0 it is one of those.
        body |= {"use_beam_search": True, "n": config.num_beams, "length_penalty": config.length_penalty,
                 "temperature": 0.0}  # fmt: skip
    else:
        # All are sent, since a model's own generation_config.json would fill in what is not.
        body |= {"temperature": config.temperature if config.do_sample else 0.0, "top_p": config.top_p,
                 "top_k": max(config.top_k, 0), "min_p": 0.0,
                 "repetition_penalty": config.repetition_penalty}  # fmt: skip
        body |= {} if seed is None else {"seed": seed}
    return msgspec.json.encode(body)


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

    async def tokenize(self, text: str) -> tuple[list[int], int]:
        """Return the tokens of a text with those that its model puts around it, and the most that the model takes."""
        body = {"model": self._name, "prompt": text, "add_special_tokens": True}
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

    async def _whole(self, path: str, body: bytes) -> bytes:
        parts: list[bytes] = []

        async def write(part: bytes) -> None:
            parts.append(part)

        try:
            await self._call(path, body, write)
        except EngineBrokeOff:
            if self.is_given_up:
                raise ClientGone from None
            raise engine_ended(self._model_id) from None
        return b"".join(parts)

    async def _call(self, path: str, body: bytes, write: Callable[[bytes], Awaitable[None]]) -> None:
        assert self.target is not None
        if self.is_given_up:
            raise ClientGone
        call = self._engines.call(self.target.url)
        self._calls.add(call)
        try:
            await call.start(path, HEADERS, body)
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


def _message(body: bytes) -> str:
    """Return what an engine's error says, whatever its form."""
    try:
        said = msgspec.json.decode(body)
        return str(said["error"]["message"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:500]
