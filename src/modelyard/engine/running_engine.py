"""The engine of one deployment while it runs: its process, its HTTP client, its silence, and the cause of its death.

`Service` decides and writes; this asks. Every question ends when the engine does or when the job is interrupted, so
that nothing waits for an answer that will not come. Nothing here writes to the deployment's row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from modelyard.engine import attempts
from modelyard.engine.child_state import ChildState
from modelyard.engine.client import EngineClient, Health
from modelyard.engine.failures import explain
from modelyard.engine.silence import Silence
from modelyard.errors import JobFailure
from modelyard.jobs.runner import JobContext
from modelyard.processes import Child, Outcome

T = TypeVar("T")

PROBE_EVERY_S = 0.2


class RunningEngine:
    """One engine after the other of the same deployment; `child` is None between them."""

    def __init__(self, context: JobContext, busy_timeout_s: float) -> None:
        self._context = context
        self._client: EngineClient | None = None
        self.child: Child | None = None
        self.outcome: Outcome | None = None
        self.silence = Silence(busy_timeout_s)
        self.started_at = time.monotonic()

    @property
    def client(self) -> EngineClient:
        """The client of the engine that runs."""
        assert self._client is not None
        return self._client

    @property
    def child_state(self) -> ChildState:
        """Return the child as `next_step` wants to know it."""
        if self.child is None:
            return ChildState.NONE
        return ChildState.ALIVE if self.child.is_alive else ChildState.ENDED

    @property
    def waited_s(self) -> float:
        """Return the time since the engine was started, or taken up."""
        return time.monotonic() - self.started_at

    def connect(self, url: str) -> EngineClient:
        """Make the client of the engine at `url`."""
        self._client = EngineClient(url)
        return self._client

    async def stop(self) -> None:
        """End the process and the client; another engine may follow. Safe to repeat."""
        if self.child is not None:
            await self.child.stop()
            self.child = None
        await self._close_client()

    async def close(self) -> None:
        """End the engine, if one still runs: the server stops in good order. Safe to repeat."""
        await self._close_client()
        if self.child is not None and self.child.is_alive:
            await self.child.stop()

    async def _close_client(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def answer(self, question: Awaitable[T]) -> T | None:
        """Await the engine's answer; None when it ended, or the job was interrupted, before that."""
        assert self.child is not None
        asking = asyncio.ensure_future(question)
        others = [
            asyncio.ensure_future(self.child.wait()),
            asyncio.ensure_future(self._context.interrupted.wait()),
        ]
        try:
            await asyncio.wait([asking, *others], return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
        finally:
            for task in (asking, *others):
                task.cancel()
            await asyncio.gather(asking, *others, return_exceptions=True)

    async def pause(self, seconds: float, woken: asyncio.Event | None = None) -> bool:
        """Sleep until time has passed, the engine ended, or a wish came; return whether it was woken."""
        reasons: list[asyncio.Future[object]] = []
        if not self._context.interrupted.is_set():
            reasons.append(asyncio.ensure_future(self._context.interrupted.wait()))
        if woken is not None:
            reasons.append(asyncio.ensure_future(woken.wait()))
        if self.child is not None:
            reasons.append(asyncio.ensure_future(self.child.wait()))
        if not reasons:
            await asyncio.sleep(seconds)
            return False
        try:
            done, _ = await asyncio.wait(reasons, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            for task in reasons:
                task.cancel()
            await asyncio.gather(*reasons, return_exceptions=True)

    async def is_well(self) -> bool:
        """Return whether the engine still answers: an error from a dying engine says nothing about an adapter."""
        health = await self.check_health()
        if health != Health.GOOD:
            await self.pause(PROBE_EVERY_S)
        return health == Health.GOOD

    async def check_health(self) -> Health | None:
        """Ask for the engine's health and count it; an engine that was silent for too long is ended."""
        health = await self.answer(self.client.health())
        if health is None:
            return None  # it ended, or is not wanted any more
        assert self.child is not None
        news = await self.silence.note(health, self.child.processor_times)
        if news is not None:
            await self._context.event(news.message, level="warning", data=news.data)
        if self.silence.failure is not None and self.child.is_alive:
            await self.child.stop()
        return health

    async def cause_of_death(self) -> JobFailure:
        """Return why the engine ended: its silence, or what its log and its exit code say."""
        if self.child is not None and not self.child.is_alive:
            self.outcome = self.child.outcome
        if self.silence.failure is not None:
            failure = self.silence.failure  # its log tells of its requests, not of why it was ended
        else:
            text = await asyncio.to_thread(attempts.newest_log, self._context.log)
            failure = explain(text, self.outcome)
        failure.hint = failure.hint.replace("<id>", str(self._context.id))
        return failure
