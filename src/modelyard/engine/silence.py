"""An engine that runs but does not answer: told busy or dead by its processor time, and ended in the end.

An engine may be silent for minutes while it works: a schema that takes long to compile, a log line that takes long to
write. Then all wait, and ending it would make them all begin anew. So its processes' time on the processor is looked
at: one that works is left alone, up to a limit (a process that waits for a GPU that hangs also spins), one that does
nothing is ended after `UNWELL_LIMIT` looks. What is ended here is not counted as a death of the engine, whose cause
would be looked for in its log and found in somebody's request; but an engine that is silent again and again is.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from modelyard.engine.client import Health
from modelyard.errors import JobFailure

#: An engine that is silent and idle, or says that it is dead, this many times in a row is ended, and started again.
UNWELL_LIMIT = 6
#: The part of one processor's time above which an engine is at work. Idle ones take less than a hundredth.
BUSY_SHARE = 0.2
#: Ends for silence that are forgiven before an engine has stood for five minutes again.
FORGIVEN = 5
TOLD_EVERY_S = 60.0


@dataclass(frozen=True)
class News:
    """Something that the job's events should have."""

    message: str
    data: dict[str, Any]


class Silence:
    """The record of one engine's silence: since when, busy or idle, and whether it is to be ended."""

    def __init__(self, busy_timeout_s: float) -> None:
        self._busy_timeout_s = busy_timeout_s
        #: How often an engine of this deployment was ended here since one of them last stood for long.
        self.count = 0
        #: Why the engine is to be ended; None while it is not.
        self.failure: JobFailure | None = None
        self.end()

    def end(self) -> None:
        """Forget the present silence: the engine answers, or another one is started."""
        self.failure = None
        self._idle_looks = 0
        self._since: float | None = None
        self._told_at = float("-inf")
        self._times: dict[int, float] | None = None
        self._looked_at = 0.0

    @property
    def is_forgiven(self) -> bool:
        """True if the engine was ended here, and may be started again although it has no restarts left."""
        return self.failure is not None and self.count <= FORGIVEN

    async def note(self, health: Health, processor_times: Callable[[], Awaitable[dict[int, float]]]) -> News | None:
        """Note what the engine said when it was asked; `failure` is set when it is to be ended."""
        now = time.monotonic()
        if health == Health.GOOD:
            silent_s, was_told = self._silent_s(now), self._told_at > 0
            self.end()
            return (
                News(f"The engine answers again after {silent_s:.0f} s.", {"seconds": silent_s}) if was_told else None
            )
        if self._since is None:
            self._since = now
        busy_s = await self._busy_s(processor_times, now) if health == Health.SILENT else 0.0
        self._idle_looks = 0 if busy_s else self._idle_looks + 1
        silent_s = self._silent_s(now)
        if self._idle_looks >= UNWELL_LIMIT:
            does = "says that it is dead" if health == Health.BAD else "does not answer, and its processes do nothing"
            self._give_up(
                "engine_silent",
                f"The engine {does}, for {silent_s:.0f} s; it was ended.",
                "If it comes again: GET /api/v1/jobs/<id>/log has what the engine wrote last.",
            )
        elif busy_s and silent_s >= self._busy_timeout_s:
            self._give_up(
                "engine_too_busy",
                f"The engine worked for {silent_s:.0f} s without answering; it was ended.",
                "A request was too much for it; MODELYARD_ENGINE_BUSY_TIMEOUT_S is how long one may take.",
            )
        elif busy_s and now - self._told_at >= TOLD_EVERY_S:
            self._told_at = now
            return News(
                f"The engine has not answered for {silent_s:.0f} s, but its processes work: it is left alone, up to "
                f"{self._busy_timeout_s:.0f} s (MODELYARD_ENGINE_BUSY_TIMEOUT_S).",
                {"silent_s": round(silent_s, 1), "processor_s": round(busy_s, 1)},
            )
        if self.failure is None:
            return None
        return News(self.failure.message, {"code": self.failure.code, "silent_s": round(silent_s, 1)})

    def _give_up(self, code: str, message: str, hint: str) -> None:
        if self.failure is None:
            self.count += 1
            self.failure = JobFailure(code, message, hint)

    def _silent_s(self, now: float) -> float:
        return now - self._since if self._since is not None else 0.0

    async def _busy_s(self, processor_times: Callable[[], Awaitable[dict[int, float]]], now: float) -> float:
        """Return the processor time since the last look if that is work, else 0."""
        before, since_s = self._times, now - self._looked_at
        self._times, self._looked_at = await processor_times(), now
        if before is None:
            return 0.0
        used_s = sum(used - before.get(pid, 0.0) for pid, used in self._times.items())
        return used_s if used_s >= BUSY_SHARE * since_s else 0.0
