"""Tracks one engine's requests: open count, last activity, adapters that have drained.

Two sources are asked, since neither is enough. The gateway of this process knows what it has sent from the moment on
that it chose the engine; the engine's own figures count what came from another gateway process too, but only from its
next step on. Nothing is written here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from modelyard.deploy.open_requests import FRESH_S, OpenRequests
from modelyard.engine.client import EngineClient


class Requests:
    """The requests to one deployment's engine, across its restarts."""

    def __init__(self, open_requests: OpenRequests, timeout_s: float) -> None:
        self._open = open_requests
        self._timeout_s = timeout_s
        self._url = ""
        self._client: EngineClient | None = None
        self._asked_at = time.monotonic()
        self._answered: float | None = None
        self._draining_since: float | None = None
        #: Engine names of adapters that clients cannot name any more, and since when.
        self._leaving: dict[str, float] = {}
        self.drained = False

    def of_engine(self, url: str, client: EngineClient) -> None:
        """Begin anew with an engine that has just been started or found."""
        self._url, self._client = url, client
        self._answered, self._draining_since, self.drained = None, None, False
        self._leaving.clear()
        self.asked()

    def engine_is_gone(self) -> None:
        """Nothing waits for the requests of an engine that has ended."""
        self._leaving.clear()

    def asked(self) -> None:
        """Note that somebody asks right now."""
        self._asked_at = time.monotonic()

    async def look(self) -> None:
        """Find out whether anybody has asked since the last look."""
        assert self._client is not None
        answered = await self._client.answered_requests()
        if answered != self._answered or self._open.count(self._url) or await self._client.open_requests():
            self._answered = answered
            self.asked()

    def unasked(self, timeout_s: float | None) -> bool:
        """True if nobody has asked for so long, as of the last look."""
        return timeout_s is not None and time.monotonic() - self._asked_at > timeout_s

    def begin_draining(self) -> None:
        """Start the clock; no new request is sent to the engine from now on."""
        self._draining_since, self.drained = time.monotonic(), False

    async def look_whether_drained(self) -> int:
        """Set `drained` if no request is open or time is up; return how many are open."""
        assert self._client is not None
        if self._draining_since is None:
            self.begin_draining()
        counted = await self._client.open_requests()
        open_requests = max(counted or 0, self._open.count(self._url))
        assert self._draining_since is not None
        seconds = time.monotonic() - self._draining_since
        # Another gateway process may have read for so long that the engine serves. An engine that does not answer may
        # be busy with requests of such a process.
        is_idle = counted == 0 and open_requests == 0
        self.drained = seconds >= max(self._timeout_s, FRESH_S) or (is_idle and seconds >= FRESH_S)
        if self.drained:
            # Nothing was awaited since the count: no request can slip in between.
            self._open.close_to(self._url)
        return open_requests

    def leave(self, names: Iterable[str]) -> None:
        """Have adapters leave: their requests are let end."""
        self._leaving.update(dict.fromkeys(names, time.monotonic()))

    def come(self, names: Iterable[str]) -> None:
        """Have adapters take requests, also those that had left."""
        self._open.open_to(self._url, names)

    @property
    def are_leaving(self) -> bool:
        """True if adapters wait for their last request."""
        return bool(self._leaving)

    async def those_that_left(self) -> list[str]:
        """Return, and forget, the adapters whose requests have ended, however long that takes.

        An engine that reads an adapter again whose folder is gone dies with all its requests: so no time is up here.
        """
        assert self._client is not None
        now = time.monotonic()
        left = [
            name
            for name, since in self._leaving.items()
            if now - since >= FRESH_S and not self._open.count(self._url, name)
        ]
        if left:
            in_use = await self._client.adapters_in_use()
            left = [
                name
                for name in left
                if in_use is not None and name not in in_use and not self._open.count(self._url, name)
            ]
        for name in left:
            self._open.close_to(self._url, name)
            del self._leaving[name]
        return left
