"""Memory that was promised to jobs of other rooms, so that engines leave it free: as functions that never commit.

A promise counts for as long as its job has not ended, whoever forgot to release it. Hold the supervisor's
`sharing_memory` from the look at free memory until the promise is committed, as the start of an engine does.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.deploy.tables import MemoryPromise
from modelyard.jobs.tables import ACTIVE, Job


@dataclass(frozen=True)
class Promised:
    """All that is promised. `not_taken_bytes` is the part of it that the machine still counts as free."""

    memory_bytes: int = 0
    not_taken_bytes: int = 0
    holders: tuple[str, ...] = ()


#: Nothing is promised to anybody.
NOTHING = Promised()


async def promised(session: AsyncSession, *, but: UUID | None = None) -> Promised:
    """Return what is promised, leaving out one job's."""
    rows = [one for one in await all_promises(session) if one.job_id != but]
    return Promised(
        sum(one.memory_bytes for one in rows),
        sum(max(0, one.memory_bytes - one.taken_bytes) for one in rows),
        tuple(one.holder for one in rows),
    )


async def all_promises(session: AsyncSession) -> list[MemoryPromise]:
    """Return the promises to jobs that have not ended."""
    query = select(MemoryPromise).join(Job, Job.id == MemoryPromise.job_id).where(Job.status.in_(ACTIVE))
    return list((await session.scalars(query.order_by(Job.number))).all())


async def promise(session: AsyncSession, job_id: UUID, holder: str, memory_bytes: int) -> None:
    """Promise memory to a job, of which it has taken none yet; one promise for each job."""
    await release(session, job_id)
    session.add(MemoryPromise(job_id=job_id, holder=holder[:300], memory_bytes=memory_bytes))
    await session.flush()


async def note_taken(session: AsyncSession, job_id: UUID, taken_bytes: int) -> None:
    """Note how much memory a job has taken by now."""
    await session.execute(
        update(MemoryPromise).where(MemoryPromise.job_id == job_id).values(taken_bytes=max(0, taken_bytes))
    )


async def release(session: AsyncSession, job_id: UUID) -> None:
    """Take a promise back. Safe to repeat."""
    await session.execute(delete(MemoryPromise).where(MemoryPromise.job_id == job_id))
