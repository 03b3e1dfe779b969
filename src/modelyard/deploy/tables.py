"""Tables of the deploy room. Requests write `wanted`; only the deployment's supervisor writes `state`."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, Uuid
from sqlalchemy.orm import Mapped, foreign, mapped_column, relationship

from modelyard.capacity.tables import Reservation
from modelyard.db import Base, Number, UtcDateTime, utcnow
from modelyard.signals import Topic
from modelyard.states import Moves


class DeploymentState(StrEnum):
    """The life of a deployment:

    STARTING -> READY | BACKOFF | STOPPING | FAILED
    READY -> STARTING | BACKOFF | DRAINING | STOPPING | FAILED
    BACKOFF -> STARTING | STOPPING | FAILED
    DRAINING -> READY | STARTING | IDLE | BACKOFF | STOPPING | FAILED
    IDLE -> STARTING | STOPPING | FAILED
    STOPPING -> STOPPED
    """

    #: An engine is on its way, or will be when memory is free; requests are asked to come back.
    STARTING = "STARTING"
    #: The engine has generated a token.
    READY = "READY"
    #: The engine died; the next one starts after a delay.
    BACKOFF = "BACKOFF"
    #: No new request reaches the engine, and those that it has are let end.
    DRAINING = "DRAINING"
    #: Nobody asked for a while and the engine was ended; the next request starts one.
    IDLE = "IDLE"
    #: Nobody wants it any more, and its engine is ending.
    STOPPING = "STOPPING"
    #: Nothing of it runs.
    STOPPED = "STOPPED"
    #: Given up; its job has the cause. Nothing of it runs.
    FAILED = "FAILED"


_State = DeploymentState
MOVES: Moves = {
    _State.STARTING: frozenset({_State.READY, _State.BACKOFF, _State.STOPPING, _State.FAILED}),
    _State.READY: frozenset({_State.STARTING, _State.BACKOFF, _State.DRAINING, _State.STOPPING, _State.FAILED}),
    _State.BACKOFF: frozenset({_State.STARTING, _State.STOPPING, _State.FAILED}),
    _State.DRAINING: frozenset(
        {_State.READY, _State.STARTING, _State.IDLE, _State.BACKOFF, _State.STOPPING, _State.FAILED}
    ),
    _State.IDLE: frozenset({_State.STARTING, _State.STOPPING, _State.FAILED}),
    _State.STOPPING: frozenset({_State.STOPPED}),
    _State.STOPPED: frozenset(),
    _State.FAILED: frozenset(),
}
#: States of deployments that have not ended: they hold an engine, or may soon.
LIVE = (_State.STARTING, _State.READY, _State.BACKOFF, _State.DRAINING, _State.IDLE, _State.STOPPING)
#: States in which an engine has taken its memory, so that it will give it back.
HOLDING = (_State.READY, _State.DRAINING, _State.STOPPING)


class Wanted(StrEnum):
    """The state that requests want of a deployment."""

    UP = "UP"
    #: Out of service when the requests that it has have ended.
    DRAINED = "DRAINED"
    #: Out of service now.
    DOWN = "DOWN"


class Strategy(StrEnum):
    """The way in which a deployment takes the place of others."""

    #: Beside them where memory allows, else in their place.
    AUTO = "auto"
    #: Beside them, or not at all: they leave when it is ready.
    SIDE_BY_SIDE = "side_by_side"
    #: They leave first.
    REPLACE = "replace"


class Deployment(Base):
    """A model in service, or one that was. `task` is what it does: generate or embed.

    Requests write what is wanted: `adapter_ids`, `wanted`, `wake_requested`, `current_at` and what is fixed at the
    beginning. The supervisor writes what is: `state`, `loaded`, `engine_url`, `restarts`, the times, and in
    the ledger what its engine holds (`reservations`).
    It also takes a wish back that cannot be fulfilled: `adapter_ids`, with the cause in `adapter_failure`.
    """

    TOPICS = ((Topic.DEPLOYMENTS, None),)
    __tablename__ = "deployments"
    __table_args__ = (Index("ix_deployments_state", "state"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    id: Mapped[uuid.UUID] = mapped_column(Uuid(), unique=True, default=uuid.uuid4)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="RESTRICT"), unique=True)
    model_id: Mapped[str] = mapped_column(String(200))
    adapter_ids: Mapped[list[str]] = mapped_column(JSON(), default=list)
    task: Mapped[str] = mapped_column(String(16))
    #: The commit of the model that it serves, whatever its row has gone on to: `{"commit", "path", "size_bytes"}`.
    #: NULL: that of the row.
    pinned: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    options: Mapped[dict[str, Any]] = mapped_column(JSON(), default=dict)
    strategy: Mapped[str] = mapped_column(String(16), default=Strategy.AUTO)
    #: Ids of the deployments that leave when this one is ready, or before it starts.
    replaces: Mapped[list[str]] = mapped_column(JSON(), default=list)
    #: Id of the deployment that this one brings back, since what it left for failed.
    restores: Mapped[uuid.UUID | None] = mapped_column(Uuid())
    #: Seconds without a request after which the engine is ended until the next one; NULL: never.
    idle_timeout_s: Mapped[float | None] = mapped_column()
    wanted: Mapped[str] = mapped_column(String(8), default=Wanted.UP)
    #: A request waits for the engine of an idle deployment.
    wake_requested: Mapped[bool] = mapped_column(default=False)
    #: When it was last asked to be the current one of its task.
    current_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    state: Mapped[str] = mapped_column(String(16), default=DeploymentState.STARTING)
    #: What renders its chats (`models.chat_template.TemplateSource`); NULL where it renders none, or nobody looked yet.
    chat_template: Mapped[str | None] = mapped_column(String(16))
    #: The adapters that clients may name: `{"adapter_id", "name", "path"}`, where `name` is the engine's for them, and
    #: `checks`, what was found of it before.
    loaded: Mapped[list[dict[str, Any]]] = mapped_column(JSON(), default=list)
    #: Why the last change of adapters was taken back: `{"adapter_id", "code", "message", "hint"}`.
    adapter_failure: Mapped[dict[str, str] | None] = mapped_column(JSON())
    #: Restarts since the engine last stood for a while.
    restarts: Mapped[int] = mapped_column(default=0)
    #: Where the engine listens: `unix:PATH`. It changes with every start.
    engine_url: Mapped[str | None] = mapped_column(String(512))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    ready_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    #: Memory that its engine was given by the fit check, by device. Written by `capacity.reservations`.
    reservations: Mapped[list[Reservation]] = relationship(
        primaryjoin=lambda: foreign(Reservation.run_id) == Deployment.id,
        order_by=Reservation.device, lazy="selectin", viewonly=True,
    )  # fmt: skip

    @property
    def memory_bytes(self) -> int | None:
        """Return the memory that its engine holds of all devices; None without an engine."""
        return sum(one.memory_bytes for one in self.reservations) or None

    @property
    def gpus(self) -> list[int]:
        """Return the numbers of its engine's GPUs, in the order of the PCI bus; empty without, or if nothing tells."""
        return [one.device for one in self.reservations if one.device >= 0]

    @property
    def has_served(self) -> bool:
        """True if it, or what it brings back, has been ready: what fails then may work the next time, or in part."""
        return self.ready_at is not None or self.restores is not None


class DeploymentModel(Base):
    """Holds a model or adapter while a deployment needs it: the store refuses to delete what is held."""

    __tablename__ = "deployment_models"

    deployment_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("deployments.id", ondelete="CASCADE"), primary_key=True)
    model_id: Mapped[str] = mapped_column(
        ForeignKey("models.model_id", ondelete="RESTRICT"), primary_key=True, index=True
    )
