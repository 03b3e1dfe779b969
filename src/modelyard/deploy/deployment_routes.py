"""REST for all deployments: those beside the current one too, and those that have ended."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import Path, Query

from modelyard.deploy import roster
from modelyard.deploy.schemas import DeployOut
from modelyard.http import Sessions, documented, router

api = router("/api/v1/deployments", "Deploy")

DeploymentId = Annotated[
    UUID, Path(description="The deployment's id.", examples=["8d0f2a35-6b1e-4c55-9d3e-2f4a7c1b9e60"])
]


@api.get("/", summary="List deployments", responses=documented(404, 422))
async def list_deployments(
    sessions: Sessions,
    everything: Annotated[
        bool, Query(alias="all", description="Also those that have ended; then the newest comes first.")
    ] = False,
    limit: Annotated[int, Query(ge=1, le=1000, description="The most deployments to return.")] = 100,
    before: Annotated[UUID | None, Query(description="Only those after this one in the list: the next page.")] = None,
) -> list[DeployOut]:
    """Return the live deployments, those first that were last asked to be the current one of their kind.

    Pass the last one's id as `before` for the next page.
    """
    read = roster.newest if everything else roster.live
    async with sessions.read() as session:
        return [DeployOut.of(one) for one in await read(session, limit=limit, before=before)]


@api.get("/{deployment_id}", summary="Get a deployment", responses=documented(404, 422))
async def get_deployment_by_id(deployment_id: DeploymentId, sessions: Sessions) -> DeployOut:
    """Return a deployment, live or ended."""
    async with sessions.read() as session:
        return DeployOut.of(await roster.get(session, deployment_id))


@api.delete("/{deployment_id}", summary="Take a deployment out of service", responses=documented(404, 409, 422))
async def delete_deployment(
    deployment_id: DeploymentId,
    sessions: Sessions,
    drain: Annotated[
        bool, Query(description="Let requests in progress end first; false: cut them off and end the engine now.")
    ] = True,
) -> DeployOut:
    """Send it no more requests, and end its engine. Safe to repeat; one that has ended answers 409 `deployment_ended`.

    The answer shows what is wanted; `state` becomes STOPPED when nothing of it runs any more.
    """
    async with sessions.begin() as session:
        deployment = await roster.leave(session, deployment_id, drain=drain)
    return DeployOut.of(deployment)
