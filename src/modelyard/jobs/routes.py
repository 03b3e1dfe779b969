"""REST for jobs: list, status, interrupt, events and log."""

from __future__ import annotations

import asyncio
import os
import pathlib
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Header, Path, Query, Request
from fastapi.sse import EventSourceResponse
from starlette.responses import PlainTextResponse, Response

from modelyard.http import Sessions, documented, event_stream, router, services_of
from modelyard.jobs import actions
from modelyard.jobs.runner import JobRunner
from modelyard.jobs.schemas import EventOut, JobOut
from modelyard.jobs.tables import JobStatus

api = router("/api/v1/jobs", "Jobs")

KEEP_ALIVE_S = 10.0
LOG_BLOCK = 64 * 1024
#: The most of a log that one answer carries.
LOG_LIMIT = 8 * 1024 * 1024


async def _runner(request: Request) -> JobRunner:
    return services_of(request.scope).runner


Runner = Annotated[JobRunner, Depends(_runner)]
JobId = Annotated[UUID, Path(description="The job's id.", examples=["3f2b8a94-5c1d-4e6f-9a70-b1c2d3e4f506"])]


@api.get("/", summary="List jobs, newest first", responses=documented(404, 422))
async def list_jobs(
    sessions: Sessions,
    limit: Annotated[int, Query(ge=1, le=1000, description="The most jobs to return.")] = 100,
    before: Annotated[UUID | None, Query(description="Only jobs created before this one: the next page.")] = None,
    kind: Annotated[str | None, Query(description="Only this kind, such as DOWNLOAD or DEPLOY.")] = None,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this status.")] = None,
) -> list[JobOut]:
    """Return a page of jobs. Pass the last one's id as `before` for the next page."""
    async with sessions.read() as session:
        jobs = await actions.newest(session, limit=limit, before=before, kind=kind, status=status)
    return [JobOut.of(job) for job in jobs]


@api.get("/{job_id}/status/", summary="Get a job's status", responses=documented(404, 422))
async def get_job_status(job_id: JobId, sessions: Sessions) -> JobOut:
    """Return a job as it is now."""
    async with sessions.read() as session:
        return JobOut.of(await actions.get(session, job_id))


@api.post("/{job_id}/interrupt/", summary="Interrupt a job", responses=documented(404, 409, 422))
async def interrupt_job(job_id: JobId, sessions: Sessions) -> JobOut:
    """Ask a job to stop. Safe to repeat; one that has ended answers 409 `job_finished`.

    The answer may still say RUNNING: the job becomes KILLED when nothing of it runs any more.
    """
    async with sessions.begin() as session:
        job = await actions.interrupt(session, job_id)
    return JobOut.of(job)


@api.get(
    "/{job_id}/events/",
    summary="Follow a job's events",
    response_model=list[EventOut],
    responses={
        200: {
            "description": "Server-sent events, or with `follow=false` a JSON list.",
            "content": {
                **event_stream('id: 17\nevent: info\ndata: {"number": 17, "message": "Running: its turn."}\n\n'),
            },
        },
        **documented(404, 422, 503),
    },
)
async def get_job_events(
    job_id: JobId,
    sessions: Sessions,
    runner: Runner,
    follow: Annotated[bool, Query(description="false: what there is so far, as JSON.")] = True,
    last_event_id: Annotated[int, Header(ge=0, le=2**63 - 1, description="Only events after this number.")] = 0,
) -> Response:
    """Stream everything so far, then what comes, until the job has ended.

    Each event's `event` is its level; `progress` events carry no id and are not kept, and the last one is `end`,
    with the job as its data. A stream that broke goes on after `Last-Event-ID`. So many may follow one job, and all
    jobs together; one more gets 503 `too_many_followers`.
    """
    if not follow:
        async with sessions.read() as session:
            await actions.get(session, job_id)
            events = await actions.events_after(session, job_id, last_event_id, limit=100_000)
        body = b"[" + b",".join(EventOut.of(event).model_dump_json().encode() for event in events) + b"]"
        return Response(body, media_type="application/json")
    stream = runner.feeds.stream(await runner.feeds.find(job_id), last_event_id, KEEP_ALIVE_S)
    # nginx would otherwise hold events back until it has a buffer full of them.
    return EventSourceResponse(stream, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


@api.get(
    "/{job_id}/log/",
    summary="Read a job's log",
    response_class=PlainTextResponse,
    responses={
        200: {"content": {"text/plain": {"example": "INFO 11-20 21:00:03 Starting vLLM\n"}}},
        **documented(404, 422),
    },
)
async def get_job_log(
    job_id: JobId,
    sessions: Sessions,
    runner: Runner,
    tail: Annotated[int | None, Query(ge=1, description="Only the last lines, so many of them.")] = None,
) -> PlainTextResponse:
    """Return what the job's child wrote, at most the last 8 MiB of it. It stays readable after the job has ended."""
    async with sessions.read() as session:
        await actions.get(session, job_id)
    text = await asyncio.to_thread(read_tail, runner.log_of(job_id), tail)
    return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})


def read_tail(path: pathlib.Path, lines: int | None, limit: int = LOG_LIMIT) -> str:
    """Return the last lines of a file, at most `limit` bytes; an absent file is empty. Blocks on the disk."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            wanted = LOG_BLOCK if lines is not None else limit
            while True:
                start = max(end - min(wanted, limit), 0)
                file.seek(start)
                data = file.read(end - start)
                if start == 0 or wanted >= limit or (lines is not None and data.count(b"\n") > lines):
                    break
                wanted *= 4
    except FileNotFoundError:
        return ""
    if start > 0:
        data = data.partition(b"\n")[2] or data  # what is left of the line that the limit cut tells nothing
    if lines is not None:
        # Only newlines end a line: a progress bar's carriage returns do not.
        data = b"\n".join(data.split(b"\n")[-lines - data.endswith(b"\n") :])
    return data.decode("utf-8", "replace")
