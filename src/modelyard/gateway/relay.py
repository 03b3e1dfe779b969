"""The passage of one request through the gateway, from its first byte in to its last byte out.

`Gateway.forward` is plain ASGI: it reads, looks up, refuses, asks the engine and hands the engine's bytes on as they
come, without a task or a queue of its own between the two sockets. From the end of the request's body on, a watch waits
for the client to go away, and then ends the wait for an engine or closes its connection, which ends the generation.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from modelyard.client_watch import ClientGone, ClientWatch
from modelyard.errors import BadGateway, BadRequest, EngineStarting, ModelyardError
from modelyard.gateway.engine_words import in_our_words
from modelyard.gateway.envelope import Envelope, check_headers, parse, read_body, with_model
from modelyard.gateway.lengths import Lengths
from modelyard.gateway.limits import ALWAYS_TOKENISED, DEFAULT_LIMITS, Limits
from modelyard.gateway.listing import Served
from modelyard.gateway.metrics import Metrics, Passage
from modelyard.gateway.upstream import Call, EngineBrokeOff, Engines, EngineUnreachable

log = logging.getLogger(__name__)

CLIENT_GONE = 499
BROKEN_OFF = 599
ANY_TASK = "any"
#: Whose errors have the form of Anthropic's interface.
ANTHROPIC = frozenset({"messages", "messages/count_tokens"})
#: Here vLLM takes a text of any length; elsewhere it refuses by its length what no model could take.
TOKENISING = frozenset({"tokenize", "detokenize", "messages/count_tokens"})
#: Request headers that an engine has a use for. Keys and cookies are the server's own business.
FORWARDED = (b"accept", b"traceparent", b"tracestate")
#: Answer headers that belong to one connection only, and those that the server sets itself.
DROPPED = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"te", b"trailer", b"transfer-encoding",
     b"upgrade", b"server", b"date", b"x-request-id", b"set-cookie"}
)  # fmt: skip
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Target(Protocol):
    """Where a name leads: the engine that serves it, and the name by which that engine knows it."""

    @property
    def model_id(self) -> str: ...
    @property
    def served_name(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def state(self) -> str: ...


class Routing(Protocol):
    """The questions that the gateway asks of the deploy room."""

    async def resolve(self, name: str | None, task: str) -> Target:
        """Return the engine for a model's name, of the current deployment for None.

        It may take long, since an idle deployment's engine is started for it; cancel it when the client goes away.
        Go on with `with routing.request(target):` before anything else is awaited.

        Raises ModelNotFound, EngineStarting or, of a name that is not known while it is away, DatabaseUnavailable.
        """
        ...

    def request(self, target: Target) -> AbstractContextManager[None]:
        """Count a request as open within a `with` block: from `resolve` until nothing more is asked of the engine.

        An engine that leaves is ended, and an adapter unloaded, when no request to it is open: one that is not counted
        may be cut off.
        """
        ...

    async def listing(self) -> Sequence[Served]:
        """Return every name under which a model is in service."""
        ...

    @property
    def is_away(self) -> bool:
        """True if the database does not answer, so that what is in service is only what was when it last did."""
        ...

    def expect_database(self, name: str | None = None) -> None:
        """Raise DatabaseUnavailable while it is away: that something does not exist cannot be said then."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """A path that engines answer: its name in metrics, its path there, and the task of the models that have it.

    ANY_TASK: every engine has it, and without a model's name the generative one is meant.
    """

    name: str
    engine_path: str
    task: str


class Gateway:
    """The state that all passages share."""

    def __init__(
        self, routing: Routing, engines: Engines, metrics: Metrics, max_body_bytes: int, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.routing = routing
        self.engines = engines
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes
        self.limits = limits
        self.lengths = Lengths(engines)

    async def forward(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the engine that serves the request's model, and hand its answer on as it comes.

        When the engine dies after the first byte the answer is left without its end: the server then closes the
        connection, and the client sees a broken transfer instead of a short answer.

        Raises:
            ModelyardError: refused here, no such model, its engine starts, or it died before its first byte.
        """
        passage = Passage(self.metrics, endpoint.name)
        status, call, watch = 500, None, None
        try:
            headers: dict[bytes, bytes] = dict(scope["headers"])
            request_id = _request_id(headers)
            envelope, body = await self._read(headers, receive)
            watch = ClientWatch(receive)
            wanted = "generate" if endpoint.task == ANY_TASK else endpoint.task
            target = await watch.unless_gone(self.routing.resolve(envelope.model or None, wanted))
            with self.routing.request(target):
                passage.model = target.model_id
                check_target(target, endpoint, envelope.model)
                if envelope.model != target.served_name:
                    body = with_model(body, target.served_name)
                if endpoint.name in TOKENISING and len(body) > ALWAYS_TOKENISED:
                    length = await watch.unless_gone(self.lengths.of(target.url, target.served_name))
                    self.limits.check_tokenised(envelope, length)
                call = self.engines.call(target.url)
                watch.when_gone(call.give_up)
                status = await self._relay(call, endpoint, target, headers, request_id, body, send)
        except (ClientGone, EngineBrokeOff) as error:
            if isinstance(error, ClientGone) or (call is not None and call.is_given_up):
                status = CLIENT_GONE
            else:
                status = BROKEN_OFF
                log.warning("the engine broke off its answer to request %s: %s", request_id, error)
        except ModelyardError as error:
            status = error.status
            raise
        finally:
            if watch is not None:
                watch.end()
            passage.end(status, call.first_byte_at if call is not None else 0.0)
            if call is not None:
                call.close()

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> tuple[Envelope, bytes]:
        check_headers(headers.get(b"content-type"), headers.get(b"content-length"), self.max_body_bytes)
        body = await read_body(receive, self.max_body_bytes, headers.get(b"content-encoding"))
        envelope = parse(body)
        self.limits.check(envelope)
        return envelope, body

    async def _relay(
        self, call: Call, endpoint: Endpoint, target: Target, headers: dict[bytes, bytes], request_id: bytes,
        body: bytes, send: Send,
    ) -> int:  # fmt: skip
        forwarded = [(b"Content-Type", b"application/json"), (b"X-Request-Id", request_id)]
        forwarded += [(name, headers[name]) for name in FORWARDED if name in headers]
        try:
            await call.start(endpoint.engine_path, forwarded, body)
        except EngineUnreachable as error:
            log.warning("engine of %s gave no answer to request %s: %s", target.model_id, request_id, error)
            raise engine_ended(target.model_id) from error
        if call.status >= 400:
            return await self._relay_error(call, endpoint, target, request_id, send)
        answer = _answer_headers(call.headers, request_id)
        await send({"type": "http.response.start", "status": call.status, "headers": answer})
        message: MutableMapping[str, Any] = {"type": "http.response.body", "body": b"", "more_body": True}

        def write(chunk: bytes) -> Awaitable[None]:
            message["body"] = chunk
            return send(message)

        await call.hand_on(write)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return call.status

    async def _relay_error(self, call: Call, endpoint: Endpoint, target: Target, request_id: bytes, send: Send) -> int:
        """Hand on the engine's own error, whole, in the words and the form that clients here know."""
        parts: list[bytes] = []

        async def take(part: bytes) -> None:
            parts.append(part)

        try:
            await call.hand_on(take)
        except EngineBrokeOff as error:
            if call.is_given_up:
                raise
            raise engine_ended(target.model_id) from error
        is_anthropic = endpoint.name in ANTHROPIC
        body = in_our_words(call.status, b"".join(parts), for_anthropic=is_anthropic)
        own = {b"content-length": str(len(body)).encode()}
        if is_anthropic:
            own[b"content-type"] = b"application/json"
        headers = [one for one in _answer_headers(call.headers, request_id) if one[0] not in own]
        headers += own.items()
        await send({"type": "http.response.start", "status": call.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
        return call.status


def _request_id(headers: dict[bytes, bytes]) -> bytes:
    given = headers.get(b"x-request-id", b"")
    return given if REQUEST_ID.fullmatch(given) else os.urandom(16).hex().encode()


def _answer_headers(given: Sequence[tuple[bytes, bytes]], request_id: bytes) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-request-id", request_id)]
    for name, value in given:
        name = name.lower()
        if name in DROPPED:
            continue
        headers.append((name, value))
        if name == b"content-type" and value.startswith(b"text/event-stream"):
            # A proxy between us and the client must not collect a stream before it hands it on.
            headers.append((b"x-accel-buffering", b"no"))
    return headers


def engine_ended(model_id: str) -> BadGateway:
    """Return the error for an engine that died before it answered."""
    return BadGateway(
        f"The engine of '{model_id}' ended before it answered. It is being started again: "
        "GET /api/v1/deploy/status says how it is; then send the request again."
    )


def check_target(target: Target, endpoint: Endpoint, name: str | None) -> None:
    """Refuse a model that does something else, or whose engine is not ready.

    Raises:
        BadRequest: it does something else.
        EngineStarting: it is not ready.
    """
    if endpoint.task != ANY_TASK and target.task != endpoint.task:
        does = "answers /embeddings only" if target.task == "embed" else "makes no embeddings"
        raise BadRequest(f"The model '{name or target.model_id}' {does}.", param="model")
    if target.state != "READY":
        raise EngineStarting(f"The engine of '{target.model_id}' is {target.state.lower()}. Try again in a moment.")
