"""Where each name leads, worked out once from the deployments and aliases of one moment.

Pure: a `Snapshot` is made from rows, and never changes. `router` takes one anew after each change, and answers every
request from the newest.

A name is looked for among the models' ids, then the adapters' ids, the adapters with their versions (as answers name
them), the users' aliases and the built-in ones. Of the deployments that could answer, one that serves comes before one
that does not, and then the last that was asked to be current.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from modelyard.deploy.roster import ASLEEP
from modelyard.deploy.tables import Deployment, DeploymentState
from modelyard.routing import aliases

TASKS = ("generate", "embed")


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
        """Its rank beside others for the same name: the higher the sooner it answers."""
        if self.deployment.state == DeploymentState.READY and self.deployment.engine_url is not None:
            return 3 if self.served_name is not None else 2
        return 1 if self.deployment.state in ASLEEP else 0

    @property
    def works(self) -> bool:
        """True if a request would be answered, if need be after a wait."""
        return self.rank in (1, 3)

    def target(self) -> Target | None:
        """Return the engine, if it serves right now."""
        one = self.deployment
        if self.rank != 3 or self.served_name is None or one.engine_url is None:
            return None
        return Target(one.id, one.model_id, self.served_name, one.engine_url, one.task, DeploymentState(one.state))


class Snapshot:
    """The way of each name, worked out once for all requests until the next snapshot.

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
