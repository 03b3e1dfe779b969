"""Deployments that leave for a training, and come back after it.

What left is written into the training's row (`Finetune.stopped`) in the transaction that has it leave, so that whoever
comes next knows what is owed: the training itself when it ends, however it ends, or the next start of the server. An
entry is `{"deployment_id", "job_id", "model_id", "adapter_ids", "options", "strategy", "idle_timeout_s", "current_at",
"memory_bytes", "left_at"}`; later `back_deployment_id`, `back_at`, and `note` where it did not come back as it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import Sessions, exclusively, utcnow
from modelyard.deploy import actions as deployments
from modelyard.deploy import roster, succession
from modelyard.deploy.tables import LIVE, Deployment, DeploymentState, Strategy, Wanted
from modelyard.finetune.tables import Finetune
from modelyard.jobs import actions as jobs
from modelyard.jobs.runner import JobContext
from modelyard.jobs.tables import ACTIVE, Job
from modelyard.models.tables import Model

LOOK_EVERY_S = 0.25
#: A deployment that rests is in service: the next request wakes it.
BACK = (DeploymentState.READY, DeploymentState.IDLE)


async def leave(session: AsyncSession, finetune_id: UUID, leaving: Sequence[UUID]) -> list[UUID]:
    """Have deployments leave for a training when their requests have ended; return the jobs that this concerns.

    Those that are not wanted any more are left alone. Never commits.
    """
    await exclusively(session, deployments.KIND)
    row = await _row(session, finetune_id)
    entries, touched = list(row.stopped), []
    for deployment_id in leaving:
        one = await roster.get(session, deployment_id)
        if one.state not in LIVE or not await deployments.is_wanted(session, one):
            continue
        entries.append(
            {
                "deployment_id": str(one.id), "job_id": str(one.job_id), "model_id": one.model_id,
                "adapter_ids": one.adapter_ids, "options": one.options, "strategy": one.strategy,
                "idle_timeout_s": one.idle_timeout_s, "current_at": one.current_at.isoformat(),
                "memory_bytes": one.memory_bytes, "left_at": utcnow().isoformat(),
                "back_deployment_id": None, "back_at": None, "note": None,
            }
        )  # fmt: skip
        await succession.take_down(session, one, Wanted.DRAINED)
        message = f"Leaves for the training {row.name}, and comes back when that has ended."
        await jobs.append_event(session, one.job_id, message, data={"finetune_id": str(finetune_id)})
        touched.append(one.job_id)
    row.stopped = entries
    return touched


def left_for(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of what has not been asked to come back."""
    return [one for one in entries if one["back_deployment_id"] is None and one["note"] is None]


async def are_gone(session: AsyncSession, finetune_id: UUID) -> bool:
    """True if everything that left for a training has given its memory back."""
    row = await _row(session, finetune_id)
    ids = [UUID(one["deployment_id"]) for one in row.stopped]
    query = select(Deployment.id).where(Deployment.id.in_(ids), Deployment.state.in_(LIVE)).limit(1)
    return not ids or (await session.scalar(query)) is None


async def bring_back(context: JobContext, sessions: Sessions, finetune_id: UUID, timeout_s: float) -> float | None:
    """Want back what left for a training, and wait until it is in service again or has failed, but not for ever.

    What somebody else has brought back or replaced meanwhile is not doubled. Safe to repeat at any point. An interrupt
    of the training does not end the wait: what was in service must be so again.

    Returns:
        The seconds in which any of them was out of service; None if none left, or none is back.
    """
    async with sessions.begin() as session:
        for message in await _want_back(session, finetune_id):
            await jobs.append_event(session, context.id, message)
    until = time.monotonic() + timeout_s
    while missing := await _note_those_back(context, sessions, finetune_id):
        if time.monotonic() > until:
            message = f"{missing} of the deployments that left for this training are still on their way back."
            await context.event(message, level="warning")
            break
        await asyncio.sleep(LOOK_EVERY_S)
    async with sessions.begin() as session:
        row = await _row(session, finetune_id)
        row.unavailable_s = unavailable_s(row.stopped)
        return row.unavailable_s


async def owed_before(session: AsyncSession, finetune_id: UUID) -> list[str]:
    """Return the names of other trainings for which deployments have left, and for this one not, or later.

    Those come back first: whoever took their memory now would keep them out of service.
    """
    query = select(Finetune).join(Job, Job.id == Finetune.job_id).where(Job.status.in_(ACTIVE))
    open_since = {
        row.id: (min(one["left_at"] for one in row.stopped if _is_open(one)), row.name)
        for row in (await session.scalars(query)).all()
        if any(_is_open(one) for one in row.stopped)
    }
    ours = open_since.pop(finetune_id, None)
    return [name for left_at, name in sorted(open_since.values()) if ours is None or left_at < ours[0]]


def _is_open(entry: dict[str, Any]) -> bool:
    return entry["back_at"] is None and entry["note"] is None


async def bring_back_forgotten(session: AsyncSession) -> int:
    """Want back what left for trainings that have ended since; return for how many. For the start of a server."""
    query = select(Finetune).join(Job, Job.id == Finetune.job_id).where(Job.status.not_in(ACTIVE))
    rows = [row for row in (await session.scalars(query.order_by(Finetune.number))).all() if left_for(row.stopped)]
    for row in rows:
        await _want_back(session, row.id)
    return len(rows)


def unavailable_s(entries: Sequence[dict[str, Any]]) -> float | None:
    """Return the seconds in which any of them was out of service; None if none is back."""
    away = sorted(
        (datetime.fromisoformat(one["left_at"]), datetime.fromisoformat(one["back_at"]))
        for one in entries
        if one["back_at"] is not None
    )
    seconds, until = 0.0, None
    for left_at, back_at in away:
        begin = left_at if until is None else max(left_at, until)
        seconds += max(0.0, (back_at - begin).total_seconds())
        until = back_at if until is None else max(until, back_at)
    return round(seconds, 1) if away else None


async def _want_back(session: AsyncSession, finetune_id: UUID) -> list[str]:
    """Write the wishes that are still owed; return what there is to say."""
    await exclusively(session, deployments.KIND)
    row = await _row(session, finetune_id)
    entries, messages = [dict(one) for one in row.stopped], list[str]()
    # The last that was current comes last, so that it is so again.
    for entry in sorted(left_for(entries), key=lambda one: str(one["current_at"])):
        wanted = [one for one in await succession.live(session) if await deployments.is_wanted(session, one)]
        wish = (entry["model_id"], entry["options"])
        same = next((one for one in wanted if (one.model_id, one.options) == wish), None)
        if same is not None:
            entry["back_deployment_id"] = str(same.id)
            messages.append(f"{entry['model_id']} has been deployed again by somebody else meanwhile.")
            continue
        note = await _why_not(session, entry, entries, wanted)
        if note:
            entry["note"] = note
            messages.append(f"{entry['model_id']}, which left for this training, does not come back: {note}.")
            continue
        back = await _deploy(session, entry, row.name)
        entry["back_deployment_id"] = str(back.id)
        messages.append(f"{entry['model_id']}, which left for this training, comes back.")
    row.stopped = entries
    return messages


async def _why_not(
    session: AsyncSession, entry: dict[str, Any], entries: Sequence[dict[str, Any]], wanted: Sequence[Deployment]
) -> str:
    """Return why what left is not to come back; empty if it is."""
    ours = {one["back_deployment_id"] for one in entries}
    left_at = datetime.fromisoformat(entry["left_at"])
    was = await roster.get(session, UUID(entry["deployment_id"]))
    instead = [
        one for one in wanted if one.task == was.task and one.created_at > left_at and str(one.id) not in ours
    ]  # fmt: skip
    if instead:
        return f"{instead[-1].model_id} was deployed in its place meanwhile"
    found = set(await session.scalars(select(Model.model_id)))
    return "" if entry["model_id"] in found else "it has been deleted from the store"


async def _deploy(session: AsyncSession, entry: dict[str, Any], name: str) -> Deployment:
    found = set(await session.scalars(select(Model.model_id)))
    adapter_ids = [one for one in entry["adapter_ids"] if one in found]
    was = await roster.get(session, UUID(entry["deployment_id"]))
    wish = deployments.Wish(
        entry["model_id"], adapter_ids, entry["options"], Strategy(entry["strategy"]), True, entry["idle_timeout_s"],
        was.pinned,
    )  # fmt: skip
    job, _ = await deployments.deploy(session, wish)
    row = await deployments.of_job(session, job.id)
    # What has served waits for memory that somebody was quicker to take, and does without an adapter that fails.
    row.restores = was.id if was.has_served else None
    # What others were asked to be meanwhile, they stay.
    row.current_at = datetime.fromisoformat(entry["current_at"])
    message = f"Wanted again: it had left for the training {name}."
    await jobs.append_event(session, job.id, message, data={"before": entry["job_id"]})
    return row


async def _note_those_back(context: JobContext, sessions: Sessions, finetune_id: UUID) -> int:
    """Write down what is in service again or will not be; return of how many neither is known yet."""
    async with sessions.read() as session:
        row = await _row(session, finetune_id)
        open_entries = [one for one in row.stopped if _is_open(one)]
        facts = {
            one["deployment_id"]: await _fate(session, UUID(one["back_deployment_id"]))
            for one in open_entries
            if one["back_deployment_id"] is not None
        }
    news = {one: fact for one, fact in facts.items() if fact is not None}
    if news:
        async with sessions.begin() as session:
            row = await _row(session, finetune_id)
            entries = [dict(one) for one in row.stopped]
            for entry in entries:
                fact = news.get(entry["deployment_id"])
                if fact is None or not _is_open(entry):
                    continue
                if isinstance(fact, datetime):
                    entry["back_at"] = fact.isoformat()
                    seconds = (fact - datetime.fromisoformat(entry["left_at"])).total_seconds()
                    message, level = f"{entry['model_id']} is back after {seconds:.1f} s out of service.", "info"
                else:
                    entry["note"] = fact
                    message, level = f"{entry['model_id']}, which left for this training, is not back: {fact}", "error"
                await jobs.append_event(session, context.id, message, level=level, data=entry)
            row.stopped = entries
    return len(open_entries) - len(news)


async def _fate(session: AsyncSession, deployment_id: UUID) -> datetime | str | None:
    """Return when a deployment was in service again, or why it is not; None if that is not known yet."""
    one = await roster.get(session, deployment_id)
    if one.state in BACK:
        return one.ready_at or utcnow()
    if one.state in LIVE and await deployments.is_wanted(session, one):
        return None
    job = await jobs.get(session, one.job_id)
    if job.failure_code is not None:
        return f"{job.failure_message} ({job.failure_code})"
    return "it was taken out of service meanwhile."


async def _row(session: AsyncSession, finetune_id: UUID) -> Finetune:
    return (await session.scalars(select(Finetune).where(Finetune.id == finetune_id))).one()
