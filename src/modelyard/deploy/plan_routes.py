"""REST for looking before deploying: what a deploy would take and do."""

from __future__ import annotations

from modelyard.deploy import admission
from modelyard.deploy.plan import plan
from modelyard.deploy.plan_schemas import PlanOut
from modelyard.deploy.schemas import DeployIn
from modelyard.http import Sessions, Settings, documented, router
from modelyard.models.routes import Kept

api = router("/api/v1/deploy", "Deploy")


@api.post("/plan/", summary="Plan a deploy", responses=documented(400, 404, 409, 413, 422, 503))
async def plan_deploy(wanted: DeployIn, sessions: Sessions, settings: Settings, backups: Kept) -> PlanOut:
    """Say what POST /api/v1/deploy/ with this body would take and do. Nothing is started, nothing changes.

    What that would refuse at once is refused here too. A plan is no promise: what is free may be taken meanwhile.
    """
    wish = admission.wish_of(wanted, settings)
    await admission.check(sessions, settings, wish, backups)
    return PlanOut.of(await plan(sessions, settings, wish))
