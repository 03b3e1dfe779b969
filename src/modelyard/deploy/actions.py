"""What may be wanted of deployments, as functions on a session that never commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import exclusively
from modelyard.deploy.tables import LIVE, Deployment, DeploymentModel, DeploymentState, Wanted
from modelyard.errors import ModelNotFound, NothingDeployed, Unprocessable
from modelyard.jobs import actions as jobs
from modelyard.jobs.tables import ACTIVE, Job
from modelyard.models import actions as models
from modelyard.models.tables import Model

KIND = "DEPLOY"


def job_name(model_id: str, adapter_ids: Sequence[str]) -> str:
    """Return the job's name in the source API's grammar: DEPLOY_<model>[_adapters_<a>_<b>]."""
    return "_".join([KIND, model_id, *(["adapters", *adapter_ids] if adapter_ids else [])])


async def deploy(
    session: AsyncSession, model_id: str, adapter_ids: Sequence[str], options: dict[str, Any]
) -> tuple[Job, list[UUID]]:
    """Want a model in service, in place of the current one of its task.

    Wanting what is current already returns its job. Two wishes at the same moment are taken one after the other:
    the later one replaces the earlier.

    Returns:
        The deployment's job, and the ids of the jobs that it replaces.

    Raises:
        ModelNotFound: the store lacks the model or an adapter.
        Unprocessable: an adapter is given as the model, or does not belong to it.
    """
    await exclusively(session, KIND)
    model = await models.get(session, model_id)
    if model.adapter:
        raise Unprocessable(
            f"'{model_id}' is an adapter of '{model.base_model_id}': deploy that model with this one in adapter_ids.",
            param="model_id",
        )
    unique = list(dict.fromkeys(adapter_ids))
    await _check_adapters(session, model, unique)
    replaced = []
    for old in await live(session, model.task):
        if old.wanted != Wanted.UP:
            continue
        if (old.model_id, old.adapter_ids, old.options) == (model_id, unique, options):
            job = await jobs.get(session, old.job_id)
            if job.status in ACTIVE and not job.interrupt_requested:
                return job, []
        replaced.append(await take_down(session, old))
    job = await jobs.create(session, kind=KIND, name=job_name(model_id, unique), spec={}, subject=model_id)
    deployment = Deployment(job_id=job.id, model_id=model_id, adapter_ids=unique, task=model.task, options=options)
    session.add(deployment)
    await session.flush()
    session.add_all(DeploymentModel(deployment_id=deployment.id, model_id=held) for held in [model_id, *unique])
    for job_id in replaced:
        await jobs.append_event(session, job_id, f"Replaced by {job.name}.", data={"replaced_by": str(job.id)})
    return job, replaced


async def _check_adapters(session: AsyncSession, model: Model, adapter_ids: Sequence[str]) -> None:
    if adapter_ids and model.task != "generate":
        raise Unprocessable("Adapters are served on generative models only.", param="adapter_ids")
    for adapter_id in adapter_ids:
        adapter = await models.get_adapter(session, adapter_id, model.model_id)
        if not adapter.adapter:
            raise Unprocessable(f"'{adapter_id}' is a model, not an adapter.", param="adapter_ids")
        if adapter.base_model_id != model.model_id:
            raise Unprocessable(
                f"'{adapter_id}' is an adapter of '{adapter.base_model_id}', not of '{model.model_id}'.",
                param="adapter_ids",
            )


async def take_down(session: AsyncSession, deployment: Deployment) -> UUID:
    """Want a deployment out of service; return its job's id. Safe to repeat."""
    deployment.wanted = Wanted.DOWN
    job = await jobs.get(session, deployment.job_id)
    if job.status in ACTIVE:
        job.interrupt_requested = True
    return job.id


async def live(session: AsyncSession, task: str | None = None) -> Sequence[Deployment]:
    """Return the deployments that hold or may soon hold an engine, oldest first."""
    query = select(Deployment).where(Deployment.state.in_(LIVE)).order_by(Deployment.number)
    if task is not None:
        query = query.where(Deployment.task == task)
    return (await session.scalars(query)).all()


async def current(session: AsyncSession, task: str | None = None) -> Deployment:
    """Return the current deployment; without a task the generative one comes before the embedding one.

    Raises:
        NothingDeployed: there is none; the message has the cause if the last one failed.
    """
    up = [deployment for deployment in await live(session, task) if deployment.wanted == Wanted.UP]
    if up:
        return max(up, key=lambda deployment: (deployment.task == "generate", deployment.number))
    raise NothingDeployed(await _last_failure(session))


async def _last_failure(session: AsyncSession) -> str:
    query = select(Job).where(Job.kind == KIND).order_by(Job.number.desc()).limit(1)
    job = (await session.scalars(query)).first()
    if job is None or job.failure_message is None:
        return ""
    return f"The last deployment, {job.name} (job {job.id}), failed: {job.failure_message} {job.failure_hint}".strip()


async def of_job(session: AsyncSession, job_id: UUID) -> Deployment:
    """Return the deployment of a job, which has one from the beginning."""
    return (await session.scalars(select(Deployment).where(Deployment.job_id == job_id))).one()


async def release(session: AsyncSession, deployment_id: UUID) -> None:
    """Let go of the models that a deployment held."""
    await session.execute(delete(DeploymentModel).where(DeploymentModel.deployment_id == deployment_id))


async def model_rows(session: AsyncSession, deployment: Deployment) -> tuple[Model, list[Model]]:
    """Return the rows of a deployment's model and adapters.

    Raises:
        ModelNotFound: one is gone, which the hold of a live deployment prevents.
    """
    found = {
        row.model_id: row
        for row in await session.scalars(
            select(Model).where(Model.model_id.in_([deployment.model_id, *deployment.adapter_ids]))
        )
    }
    missing = {deployment.model_id, *deployment.adapter_ids} - found.keys()
    if missing:
        raise ModelNotFound(min(missing))
    return found[deployment.model_id], [found[adapter_id] for adapter_id in deployment.adapter_ids]


async def end_forgotten(session: AsyncSession) -> None:
    """Write off live deployments whose job has ended. For the start of a server, before anything runs."""
    forgotten = (
        select(Deployment)
        .join(Job, Job.id == Deployment.job_id)
        .where(Deployment.state.in_(LIVE), Job.status.not_in(ACTIVE))
    )
    for deployment in (await session.scalars(forgotten)).all():
        deployment.wanted = Wanted.DOWN
        deployment.state = DeploymentState.FAILED
        deployment.engine_url = None
        await release(session, deployment.id)
