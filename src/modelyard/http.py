"""Parts that all routes share: paths with either ending, a limit on bodies, documented errors, one mapping to answers.

Only `routes` modules and the application import this.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.dependencies.utils import get_flat_dependant
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.convertors import UUIDConvertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from modelyard import errors
from modelyard.bodies import Gunzip, decompressor
from modelyard.db import Sessions as DatabaseSessions
from modelyard.parameters import check_query, not_an_id
from modelyard.settings import Settings as ServerSettings

if TYPE_CHECKING:
    from modelyard.services import Services

BODY_TOO_LARGE = "The body is larger than the 1 MiB that this path takes."
#: The most that a management request may say. FastAPI holds it in memory whole before it looks at it.
BODY_LIMIT = 1024 * 1024


#: All below it that is not a path of OpenAI's or Anthropic's clients manages the server.
MANAGEMENT = "/api/v1/"
#: Here errors are a line of text: clients of the interface that these succeed know no other form.
PLAIN_TEXT_PATHS = frozenset({"/api/generate-one", "/api/generate-batch"})
#: Here errors have the form of Anthropic's interface, whose clients find the message nowhere else.
ANTHROPIC_PATHS = frozenset(f"{base}/messages{end}" for base in ("/v1", "/api/v1") for end in ("", "/count_tokens"))
#: And at every other path that only such a client asks for: /v1/messages/batches, or one after a wrong base address.
_ANTHROPIC = re.compile(r"\A(?:/+(?:api|v1))*/+messages(?:/.*)?", re.DOTALL)


_UUID = UUIDConvertor.regex
_ID = re.compile(_UUID)


class EitherSlashRoute(APIRoute):
    """A route that answers with and without the trailing slash. A redirect would lose the body of a POST.

    What can be got answers HEAD too, with the status and headers of GET and no body. HEAD is not among `methods`, since
    FastAPI would describe each of them a second time.

    A body that FastAPI reads for the route may have `BODY_LIMIT` bytes. One that the route reads itself, as a stream,
    is for the route to limit.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(path, endpoint, **kwargs)
        pattern = self.path_regex.pattern.removesuffix("$").removesuffix("/")
        # A `{name:path}` takes all that it can get: it must leave the last slash, and a name is not empty.
        pattern = pattern.replace(">.*)", ">.+?)") + "/?$"
        self.path_regex = re.compile(pattern)
        #: The same with anything in the place of an id; None where the path has none that must be a UUID.
        self.any_id_regex = re.compile(pattern.replace(_UUID, "[^/]+")) if _UUID in pattern else None

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return the match as starlette wants it."""
        match, found = super().matches(scope)
        return (Match.FULL if match is Match.PARTIAL and self._is_head(scope) else match), found

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if self._is_head(scope):
            await self.app(scope, receive, send)
        else:
            await super().handle(scope, receive, send)

    def _is_head(self, scope: Scope) -> bool:
        return scope["method"] == "HEAD" and "GET" in (self.methods or ())

    def malformed_id(self, path: str) -> errors.Unprocessable | None:
        """Return the refusal of a path that would be one of this route's if it had an id in the place of one."""
        found = self.any_id_regex.match(path) if self.any_id_regex is not None else None
        for name, value in found.groupdict().items() if found else ():
            if isinstance(self.param_convertors[name], UUIDConvertor) and not _ID.fullmatch(value):
                return not_an_id("path", name, value)
        return None

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request, as FastAPI wants it."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return _without_stream(handle) if "GET" in (self.methods or ()) else handle

        async def limited(request: Request) -> Response:
            announced = request.headers.get("content-length", "")
            if announced.isdecimal() and int(announced) > BODY_LIMIT:
                raise errors.TooLarge(BODY_TOO_LARGE)
            packed = decompressor(request.headers.get("content-encoding", "").encode("latin-1"))
            if packed is None:
                return await handle(Request(request.scope, _limited(request.receive)))
            return await handle(Request(request.scope, _replaying(await _unpacked(request, packed))))

        return limited


def _without_stream(
    handle: Callable[[Request], Coroutine[Any, Any, Response]],
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """Return the handler, which answers HEAD without making what only a body would hold (a stream may never end)."""

    async def answer(request: Request) -> Response:
        response = await handle(request)
        if request.method != "HEAD" or not isinstance(response, StreamingResponse):
            return response
        response.body_iterator = _nothing()
        return response

    return answer


async def _nothing() -> AsyncGenerator[bytes]:
    return
    yield b""


async def _unpacked(request: Request, packed: Gunzip) -> bytes:
    parts: list[bytes] = []
    room = BODY_LIMIT
    try:
        async for chunk in request.stream():
            parts.append(await packed.feed(chunk, room))
            room -= len(parts[-1])
            if room < 0:
                raise errors.TooLarge(BODY_TOO_LARGE)
    except ClientDisconnect:
        raise errors.BadRequest("The connection broke off within the body.", code="body_broken_off") from None
    packed.finish()
    return b"".join(parts)


def _replaying(body: bytes) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return receive


def _limited(receive: Receive) -> Receive:
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > BODY_LIMIT:
            # FastAPI makes a 400 of everything else that is raised while it reads a body.
            raise HTTPException(errors.TooLarge.status, BODY_TOO_LARGE)
        return message

    return receive_limited


class ManagementRoute(EitherSlashRoute):
    """A route of the management API, which refuses query parameters that it does not have, and one given twice.

    A misspelt one would else be ignored without a word (`?drian=false`). The paths of OpenAI's and Anthropic's clients,
    which send parameters of their own, are no routes of this class.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request, as FastAPI wants it."""
        handle = super().get_route_handler()
        fields = get_flat_dependant(self.dependant).query_params
        known = {field.alias: get_origin(field.field_info.annotation) is list for field in fields}

        async def checked(request: Request) -> Response:
            if request.scope["query_string"]:
                check_query(request.query_params.multi_items(), known)
            return await handle(request)

        return checked


def router(prefix: str = "", tag: str = "") -> APIRouter:
    """Return a router whose routes answer with and without a trailing slash.

    With a prefix of the management API they refuse query parameters that they do not have.
    """
    is_management = prefix.startswith(MANAGEMENT)
    return APIRouter(
        prefix=prefix,
        tags=[tag] if tag else None,
        route_class=ManagementRoute if is_management else EitherSlashRoute,
        responses=documented(422) if is_management else None,
        redirect_slashes=False,
    )


class ErrorBody(BaseModel):
    """The error: what went wrong, where, and what to do about it."""

    message: str = Field(examples=["There is no model 'openchat/openchat-3.5-0106' in the store."])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["model_id"])
    code: str | int | None = Field(
        description="Stable: programs may match it. A number where it is the engine's own error: then the status.",
        examples=["model_not_found"],
    )
    evidence: list[str] | None = Field(
        default=None,
        description="Lines that show it, where a process of its own failed: rows with their reasons, or a log's.",
        examples=[["line 7: the chat template leaves out the tools"]],
    )


class ErrorOut(BaseModel):
    """The one form of all errors, which OpenAI's clients understand."""

    error: ErrorBody


class AnthropicErrorBody(BaseModel):
    """The error, as Anthropic's clients read it."""

    type: str = Field(description="By the status, as Anthropic documents it.", examples=["not_found_error"])
    message: str = Field(examples=["There is no model 'nope' in service; there are: default."])


class AnthropicErrorOut(BaseModel):
    """The form of errors in Anthropic's interface."""

    type: Literal["error"] = Field(examples=["error"])
    error: AnthropicErrorBody


FAMILIES = {
    400: "The request cannot be understood.",
    401: "The admin key is missing or wrong.",
    403: "Not from this host name or web page.",
    404: "There is no such thing.",
    405: "Not with this method; `Allow` names those that are possible.",
    408: "The rest of the request did not come in time.",
    409: "Not in the present state.",
    413: "The body is larger than this path takes.",
    415: "The body is compressed in a way that is not known here; `Accept-Encoding` says which is.",
    416: "There is no such part of the file; `Content-Range` says how long it is.",
    422: "A parameter or a field has a value that it cannot have.",
    431: "The address and the headers are too large.",
    502: "The engine failed.",
    503: "Not now; `Retry-After` says when to try again.",
}


EXAMPLES: dict[int, errors.ModelyardError] = {
    400: errors.InvalidJson("The body is not JSON: Expecting value (at character 12)."),
    401: errors.Unauthorized("This server wants its admin key: send 'Authorization: Bearer KEY' or 'X-API-KEY: KEY'."),
    403: errors.OriginNotAllowed("Pages from https://example.org may not call this server."),
    404: errors.ModelNotFound("Qwen/Qwen3-0.6B", known=["openchat/openchat-3.5-0106"]),
    405: errors.MethodNotAllowed("PUT is not possible at /api/v1/jobs/.", code="method_not_allowed"),
    408: errors.RequestTooSlow("The headers were not complete within 10 s."),
    409: errors.JobFinished("3f2b8a94-5c1d-4e6f-9a70-b1c2d3e4f506", "FINISHED"),
    413: errors.TooLarge(BODY_TOO_LARGE),
    415: errors.EncodingNotAllowed("br"),
    416: errors.RangeNotSatisfiable(2048),
    422: errors.Unprocessable("query limit: Input should be greater than or equal to 1.", param="limit"),
    431: errors.HeadersTooLarge(64),
    502: errors.BadGateway("The engine of 'Qwen/Qwen3-0.6B' broke off before it answered."),
    503: errors.EngineStarting("The engine of 'Qwen/Qwen3-0.6B' is starting."),
}
ERROR_SCHEMA = {"$ref": "#/components/schemas/ErrorOut"}
ANTHROPIC_ERROR_SCHEMA = {"$ref": "#/components/schemas/AnthropicErrorOut"}
#: Anthropic's names for errors, by status; what it has no name for is the request's fault below 500.
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


#: One event of a stream. Generators and checkers of clients read the schema of a stream as that of each event.
EVENT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "One event of the stream, as its lines say.",
    "required": ["data"],
    "properties": {
        "id": {"type": "string", "description": "Its number, for Last-Event-ID."},
        "event": {"type": "string", "description": "Its kind."},
        "data": {"type": "string", "description": "JSON, or a word such as [DONE]."},
    },
}


def event_stream(example: str) -> dict[str, Any]:
    """Return the documented content of server-sent events; `example` is the beginning of a stream."""
    lines = [line.partition(": ") for line in example.partition("\n\n")[0].splitlines()]
    return {"text/event-stream": {"schema": EVENT_SCHEMA, "example": {name: value for name, _, value in lines}}}


def _with_common(statuses: tuple[int, ...]) -> list[int]:
    """Return the statuses of a route with those of every route, and of every one that takes a body of a known size."""
    return sorted({401, 403, *statuses, *((415,) if 413 in statuses else ())})


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses=` of a route that can answer with these errors, and with those that every route can."""
    # Written out, since FastAPI would give an error the media type of the route's good answer.
    return {
        status: {
            "description": FAMILIES[status],
            "content": {"application/json": {"schema": ERROR_SCHEMA, "example": EXAMPLES[status].envelope()}},
        }
        for status in _with_common(statuses)
    }


def documented_as_anthropic(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the same for a route at one of `ANTHROPIC_PATHS`."""
    return {
        status: {
            "description": FAMILIES[status],
            "content": {
                "application/json": {
                    "schema": ANTHROPIC_ERROR_SCHEMA,
                    "example": anthropic_envelope(status, EXAMPLES[status].message),
                }
            },
        }
        for status in _with_common(statuses)
    }


def anthropic_envelope(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error in Anthropic's form."""
    kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def documented_in_plain_text(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the same for a route at one of `PLAIN_TEXT_PATHS`."""
    return {
        status: {
            "description": FAMILIES[status],
            "content": {"text/plain": {"schema": {"type": "string"}, "example": EXAMPLES[status].message}},
        }
        for status in _with_common(statuses)
    }


def error_response(error: errors.ModelyardError, path: str = "") -> Response:
    """Return the answer to an error: its form at this path, and `Retry-After` where there is a time to name."""
    headers = {}
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, errors.RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.size_bytes}"
    if isinstance(error, errors.EncodingNotAllowed):
        headers["Accept-Encoding"] = error.accepted
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if path.removesuffix("/") in PLAIN_TEXT_PATHS:
        return PlainTextResponse(error.message, status_code=error.status, headers=headers)
    envelope = anthropic_envelope(error.status, error.message) if _ANTHROPIC.fullmatch(path) else error.envelope()
    return Response(
        msgspec.json.encode(envelope), status_code=error.status, headers=headers, media_type="application/json"
    )


def services_of(scope: Scope) -> Services:
    """Return what the application made for its routes when it started; a request has it in `request.scope`."""
    found: Services = scope["app"].state.services
    return found


# Coroutines, though they wait for nothing: FastAPI calls a plain function in another thread.
async def _sessions(request: Request) -> DatabaseSessions:
    return services_of(request.scope).sessions


async def _settings(request: Request) -> ServerSettings:
    return services_of(request.scope).settings


Sessions = Annotated[DatabaseSessions, Depends(_sessions)]
Settings = Annotated[ServerSettings, Depends(_settings)]
