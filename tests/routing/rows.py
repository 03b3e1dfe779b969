"""A table of deployments that a test writes row by row: no engine, no supervisor, only the routing that reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from modelyard.db import Sessions
from modelyard.deploy import roster
from modelyard.deploy.tables import Deployment, DeploymentState
from modelyard.foundation import Foundation
from modelyard.jobs.tables import Job, JobStatus
from modelyard.routing import aliases
from modelyard.routing.router import Routing
from modelyard.routing.tables import Alias
from modelyard.signals import Topic
from tests.deploy.yard import make_settings
from tests.eventually import PATIENCE_S

State = DeploymentState
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


class Rows:
    """The table, and the routing that reads it. `signals` counts what others than the test wrote.

    The database is never away here: on a busy machine a read may take longer than the server would wait for it.
    """

    def __init__(self, sessions: Sessions, wake_timeout_s: float) -> None:
        self.sessions = sessions
        self.routing = Routing(sessions, wake_timeout_s, patience_s=PATIENCE_S)
        self.signals = 0
        self.sessions.signals.subscribe(Topic.DEPLOYMENTS, self._count_signal)
        self.count = 0

    def _count_signal(self) -> None:
        self.signals += 1

    async def add(
        self,
        model_id: str,
        state: State = State.READY,
        *,
        adapter_ids: Sequence[str] = (),
        loaded: Mapping[str, str] | None = None,
        **columns: Any,
    ) -> UUID:
        """Add a deployment, later asked to be current than those before it; `loaded` maps adapters to their names."""
        self.count += 1
        has_engine = state in (State.STARTING, State.READY, State.DRAINING)
        values = {
            "task": "generate",
            "current_at": NOON + timedelta(seconds=self.count),
            "engine_url": f"unix:/engine-{self.count}" if has_engine else None,
            "loaded": [{"adapter_id": one, "name": name, "path": "/p"} for one, name in (loaded or {}).items()],
            "adapter_ids": list(adapter_ids),
            **columns,
        }
        async with self.sessions.begin() as session:
            job = Job(kind="DEPLOY", name=f"DEPLOY_{model_id}", spec={}, status=JobStatus.RUNNING)
            session.add(job)
            await session.flush()
            row = Deployment(job_id=job.id, model_id=model_id, state=state, **values)
            session.add(row)
        self.signals -= 1
        return row.id

    async def change(self, deployment_id: UUID, **columns: Any) -> None:
        async with self.sessions.begin() as session:
            row = await roster.get(session, deployment_id)
            for name, value in columns.items():
                setattr(row, name, value)
        self.signals -= 1

    async def row(self, deployment_id: UUID) -> Deployment:
        async with self.sessions.read() as session:
            return await roster.get(session, deployment_id)

    async def alias(self, name: str, target: str | None) -> None:
        async with self.sessions.begin() as session:
            row = await session.get(Alias, name)
            if target is None:
                await aliases.remove(session, name)
            elif row is None:
                session.add(Alias(name=name, target=target))
            else:
                row.target = target

    async def url(self, name: str | None, task: str = "generate") -> str:
        return (await self.routing.resolve(name, task)).url


@asynccontextmanager
async def rows(data_dir: Path, wake_timeout_s: float = 30.0) -> AsyncIterator[Rows]:
    foundation = Foundation(make_settings(data_dir))
    foundation.lay()
    sessions = Sessions(foundation.url)
    try:
        yield Rows(sessions, wake_timeout_s)
    finally:
        await sessions.close()
        foundation.close()
