"""REST for the current deployment: deploy, look, interrupt."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query, Request

from modelyard.deploy import actions, admission, succession
from modelyard.deploy.schemas import DeployIn, DeployJobOut, DeployOut, DeployStatusOut
from modelyard.http import Sessions, Settings, documented, router, services_of
from modelyard.jobs import actions as jobs
from modelyard.jobs.schemas import JobOut
from modelyard.models.routes import Kept

api = router("/api/v1/deploy", "Deploy")


Task = Annotated[
    Literal["generate", "embed"] | None,
    Query(description="Which current deployment; left out, the generative one comes before the embedding one."),
]


@api.get("/", summary="Get the current deployment", responses=documented(404, 422))
async def get_deployment(sessions: Sessions, task: Task = None) -> DeployOut:
    """Return the model that was last asked for, in service or on its way there (`state`)."""
    async with sessions.read() as session:
        return DeployOut.of(await actions.current(session, task))


@api.post("/", summary="Deploy a model", responses=documented(400, 404, 409, 413, 422, 503))
async def deploy_model(
    request: Request,
    wanted: DeployIn,
    sessions: Sessions,
    settings: Settings,
    backups: Kept,
) -> DeployJobOut:
    """Put a model with its adapters into service, in place of the current one of its kind.

    The job runs for as long as the model is in service. Deploying what is deployed already returns its job; with other
    adapters it changes the running engine, and no request is lost. Another model is started beside the current one
    where memory allows, and requests move when it is ready; one that fails to start leaves the current one as it is.
    """
    wish = admission.wish_of(wanted, settings)
    await admission.check(sessions, settings, wish, backups)
    warnings = await admission.warnings_of(sessions, settings, wish, services_of(request.scope).tokenizers)
    async with sessions.begin() as session:
        job, _ = await actions.deploy(session, wish)
        deployment = await actions.of_job(session, job.id)
        await actions.say_of_adapters(session, deployment, warnings)
        answer = DeployJobOut.with_warnings(job, deployment, list(warnings.values()))
    return answer


@api.get("/status/", summary="Get the current deployment and its job", responses=documented(404, 422))
async def get_deployment_status(sessions: Sessions, task: Task = None) -> DeployStatusOut:
    """Return the model that was last asked for, in service or on its way there, with its job."""
    async with sessions.read() as session:
        deployment = await actions.current(session, task)
        job = await jobs.get(session, deployment.job_id)
    return DeployStatusOut(**DeployOut.of(deployment).model_dump(), job=JobOut.of(job))


@api.post("/interrupt/", summary="Take the current deployment out of service", responses=documented(404, 422))
async def interrupt_deployment(sessions: Sessions, task: Task = None) -> JobOut:
    """End the engine. The answer may still say RUNNING: the job becomes KILLED when nothing of it runs any more."""
    async with sessions.begin() as session:
        deployment = await actions.current(session, task)
        job_id = await succession.take_down(session, deployment)
        job = await jobs.get(session, job_id)
    return JobOut.of(job)
