"""From an adapter in the store to one that answers requests, and an alias that leads to it if it is better.

Wishes are written as anybody's are, the deployment's own supervisor fulfils them, and its row says what came of it.
Nothing of the supervisor's is written here. Everything may be called again after a restart of the server: which
deployment was asked is kept among the training's events, in the transaction that asked it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import Sessions, exclusively
from modelyard.deploy import actions as deployments
from modelyard.deploy import admission, roster, succession
from modelyard.deploy.tables import Deployment, DeploymentState, Strategy, Wanted
from modelyard.engine.options import EngineOptions
from modelyard.errors import JobFailure, ModelyardError
from modelyard.jobs import actions as jobs
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.jobs.tables import JobEvent
from modelyard.routing import aliases
from modelyard.routing.tables import AliasMove
from modelyard.settings import Settings

LOOK_EVERY_S = 0.25
MOST_ASKED_AGAIN = 5
_ASKED = "Into service: "


async def put_into_service(
    context: JobContext, sessions: Sessions, settings: Settings, *, model_id: str, adapter_id: str
) -> dict[str, Any]:
    """Have the engine of the base serve an adapter besides what it serves, and wait until clients may name it.

    Where the base is not in service it is deployed with the adapter, beside whatever is; what is current stays so.
    Call it when no memory is promised to the training any more. May be called again at any point.

    Returns:
        What the checks found before it was named to clients; empty if it was served without any.

    Raises:
        JobFailure: `adapter_not_deployed`, with the cause and its code; the adapter stays in the store.
        JobInterrupted: the wish has been taken back.
    """
    asked = await _asked_before(sessions, context)
    deployment_id, is_new = asked or await _ask(context, sessions, settings, model_id, adapter_id)
    asked_again = 0
    while True:
        if context.interrupted.is_set():
            await _take_back(sessions, deployment_id, adapter_id, is_new=is_new)
            raise JobInterrupted
        async with sessions.read() as session:
            row = await roster.get(session, deployment_id)
            entry = next((one for one in row.loaded if one["adapter_id"] == adapter_id), None)
            if entry is not None and row.state == DeploymentState.READY:
                return dict(entry.get("checks") or {})
            moved_to = await _served_elsewhere(session, row, adapter_id)
            fell_with_another = await _fell_with_another(session, row, adapter_id) and asked_again < MOST_ASKED_AGAIN
            if moved_to is None and not fell_with_another:
                await _refuse_what_never_comes(session, row, adapter_id)
        if moved_to is not None:
            deployment_id, is_new = moved_to, False
            continue
        if fell_with_another:
            asked_again += 1
            deployment_id, is_new = await _ask(context, sessions, settings, model_id, adapter_id)
            continue
        await _pause(context)


async def promote(
    sessions: Sessions,
    *,
    name: str,
    adapter_id: str,
    wanted: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Have an alias lead to an adapter in service, if that was asked for on a condition that holds. Safe to repeat.

    Args:
        name: The training's name, which becomes the reason of the move.
        adapter_id: The adapter.
        wanted: `{"alias", "if"}`; `if` is `better` or `always`.
        evaluation: Base and adapter on the rows that were held back, with `better` (which it is only if that is sure)
            and `why`; None if there is none.

    Returns:
        `{"moved", "alias", "from", "to", "why"}`; `from` is None where the alias was not there or followed.
    """
    alias = str(wanted["alias"])
    found: dict[str, Any] = {"moved": False, "alias": alias, "from": None, "to": adapter_id, "why": ""}
    if wanted.get("if") == "better" and not (evaluation or {}).get("better"):
        why = "No rows were held back, so that nothing tells whether it is better."
        return {**found, "why": str(evaluation.get("why") or "It is not better than its base.") if evaluation else why}
    reason = f"training {name}"[:200]
    try:
        async with sessions.begin() as session:
            await exclusively(session, "ALIASES")
            before = await _before_promotion(session, alias, adapter_id, reason)
            await aliases.put(session, alias, adapter_id, reason)
    except ModelyardError as error:
        return {**found, "why": f"The alias could not be moved: {error.message}"}
    why = str((evaluation or {}).get("why") or "It is better than its base.")
    return {**found, "moved": True, "from": before, "why": why if wanted.get("if") == "better" else "It was asked for."}


async def _before_promotion(session: AsyncSession, alias: str, adapter_id: str, reason: str) -> str | None:
    """Return where the alias led before this training moved it, which it may have done before a restart."""
    query = select(AliasMove).where(AliasMove.name == alias).order_by(AliasMove.number.desc()).limit(1)
    last = (await session.scalars(query)).first()
    if last is not None and last.undone_at is None and (last.after, last.reason) == (adapter_id, reason):
        return last.before
    row = next((one for one in await aliases.all_aliases(session) if one.name == alias), None)
    return row.target if row is not None else None


async def _asked_before(sessions: Sessions, context: JobContext) -> tuple[UUID, bool] | None:
    """Return the deployment that an earlier call has asked, and whether that call made it."""
    query = (
        select(JobEvent)
        .where(JobEvent.job_id == context.id, JobEvent.message.startswith(_ASKED, autoescape=True))
        .order_by(JobEvent.number.desc())
        .limit(1)
    )
    async with sessions.read() as session:
        event = (await session.scalars(query)).first()
    return (UUID(event.data["deployment_id"]), bool(event.data["is_new"])) if event is not None else None


async def _ask(
    context: JobContext, sessions: Sessions, settings: Settings, model_id: str, adapter_id: str
) -> tuple[UUID, bool]:
    """Write the wish; return the deployment, and whether it is a new one."""
    try:
        async with sessions.read() as session:
            running = await _best(session, settings, model_id)
        wish = _wish(running, settings, model_id, adapter_id)
        # Its files are read outside of the transaction.
        await admission.check(sessions, settings, wish)
        async with sessions.begin() as session:
            await exclusively(session, deployments.KIND)
            running = await _best(session, settings, model_id)
            if running is not None:
                job = await deployments.add_adapter(session, running, adapter_id)
                row = running
            else:
                job, _ = await deployments.deploy(session, _wish(None, settings, model_id, adapter_id))
                row = await deployments.of_job(session, job.id)
                await _stay_behind(session, row)
            data = {"deployment_id": str(row.id), "deploy_job_id": str(job.id), "is_new": running is None}
            how = "is loaded into the running engine" if running is not None else "is deployed with its base"
            await jobs.append_event(session, context.id, f"{_ASKED}{adapter_id} {how} ({job.name}).", data=data)
            found = (row.id, running is None)
    except (ModelyardError, JobFailure) as error:
        raise _not_deployed(adapter_id, error.code, error.message, getattr(error, "hint", "")) from error
    return found


def _wish(running: Deployment | None, settings: Settings, model_id: str, adapter_id: str) -> deployments.Wish:
    if running is None:
        return deployments.Wish(
            model_id, [adapter_id], keep_others=True, idle_timeout_s=settings.engine_idle_timeout_s
        )  # fmt: skip
    adapter_ids = list(dict.fromkeys([*running.adapter_ids, adapter_id]))
    return deployments.Wish(
        model_id, adapter_ids, running.options, Strategy(running.strategy), True, running.idle_timeout_s
    )


async def _best(session: AsyncSession, settings: Settings, model_id: str) -> Deployment | None:
    """Return the deployment of a model that is to take an adapter: one that serves, else the last that was current."""
    found = [
        one
        for one in await succession.live(session)
        if one.model_id == model_id
        and EngineOptions(**one.options).over(settings).max_loras != 0
        and await deployments.is_wanted(session, one)
    ]
    return max(found, key=lambda one: (one.state == DeploymentState.READY, one.current_at, one.number), default=None)


async def _stay_behind(session: AsyncSession, new: Deployment) -> None:
    """Have what was current stay so: a training that ends must not change what `default` means."""
    others = [one for one in await succession.live(session, new.task) if one.id != new.id and one.wanted == Wanted.UP]
    if others:
        new.current_at = min(one.current_at for one in others) - timedelta(milliseconds=1)


async def _served_elsewhere(session: AsyncSession, row: Deployment, adapter_id: str) -> UUID | None:
    """Return another deployment that is to serve the adapter, if this one is not any more."""
    if adapter_id in row.adapter_ids and await deployments.is_wanted(session, row):
        return None
    for one in await succession.live(session):
        if one.id != row.id and adapter_id in one.adapter_ids and await deployments.is_wanted(session, one):
            return one.id
    return None


async def _fell_with_another(session: AsyncSession, row: Deployment, adapter_id: str) -> bool:
    """True if the adapter was taken back only because another one that was asked for beside it was refused."""
    failure = row.adapter_failure
    return (
        failure is not None
        and failure["adapter_id"] != adapter_id
        and adapter_id not in row.adapter_ids
        and await deployments.is_wanted(session, row)
    )


async def _refuse_what_never_comes(session: AsyncSession, row: Deployment, adapter_id: str) -> None:
    job = await jobs.get(session, row.job_id)
    failure = row.adapter_failure
    if failure is not None and failure["adapter_id"] == adapter_id:
        raise _not_deployed(adapter_id, failure["code"], failure["message"], failure["hint"])
    if job.failure_code is not None:
        raise _not_deployed(adapter_id, job.failure_code, job.failure_message or "", job.failure_hint or "")
    if not await deployments.is_wanted(session, row):
        message = f"its deployment ({job.name}) was taken out of service meanwhile."
        raise _not_deployed(adapter_id, "taken_out_of_service", message, "Deploy it yourself if it is to serve.")
    if adapter_id not in row.adapter_ids:
        message = f"other adapters were asked for meanwhile ({job.name})."
        raise _not_deployed(adapter_id, "adapters_changed", message, "Deploy it yourself if it is to serve.")


def _not_deployed(adapter_id: str, code: str, message: str, hint: str) -> JobFailure:
    return JobFailure(
        "adapter_not_deployed",
        f"{adapter_id} is trained and in the store, but not in service: {message.rstrip('.')} ({code}).",
        hint,
    )


async def _take_back(sessions: Sessions, deployment_id: UUID, adapter_id: str, *, is_new: bool) -> None:
    async with sessions.begin() as session:
        await exclusively(session, deployments.KIND)
        row = await roster.get(session, deployment_id)
        if not await deployments.is_wanted(session, row) or adapter_id not in row.adapter_ids:
            return
        if is_new and row.adapter_ids == [adapter_id]:
            await succession.take_down(session, row)
        else:
            await deployments.remove_adapter(session, row, adapter_id)


async def _pause(context: JobContext) -> None:
    try:
        async with asyncio.timeout(LOOK_EVERY_S):
            await context.interrupted.wait()
    except TimeoutError:
        return
