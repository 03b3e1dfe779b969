"""Tables of the finetune room. Requests write what is wanted; only the training's job function writes what is."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from modelyard.db import Base, Number, UtcDateTime, utcnow


class Phase(StrEnum):
    """The phase of a training; its job's status says whether it still is. A restart may begin a phase again."""

    #: Other trainings come first.
    QUEUED = "QUEUED"
    #: The dataset and, if there is one, a checkpoint are fetched.
    PREPARING = "PREPARING"
    #: The accelerator is taken.
    WAITING = "WAITING"
    #: The trainer runs.
    TRAINING = "TRAINING"
    #: Base and adapter are scored on the rows that were held back.
    EVALUATING = "EVALUATING"
    #: The adapter goes into the store.
    PUBLISHING = "PUBLISHING"
    #: The adapter is loaded into an engine and checked there.
    DEPLOYING = "DEPLOYING"
    #: All that was asked for is done.
    DONE = "DONE"


class OnBusy(StrEnum):
    """The choice for when the accelerator is taken by deployments."""

    #: Wait until there is room.
    WAIT = "wait"
    #: Drain them, train, and bring them back.
    STOP_DEPLOYMENT = "stop_deployment"
    #: Give up.
    FAIL = "fail"


class Finetune(Base):
    """A training, or one that was. Its newest job is `job_id`: a training that is resumed gets a new one."""

    __tablename__ = "finetunes"

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    id: Mapped[uuid.UUID] = mapped_column(Uuid(), unique=True, default=uuid.uuid4)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="RESTRICT"), unique=True)
    name: Mapped[str] = mapped_column(String(200))
    model_id: Mapped[str] = mapped_column(String(200))
    #: The commit of the base that it began on, as `deployments.pinned`; NULL: that of the base's row.
    pinned: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    dataset_id: Mapped[uuid.UUID] = mapped_column(Uuid(), index=True)
    #: What the adapter is called in the store; no two trainings share one.
    adapter_id: Mapped[str] = mapped_column(String(200), unique=True)
    #: As the request gave them, with the defaults filled in (`trainer.spec.Hyperparameters`).
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON())
    on_busy: Mapped[str] = mapped_column(String(16), default=OnBusy.WAIT)
    deploy: Mapped[bool] = mapped_column(default=False)
    #: `{"alias", "if"}`; NULL: no alias moves.
    promote: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    phase: Mapped[str] = mapped_column(String(16), default=Phase.QUEUED)
    #: What was expected before it began: seconds, memory_bytes, tokens_per_s, basis.
    estimate: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    #: What the rows turned out to be: rows, tokens, truncated, left out, held out, steps.
    prepared: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    #: What it took: steps, seconds, tokens_per_s, peak_memory_bytes, losses.
    figures: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    #: Base and adapter on the rows that were held back.
    evaluation: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    #: What the checks before the adapter was named to clients found.
    checks: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    #: Whether the alias moved, from where to where, and why or why not.
    promotion: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    #: Deployments that were drained for it and are to come back, with when they left and came back.
    stopped: Mapped[list[dict[str, Any]]] = mapped_column(JSON(), default=list)
    #: Seconds for which a deployment was out of service for it.
    unavailable_s: Mapped[float | None] = mapped_column()
    versions: Mapped[dict[str, str] | None] = mapped_column(JSON(none_as_null=True))
    #: Step of the newest checkpoint that is in the storage.
    checkpoint_step: Mapped[int | None] = mapped_column(BigInteger())
    #: How far the trainer's reports were read: `{"attempt", "offset"}`, written together with what they said.
    followed: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    #: When the trainer took its first step.
    first_step_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime())


class FinetunePoint(Base):
    """The figures of a training at one step. A step that is done again after a restart replaces what it said."""

    __tablename__ = "finetune_points"
    __table_args__ = (Index("ix_finetune_points_finetune_id_step", "finetune_id", "step", unique=True),)

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    finetune_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("finetunes.id", ondelete="CASCADE"))
    step: Mapped[int] = mapped_column(BigInteger())
    at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    epoch: Mapped[float | None] = mapped_column()
    loss: Mapped[float | None] = mapped_column()
    validation_loss: Mapped[float | None] = mapped_column()
    learning_rate: Mapped[float | None] = mapped_column()
    grad_norm: Mapped[float | None] = mapped_column()
    tokens: Mapped[int | None] = mapped_column(BigInteger())
    tokens_per_s: Mapped[float | None] = mapped_column()
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger())


class FinetuneHold(Base):
    """Holds the base and the dataset while a training needs them: their rooms refuse to delete what is held."""

    __tablename__ = "finetune_holds"

    finetune_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("finetunes.id", ondelete="CASCADE"), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.model_id", ondelete="RESTRICT"), index=True)
    dataset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("datasets.id", ondelete="RESTRICT"), index=True)
