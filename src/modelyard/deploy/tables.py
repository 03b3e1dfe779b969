"""Tables of the deploy room. Requests write `wanted`; only the deployment's supervisor writes `state`."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from modelyard.db import Base, Number, UtcDateTime, utcnow
from modelyard.states import Moves


class DeploymentState(StrEnum):
    """The life of a deployment:

    STARTING -> READY | BACKOFF | STOPPING | FAILED
    READY -> STARTING | BACKOFF | STOPPING | FAILED
    BACKOFF -> STARTING | STOPPING | FAILED
    STOPPING -> STOPPED
    """

    #: An engine is on its way, or will be when memory is free; requests are asked to come back.
    STARTING = "STARTING"
    #: The engine has generated a token.
    READY = "READY"
    #: The engine died; the next one starts after a delay.
    BACKOFF = "BACKOFF"
    #: Nobody wants it any more, and its engine is ending.
    STOPPING = "STOPPING"
    #: Nothing of it runs.
    STOPPED = "STOPPED"
    #: Given up; its job has the cause. Nothing of it runs.
    FAILED = "FAILED"


MOVES: Moves = {
    DeploymentState.STARTING: frozenset(
        {DeploymentState.READY, DeploymentState.BACKOFF, DeploymentState.STOPPING, DeploymentState.FAILED}
    ),
    DeploymentState.READY: frozenset(
        {DeploymentState.STARTING, DeploymentState.BACKOFF, DeploymentState.STOPPING, DeploymentState.FAILED}
    ),
    DeploymentState.BACKOFF: frozenset({DeploymentState.STARTING, DeploymentState.STOPPING, DeploymentState.FAILED}),
    DeploymentState.STOPPING: frozenset({DeploymentState.STOPPED}),
    DeploymentState.STOPPED: frozenset(),
    DeploymentState.FAILED: frozenset(),
}
#: States of deployments that hold, or may soon hold, an engine.
LIVE = (DeploymentState.STARTING, DeploymentState.READY, DeploymentState.BACKOFF, DeploymentState.STOPPING)


class Wanted(StrEnum):
    """What requests want of a deployment."""

    UP = "UP"
    DOWN = "DOWN"


class Deployment(Base):
    """A model in service, or one that was. `task` is what it does: generate or embed."""

    __tablename__ = "deployments"
    __table_args__ = (Index("ix_deployments_state", "state"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    id: Mapped[uuid.UUID] = mapped_column(Uuid(), unique=True, default=uuid.uuid4)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="RESTRICT"), unique=True)
    model_id: Mapped[str] = mapped_column(String(200))
    adapter_ids: Mapped[list[str]] = mapped_column(JSON(), default=list)
    task: Mapped[str] = mapped_column(String(16))
    options: Mapped[dict[str, Any]] = mapped_column(JSON(), default=dict)
    wanted: Mapped[str] = mapped_column(String(8), default=Wanted.UP)
    state: Mapped[str] = mapped_column(String(16), default=DeploymentState.STARTING)
    #: Restarts since the engine last stood for a while.
    restarts: Mapped[int] = mapped_column(default=0)
    #: Where the engine listens: `unix:PATH`. It changes with every start.
    engine_url: Mapped[str | None] = mapped_column(String(512))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    ready_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime())


class DeploymentModel(Base):
    """Holds a model or adapter while a deployment needs it: the store refuses to delete what is held."""

    __tablename__ = "deployment_models"

    deployment_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("deployments.id", ondelete="CASCADE"), primary_key=True)
    model_id: Mapped[str] = mapped_column(
        ForeignKey("models.model_id", ondelete="RESTRICT"), primary_key=True, index=True
    )
