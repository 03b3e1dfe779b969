"""Open requests of this process at engines, and the engines and adapters that get no new one.

The gateway counts a request from the moment on that it chose the engine; a deployment that drains asks how many are
left, and closes the engine before it ends it. Held in memory: what another gateway process has open the engine says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Protocol

#: A gateway may go on for so long sending requests where it last read that they belong.
FRESH_S = 1.0


class Address(Protocol):
    """The part of a target by which its requests are counted."""

    @property
    def url(self) -> str: ...
    @property
    def served_name(self) -> str: ...


class OpenRequests:
    """The requests that one gateway process has open, by engine and by the engine's name for the model or adapter."""

    def __init__(self) -> None:
        self._open: Counter[tuple[str, str]] = Counter()
        #: Engines, and adapters' names at engines, that get no new request even if a snapshot still names them.
        self._closed: set[tuple[str, str | None]] = set()

    def request(self, target: Address) -> OpenRequest:
        """Count a request to an engine as open within a `with` block, which keeps the engine from being ended."""
        return OpenRequest(self._open, (target.url, target.served_name))

    def count(self, url: str, served_name: str | None = None) -> int:
        """Return how many requests this process has open at an engine, or at one of its names."""
        if served_name is not None:
            return self._open[url, served_name]
        return sum(count for (one, _), count in self._open.items() if one == url)

    def close_to(self, url: str, served_name: str | None = None) -> None:
        """Send no new request to an engine, or to one of its names, from now on.

        A snapshot may be older than the word that it leaves, where the database is slow or away.
        """
        self._closed.add((url, served_name))

    def open_to(self, url: str, served_names: Iterable[str]) -> None:
        """Send requests again to names that the engine has loaded anew."""
        self._closed.difference_update((url, name) for name in served_names)

    def is_closed(self, target: Address) -> bool:
        """True if a target gets no new request."""
        closed = self._closed
        return bool(closed) and ((target.url, None) in closed or (target.url, target.served_name) in closed)

    def forget_others(self, urls: Collection[str | None]) -> None:
        """Forget what was closed at engines that are gone: only those with these URLs are there."""
        self._closed = {(url, name) for url, name in self._closed if url in urls}


class OpenRequest:
    """A request that counts as open within its `with` block."""

    __slots__ = ("_counts", "_key")

    def __init__(self, counts: Counter[tuple[str, str]], key: tuple[str, str]) -> None:
        self._counts = counts
        self._key = key

    def __enter__(self) -> None:
        self._counts[self._key] += 1

    def __exit__(self, *_: object) -> None:
        if self._counts[self._key] > 1:
            self._counts[self._key] -= 1
        else:
            del self._counts[self._key]  # every start of an engine has an address of its own
