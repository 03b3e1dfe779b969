"""The way to engines: one kept-alive set of connections per engine, on its Unix socket or its HTTP address.

`Engines.ask` sends a request and returns when the engine's headers are there; the `Answer` then hands out its body as
bytes, in the pieces in which they arrived. There is no time limit: how long a generation may take is for the client
and the supervisor to say. Closing an answer early closes its connection, by which the engine stops generating.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

#: Engines drop a connection that idles for 5 s; one that is given up sooner is never dropped under a new request.
KEEP_ALIVE_S = 3.0
CONNECT_TIMEOUT_S = 10.0

Headers = Sequence[tuple[str, str]]


class EngineUnreachable(Exception):
    """The engine answered nothing at all: it is not there, or it died before the first byte."""


class EngineBrokeOff(Exception):
    """The engine died, or was given up by us, in the middle of an answer."""


class Answer:
    """An engine's answer: status and headers are there, the body is still coming."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = response.raw_headers

    async def read(self) -> bytes:
        """Return what has come since the last call, waiting for something; empty at the end.

        Raises:
            EngineBrokeOff: the answer stopped before its end.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineBrokeOff(str(error)) from error

    def close(self) -> None:
        """Give the answer up. After its end this does nothing: the connection is kept for the next request."""
        self._response.close()


class Engines:
    """Connections to all engines, by the URL of each."""

    def __init__(self) -> None:
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def ask(self, url: str, path: str, headers: Headers, body: bytes) -> Answer:
        """POST to an engine and return its answer once its headers are there. Cancel to give up.

        Raises:
            EngineUnreachable: no answer came.
        """
        session = self._sessions.get(url) or self._open(url)
        base = "http://engine" if url.startswith("unix:") else url
        for is_last in (False, True):
            try:
                return Answer(await session.post(base + path, data=body, headers=headers, allow_redirects=False))
            except aiohttp.ClientConnectorError as error:
                raise EngineUnreachable(str(error)) from error
            except (aiohttp.ClientError, ConnectionError) as error:
                # A kept-alive connection may be closed by the engine just as we write to it. Nothing was answered,
                # so the request is sent once more; an engine that is really gone then refuses the connection.
                if is_last:
                    raise EngineUnreachable(str(error)) from error
        raise AssertionError("unreachable")

    def _open(self, url: str) -> aiohttp.ClientSession:
        if url.startswith("unix:"):
            connector: aiohttp.BaseConnector = aiohttp.UnixConnector(
                url.removeprefix("unix:"), limit=0, keepalive_timeout=KEEP_ALIVE_S
            )
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._sessions[url] = session
        return session

    async def forget(self, url: str) -> None:
        """Close the connections to an engine that is gone for good. An unknown URL is no error."""
        if (session := self._sessions.pop(url, None)) is not None:
            await session.close()

    async def close(self) -> None:
        """Close all connections."""
        for url in list(self._sessions):
            await self.forget(url)
        await asyncio.sleep(0)
