"""Wishes about deployments, as functions on a session that never commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, and_, delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.capacity import reservations
from modelyard.db import exclusively, utcnow
from modelyard.deploy import succession
from modelyard.deploy.tables import LIVE, Deployment, DeploymentModel, DeploymentState, Strategy, Wanted
from modelyard.errors import ModelNotFound, NothingDeployed, Unprocessable
from modelyard.jobs import actions as jobs
from modelyard.jobs.tables import ACTIVE, Job, JobStatus
from modelyard.models import actions as models
from modelyard.models import adapter_rendering
from modelyard.models.tables import Model

KIND = succession.KIND
#: As many as a job's row keeps.
JOB_NAME_CHARACTERS = 512


def job_name(model_id: str, adapter_ids: Sequence[str]) -> str:
    """Return the job's name in the source API's grammar: DEPLOY_<model>[_adapters_<a>_<b>]; cut if too long."""
    name = "_".join([KIND, model_id, *(["adapters", *adapter_ids] if adapter_ids else [])])
    return name if len(name) <= JOB_NAME_CHARACTERS else name[: JOB_NAME_CHARACTERS - 3] + "..."


@dataclass(frozen=True)
class Wish:
    """A model wanted in service; `options` as the request gave them, without defaults."""

    model_id: str
    adapter_ids: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    strategy: Strategy = Strategy.AUTO
    keep_others: bool = False
    idle_timeout_s: float | None = None
    #: The commit that is wanted back, as a deployment's row has it; None: the one that is in the store now.
    pinned: Mapping[str, Any] | None = None
    #: The request says itself that the adapters belong to the model, whatever their files name as base.
    names_base: bool = False
    #: The names that the request has for `model_id` and `adapter_ids`, where it has others.
    params: Mapping[str, str] = field(default_factory=dict)

    def is_met_by(self, deployment: Deployment, path: str) -> bool:
        """Return True if a deployment serves this model in this way, from the folder that a row names."""
        is_same = (deployment.model_id, deployment.options) == (self.model_id, self.options)
        return is_same and (deployment.pinned is None or deployment.pinned["path"] == path)


async def deploy(session: AsyncSession, wish: Wish) -> tuple[Job, list[UUID]]:
    """Want a model in service, as the current one of its task.

    A deployment of the same commit of the model with the same options is changed in place: its adapters, and that it is
    the current one. Else there is a new one. Either way the others of the task leave as soon as it is ready, unless
    they are to be kept. Wanting what is current already returns its job. Two wishes at the same moment are taken one
    after the other.

    Returns:
        The deployment's job, and the ids of the jobs of those that leave for it now.

    Raises:
        ModelNotFound: the store lacks the model or an adapter.
        Unprocessable: an adapter is given as the model, or does not belong to it.
    """
    await exclusively(session, KIND)
    model, adapters = await wanted_models(session, wish.model_id, wish.adapter_ids, wish.names_base)
    if wish.names_base:
        for adapter in adapters:
            await models.name_base(session, adapter, model.model_id)
    adapter_ids = list(dict.fromkeys(wish.adapter_ids))
    up = await _up(session, model.task)
    pinned = dict(wish.pinned or models.pin(model))
    same = next((one for one in up if wish.is_met_by(one, pinned["path"])), None)
    others = [] if wish.keep_others else [one for one in up if one is not same]
    if same is None:
        name = job_name(wish.model_id, adapter_ids)
        job = await jobs.create(session, kind=KIND, name=name, spec={}, subject=wish.model_id)
        same = Deployment(
            job_id=job.id, model_id=wish.model_id, adapter_ids=adapter_ids, task=model.task, pinned=pinned,
            chat_template=pinned.get("chat_template"), options=dict(wish.options), strategy=wish.strategy,
            idle_timeout_s=wish.idle_timeout_s,
        )  # fmt: skip
        session.add(same)
        await session.flush()
        await _hold(session, same.id, [wish.model_id, *adapter_ids])
    else:
        job = await jobs.get(session, same.job_id)
        same.strategy, same.idle_timeout_s = wish.strategy, wish.idle_timeout_s
        same.current_at = utcnow()
        await succession.forget(session, same)
        if same.state in (DeploymentState.IDLE, DeploymentState.DRAINING):
            same.wake_requested = True  # whoever deploys waits for READY
        if wish.keep_others:
            await succession.keep_those_that_stay(session, same)
        if same.adapter_ids != adapter_ids:
            await _want_adapters(session, same, job, adapter_ids)
    touched = await succession.take_the_place_of(session, same, job, others)
    return job, touched


async def say_of_adapters(session: AsyncSession, deployment: Deployment, warnings: Mapping[str, str]) -> None:
    """Append what is said of adapters to a deployment's job, but for those that it serves already."""
    served = {one["adapter_id"] for one in deployment.loaded}
    for adapter_id, said in warnings.items():
        if adapter_id not in served:
            data = {"code": adapter_rendering.EVENT, "adapter_id": adapter_id}
            await jobs.append_event(session, deployment.job_id, said, level="warning", data=data)


async def add_adapter(session: AsyncSession, deployment: Deployment, adapter_id: str) -> Job:
    """Want one more adapter of a live deployment, and nothing else of it changed; return its job. Safe to repeat.

    Hold `exclusively(session, KIND)`, in which the deployment was read.

    Raises:
        ModelNotFound: the store lacks the adapter.
        Unprocessable: it does not belong to the model.
    """
    await wanted_models(session, deployment.model_id, [adapter_id])
    job = await jobs.get(session, deployment.job_id)
    if deployment.state in (DeploymentState.IDLE, DeploymentState.DRAINING):
        deployment.wake_requested = True  # whoever wants it waits for it
    if adapter_id not in deployment.adapter_ids:
        await _want_adapters(session, deployment, job, [*deployment.adapter_ids, adapter_id])
    return job


async def remove_adapter(session: AsyncSession, deployment: Deployment, adapter_id: str) -> Job:
    """Want one adapter less of a live deployment; return its job. Safe to repeat, and to be held as `add_adapter`."""
    job = await jobs.get(session, deployment.job_id)
    if adapter_id in deployment.adapter_ids:
        await _want_adapters(session, deployment, job, [one for one in deployment.adapter_ids if one != adapter_id])
    return job


async def _up(session: AsyncSession, task: str) -> list[Deployment]:
    """Return the deployments of a task that are wanted; those whose job was interrupted are so no longer."""
    up = [one for one in await succession.live(session, task) if one.wanted == Wanted.UP]
    for one in up:
        if not await is_wanted(session, one):
            one.wanted = Wanted.DOWN  # nobody has come to it yet
            await succession.forget(session, one)
    return [one for one in up if one.wanted == Wanted.UP]


async def _want_adapters(session: AsyncSession, deployment: Deployment, job: Job, adapter_ids: list[str]) -> None:
    before = deployment.adapter_ids
    deployment.adapter_ids = adapter_ids
    deployment.adapter_failure = None
    job.name = job_name(deployment.model_id, adapter_ids)
    await _hold(session, deployment.id, adapter_ids)
    message = f"Adapters wanted: {', '.join(adapter_ids) or 'none'}."
    await jobs.append_event(session, job.id, message, data={"adapter_ids": adapter_ids, "before": before})


async def restore_replaced(session: AsyncSession, failed: Deployment) -> Job | None:
    """Want back what left for a deployment that then did not get ready; return the new job.

    Nothing comes back where another deployment of the task is wanted meanwhile.
    """
    await exclusively(session, KIND)
    if any(one.id != failed.id for one in await _up(session, failed.task)):
        return None
    gone = [one for one in await succession.replaced_by(session, failed) if one.has_served]
    if not gone:
        return None
    last = max(gone, key=lambda one: one.current_at)
    found = set(await session.scalars(select(Model.model_id)))
    if last.model_id not in found:
        return None
    adapter_ids = [one for one in last.adapter_ids if one in found]
    wish = Wish(last.model_id, adapter_ids, last.options, idle_timeout_s=last.idle_timeout_s, pinned=last.pinned)
    failed.replaces = []
    failed.wanted = Wanted.DOWN
    job, _ = await deploy(session, wish)
    (await of_job(session, job.id)).restores = last.id
    message = f"Wanted again, since what replaced it, {failed.model_id}, failed."
    await jobs.append_event(session, job.id, message, data={"failed": str(failed.job_id)})
    return job


async def wanted_models(
    session: AsyncSession, model_id: str, adapter_ids: Sequence[str], names_base: bool = False
) -> tuple[Model, list[Model]]:
    """Return the rows of a model and its adapters that somebody wants in service.

    What an adapter's files name as its base is a hint, which says nothing where it is no model's name: `names_base`
    puts it on this model all the same. Its layers are held against the model's own in either case (`admission`).

    Raises:
        ModelNotFound: the store lacks the model or an adapter.
        Conflict: one of them is being downloaded.
        Unprocessable: an adapter is given as the model, or does not belong to it.
    """
    model = await models.get_for_use(session, model_id, among=models.BASES)
    if model.adapter:
        raise Unprocessable(
            f"'{model_id}' is an adapter of '{model.base_model_id or 'a base that it does not name'}': deploy its base "
            "with this one in adapter_ids.",
            param="model_id",
        )
    return model, await _adapters(session, model, list(dict.fromkeys(adapter_ids)), names_base)


async def _adapters(session: AsyncSession, model: Model, adapter_ids: Sequence[str], names_base: bool) -> list[Model]:
    if adapter_ids and model.task != "generate":
        raise Unprocessable("Adapters are served on generative models only.", param="adapter_ids")
    found = []
    for adapter_id in adapter_ids:
        adapter = await models.get_adapter(session, adapter_id, model.model_id)
        if not adapter.adapter:
            raise Unprocessable(f"'{adapter_id}' is a model, not an adapter.", param="adapter_ids")
        # Names on the hub are the same in capitals and small letters.
        hint = adapter.base_model_id or model.model_id
        if hint.casefold() != model.model_id.casefold() and not names_base:
            raise Unprocessable(
                f"'{adapter_id}' is an adapter of '{adapter.base_model_id}', not of '{model.model_id}'. If it is one "
                f"of this all the same, say so: deploy it with base_model_id '{model.model_id}'. Its layers are then "
                "held against that model's.",
                param="adapter_ids",
            )
        found.append(adapter)
    return found


async def _hold(session: AsyncSession, deployment_id: UUID, model_ids: Sequence[str]) -> None:
    """Keep models from being deleted; what is held already stays so."""
    held = set(
        await session.scalars(select(DeploymentModel.model_id).where(DeploymentModel.deployment_id == deployment_id))
    )
    session.add_all(
        DeploymentModel(deployment_id=deployment_id, model_id=one)
        for one in dict.fromkeys(model_ids)
        if one not in held
    )
    await session.flush()


async def holds_more_than_it_needs(session: AsyncSession, deployment: Deployment) -> bool:
    """True if a deployment holds adapters that it neither wants nor serves."""
    more = select(DeploymentModel.model_id).where(_not_needed(deployment)).limit(1)
    return (await session.scalar(more)) is not None


async def let_go_of_adapters(session: AsyncSession, deployment: Deployment) -> None:
    """Let go of the adapters that a deployment neither wants nor serves."""
    await session.execute(delete(DeploymentModel).where(_not_needed(deployment)))


def _not_needed(deployment: Deployment) -> ColumnElement[bool]:
    needed = {deployment.model_id, *deployment.adapter_ids, *(one["adapter_id"] for one in deployment.loaded)}
    return and_(DeploymentModel.deployment_id == deployment.id, DeploymentModel.model_id.not_in(needed))


async def current(session: AsyncSession, task: str | None = None) -> Deployment:
    """Return the current deployment; without a task the generative one comes before the embedding one.

    Raises:
        NothingDeployed: there is none; the message has the cause if the last one failed.
    """
    up = [deployment for deployment in await succession.live(session, task) if deployment.wanted == Wanted.UP]
    if up:
        return max(up, key=lambda one: (one.task == "generate", one.current_at, one.number))
    raise NothingDeployed(await _last_failure(session))


async def _last_failure(session: AsyncSession) -> str:
    query = select(Job).where(Job.kind == KIND).order_by(Job.number.desc()).limit(1)
    job = (await session.scalars(query)).first()
    if job is None or job.failure_message is None:
        return ""
    return f"The last deployment, {job.name} (job {job.id}), failed: {job.failure_message} {job.failure_hint}".strip()


async def is_wanted(session: AsyncSession, deployment: Deployment) -> bool:
    """True if a deployment is wanted in service: its job runs, and neither of them was asked to end."""
    job = await jobs.get(session, deployment.job_id)
    return deployment.wanted == Wanted.UP and job.status in ACTIVE and not job.interrupt_requested


def no_engine() -> dict[str, Any]:
    """Return what a deployment without an engine has in the columns that tell of one."""
    return {"engine_url": None, "loaded": []}


async def of_job(session: AsyncSession, job_id: UUID) -> Deployment:
    """Return the deployment of a job, which has one from the beginning."""
    return (await session.scalars(select(Deployment).where(Deployment.job_id == job_id))).one()


async def release(session: AsyncSession, deployment_id: UUID) -> None:
    """Let go of the models that a deployment held."""
    await session.execute(delete(DeploymentModel).where(DeploymentModel.deployment_id == deployment_id))


async def folders_in_use(session: AsyncSession) -> set[str]:
    """Return the folders of the store that live deployments read, as models' rows name them."""
    found = set()
    for one in await succession.live(session):
        if one.pinned is not None:
            found.add(one.pinned["path"])
        found |= {"/".join(PurePath(loaded["path"]).parts[-2:]) for loaded in one.loaded}
    return found


async def model_rows(session: AsyncSession, deployment: Deployment) -> tuple[Model, list[Model]]:
    """Return the rows of a deployment's model, at the commit that it serves, and its adapters.

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
    model = models.at_pin(found[deployment.model_id], deployment.pinned)
    return model, [found[adapter_id] for adapter_id in deployment.adapter_ids]


async def ended(session: AsyncSession, job_id: UUID) -> None:
    """Write off the deployment of a job that ends, if it has not ended itself: their rows never disagree.

    For the transaction that writes the job's end.
    """
    deployment = (await session.scalars(select(Deployment).where(Deployment.job_id == job_id))).one_or_none()
    if deployment is not None and deployment.state in LIVE:
        await _write_off(session, deployment)


async def reconcile(session: AsyncSession) -> list[UUID]:
    """Write off live deployments whose job has ended, and want those again that failed while they were wanted.

    For the start of a server, before anything runs. Earlier servers left such rows when the database was away.

    Returns:
        The jobs of those that are wanted again.
    """
    forgotten = (
        select(Deployment, Job)
        .join(Job, Job.id == Deployment.job_id)
        .where(Deployment.state.in_(LIVE), Job.status.not_in(ACTIVE))
        # The last that was current is wanted last, so that it is so again.
        .order_by(Deployment.current_at, Deployment.number)
    )
    found = [(one, job) for one, job in (await session.execute(forgotten)).all()]
    wanted = [
        one for one, job in found
        if one.wanted == Wanted.UP and job.status == JobStatus.FAILED and not job.interrupt_requested
    ]  # fmt: skip
    for deployment, _ in found:
        await _write_off(session, deployment)
    await session.flush()
    known = set(await session.scalars(select(Model.model_id)))
    jobs_of_them = []
    for one in wanted:
        if one.model_id not in known:
            continue
        adapter_ids = [adapter_id for adapter_id in one.adapter_ids if adapter_id in known]
        wish = Wish(
            one.model_id, adapter_ids, one.options, Strategy(one.strategy), True, one.idle_timeout_s, one.pinned
        )
        job, _ = await deploy(session, wish)
        again = await of_job(session, job.id)
        again.restores = one.id if one.has_served else None
        message = "Wanted again: it was in service when its job failed, and nobody had asked for its end."
        await jobs.append_event(session, job.id, message, data={"before": str(one.job_id)})
        jobs_of_them.append(job.id)
    return jobs_of_them


async def _write_off(session: AsyncSession, deployment: Deployment) -> None:
    deployment.wanted = Wanted.DOWN
    deployment.state = DeploymentState.FAILED
    deployment.ended_at = utcnow()
    for name, value in no_engine().items():
        setattr(deployment, name, value)
    await reservations.release(session, deployment.id)
    await release(session, deployment.id)
