"""Actions on jobs, as functions on a session that never commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.errors import JobFinished, JobNotFound
from modelyard.jobs.tables import ACTIVE, Job, JobEvent
from modelyard.signals import NOTIFIES, ROW_ID, Topic


async def create(
    session: AsyncSession, *, kind: str, name: str, spec: dict[str, Any], subject: str | None = None
) -> Job:
    """Create a job, which the runner takes after the commit."""
    job = Job(kind=kind, name=name, spec=spec, subject=subject)
    session.add(job)
    await session.flush()
    return job


async def find_active(session: AsyncSession, *, kind: str, subject: str) -> Job | None:
    """Return the newest waiting or running job of this kind for this subject that nobody asked to stop."""
    query = select(Job).where(
        Job.kind == kind, Job.subject == subject, Job.status.in_(ACTIVE), Job.interrupt_requested.is_(False)
    )
    return (await session.scalars(query.order_by(Job.number.desc()).limit(1))).first()


async def get(session: AsyncSession, job_id: UUID) -> Job:
    """Return a job.

    Raises:
        JobNotFound: there is none.
    """
    job = (await session.scalars(select(Job).where(Job.id == job_id))).first()
    if job is None:
        raise JobNotFound(job_id)
    return job


async def newest(
    session: AsyncSession,
    *,
    limit: int,
    before: UUID | None = None,
    kind: str | None = None,
    status: str | None = None,
) -> Sequence[Job]:
    """Return jobs, newest first; with `before`, those created before that job.

    Raises:
        JobNotFound: `before` names no job.
    """
    query = select(Job).order_by(Job.number.desc()).limit(limit)
    if before is not None:
        number = await session.scalar(select(Job.number).where(Job.id == before))
        if number is None:
            raise JobNotFound(before, param="before")
        query = query.where(Job.number < number)
    if kind is not None:
        query = query.where(Job.kind == kind)
    if status is not None:
        query = query.where(Job.status == status)
    return (await session.scalars(query)).all()


async def interrupt(session: AsyncSession, job_id: UUID) -> Job:
    """Write the wish that a job stops. Safe to repeat; the runner acts on it.

    Raises:
        JobNotFound: there is no such job.
        JobFinished: it has ended already.
    """
    wish = update(Job).where(Job.id == job_id, Job.status.in_(ACTIVE)).values(interrupt_requested=True).returning(Job)
    job = (await session.scalars(wish, execution_options={ROW_ID: job_id})).first()
    if job is None:
        raise JobFinished(job_id, (await get(session, job_id)).status)
    return job


async def append_event(
    session: AsyncSession, job_id: UUID, message: str, *, level: str = "info", data: dict[str, Any] | None = None
) -> JobEvent:
    """Append to a job's event list."""
    # One at a time for each job: on PostgreSQL a number that is committed after a higher one would never be followed.
    await session.execute(select(Job.number).where(Job.id == job_id).with_for_update())
    event = JobEvent(job_id=job_id, level=level, message=message, data=data or {})
    session.add(event)
    await session.flush()
    return event


async def newest_events(session: AsyncSession, job_id: UUID, limit: int) -> list[JobEvent]:
    """Return a job's last events, oldest first."""
    query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.number.desc()).limit(limit)
    return list(reversed((await session.scalars(query)).all()))


async def events_after(session: AsyncSession, job_id: UUID, after: int, limit: int) -> Sequence[JobEvent]:
    """Return a job's events with a number above `after`, oldest first."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.number > after)
    return (await session.scalars(query.order_by(JobEvent.number).limit(limit))).all()


async def set_progress(session: AsyncSession, job_id: UUID, done: int, total: int, unit: str) -> None:
    """Write how far a job is."""
    values = {"progress_done": done, "progress_total": total, "progress_unit": unit}
    # No reason for the runner to look at all jobs, twice a second.
    news = {NOTIFIES: ((Topic.JOB_NEWS, job_id),)}
    await session.execute(update(Job).where(Job.id == job_id).values(values), execution_options=news)
