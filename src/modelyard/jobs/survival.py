"""Deaths of the server during a job: a job that ends the server each time it is resumed is not resumed a third time.

A job whose function was called is *at risk* until it is seen to survive: it came further than ever before, it ran for
two minutes, or the server ended in good order. A server that starts and finds a job at risk knows that another died
while the job ran, and counts. Two power cuts in a training of days count nothing, since it got on in between, and a
deployment that has served is never at risk again: another job's crashes must not take it down. All functions take a
session and never commit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from uuid import UUID

from sqlalchemy import and_, update
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.errors import JobFailure
from modelyard.jobs.tables import Job, JobStatus
from modelyard.plurals import counted
from modelyard.signals import NOTIFIES

#: So many deaths of the server during one job, one after the other, are no accident.
MOST_DEATHS = 2
#: A job that ran for so long has not ended the server.
SURVIVED_S = 120.0
#: In the place of a number of deaths: never at risk again.
IMMUNE = -1


async def count_deaths(session: AsyncSession) -> Sequence[Job]:
    """Count for each job that an earlier server left running, and return those that may not be resumed."""
    running = and_(Job.status == JobStatus.RUNNING, Job.deaths != IMMUNE)
    await session.execute(update(Job).where(running, Job.at_risk).values(deaths=Job.deaths + 1))
    await session.execute(update(Job).where(running, Job.at_risk.is_(False)).values(at_risk=True, deaths=0))
    deadly = update(Job).where(running, Job.deaths >= MOST_DEATHS).values(at_risk=False).returning(Job)
    return (await session.scalars(deadly)).all()


async def note_survival(session: AsyncSession, job_ids: Collection[UUID], *, for_good: bool = False) -> None:
    """Write that jobs are not at risk any more, or, with `for_good`, will never be again."""
    if job_ids:
        deaths = IMMUNE if for_good else 0
        known = update(Job).where(Job.id.in_(job_ids), Job.deaths != IMMUNE)
        # No client is shown this, and the runner has nothing to do for it.
        await session.execute(known.values(at_risk=False, deaths=deaths), execution_options={NOTIFIES: ()})


async def note_good_end(session: AsyncSession) -> None:
    """Write that no job ended this server: it stops in good order."""
    await session.execute(update(Job).where(Job.at_risk).values(at_risk=False, deaths=0))


def failure(job: Job) -> JobFailure:
    """Return why such a job is not resumed."""
    return JobFailure(
        "server_died",
        f"The server died {counted(job.deaths, 'time')} while this job ran, each time soon after the job was "
        "begun or resumed; it is not resumed again by itself.",
        "See how the server ended (its own log, dmesg for lack of memory). If the job was not the cause, start it "
        "again: a download goes on with what has arrived, a training resumes from its last checkpoint "
        "(POST /api/v1/finetune/<id>/resume/), a deployment is made by another deploy.",
    )
