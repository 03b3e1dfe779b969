"""What all routes share: paths with either ending, documented errors, one mapping from errors to answers.

Only `routes` modules and the application import this.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.responses import Response

from modelyard import errors
from modelyard.db import Sessions as DatabaseSessions
from modelyard.settings import Settings as ServerSettings


class EitherSlashRoute(APIRoute):
    """A route that answers with and without the trailing slash. A redirect would lose the body of a POST."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(path, endpoint, **kwargs)
        pattern = self.path_regex.pattern.removesuffix("$").removesuffix("/")
        # A `{name:path}` takes all that it can get: it must leave the last slash, and a name is not empty.
        self.path_regex = re.compile(pattern.replace(">.*)", ">.+?)") + "/?$")


def router(prefix: str = "", tag: str = "") -> APIRouter:
    """Return a router whose routes answer with and without a trailing slash."""
    return APIRouter(prefix=prefix, tags=[tag] if tag else None, route_class=EitherSlashRoute, redirect_slashes=False)


class ErrorBody(BaseModel):
    """What went wrong: where, and what to do about it."""

    message: str = Field(examples=["There is no model 'openchat/openchat-3.5-0106' in the store."])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["model_id"])
    code: str | None = Field(description="Stable: programs may match it.", examples=["model_not_found"])


class ErrorOut(BaseModel):
    """The one form of all errors, which OpenAI's clients understand."""

    error: ErrorBody


FAMILIES = {
    400: "The request cannot be understood.",
    401: "The admin key is missing or wrong.",
    403: "Not from this host name or web page.",
    404: "There is no such thing.",
    409: "Not in the present state.",
    413: "The body is larger than the settings allow.",
    422: "A parameter or a field has a value that it cannot have.",
    502: "The engine failed.",
    503: "Not now; `Retry-After` says when to try again.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses=` of a route that can answer with these errors, and with those that every route can."""
    return {status: {"model": ErrorOut, "description": FAMILIES[status]} for status in sorted({401, 403, *statuses})}


def error_response(error: errors.ModelyardError) -> Response:
    """Return the answer to an error: its envelope, and `Retry-After` where there is a time to name."""
    headers = {}
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        msgspec.json.encode(error.envelope()), status_code=error.status, headers=headers, media_type="application/json"
    )


def _sessions(request: Request) -> DatabaseSessions:
    found: DatabaseSessions = request.app.state.sessions
    return found


def _settings(request: Request) -> ServerSettings:
    found: ServerSettings = request.app.state.settings
    return found


Sessions = Annotated[DatabaseSessions, Depends(_sessions)]
Settings = Annotated[ServerSettings, Depends(_settings)]
