"""The register of all client connections: how many are open, whose time is up, and what was refused.

`sweep` is called by the server a few times a second, so that no request pays for a timer. Refusals have a line a minute
in the log at most. What a connection does with its bounds is its own business (`connections`).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

log = logging.getLogger(__name__)

#: The most refused clients that may go on sending for a moment.
MOST_LINGERING = 64
#: Refusals are logged so often, in seconds.
REPORT_EVERY_S = 60.0


@dataclass(frozen=True)
class Limits:
    """The bounds of every connection. Times in seconds."""

    max_connections: int
    header_bytes: int
    header_timeout_s: float
    body_timeout_s: float
    idle_timeout_s: float


class Timed(Protocol):
    """A connection as the register sees it."""

    def check_time(self, now: float) -> None:
        """End what has had its time by `now`, a monotonic clock's."""


class Connections:
    """All client connections of a server."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: set[Timed] = set()
        self._lingering: set[Timed] = set()
        self._refused: Counter[str] = Counter()
        self._last_from = ""
        self._reported_at = -math.inf

    def admit(self, connection: Timed) -> bool:
        """Count a new connection; return False if it is one too many."""
        if len(self._open) >= self.limits.max_connections:
            return False
        self._open.add(connection)
        return True

    def linger(self, connection: Timed) -> bool:
        """Let a refused connection read on for a moment; return False if too many do."""
        self._open.discard(connection)
        if len(self._lingering) >= MOST_LINGERING:
            return False
        self._lingering.add(connection)
        return True

    def forget(self, connection: Timed) -> None:
        """Take a connection off the books: it is closed."""
        self._open.discard(connection)
        self._lingering.discard(connection)

    def note(self, code: str, client: tuple[str, int] | None) -> None:
        """Count a refusal for the log."""
        self._refused[code] += 1
        self._last_from = client[0] if client else ""

    def sweep(self) -> None:
        """End what has had its time, and report what was refused."""
        now = monotonic()
        for connection in [*self._open, *self._lingering]:
            connection.check_time(now)
        if self._refused and now - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = now
            counts = ", ".join(f"{code} {count}" for code, count in sorted(self._refused.items()))
            log.warning("refused connections or requests: %s (the last from %s)", counts, self._last_from)
            self._refused.clear()
