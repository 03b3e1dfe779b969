"""The deployments that there are, live and ended: found, listed, taken out of service, woken. Nothing here commits."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import exclusively
from modelyard.deploy import actions, succession
from modelyard.deploy.tables import LIVE, Deployment, DeploymentState, Wanted
from modelyard.errors import DeploymentEnded, DeploymentNotFound

#: States in which a deployment has no engine for requests, but gets one when a request asks.
ASLEEP = frozenset({DeploymentState.IDLE, DeploymentState.DRAINING})


async def get(session: AsyncSession, deployment_id: UUID, *, param: str = "deployment_id") -> Deployment:
    """Return a deployment, live or ended.

    Raises:
        DeploymentNotFound: there is none.
    """
    found = (await session.scalars(select(Deployment).where(Deployment.id == deployment_id))).first()
    if found is None:
        raise DeploymentNotFound(deployment_id, param=param)
    return found


async def live(session: AsyncSession, *, limit: int, before: UUID | None = None) -> Sequence[Deployment]:
    """Return live deployments, those first that were last asked to be current; `before` is the last one's id.

    Raises:
        DeploymentNotFound: `before` names none.
    """
    order = tuple_(Deployment.current_at, Deployment.number)
    query = select(Deployment).where(Deployment.state.in_(LIVE))
    if before is not None:
        last = await get(session, before, param="before")
        query = query.where(order < (last.current_at, last.number))
    query = query.order_by(Deployment.current_at.desc(), Deployment.number.desc())
    return (await session.scalars(query.limit(limit))).all()


async def newest(session: AsyncSession, *, limit: int, before: UUID | None = None) -> Sequence[Deployment]:
    """Return deployments, live and ended, the newest first; with `before`, those made before that one.

    Raises:
        DeploymentNotFound: `before` names none.
    """
    query = select(Deployment)
    if before is not None:
        query = query.where(Deployment.number < (await get(session, before, param="before")).number)
    return (await session.scalars(query.order_by(Deployment.number.desc()).limit(limit))).all()


async def leave(session: AsyncSession, deployment_id: UUID, *, drain: bool) -> Deployment:
    """Want a deployment out of service, when its requests have ended or now. Safe to repeat.

    Raises:
        DeploymentNotFound: there is none.
        DeploymentEnded: it is out of service already.
    """
    await exclusively(session, actions.KIND)
    deployment = await get(session, deployment_id)
    if deployment.state not in LIVE:
        raise DeploymentEnded(deployment_id, deployment.state)
    await succession.take_down(session, deployment, Wanted.DRAINED if drain else Wanted.DOWN)
    return deployment


async def wake(session: AsyncSession, deployment_id: UUID) -> None:
    """Have the engine of an idle deployment started. Safe to repeat; one that is not idle is left alone."""
    await session.execute(
        update(Deployment)
        .where(Deployment.id == deployment_id, Deployment.state.in_(ASLEEP), Deployment.wanted == Wanted.UP)
        .values(wake_requested=True)
    )
