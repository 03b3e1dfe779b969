"""Which engine serves a name. Read by the gateway at every request, so it answers from memory.

What it knows comes from the database: a snapshot that is taken anew when somebody says that something changed, and at
least every second, so that a second process would see the same. It says what is in service and writes nothing but the
wish that an idle deployment wakes. Of its own it only counts the requests that this process has open.

While the database is away the last snapshot answers (`last_known`): the engines that it names go on serving. A name
that is not in it may exist all the same, so that is told as an outage.

A name is looked for among the models' ids, then the adapters' ids, the adapters with their versions (as answers name
them), the users' aliases and the built-in ones. Of the
deployments that could answer, one that serves comes before one that does not, and then the last that was asked to be
current.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn, Protocol
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError

from modelyard import outages
from modelyard.db import Sessions
from modelyard.deploy import aliases, roster, succession
from modelyard.deploy.last_known import FRESH_S, PATIENCE_S, RETRY_S, LastKnown
from modelyard.deploy.roster import ASLEEP
from modelyard.deploy.tables import Deployment, DeploymentState, Wanted
from modelyard.errors import DatabaseUnavailable, EngineStarting, ModelNotFound

log = logging.getLogger(__name__)

STARTING_RETRY_S = 5
LOADING_RETRY_S = 1
TASKS = ("generate", "embed")
#: States in which the engine that was woken is on its way.
_COMING = frozenset({DeploymentState.STARTING, DeploymentState.BACKOFF})


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
    """A name that clients may use. `root` is the model or adapter behind an alias, and the model behind an adapter."""

    name: str
    model_id: str
    created_at: datetime
    root: str | None


@dataclass(frozen=True)
class Way:
    """Where a name leads: to a deployment, or to one of its adapters.

    `served_name` is None for an adapter that is wanted but not loaded.
    """

    deployment: Deployment
    adapter_id: str | None
    served_name: str | None

    @property
    def rank(self) -> int:
        """How good it is, beside others for the same name: the higher the sooner it answers."""
        if self.deployment.state == DeploymentState.READY and self.deployment.engine_url is not None:
            return 3 if self.served_name is not None else 2
        return 1 if self.deployment.state in ASLEEP else 0

    @property
    def works(self) -> bool:
        """Whether a request would be answered, if need be after a wait."""
        return self.rank in (1, 3)

    def target(self) -> Target | None:
        """Return the engine, if it serves right now."""
        one = self.deployment
        if self.rank != 3 or self.served_name is None or one.engine_url is None:
            return None
        return Target(one.id, one.model_id, self.served_name, one.engine_url, one.task, DeploymentState(one.state))


class Address(Protocol):
    """What is needed of a target to count its requests."""

    @property
    def url(self) -> str: ...
    @property
    def served_name(self) -> str: ...


class Routing:
    """Answers which engine serves a name.

    `stir` is called when an idle deployment is to wake, after the commit; the supervisor sets it.
    """

    def __init__(self, sessions: Sessions, wake_timeout_s: float = 300.0) -> None:
        self.stir: Callable[[], None] = lambda: None
        self._sessions = sessions
        self._wake_timeout_s = wake_timeout_s
        self._snapshots = LastKnown("the routing", Snapshot((), {}), self._take)
        self._waking = asyncio.Lock()
        #: Deployments whose engine is on its way because a request of this process asked.
        self._woken: set[UUID] = set()
        #: Set and replaced by `changed`.
        self._news = asyncio.Event()
        self._open: Counter[tuple[str, str]] = Counter()
        #: Engines, and adapters' names at engines, that get no new request even if the snapshot still names them.
        self._closed: set[tuple[str, str | None]] = set()

    def changed(self) -> None:
        """Take a new snapshot at the next question. Call it after the commit."""
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
        if target is None or self._is_closed(target):
            return await self._wait_for(name, task)
        return target

    def request(self, target: Address) -> OpenRequest:
        """Count a request to an engine as open within a `with` block, which keeps the engine from being ended."""
        return OpenRequest(self._open, (target.url, target.served_name))

    def open_requests(self, url: str, served_name: str | None = None) -> int:
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
            if target is not None and not self._is_closed(target):
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

    def _is_closed(self, target: Target) -> bool:
        closed = self._closed
        return bool(closed) and ((target.url, None) in closed or (target.url, target.served_name) in closed)

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
            await outages.within(PATIENCE_S, self._write_wake(now.id))
            self._woken.add(now.id)
            self.changed()
            self.stir()

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
        urls = {one.engine_url for one in snapshot.up}
        self._closed = {(url, name) for url, name in self._closed if url in urls}
        self._woken &= {one.id for one in snapshot.up if one.state != DeploymentState.READY}
        return snapshot


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


class Snapshot:
    """Which names lead where, worked out once for all requests until the next snapshot.

    `up` are the deployments that are wanted, those first that were last asked to be current.
    """

    def __init__(self, up: Sequence[Deployment], names: Mapping[str, str]) -> None:
        self.up = sorted(up, key=lambda one: (one.current_at, one.number), reverse=True)
        self.names = names
        self._ids = _ways(self.up)
        self._current = {task: way for task in TASKS if (way := _current(self.up, task)) is not None}
        #: An adapter as answers name it, by its id and version. It is not listed: the id alone goes on to the next one.
        self._versions = {
            way.served_name: way for way in self._ids.values() if way.served_name and way.served_name not in self._ids
        }
        #: What is answered at once, by name and task.
        self.targets: dict[tuple[str | None, str], Target] = {}
        for name in (None, *self.known(), *self._versions):
            for task in TASKS:
                way = self.way(name, task)
                target = way.target() if way is not None else None
                if target is not None:
                    self.targets[name, task] = target

    def way(self, name: str | None, task: str) -> Way | None:
        """Return where a name leads in a request for a task; None means its current deployment."""
        if name is None:
            return self._current.get(task)
        if name in self._ids:
            return self._ids[name]
        if name in self._versions:
            return self._versions[name]
        if name in self.names:
            return self._ids.get(self.names[name])
        if name == aliases.DEFAULT:
            found = (self._current.get(one) for one in (task, *TASKS))
            return next((way for way in found if way is not None), None)
        return self._current.get(aliases.BUILT_IN.get(name, ""))

    def find(self, deployment_id: UUID) -> Deployment | None:
        """Return a deployment that is wanted."""
        return next((one for one in self.up if one.id == deployment_id), None)

    def known(self) -> list[str]:
        """Return every name that leads somewhere, by kind: models, adapters, users' aliases, built-in ones."""
        models = [name for name, way in self._ids.items() if way.adapter_id is None]
        adapters = [name for name, way in self._ids.items() if way.adapter_id is not None]
        names = [*models, *adapters, *self.names, *aliases.BUILT_IN]
        return [name for name in dict.fromkeys(names) if self.way(name, TASKS[0]) is not None]

    def served(self) -> list[Served]:
        """Return the names that work."""
        found = []
        for name in self.known():
            way = self.way(name, TASKS[0])
            if way is not None and way.works:
                model_id = way.deployment.model_id
                if name in self._ids:
                    root = model_id if way.adapter_id is not None else None
                else:
                    root = way.adapter_id or model_id
                found.append(Served(name, model_id, way.deployment.created_at, root))
        return found


def _ways(up: Sequence[Deployment]) -> dict[str, Way]:
    best: dict[str, Way] = {}
    for one in up:
        offers = {one.model_id: Way(one, None, one.model_id)}
        # One that is not wanted any more serves until the engine has what is wanted instead.
        serves = one.state == DeploymentState.READY
        loaded = {each["adapter_id"]: each["name"] for each in one.loaded} if serves else {}
        for adapter_id in [*loaded, *one.adapter_ids]:
            offers[adapter_id] = Way(one, adapter_id, loaded.get(adapter_id))
        for name, way in offers.items():
            if name not in best or way.rank > best[name].rank:
                best[name] = way
    return best


def _current(up: Sequence[Deployment], task: str) -> Way | None:
    ways = [Way(one, None, one.model_id) for one in up if one.task == task]
    return next((way for way in ways if way.works), ways[0] if ways else None)


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
