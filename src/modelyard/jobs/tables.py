"""Tables of the jobs room. Only the runner writes `status`; requests write `interrupt_requested`."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, Text, Uuid, false
from sqlalchemy.orm import Mapped, mapped_column

from modelyard.db import Base, Number, UtcDateTime, utcnow
from modelyard.signals import Topic
from modelyard.states import Moves


class JobStatus(StrEnum):
    """The life of a job:

    CREATED -> RUNNING | KILLED
    RUNNING -> FINISHED | FAILED | KILLED
    """

    #: Waits for its turn.
    CREATED = "CREATED"
    #: Its function runs, or will again when the server is back.
    RUNNING = "RUNNING"
    #: Did what it was asked to.
    FINISHED = "FINISHED"
    #: Ended without; `failure` says why and what to do.
    FAILED = "FAILED"
    #: Interrupted, or replaced by another; nothing of it runs any more.
    KILLED = "KILLED"


MOVES: Moves = {
    JobStatus.CREATED: frozenset({JobStatus.RUNNING, JobStatus.KILLED}),
    JobStatus.RUNNING: frozenset({JobStatus.FINISHED, JobStatus.FAILED, JobStatus.KILLED}),
    JobStatus.FINISHED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.KILLED: frozenset(),
}
ACTIVE = (JobStatus.CREATED, JobStatus.RUNNING)


class Job(Base):
    """A job. `number` orders jobs by creation, `subject` is what a second wish for the same thing finds."""

    TOPICS = ((Topic.JOBS, None), (Topic.JOB_NEWS, "id"))
    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_status_number", "status", "number"),
        Index("ix_jobs_kind_number", "kind", "number"),
        Index("ix_jobs_kind_status_number", "kind", "status", "number"),
        Index("ix_jobs_kind_subject", "kind", "subject"),
    )

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    id: Mapped[uuid.UUID] = mapped_column(Uuid(), unique=True, default=uuid.uuid4)
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(512))
    subject: Mapped[str | None] = mapped_column(String(512))
    spec: Mapped[dict[str, Any]] = mapped_column(JSON())
    status: Mapped[str] = mapped_column(String(16), default=JobStatus.CREATED)
    interrupt_requested: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    progress_done: Mapped[int | None] = mapped_column(BigInteger())
    progress_total: Mapped[int | None] = mapped_column(BigInteger())
    progress_unit: Mapped[str | None] = mapped_column(String(16))
    failure_code: Mapped[str | None] = mapped_column(String(64))
    failure_message: Mapped[str | None] = mapped_column(Text())
    failure_hint: Mapped[str | None] = mapped_column(Text())
    #: A server has called its function, and has neither ended in good order nor seen it survive (`survival`).
    at_risk: Mapped[bool] = mapped_column(default=False, server_default=false())
    #: Servers that died while it was at risk, one after the other.
    deaths: Mapped[int] = mapped_column(default=0, server_default="0")
    #: The lines of a log that show the failure.
    failure_evidence: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))


class JobEvent(Base):
    """Something that happened to a job. Never changed, never deleted before its job."""

    TOPICS = ((Topic.JOB_NEWS, "job_id"),)
    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_id_number", "job_id", "number"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text())
    data: Mapped[dict[str, Any]] = mapped_column(JSON(), default=dict)
