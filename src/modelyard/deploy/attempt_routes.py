"""REST for the starts of a deployment's engine: how each ended, and what it wrote."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import Path, Query
from pydantic import BaseModel, Field
from starlette.responses import PlainTextResponse

from modelyard.deploy import roster
from modelyard.deploy.deployment_routes import DeploymentId
from modelyard.engine import attempts
from modelyard.engine.attempts import Attempt
from modelyard.engine.failures import explain
from modelyard.errors import AttemptNotFound, JobFailure
from modelyard.http import Sessions, documented, router
from modelyard.jobs.routes import Runner
from modelyard.jobs.schemas import FailureOut, Time
from modelyard.processes import Outcome

#: Attempts whose cause of failure is kept.
KEPT_CAUSES = 512
UNKNOWN = datetime.fromtimestamp(0, UTC)

api = router("/api/v1/deployments", "Deploy")

Number = Annotated[int, Path(ge=1, description="Which start: 1 is the first.", examples=[1])]


class AttemptOut(BaseModel):
    """One start of an engine."""

    number: int = Field(examples=[1])
    started_at: Time
    command: str = Field(examples=["python -m vllm.entrypoints.openai.api_server --model ..."])
    ended: str | None = Field(
        description="How it ended; null while it runs, or where nobody saw it end.", examples=["exit code 1"]
    )
    failure: FailureOut | None = Field(description="Why it ended; null where it runs or was asked to end.")


@api.get("/{deployment_id}/attempts/", summary="List the starts of an engine", responses=documented(404, 422))
async def list_attempts(deployment_id: DeploymentId, sessions: Sessions, runner: Runner) -> list[AttemptOut]:
    """Return every start of a deployment's engine, the first first, each with its cause of failure."""
    log = await _log_of(deployment_id, sessions, runner)
    return await asyncio.to_thread(lambda: [_shown(log, attempt) for attempt in attempts.listing(log.parent, log)])


@api.get(
    "/{deployment_id}/attempts/{number}/log/",
    summary="Read what an engine wrote",
    response_class=PlainTextResponse,
    responses={
        200: {"content": {"text/plain": {"example": "INFO 11-20 21:00:03 Starting vLLM\n"}}},
        **documented(404, 422),
    },
)
async def get_attempt_log(
    deployment_id: DeploymentId,
    number: Number,
    sessions: Sessions,
    runner: Runner,
    tail: Annotated[int | None, Query(ge=1, description="Only the last lines, so many of them.")] = None,
) -> PlainTextResponse:
    """Return what one start wrote, at most its last 8 MiB. It stays readable after the next one and after the end."""
    log = await _log_of(deployment_id, sessions, runner)
    found = await asyncio.to_thread(attempts.listing, log.parent, log)
    if number > len(found):
        raise AttemptNotFound(number, len(found))
    text = await asyncio.to_thread(attempts.log_of, log, found[number - 1])
    if tail is not None:
        text = "".join(text.splitlines(keepends=True)[-tail:])
    return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})


async def _log_of(deployment_id: DeploymentId, sessions: Sessions, runner: Runner) -> FilePath:
    async with sessions.read() as session:
        deployment = await roster.get(session, deployment_id)
    return runner.log_of(deployment.job_id)


@lru_cache(maxsize=KEPT_CAUSES)
def _cause(log: FilePath, start: int, end: int, outcome: Outcome) -> JobFailure:
    """Return why an attempt failed. What an attempt that has ended wrote never changes, so that its cause is kept."""
    attempt = Attempt(0, UNKNOWN, "", start, end, outcome)
    return explain(attempts.log_of(log, attempt, attempts.TAIL_BYTES), outcome)


def _shown(log: FilePath, attempt: Attempt) -> AttemptOut:
    outcome, failure = attempt.outcome, None
    if outcome is not None and not outcome.stopped and not outcome.abandoned:
        cause = _cause(log, attempt.start, attempt.end, outcome)
        hint = cause.hint.replace("<id>", log.parent.name)
        failure = FailureOut(code=cause.code, message=cause.message, hint=hint, evidence=list(cause.evidence))
    return AttemptOut(
        number=attempt.number,
        started_at=attempt.started_at,
        command=attempt.command,
        ended=outcome.describe() if outcome is not None else None,
        failure=failure,
    )
