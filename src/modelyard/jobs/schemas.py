"""Wire shapes of jobs: the source API's four fields first, ours after them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema

from modelyard.jobs.tables import Job, JobEvent, JobStatus


def _naive(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")


def _zoned(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


#: UTC without a zone, as the source API writes `started_at`.
NaiveTime = Annotated[
    datetime,
    PlainSerializer(_naive, return_type=str),
    WithJsonSchema({"type": "string", "description": "UTC, without a zone."}),
]
#: UTC, marked as such.
Time = Annotated[
    datetime, PlainSerializer(_zoned, return_type=str), WithJsonSchema({"type": "string", "format": "date-time"})
]


class ProgressOut(BaseModel):
    """The progress of a job."""

    done: int = Field(examples=[1_048_576])
    total: int = Field(examples=[4_194_304])
    unit: str = Field(examples=["bytes"])


class FailureOut(BaseModel):
    """Why a job failed, and what to do about it."""

    code: str = Field(description="Stable: programs may match it.", examples=["gated_repository"])
    message: str = Field(examples=["The repository meta-llama/Llama-3.2-1B is gated, and no token was sent."])
    hint: str = Field(examples=["Accept its terms on the hub and set HF_TOKEN."])
    evidence: list[str] = Field(
        description="The lines of the log that show it, at most 20; none where there is nothing to show.",
        examples=[["huggingface_hub.errors.GatedRepoError: 401 Client Error."]],
    )


class JobOut(BaseModel):
    """A job. `started_at` is UTC without a zone, as in the source API; a waiting job shows its creation time."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "4d78d943-1896-4d7b-9f11-b10cc2389ba3",
                    "name": "DOWNLOAD_openchat/openchat-3.5-0106",
                    "status": "RUNNING",
                    "started_at": "2026-03-21T09:58:29.846708",
                    "kind": "DOWNLOAD",
                    "created_at": "2026-03-21T09:58:29.801112Z",
                    "finished_at": None,
                    "interrupt_requested": False,
                    "progress": {"done": 1048576, "total": 4194304, "unit": "bytes"},
                    "failure": None,
                }
            ]
        }
    )

    id: UUID
    name: str
    status: JobStatus
    started_at: NaiveTime
    kind: str
    created_at: Time
    finished_at: Time | None
    interrupt_requested: bool
    progress: ProgressOut | None
    failure: FailureOut | None

    @classmethod
    def of(cls, job: Job) -> JobOut:
        """Show a row."""
        progress = failure = None
        if job.progress_total is not None:
            progress = ProgressOut(
                done=job.progress_done or 0, total=job.progress_total, unit=job.progress_unit or "steps"
            )
        if job.failure_code is not None:
            failure = FailureOut(
                code=job.failure_code,
                message=job.failure_message or "",
                hint=job.failure_hint or "",
                evidence=job.failure_evidence or [],
            )
        return cls(
            id=job.id,
            name=job.name,
            status=JobStatus(job.status),
            started_at=job.started_at or job.created_at,
            kind=job.kind,
            created_at=job.created_at,
            finished_at=job.finished_at,
            interrupt_requested=job.interrupt_requested,
            progress=progress,
            failure=failure,
        )


class EventOut(BaseModel):
    """One thing that happened to a job. `number` grows over all jobs; resume after it with Last-Event-ID."""

    number: int = Field(examples=[17])
    at: Time
    level: str = Field(examples=["info"])
    message: str = Field(examples=["Ready: generated its first token after 34.1 s."])
    data: dict[str, Any] = Field(examples=[{"seconds": 34.1}])

    @classmethod
    def of(cls, event: JobEvent) -> EventOut:
        """Show a row."""
        return cls(number=event.number, at=event.at, level=event.level, message=event.message, data=event.data)
