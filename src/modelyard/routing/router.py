"""The engine that serves a name. Read by the gateway at every request, so it answers from memory.

What it knows comes from the database: a snapshot that is taken anew after each commit that writes a deployment or an
alias, and at least every second, so that a second process would see the same. It says what is in service and writes
nothing but the wish that an idle deployment wakes.

While the database is away the last snapshot answers (`last_known`): the engines that it names go on serving. A name
that is not in it may exist all the same, so that is told as an outage.

Which of the deployments a name leads to is decided in `snapshot`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import NoReturn
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError

from modelyard import outages
from modelyard.db import Sessions
from modelyard.deploy import roster, succession
from modelyard.deploy.open_requests import FRESH_S, OpenRequests
from modelyard.deploy.roster import ASLEEP
from modelyard.deploy.tables import Deployment, DeploymentState, Wanted
from modelyard.errors import DatabaseUnavailable, EngineStarting, ModelNotFound
from modelyard.routing import aliases
from modelyard.routing.last_known import PATIENCE_S, RETRY_S, LastKnown
from modelyard.routing.snapshot import TASKS, Served, Snapshot, Target, Way
from modelyard.signals import Topic

log = logging.getLogger(__name__)

STARTING_RETRY_S = 5
LOADING_RETRY_S = 1
#: States in which the engine that was woken is on its way.
_COMING = frozenset({DeploymentState.STARTING, DeploymentState.BACKOFF})


class Routing:
    """Answers which engine serves a name; a database that takes longer than `patience_s` to answer counts as away."""

    def __init__(self, sessions: Sessions, wake_timeout_s: float = 300.0, *, patience_s: float = PATIENCE_S) -> None:
        #: The requests that this process has open, which deployments ask for when they drain.
        self.requests = OpenRequests()
        #: Counts a request as open within a `with` block; an attribute, since every request asks for it.
        self.request = self.requests.request
        self._sessions = sessions
        self._wake_timeout_s = wake_timeout_s
        self._patience_s = patience_s
        self._snapshots = LastKnown("the routing", Snapshot((), {}), self._take, patience_s=patience_s)
        self._waking = asyncio.Lock()
        #: Deployments whose engine is on its way because a request of this process asked.
        self._woken: set[UUID] = set()
        #: Set and replaced by `changed`.
        self._news = asyncio.Event()
        for topic in (Topic.DEPLOYMENTS, Topic.ALIASES):
            sessions.signals.subscribe(topic, self.changed)

    def changed(self) -> None:
        """Take a new snapshot at the next question, as after each commit that writes a deployment or an alias."""
        self._snapshots.changed()
        self._news.set()
        self._news = asyncio.Event()

    @property
    def is_away(self) -> bool:
        """True if the database does not answer, so that only what was known before is."""
        return self._snapshots.is_away

    def expect_database(self, name: str | None = None) -> None:
        """Refuse to say that something does not exist while the database is away.

        Raises:
            DatabaseUnavailable: it is away.
        """
        if self.is_away:
            named = f"'{name}' is not among the models" if name is not None else "There are none among those"
            raise DatabaseUnavailable(
                f"{named} that were in service when the database last answered. Whether that is still so is known when "
                "it is back; GET /ready tells when."
            )

    async def follow(self) -> None:
        """Take a snapshot after each change, also where nobody asks: an outage then finds the newest. Never ends."""
        while True:
            news = self._news
            try:
                await self._look()
            except SQLAlchemyError:
                log.exception("the routing could not be read; trying again at the next change")
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S if self.is_away else None):
                    await news.wait()

    async def close(self) -> None:
        """End what is under way. Safe to repeat."""
        await self._snapshots.close()

    async def resolve(self, name: str | None, task: str) -> Target:
        """Return the ready engine for a name; None means the current deployment of the task.

        The engine of an idle deployment is started, and waited for as long as the settings say. May be cancelled.
        Count the request with `request` before anything else is awaited.

        Raises:
            ModelNotFound: nothing in service has this name; the message says what does.
            EngineStarting: its engine is not ready yet, or did not come back in time.
            DatabaseUnavailable: the name was not known when the database went away, or its engine must be woken.
        """
        snapshot = self._snapshots.value if self._snapshots.is_fresh else await self._look()
        target = snapshot.targets.get((name, task))
        if target is None or self.requests.is_closed(target):
            return await self._wait_for(name, task)
        return target

    async def listing(self) -> list[Served]:
        """Return every name that works now: models, adapters, users' aliases, built-in ones."""
        return (await self._look()).served()

    async def where(self, name: str) -> Way | None:
        """Return where a name leads, whether or not it serves; wakes nothing."""
        snapshot = await self._look()
        ways = (snapshot.way(name, task) for task in TASKS)
        return next((way for way in ways if way is not None), None)

    async def ready_engines(self) -> list[tuple[str, str]]:
        """Return the URL of each ready engine with a name of its own: the model's id, if need be with the deployment's.

        Those that drain for another are not among them.
        """
        names: dict[str, str] = {}
        for one in (await self._look()).up:
            if one.state == DeploymentState.READY and one.engine_url is not None:
                name = one.model_id if one.model_id not in names else f"{one.model_id}#{one.id}"
                names[name] = one.engine_url
        return list(names.items())

    async def _wait_for(self, name: str | None, task: str) -> Target:
        """Return the engine for a name, waking its deployment if that is idle; bounded."""
        until = time.monotonic() + self._wake_timeout_s
        awaited: Deployment | None = None
        while True:
            news = self._news
            snapshot = await self._look()
            target = snapshot.targets.get((name, task))
            if target is not None and not self.requests.is_closed(target):
                return target
            way = snapshot.way(name, task)
            if way is None:
                self.expect_database(name or aliases.DEFAULT)
            if way is None or not self._comes_back(way, awaited):
                if awaited is None:
                    _refuse(name, way, snapshot)
                raise EngineStarting(
                    f"{awaited.model_id} was idle, and its engine has not come back: "
                    f"GET /api/v1/jobs/{awaited.job_id}/status says why.",
                    retry_after_s=STARTING_RETRY_S,
                )
            awaited = way.deployment
            left_s = until - time.monotonic()
            if left_s <= 0.0:
                raise EngineStarting(
                    f"{awaited.model_id} was idle, and its engine is starting again. The request has waited for "
                    f"{self._wake_timeout_s:g} s (MODELYARD_ENGINE_WAKE_TIMEOUT_S); the engine's job is "
                    f"{awaited.job_id}.",
                    retry_after_s=STARTING_RETRY_S,
                )
            await self._wake(awaited)
            # A snapshot by another process's hand makes no news here.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(FRESH_S, left_s)):
                    await news.wait()

    def _comes_back(self, way: Way, awaited: Deployment | None) -> bool:
        one = way.deployment
        if one.state == DeploymentState.READY:
            return awaited is not None  # its adapter is being loaded
        return one.state in ASLEEP or (one.state in _COMING and (one.wake_requested or one.id in self._woken))

    async def _wake(self, deployment: Deployment) -> None:
        """Write once that a request waits, however many do."""
        if deployment.state not in ASLEEP or deployment.wake_requested:
            return
        async with self._waking:
            now = (await self._look()).find(deployment.id)
            if now is None or now.state not in ASLEEP or now.wake_requested:
                return
            if self.is_away:
                raise DatabaseUnavailable(
                    f"{now.model_id} is idle, and its engine is started again when the database is back: GET /ready "
                    "tells when."
                )
            self._woken.add(now.id)
            await outages.within(self._patience_s, self._write_wake(now.id))

    async def _write_wake(self, deployment_id: UUID) -> None:
        async with self._sessions.begin() as session:
            await roster.wake(session, deployment_id)

    async def _look(self) -> Snapshot:
        """Return what is, no older than the last change that was told before this question, unless in an outage."""
        return await self._snapshots.look()

    async def _take(self) -> Snapshot:
        async with self._sessions.read() as session:
            live = await succession.live(session)
            names = {row.name: row.target for row in await aliases.all_aliases(session)}
        snapshot = Snapshot([one for one in live if one.wanted == Wanted.UP], names)
        self.requests.forget_others({one.engine_url for one in snapshot.up})
        self._woken &= {one.id for one in snapshot.up if one.state != DeploymentState.READY}
        return snapshot


def _refuse(name: str | None, way: Way | None, snapshot: Snapshot) -> NoReturn:
    if way is None:
        asked = name or aliases.DEFAULT
        hint = "GET /api/v1/models/ lists what can be deployed."
        if asked in snapshot.names:
            hint = f"It is an alias of '{snapshot.names[asked]}', which is not in service. {hint}"
        raise ModelNotFound(asked, where="in service", known=sorted(snapshot.known()), hint=hint)
    one = way.deployment
    if way.rank == 2:
        message = f"The adapter {way.adapter_id} is being loaded; the job is {one.job_id}."
        raise EngineStarting(message, retry_after_s=LOADING_RETRY_S)
    raise EngineStarting(f"{one.model_id} is starting; its job is {one.job_id}.", retry_after_s=STARTING_RETRY_S)
