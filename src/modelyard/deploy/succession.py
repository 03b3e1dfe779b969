"""Who leaves for whom: the wishes by which one deployment takes the place of others, as functions that never commit.

`replaces` of a deployment names those that leave for it. A serving one leaves when the new one is ready
(`let_go_of_replaced`), or before it starts where both don't fit or the request says so (`drain_replaced`); it drains,
so that its requests end whole. One that does not serve leaves at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import exclusively
from modelyard.deploy.tables import LIVE, Deployment, DeploymentState, Strategy, Wanted
from modelyard.jobs import actions as jobs
from modelyard.jobs.tables import ACTIVE, Job

KIND = "DEPLOY"


async def live(session: AsyncSession, task: str | None = None) -> Sequence[Deployment]:
    """Return the deployments that hold or may soon hold an engine, oldest first."""
    query = select(Deployment).where(Deployment.state.in_(LIVE)).order_by(Deployment.number)
    if task is not None:
        query = query.where(Deployment.task == task)
    return (await session.scalars(query)).all()


async def take_down(session: AsyncSession, deployment: Deployment, wanted: Wanted = Wanted.DOWN) -> UUID:
    """Want a deployment out of service, at once or when its requests have ended; return its job's id.

    It then comes back for nobody. Safe to repeat; what is to go at once is not given time again.
    """
    await exclusively(session, KIND)
    await forget(session, deployment)
    return await _leave(session, deployment, wanted)


async def forget(session: AsyncSession, deployment: Deployment) -> None:
    """Remove the deployment from every `replaces` list: a newer request decides about it."""
    for one in await live(session, deployment.task):
        if str(deployment.id) in one.replaces:
            one.replaces = [each for each in one.replaces if each != str(deployment.id)]


async def _leave(session: AsyncSession, deployment: Deployment, wanted: Wanted) -> UUID:
    if deployment.wanted != Wanted.DOWN:
        deployment.wanted = wanted
    job = await jobs.get(session, deployment.job_id)
    if job.status in ACTIVE:
        job.interrupt_requested = True
    return job.id


async def take_the_place_of(
    session: AsyncSession, new: Deployment, job: Job, others: Sequence[Deployment]
) -> list[UUID]:
    """Want others out of service for a deployment, now or when it is ready; return the ids of those jobs that leave."""
    touched: list[UUID] = []
    is_ready = new.state == DeploymentState.READY
    replaces = list(new.replaces)
    for old in others:
        serves = old.state in (DeploymentState.READY, DeploymentState.DRAINING)
        if is_ready or not serves or new.strategy == Strategy.REPLACE:
            touched.append(await _leave(session, old, Wanted.DRAINED if serves else Wanted.DOWN))
            await jobs.append_event(session, old.job_id, f"Replaced by {job.name}.", data={"replaced_by": str(job.id)})
        # What it was to replace falls to the new one.
        replaces += [*([str(old.id)] if old.has_served else []), *old.replaces]
    new.replaces = [] if is_ready else [one for one in dict.fromkeys(replaces) if one != str(new.id)]
    return touched


async def let_go_of_replaced(session: AsyncSession, deployment: Deployment) -> list[UUID]:
    """Have those leave that a deployment replaces, as it is ready; return the ids of their jobs."""
    touched = await drain_replaced(session, deployment, f"Replaced by {deployment.model_id}, which is ready.")
    deployment.replaces = []
    return touched


async def drain_replaced(session: AsyncSession, deployment: Deployment, why: str) -> list[UUID]:
    """Have those leave that a deployment replaces, before it starts; return the ids of their jobs. Safe to repeat."""
    touched = []
    for old in await staying(session, deployment):
        touched.append(await _leave(session, old, Wanted.DRAINED))
        await jobs.append_event(session, old.job_id, why, data={"replaced_by": str(deployment.job_id)})
    return touched


async def replaced_by(session: AsyncSession, deployment: Deployment) -> Sequence[Deployment]:
    """Return the deployments that left, or will, for this one, as long as it is not ready."""
    ids = [UUID(one) for one in deployment.replaces]
    return (await session.scalars(select(Deployment).where(Deployment.id.in_(ids)))).all() if ids else []


async def staying(session: AsyncSession, deployment: Deployment) -> Sequence[Deployment]:
    """Return those that leave for a deployment only when it is ready: they could leave before."""
    return [one for one in await replaced_by(session, deployment) if one.wanted == Wanted.UP and one.state in LIVE]


async def keep_those_that_stay(session: AsyncSession, deployment: Deployment) -> None:
    """Have nobody leave for a deployment any more; those that have begun to are not called back."""
    stay = {str(one.id) for one in await staying(session, deployment)}
    deployment.replaces = [one for one in deployment.replaces if one not in stay]


async def leaving(session: AsyncSession, deployment: Deployment) -> Sequence[Deployment]:
    """Return the other deployments that are about to give their memory back."""
    return [one for one in await live(session) if one.wanted != Wanted.UP and one.id != deployment.id]
