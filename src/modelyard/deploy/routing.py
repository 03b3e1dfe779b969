"""Which engine serves a name. Read by the gateway at every request, so it answers from memory.

What it knows comes from the database: a snapshot that is taken anew when the supervisor says that something changed,
and at least every second, so that a second process would see the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from modelyard.db import Sessions
from modelyard.deploy import succession
from modelyard.deploy.tables import Deployment, DeploymentState, Wanted
from modelyard.errors import EngineStarting, ModelNotFound

#: Names that follow the current deployment of a task.
ALIASES = {
    "generate": ("default", "Compressa-LLM"),
    "embed": ("default", "Compressa-Embedding"),
}
FRESH_S = 1.0


@dataclass(frozen=True)
class Target:
    """The engine behind a name. `served_name` is what the engine calls it; `url` is `unix:PATH`."""

    deployment_id: UUID
    model_id: str
    served_name: str
    url: str
    task: str
    state: DeploymentState


@dataclass(frozen=True)
class Served:
    """A name that clients may use. `root` is the model behind an alias or an adapter."""

    name: str
    model_id: str
    created_at: datetime
    root: str | None


class Routing:
    """Answers which engine serves a name. Has no state that the database does not have."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._up: list[Deployment] = []
        self._taken_at = float("-inf")
        self._changes = self._changes_seen = 0
        self._taking = asyncio.Lock()
        self._open: Counter[tuple[str, str]] = Counter()
        #: Has every deployment's task look at its row again; the supervisor puts itself here.
        self.stir: Callable[[], None] = lambda: None

    @contextmanager
    def request(self, target: Target) -> Iterator[None]:
        """Count a request as open for as long as the block lasts."""
        key = (target.url, target.served_name)
        self._open[key] += 1
        try:
            yield
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    def open_requests(self, url: str, served_name: str | None = None) -> int:
        """Return how many requests this process has open at an engine, of all names or of one."""
        return sum(count for key, count in self._open.items() if key[0] == url and served_name in (None, key[1]))

    def changed(self) -> None:
        """Take a new snapshot at the next question. Call it after the commit."""
        self._changes += 1

    async def resolve(self, name: str | None, task: str) -> Target:
        """Return the ready engine for a name; None means the current deployment of the task.

        Raises:
            ModelNotFound: nothing in service has this name; the message says what does.
            EngineStarting: its engine is not ready yet.
        """
        up = await self._snapshot()
        found = _find(up, name, task)
        if found is None:
            known = sorted({served.name for served in _names(up)})
            hint = "GET /api/v1/models/ lists what can be deployed."
            raise ModelNotFound(name or "default", where="in service", known=known, hint=hint)
        deployment, served_name = found
        state = DeploymentState(deployment.state)
        if state != DeploymentState.READY or deployment.engine_url is None:
            raise EngineStarting(f"{deployment.model_id} is starting; its job is {deployment.job_id}.", retry_after_s=5)
        return Target(
            deployment_id=deployment.id,
            model_id=deployment.model_id,
            served_name=served_name,
            url=deployment.engine_url,
            task=deployment.task,
            state=state,
        )

    async def listing(self) -> list[Served]:
        """Return every name that works now, those of the newest deployments first."""
        return _names([one for one in await self._snapshot() if one.state == DeploymentState.READY])

    async def ready_engines(self) -> list[tuple[str, str]]:
        """Return the model id and URL of each ready engine."""
        return [
            (one.model_id, one.engine_url)
            for one in await self._snapshot()
            if one.state == DeploymentState.READY and one.engine_url is not None
        ]

    async def _snapshot(self) -> list[Deployment]:
        if not self._is_fresh():
            async with self._taking:
                if not self._is_fresh():
                    changes, taken_at = self._changes, time.monotonic()
                    async with self._sessions.read() as session:
                        live = await succession.live(session)
                    self._up = [one for one in reversed(live) if one.wanted == Wanted.UP]
                    # What changed during the read may have been missed: such a snapshot is not fresh.
                    self._changes_seen, self._taken_at = changes, taken_at
        return self._up

    def _is_fresh(self) -> bool:
        return self._changes_seen == self._changes and time.monotonic() - self._taken_at < FRESH_S


def _find(up: list[Deployment], name: str | None, task: str) -> tuple[Deployment, str] | None:
    for one in up:
        if name == one.model_id:
            return one, one.model_id
        for adapter in one.loaded:
            if name == adapter["adapter_id"]:
                return one, adapter["name"]
    for one in up:  # newest first: the first of a task is its current one
        if one.task == task and (name is None or name in ALIASES[one.task]):
            return one, one.model_id
    for one in up:
        if name is not None and name in ALIASES[one.task]:
            return one, one.model_id
    return None


def _names(up: list[Deployment]) -> list[Served]:
    names: dict[str, Served] = {}
    for one in up:
        names.setdefault(one.model_id, Served(one.model_id, one.model_id, one.created_at, None))
        for adapter_id in (adapter["adapter_id"] for adapter in one.loaded):
            names.setdefault(adapter_id, Served(adapter_id, one.model_id, one.created_at, one.model_id))
    for one in up:
        for alias in ALIASES[one.task]:
            names.setdefault(alias, Served(alias, one.model_id, one.created_at, one.model_id))
    return list(names.values())
