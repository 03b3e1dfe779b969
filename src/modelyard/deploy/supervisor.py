"""The supervisor: gives every deployment its supervising task, and holds what these tasks share.

`serve` is the function of the job kind DEPLOY; `service` does one deployment's work, and looks at its row again after
each commit that writes a deployment.
"""

from __future__ import annotations

import asyncio
import importlib

from modelyard.db import Sessions
from modelyard.deploy import actions, succession
from modelyard.deploy.open_requests import OpenRequests
from modelyard.deploy.service import ENGINE_GONE, Service
from modelyard.deploy.shared import Shared
from modelyard.deploy.tables import MOVES, Deployment, DeploymentState
from modelyard.engine import attempts
from modelyard.jobs.runner import JobContext
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.processes import Children
from modelyard.settings import Settings
from modelyard.states import move


class Supervisor:
    """Gives every deployment its supervising task. `sharing_memory` is held while one shares memory out."""

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        children: Children,
        open_requests: OpenRequests,
        tokenizers: TokenizerChildren,
    ) -> None:
        self.sharing_memory = asyncio.Lock()
        self._settings, self._sessions, self._children = settings, sessions, children
        self._shared = Shared(settings, sessions, children, open_requests, tokenizers, self.sharing_memory)

    async def serve(self, context: JobContext) -> None:
        """Keep the job's deployment in service until it is interrupted.

        Raises:
            JobInterrupted: it was taken out of service, and nothing of it runs.
            JobFailure: it was given up, and nothing of it runs.
        """
        row = await context.patiently(lambda: self._row(context))
        # What the client to engines needs takes a while to load the first time: not in the way of requests.
        await asyncio.to_thread(importlib.import_module, "aiohttp")
        service = Service(self._shared, context, row)
        try:
            await service.run()
        finally:
            await service.close()

    async def _row(self, context: JobContext) -> Deployment:
        async with self._sessions.read() as session:
            return await actions.of_job(session, context.id)

    async def check_before_serving(self) -> None:
        """Correct what the table says of engines that ended while no server looked. For the start of a server.

        Until then a request could be sent to an engine that is not there.
        """
        async with self._sessions.read() as session:
            live = await succession.live(session)
        for row in live:
            attempt = attempts.newest(self._settings.jobs_dir / str(row.job_id))
            if row.state == DeploymentState.READY and (attempt is None or not await self._children.is_running(attempt)):
                async with self._sessions.begin() as session:
                    await move(session, Deployment, row.id, "state", MOVES, DeploymentState.STARTING, ENGINE_GONE)
