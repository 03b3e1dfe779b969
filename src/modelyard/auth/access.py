"""The gate before every route: the admin key where one is set, and otherwise this machine alone.

With a key, every path but `/health` wants it, as `Authorization: Bearer KEY` or `X-API-KEY: KEY`; a wrong one is
logged, and answered the later the more of them came from its address. Without a key the server listens on loopback
only, and a browser is the way in for others: so the Host must be a name of this machine (against DNS rebinding), and a
page from elsewhere is refused whatever it sends, since a `text/plain` POST needs no preflight. A link from elsewhere
leads to pages only. `MODELYARD_CORS_ORIGINS` names the pages and programs that may call.

Written as plain ASGI: it costs some microseconds and never touches a body.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from modelyard.auth.wrong_keys import WrongKeys
from modelyard.errors import BadRequest, Forbidden, HostNotAllowed, ModelyardError, OriginNotAllowed, Unauthorized
from modelyard.http import error_response
from modelyard.log_limits import limit_repeats
from modelyard.settings import Settings

log = logging.getLogger(__name__)
limit_repeats(log)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Where the scope of a request says who asks, for what belongs to its caller.
CALLER = "modelyard.caller"
THIS_MACHINE = "local"
OPEN_PATHS = frozenset({"/health", "/health/"})
#: What is made to be looked at in a browser: links from other sites may lead there, and nowhere else.
PAGES = frozenset({"/api/docs", "/api/docs/"})
#: And the pages of the manual, all of which lie below this.
GUIDE = "/api/docs/guide/"
#: The names under which this machine alone is known, with any port.
OWN_HOST = re.compile(rb"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
DECISIVE = (b"host", b"origin", b"authorization", b"x-api-key", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest")
CORS_METHODS = b"GET, POST, PUT, PATCH, DELETE"
CORS_MAX_AGE_S = b"600"


def is_page(path: str) -> bool:
    """Return whether a path is one of the pages that links from other sites may lead to."""
    return path in PAGES or f"{path}/".startswith(GUIDE)


class Access:
    """ASGI middleware that lets a request through or answers 400, 401 or 403 itself."""

    def __init__(self, app: App, settings: Settings) -> None:
        self._app = app
        self._key = settings.admin_key.encode() if settings.admin_key is not None else None
        self._caller = hashlib.sha256(self._key).hexdigest() if self._key is not None else THIS_MACHINE
        self._wrong_keys = WrongKeys(settings.wrong_key_delay_s)
        self._origins = frozenset(origin.encode("latin-1") for origin in settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise Forbidden("Only HTTP is spoken here.")
        headers: dict[bytes, bytes] = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and origin in self._origins:
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await _answer_preflight(origin, headers, send)
                return
            send = _with_origin(origin, send)
        try:
            self._check(scope, headers, origin)
        except ModelyardError as error:
            if isinstance(error, Unauthorized) and (b"authorization" in headers or b"x-api-key" in headers):
                await self._hold_back(scope)
            await error_response(error, scope["path"])(scope, receive, send)
            return
        scope[CALLER] = self._caller
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: dict[bytes, bytes], origin: bytes | None) -> None:
        if len(headers) != len(scope["headers"]):
            _refuse_doubles(scope["headers"])
        if self._key is not None:
            if scope["path"] not in OPEN_PATHS and not self._has_key(headers):
                raise Unauthorized(
                    "This server wants its admin key: send 'Authorization: Bearer KEY' or 'X-API-KEY: KEY'."
                )
            return
        host = headers.get(b"host", b"")
        if not OWN_HOST.fullmatch(host):
            raise HostNotAllowed(
                f"The host name '{_shown(host)}' is not this machine's own. Ask for 127.0.0.1 or localhost, or set "
                "MODELYARD_ADMIN_KEY to serve other names."
            )
        if origin is not None and origin not in self._origins and origin != scope["scheme"].encode() + b"://" + host:
            if origin == b"null":
                raise OriginNotAllowed(
                    "Pages without an origin of their own (opened from a file, or in a sandboxed frame) may not call "
                    "this server. MODELYARD_CORS_ORIGINS=null allows all such pages."
                )
            raise OriginNotAllowed(
                f"Pages from {_shown(origin)} may not call this server. MODELYARD_CORS_ORIGINS names those that may."
            )
        if origin is None and headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site"):
            mode = headers.get(b"sec-fetch-mode")
            # A link that somebody follows to the documentation is no danger; anything else from another page is. What
            # is no page would be shown, or saved, or start work, without anybody having asked this server for it.
            is_followed = mode == b"navigate" and headers.get(b"sec-fetch-dest", b"document") == b"document"
            if scope["method"] not in ("GET", "HEAD") or not is_followed or not is_page(scope["path"]):
                raise OriginNotAllowed(
                    "Another page's request. Links from other pages lead to /api/docs and its manual only; type other "
                    "addresses. MODELYARD_CORS_ORIGINS names the pages that may call this server."
                )

    async def _hold_back(self, scope: Scope) -> None:
        address = (scope.get("client") or ("an unknown address",))[0]
        delay_s = self._wrong_keys.another_from(address)
        log.warning("a wrong key came from %s, for %s", address, ascii(scope["path"][:200]))
        if delay_s:
            await asyncio.sleep(delay_s)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        assert self._key is not None
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        sent = bearer.strip() if scheme.lower() == b"bearer" else b""
        # Both are always compared, and in constant time: the time of the answer tells nothing about the key.
        found = hmac.compare_digest(sent, self._key)
        return hmac.compare_digest(headers.get(b"x-api-key", b""), self._key) or found


def _refuse_doubles(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuse a header that decides about access and is there twice: who else reads it may take the other one."""
    names = [name for name, _ in headers]
    for name in DECISIVE:
        if names.count(name) > 1:
            raise BadRequest(f"The header {name.decode()} was sent more than once.", code="header_sent_twice")


def _shown(value: bytes) -> str:
    return value.decode("latin-1")[:200]


async def _answer_preflight(origin: bytes, headers: dict[bytes, bytes], send: Send) -> None:
    asked = headers.get(b"access-control-request-headers", b"")
    answer = [
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-methods", CORS_METHODS),
        (b"access-control-allow-headers", asked or b"*"),
        (b"access-control-max-age", CORS_MAX_AGE_S),
        (b"vary", b"Origin"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": answer})
    await send({"type": "http.response.body", "body": b""})


def _with_origin(origin: bytes, send: Send) -> Send:
    async def send_with_origin(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                *message.get("headers", ()),
                (b"access-control-allow-origin", origin),
                (b"access-control-expose-headers", b"*"),
                (b"vary", b"Origin"),
            ]
        await send(message)

    return send_with_origin
