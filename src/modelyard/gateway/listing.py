"""The list of models in service in OpenAI's form, and how to tell who wants it where two forms share one address.

GET /v1/models is OpenAI's alone. At /api/v1/models the management API has its own list, of the models in the store.
Its address is documented with a trailing slash, while OpenAI's clients ask without one and name themselves in headers:
without the slash and with such headers the answer is OpenAI's, in every other case it is the management API's. The
same holds for one model, at /api/v1/models/{name}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from modelyard.errors import ModelNotFound
from modelyard.http import EitherSlashRoute


class Served(Protocol):
    """A name under which requests find a model: its id, an adapter's, or an alias."""

    @property
    def name(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def created_at(self) -> datetime: ...
    @property
    def root(self) -> str | None: ...


def wants_openai_list(headers: Mapping[str, str]) -> bool:
    """True if a caller is one of OpenAI's own clients (or a derivative), by the headers that all of them send.

    `headers` must be looked up by lower-case names.
    """
    return "x-stainless-lang" in headers or headers.get("user-agent", "").startswith(("OpenAI/", "AsyncOpenAI/"))


class OpenAIListRoute(EitherSlashRoute):
    """Matches only without a trailing slash and for OpenAI's clients; all others find the next route of the address."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return the match as starlette wants it."""
        if scope["type"] != "http" or scope["path"].endswith("/") or not wants_openai_list(Headers(scope=scope)):
            return Match.NONE, {}
        match, found = super().matches(scope)
        # A partial match (another method) must not hide the other route either.
        return (match, found) if match is Match.FULL else (Match.NONE, {})


def model_card(served: Served) -> dict[str, Any]:
    """Return a model in service as OpenAI describes one; `root` says what the name stands for."""
    return {
        "id": served.name,
        "object": "model",
        "created": int(served.created_at.timestamp()),
        "owned_by": "modelyard",
        "root": served.root or served.model_id,
        "parent": None if served.name == served.model_id else served.model_id,
    }


def openai_list(listing: Sequence[Served]) -> dict[str, Any]:
    """Return the models in service as OpenAI's list."""
    return {"object": "list", "data": [model_card(served) for served in listing]}


def openai_model(listing: Sequence[Served], name: str) -> dict[str, Any]:
    """Return one model in service.

    Raises:
        ModelNotFound: nothing in service has this name.
    """
    for served in listing:
        if served.name == name:
            return model_card(served)
    raise ModelNotFound(name, where="in service", known=[served.name for served in listing])
