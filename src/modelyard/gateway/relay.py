"""The passage of one request through the gateway, from its first byte in to its last byte out.

`forward` reads, looks up, refuses and asks the engine; what it returns is an ASGI response that hands the engine's
bytes on as they come, without a task, a queue or a parser of its own between the two sockets. From the end of the body
on, a watch waits for the client to go away and then closes the engine's connection, which ends the generation.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelyard.errors import BadGateway, BadRequest, EngineStarting, ModelyardError
from modelyard.gateway.envelope import ClientGone, check_headers, parse, read_body, with_model
from modelyard.gateway.listing import Served
from modelyard.gateway.metrics import Metrics, Passage
from modelyard.gateway.upstream import Call, EngineBrokeOff, Engines, EngineUnreachable

log = logging.getLogger(__name__)

CLIENT_GONE = 499
BROKEN_OFF = 599
ANY_TASK = "any"
#: Request headers that an engine has a use for. Keys and cookies are the server's own business.
FORWARDED = ("accept", "traceparent", "tracestate")
#: Answer headers that belong to one connection only, and those that the server sets itself.
DROPPED = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"te", b"trailer", b"transfer-encoding",
     b"upgrade", b"server", b"date", b"x-request-id", b"set-cookie"}
)  # fmt: skip
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


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
    """What the gateway asks of the deploy room."""

    async def resolve(self, name: str | None, task: str) -> Target:
        """Return the engine for a model's name, of the current deployment for None.

        Raises ModelNotFound or EngineStarting.
        """
        ...

    async def listing(self) -> Sequence[Served]:
        """Return every name under which a model is in service."""
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
    """What all passages share."""

    def __init__(self, routing: Routing, engines: Engines, metrics: Metrics, max_body_bytes: int) -> None:
        self.routing = routing
        self.engines = engines
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes

    async def forward(self, request: Request, endpoint: Endpoint) -> Response:
        """Ask the engine that serves the request's model, and return its answer as it comes.

        Raises:
            ModelyardError: refused here, no such model, its engine starts, or it died before its first byte.
        """
        passage = Passage(self.metrics, endpoint.name)
        try:
            return await self._forward(request, endpoint, passage)
        except ClientGone:
            passage.end(CLIENT_GONE)
            return Response(status_code=CLIENT_GONE)
        except ModelyardError as error:
            passage.end(error.status)
            raise
        except BaseException:
            passage.end(500)
            raise

    async def _forward(self, request: Request, endpoint: Endpoint, passage: Passage) -> Response:
        given = request.headers
        check_headers(given.get("content-type"), given.get("content-length"), self.max_body_bytes)
        body = await read_body(request.receive, self.max_body_bytes)
        envelope = parse(body)
        wanted = "generate" if endpoint.task == ANY_TASK else endpoint.task
        target = await self.routing.resolve(envelope.model or None, wanted)
        passage.model = target.model_id
        _check_target(target, endpoint, envelope.model)
        if envelope.model != target.served_name:
            body = with_model(body, target.served_name)
        request_id = given.get("x-request-id", "")
        if REQUEST_ID.fullmatch(request_id) is None:
            request_id = uuid4().hex
        headers = [("Content-Type", "application/json"), ("X-Request-Id", request_id)]
        headers += [(name, given[name]) for name in FORWARDED if name in given]

        call = self.engines.call(target.url)
        watch = asyncio.create_task(_until_gone(request.receive), name="client watch")
        watch.add_done_callback(lambda _: call.give_up())
        try:
            await call.start(endpoint.engine_path, headers, body)
        except BaseException as error:
            is_gone = watch.done()
            watch.cancel()
            if isinstance(error, EngineBrokeOff) and is_gone:
                raise ClientGone from error
            if not isinstance(error, EngineUnreachable):
                raise
            log.warning("engine of %s gave no answer to request %s: %s", target.model_id, request_id, error)
            raise BadGateway(
                f"The engine of '{target.model_id}' ended before it answered. It is being started again: "
                "GET /api/v1/deploy/status says how it is; then send the request again."
            ) from error
        return Relay(call, watch, passage, request_id)


def _check_target(target: Target, endpoint: Endpoint, name: str | None) -> None:
    if endpoint.task != ANY_TASK and target.task != endpoint.task:
        does = "answers /embeddings only" if target.task == "embed" else "makes no embeddings"
        raise BadRequest(f"The model '{name or target.model_id}' {does}.", param="model")
    if target.state != "READY":
        raise EngineStarting(f"The engine of '{target.model_id}' is {target.state.lower()}. Try again in a moment.")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Relay(Response):
    """An engine's answer on its way to the client.

    The body's end is sent only when the engine sent one; else the server closes the connection, and the client sees a
    broken transfer.
    """

    def __init__(self, call: Call, watch: asyncio.Task[None], passage: Passage, request_id: str) -> None:
        self.background = None
        self.status_code = call.status
        headers = [(name.lower(), value) for name, value in call.headers if name.lower() not in DROPPED]
        headers.append((b"x-request-id", request_id.encode()))
        if any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers):
            # A proxy between us and the client must not collect a stream before it hands it on.
            headers.append((b"x-accel-buffering", b"no"))
        self.raw_headers = headers
        self._call = call
        self._watch = watch
        self._passage = passage
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; ends early, without an error, when the client or the engine goes away."""
        call, watch = self._call, self._watch
        status = BROKEN_OFF
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            message: MutableMapping[str, Any] = {"type": "http.response.body", "body": b"", "more_body": True}
            chunk = await call.read()
            self._passage.first_byte()
            while chunk:
                message["body"] = chunk
                await send(message)
                chunk = await call.read()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            status = self.status_code
        except EngineBrokeOff as error:
            if watch.done():
                status = CLIENT_GONE
            else:
                log.warning("the engine broke off its answer to request %s: %s", self._request_id, error)
        finally:
            if status == BROKEN_OFF and watch.done():
                status = CLIENT_GONE
            call.close()
            watch.cancel()
            self._passage.end(status)
