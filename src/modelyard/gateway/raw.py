"""The raw-prompt lane: a text, or several at once, generated from prompts as they are, and continued by request id.

A text that stopped before its end is kept as tokens (`continuations`) and goes on with the next request of the same
id, as if it had never stopped. That is so, too, where its client left while it was streamed; what an engine broke off
changes nothing, so that the same request can be sent again. An error before the first byte is a status and a line of
text, one after it a transfer without an end. Several texts are one request to the engine and are answered in order.

Characters come whole: where a text stopped inside one, the first part is held back and its continuation has it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import msgspec
from starlette.types import Receive, Scope, Send

from modelyard.auth.access import CALLER
from modelyard.bodies import refuse_half_characters
from modelyard.client_watch import ClientGone, ClientWatch
from modelyard.db import Sessions
from modelyard.errors import BadGateway, BadRequest, ModelNotFound, ModelyardError
from modelyard.gateway.continuations import Kept, Text
from modelyard.gateway.envelope import check_length, check_type, read_body
from modelyard.gateway.kept_texts import KeptTexts
from modelyard.gateway.metrics import Passage
from modelyard.gateway.raw_engine import Asking, Choice, EngineRefused, Vocabulary
from modelyard.gateway.raw_schemas import Config, RawRequest, parse_batch, parse_one
from modelyard.gateway.raw_turns import Turn
from modelyard.gateway.raw_work import Work
from modelyard.gateway.relay import BROKEN_OFF, CLIENT_GONE, Endpoint, Gateway, Target, check_target, engine_ended
from modelyard.gateway.upstream import EngineBrokeOff
from modelyard.plurals import counted
from modelyard.settings import Settings

log = logging.getLogger(__name__)

ONE = Endpoint("generate-one", "/v1/completions", "generate")
BATCH = Endpoint("generate-batch", "/v1/completions", "generate")
PLAIN = b"text/plain; charset=utf-8"
JSON = b"application/json"
ALL_ENDED, SOME_STOPPED = 200, 206
LENGTHS_KNOWN = 64


class Reply:
    """The answer, from its first byte on."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = False

    async def write(self, text: str) -> None:
        """Send a piece of a streamed text; the first one, which may be empty, starts the answer."""
        if not self.is_started:
            self.is_started = True
            # A proxy between us and the client must not collect the stream before it hands it on.
            headers = [(b"content-type", PLAIN), (b"x-accel-buffering", b"no")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if text:
            await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def end(self) -> None:
        """Send the end of a streamed text."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, status: int, kind: bytes, body: bytes) -> None:
        """Send an answer that is not streamed."""
        self.is_started = True
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


class Visit:
    """One request from its body to its answer: who asks, what for, and what is kept of it under its ids."""

    def __init__(self, caller: str, request: RawRequest, reply: Reply) -> None:
        self.caller = caller
        self.request = request
        self.reply = reply
        self.kept: Kept | None = None
        self.had_entry = False
        #: The model's name that a continuation will ask for again.
        self.asked_model: str | None = None


class RawLane:
    """Both routes, as plain ASGI."""

    def __init__(self, gateway: Gateway, sessions: Sessions, settings: Settings) -> None:
        self._gateway = gateway
        self.kept = KeptTexts(sessions, settings, gateway.metrics, lambda: gateway.routing.is_away)
        self._settings = settings
        self._defaults = Config.of_settings(settings)
        self._origins = frozenset(origin.encode("latin-1") for origin in settings.cors_origins)
        #: How much the model of an engine takes, by the engine's URL, which is another one after every start.
        self._lengths: dict[str, int] = {}
        #: What is known of its tokens, likewise.
        self._vocabularies: dict[str, Vocabulary] = {}

    async def one(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer POST /api/generate-one.

        Raises:
            ModelyardError: refused, no such model, its engine starts, or it died before its first byte.
        """
        await self._serve(ONE, self._one, scope, receive, send)

    async def batch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer POST /api/generate-batch.

        Raises:
            ModelyardError: as `one`.
        """
        await self._serve(BATCH, self._batch, scope, receive, send)

    async def _serve(
        self, endpoint: Endpoint, answer: Callable[[Visit, Work], Awaitable[int]],
        scope: Scope, receive: Receive, send: Send,
    ) -> None:  # fmt: skip
        passage = Passage(self._gateway.metrics, endpoint.name)
        status, watch, asking = 500, None, Asking(self._gateway.engines)
        try:
            request = await self._read(endpoint, scope, receive)
            visit = Visit(scope[CALLER], request, Reply(send))
            watch = ClientWatch(receive)
            watch.when_gone(asking.give_up)
            target = await watch.unless_gone(self._find(visit))
            with self._gateway.routing.request(target):
                passage.model = target.model_id
                check_target(target, endpoint, visit.asked_model)
                status = await self._answer(answer, visit, asking, target)
        except (ClientGone, EngineBrokeOff) as error:
            status = CLIENT_GONE
            if isinstance(error, EngineBrokeOff) and not asking.is_given_up:
                status = BROKEN_OFF
                log.warning("the engine of %s broke off a text: %s", passage.model, error)
        except ModelyardError as error:
            status = error.status
            raise
        finally:
            if watch is not None:
                watch.end()
            passage.end(status, asking.first_piece_at)

    async def _read(self, endpoint: Endpoint, scope: Scope, receive: Receive) -> RawRequest:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        origin = headers.get(b"origin")
        own = scope["scheme"].encode() + b"://" + headers.get(b"host", b"")
        # Pages that may call, and programs, need not say that it is JSON: browsers send a string as text/plain.
        if origin is not None and origin not in self._origins and origin != own:
            check_type(headers.get(b"content-type"))
        check_length(headers.get(b"content-length"), self._gateway.max_body_bytes)
        body = await read_body(receive, self._gateway.max_body_bytes, headers.get(b"content-encoding"))
        refuse_half_characters(body)
        return (parse_one if endpoint is ONE else parse_batch)(body, self._defaults)

    async def _find(self, visit: Visit) -> Target:
        """Find what is kept under the request's ids, and the engine for it."""
        kept = await self.kept.find(visit.caller, visit.request.request_ids)
        visit.had_entry = kept is not None
        visit.asked_model = visit.request.model or (kept.asked_model if kept is not None else None)
        try:
            target = await self._gateway.routing.resolve(visit.asked_model, "generate")
        except ModelNotFound:
            if visit.request.model is not None or visit.asked_model is None:
                raise
            # The model of the kept text is out of service: what is there now begins anew.
            visit.asked_model = None
            target = await self._gateway.routing.resolve(None, "generate")
        # Tokens of one model are nothing to another.
        visit.kept = kept if kept is not None and kept.model_id == target.model_id else None
        return target

    async def _answer(
        self, answer: Callable[[Visit, Work], Awaitable[int]], visit: Visit, asking: Asking, target: Target
    ) -> int:
        asking.target = target
        work = await self._work(visit, asking, target)
        work.check()
        try:
            return await answer(visit, work)
        except EngineRefused as error:
            raise await work.explained(error) from error
        except EngineBrokeOff as error:
            if visit.reply.is_started or asking.is_given_up:
                raise
            raise engine_ended(target.model_id) from error

    async def _work(self, visit: Visit, asking: Asking, target: Target) -> Work:
        request, kept = visit.request, visit.kept
        if kept is None and any(prompt.text is None for prompt in request.prompts):
            raise BadRequest(
                "Nothing is kept under this request_id that this model could go on with: send the prompt.",
                param="prompt",
            )
        texts = kept.texts if kept is not None else [Text([]) for _ in request.prompts]
        turns = [Turn(text, prompt.text, prompt.field) for text, prompt in zip(texts, request.prompts, strict=True)]
        config = request.config or (Config.of_kept(kept.config, self._defaults) if kept else self._defaults)
        self._check_size(len(turns), config.num_beams)
        work = Work(
            request, asking, target, config, self._settings.generate_seed, turns, await self._length(asking, target)
        )
        if config.num_beams > 1:
            work.vocabulary = await self._vocabulary(asking, target)
        return work

    def _check_size(self, texts: int, beams: int) -> None:
        """Refuse more texts than one request may have an engine work on, each beam being one."""
        most = self._settings.request_max_prompts
        if texts * beams > most:
            asked = f"{counted(texts, 'prompt')} with {beams} beams each" if beams > 1 else counted(texts, "prompt")
            raise BadRequest(
                f"The request has {asked}; {most} texts are allowed, each beam being one "
                "(MODELYARD_REQUEST_MAX_PROMPTS). Send fewer at a time.",
                param="prompts",
            )

    async def _length(self, asking: Asking, target: Target) -> int:
        if target.url not in self._lengths:
            if len(self._lengths) >= LENGTHS_KNOWN:
                self._lengths.clear()
            try:
                _, self._lengths[target.url] = await asking.tokenize("?")
            except EngineRefused as error:
                raise BadGateway(f"The engine of '{target.model_id}' failed: {error.message}") from error
        return self._lengths[target.url]

    async def _vocabulary(self, asking: Asking, target: Target) -> Vocabulary:
        if target.url not in self._vocabularies:
            if len(self._vocabularies) >= LENGTHS_KNOWN:
                self._vocabularies.clear()
            try:
                self._vocabularies[target.url] = await asking.vocabulary()
            except EngineRefused as error:
                raise BadGateway(f"The engine of '{target.model_id}' failed: {error.message}") from error
        return self._vocabularies[target.url]

    async def _one(self, visit: Visit, work: Work) -> int:
        [turn], reply = work.turns, visit.reply
        is_full = not visit.request.only_new_tokens
        if not visit.request.stream_response or work.config.num_beams > 1:
            [new] = await work.complete()
            await self._remember(visit, work)
            await reply.whole(200, PLAIN, ((turn.before if is_full else "") + new).encode())
            return 200
        await work.look()
        unsaid = turn.before if is_full else ""

        async def take(piece: Choice) -> None:
            nonlocal unsaid
            text, unsaid = unsaid + turn.new(piece.text), ""
            turn.advance(piece)
            await reply.write(text)

        try:
            await work.asking.stream(work.body([turn], stream=True), take)
        except EngineBrokeOff:
            if work.asking.is_given_up and reply.is_started:
                await self._remember(visit, work)
            raise
        await self._remember(visit, work)
        await reply.end()
        return 200

    async def _batch(self, visit: Visit, work: Work) -> int:
        news = await work.complete()
        await self._remember(visit, work)
        answers = []
        for prompt, turn, new in zip(visit.request.prompts, work.turns, news, strict=True):
            answer = {"request_id": prompt.request_id}
            if not visit.request.only_new_tokens:
                answer["prompt"] = turn.prompt_text
                new = turn.so_far + new
            answers.append({**answer, "response": new})
        status = ALL_ENDED if all(turn.text.is_finished for turn in work.turns) else SOME_STOPPED
        await visit.reply.whole(status, JSON, msgspec.json.encode(answers))
        return status

    async def _remember(self, visit: Visit, work: Work) -> None:
        """Keep the texts if one of them can go on; else see to it that nothing is kept under their ids."""
        texts, ids = [turn.text for turn in work.turns], visit.request.request_ids
        is_all = all(text.is_finished for text in texts)
        if is_all and not visit.had_entry:
            return
        kept = None
        if not is_all:
            kept = Kept(visit.asked_model, work.target.model_id, work.config.stored(), texts)
        await self.kept.keep(visit.caller, ids, kept)
