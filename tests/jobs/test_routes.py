"""The jobs routes over a real uvicorn: paths, pages, streams of events and logs."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from benchmarks.jobs import fill
from sqlalchemy import event

from modelyard.db import Sessions, database_url
from modelyard.errors import JobFailure
from modelyard.jobs import actions, feeds, routes
from modelyard.jobs.routes import read_tail
from modelyard.signals import Topic
from tests.eventually import eventually
from tests.jobs.server import Client, jobs_server
from tests.jobs.yard import away, without_table

JOBS = "/api/v1/jobs"
SHAPE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}"


async def get(client: Client, path: str, expected: int = 200, /, **parameters: Any) -> Any:
    async with client.http.get(JOBS + path, params=parameters, allow_redirects=False) as reply:
        assert reply.status == expected, await reply.text()
        return await reply.json()


async def post(client: Client, path: str, expected: int = 200) -> Any:
    async with client.http.post(JOBS + path, allow_redirects=False) as reply:
        assert reply.status == expected, await reply.text()
        return await reply.json()


async def sse(reply: aiohttp.ClientResponse) -> AsyncIterator[dict[str, str]]:
    """Yield each event of a stream as its fields; comments are left out."""
    fields: dict[str, str] = {}
    async for line in reply.content:
        text = line.decode().rstrip("\n")
        if not text and fields:
            yield fields
            fields = {}
        elif text and not text.startswith(":"):
            name, _, value = text.partition(": ")
            fields[name] = value


async def follow(client: Client, job_id: uuid.UUID, after: int | None = None) -> list[dict[str, str]]:
    """Return all events of a stream that ends by itself."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    async with client.http.get(f"{JOBS}/{job_id}/events", headers=headers) as reply:
        assert reply.status == 200
        assert reply.content_type == "text/event-stream"
        return [event async for event in sse(reply)]


def ids(events: list[dict[str, str]]) -> list[int]:
    return [int(event["id"]) for event in events if "id" in event]


# Lists and single jobs


async def test_a_job_has_the_source_documents_shape_in_lists_status_and_interrupt(
    database_url: str, tmp_path: Path
) -> None:
    async with jobs_server(database_url, tmp_path) as client:
        job_id = await client.yard.create("DOWNLOAD_test")
        await client.yard.runs(job_id)
        for job in (
            (await get(client, "/"))[0],
            await get(client, f"/{job_id}/status/"),
            await post(client, f"/{job_id}/interrupt/"),
        ):
            assert list(job)[:4] == ["id", "name", "status", "started_at"]
            assert (job["id"], job["name"]) == (str(job_id), "DOWNLOAD_test")
            assert re.fullmatch(SHAPE, job["started_at"])
        await client.yard.becomes(job_id, "KILLED")
        assert (await get(client, f"/{job_id}/status/"))["status"] == "KILLED"
        assert re.fullmatch(SHAPE + "Z", (await get(client, "/"))[0]["finished_at"])


async def test_every_path_answers_with_and_without_its_slash_and_never_redirects(
    database_url: str, tmp_path: Path
) -> None:
    async with jobs_server(database_url, tmp_path) as client:
        for number, end in enumerate(("", "/"), start=1):
            job_id = await client.yard.create()
            await client.yard.runs(job_id)
            assert len(await get(client, end)) == number
            assert (await get(client, f"/{job_id}/status{end}"))["id"] == str(job_id)
            assert len(await get(client, f"/{job_id}/events{end}", follow="false")) == 1
            async with client.http.get(f"{JOBS}/{job_id}/log{end}", allow_redirects=False) as reply:
                assert reply.status == 200
            assert (await post(client, f"/{job_id}/interrupt{end}"))["interrupt_requested"] is True
            await client.yard.becomes(job_id, "KILLED")
        for path in (f"/{job_id}/status//", "x", "//"):
            async with client.http.get(JOBS + path, allow_redirects=False) as reply:
                assert reply.status == 404, path


async def test_lists_are_paged_and_filtered(database_url: str, tmp_path: Path) -> None:
    async with jobs_server(database_url, tmp_path, limits={"TEST": 1}) as client:
        for number in range(5):
            await client.yard.create(f"job {number}", wake=number == 0)
        other = await client.yard.create("other", kind="OTHER")
        await client.yard.runs(other)
        page = await get(client, "/", limit=4)
        assert [job["name"] for job in page] == ["other", "job 4", "job 3", "job 2"]
        rest = await get(client, "/", limit=4, before=page[-1]["id"])
        assert [job["name"] for job in rest] == ["job 1", "job 0"]
        assert [job["name"] for job in await get(client, "/", status="RUNNING")] == ["other", "job 0"]
        assert [job["name"] for job in await get(client, "/", kind="OTHER")] == ["other"]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "before=not-an-id", "status=ASLEEP", "status=running"]
)
async def test_a_value_that_cannot_be_is_422(query: str, tmp_path: Path) -> None:
    async with jobs_server("", tmp_path) as client, client.http.get(f"{JOBS}/?{query}") as reply:
        assert reply.status == 422


async def test_what_does_not_exist_is_404_in_the_envelope(database_url: str, tmp_path: Path) -> None:
    async with jobs_server(database_url, tmp_path) as client:
        absent = uuid.uuid4()
        for answer in (
            await get(client, f"/{absent}/status/", 404),
            await get(client, f"/{absent}/events/", 404),
            await get(client, f"/{absent}/events/", 404, follow="false"),
            await get(client, f"/{absent}/log/", 404),
            await post(client, f"/{absent}/interrupt/", 404),
        ):
            assert list(answer["error"]) == ["message", "type", "param", "code"]
            assert str(absent) in answer["error"]["message"]
            assert (answer["error"]["code"], answer["error"]["param"]) == ("job_not_found", "job_id")
        assert (await get(client, "/", 404, before=str(absent)))["error"]["param"] == "before"


async def test_interrupting_twice_is_harmless_and_interrupting_what_has_ended_is_409(
    database_url: str, tmp_path: Path
) -> None:
    async with jobs_server(database_url, tmp_path, limits={"TEST": 1}) as client:
        running = await client.yard.create()
        await client.yard.runs(running)
        answers = await asyncio.gather(*(client.http.post(f"{JOBS}/{running}/interrupt") for _ in range(2)))
        assert {answer.status for answer in answers} <= {200, 409}
        await client.yard.becomes(running, "KILLED")
        assert (await post(client, f"/{running}/interrupt/", 409))["error"]["code"] == "job_finished"


async def test_a_page_of_many_jobs_is_read_in_the_order_of_an_index(tmp_path: Path) -> None:
    """None is sorted, and none is looked through: `make bench` says what that comes to with 100,000 jobs."""
    sessions = Sessions(database_url("", tmp_path))
    try:
        middle, _ = await fill(sessions, 500)
        of_both = {"kind": "DEPLOY", "status": "FAILED", "before": middle}
        pages: dict[str, dict[str, Any]] = {
            "SCAN jobs": {},
            "SEARCH jobs USING INTEGER PRIMARY KEY": {"before": middle},
            "SEARCH jobs USING INDEX ix_jobs_status_number": {"status": "FAILED"},
            "SEARCH jobs USING INDEX ix_jobs_kind_number": {"kind": "DEPLOY"},
            "SEARCH jobs USING INDEX ix_jobs_kind_status_number": of_both,
        }
        for plan, asked in pages.items():
            queries: list[tuple[str, Any]] = []
            async with sessions.read() as session:
                engine = session.get_bind()
                event.listen(engine, "before_cursor_execute", lambda *told: queries.append((told[2], told[3])))  # noqa: B023
                assert await actions.newest(session, limit=100, **asked)
                query, values = queries[-1]
                rows = await (await session.connection()).exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values)
                [step] = [row._mapping["detail"] for row in rows]
            assert step.startswith(plan), asked
    finally:
        await sessions.close()


# Events


async def test_a_stream_shows_everything_so_far_then_what_comes_and_ends(database_url: str, tmp_path: Path) -> None:
    async with jobs_server(database_url, tmp_path) as client:
        job_id = await client.yard.create()
        context = await client.yard.runs(job_id)
        await context.event("before", data={"text": "two\nlines"})
        async with client.http.get(f"{JOBS}/{job_id}/events/") as reply:
            assert reply.headers["Cache-Control"] == "no-store"
            assert reply.headers["X-Accel-Buffering"] == "no", "nginx passes events on as they come"
            stream = sse(reply)
            seen = [await anext(stream), await anext(stream)]
            await context.event("live", level="warning")
            seen.append(await asyncio.wait_for(anext(stream), routes.KEEP_ALIVE_S / 2))
            await context.progress(5, 5, "bytes")
            seen.append(await asyncio.wait_for(anext(stream), routes.KEEP_ALIVE_S / 2))
            client.yard.order(job_id, JobFailure("no_disk", "The disk is full.", "Free some."))
            seen += [event async for event in stream]
        assert [event["event"] for event in seen] == ["info", "info", "warning", "progress", "error", "end"]
        assert json.loads(seen[1]["data"])["data"] == {"text": "two\nlines"}
        assert json.loads(seen[3]["data"]) == {"done": 5, "total": 5, "unit": "bytes"}
        end = json.loads(seen[-1]["data"])
        assert (end["status"], end["failure"]["code"]) == ("FAILED", "no_disk")
        assert ids(seen) == sorted(ids(seen))
        assert ["id" in event for event in seen] == [True, True, True, False, True, False]
        assert not client.yard.sessions.signals.has_subscribers(Topic.JOB_NEWS)


async def test_a_stream_that_broke_goes_on_after_its_last_event(database_url: str, tmp_path: Path) -> None:
    async with jobs_server(database_url, tmp_path) as client:
        job_id = await client.yard.create()
        context = await client.yard.runs(job_id)
        for number in range(20):
            await context.event(f"event {number}")
        client.yard.order(job_id)
        await client.yard.becomes(job_id, "FINISHED")
        whole = await follow(client, job_id)
        assert len(ids(whole)) == 22
        for cut in (0, 7, 21):
            assert await follow(client, job_id, after=ids(whole)[cut]) == whole[cut + 1 :]
        as_json = await get(client, f"/{job_id}/events/", follow="false")
        assert [event["number"] for event in as_json] == ids(whole)
        assert as_json == [json.loads(event["data"]) for event in whole if "id" in event]


async def test_a_stream_longer_than_a_batch_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "BATCH", 7)
    monkeypatch.setattr(feeds, "KEPT", 10)
    async with jobs_server("", tmp_path) as client:
        job_id = await client.yard.create()
        context = await client.yard.runs(job_id)
        following = asyncio.create_task(follow(client, job_id))
        for number in range(40):
            await context.event(f"event {number}")
        client.yard.order(job_id)
        seen = await following
        assert [json.loads(event["data"])["message"] for event in seen if "id" in event] == [
            "Running: its turn.", *(f"event {number}" for number in range(40)), "Finished: done.",
        ]  # fmt: skip
        assert seen[-1]["event"] == "end"


async def test_a_quiet_stream_is_kept_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "KEEP_ALIVE_S", 0.05)
    async with jobs_server("", tmp_path) as client:
        job_id = await client.yard.create()
        await client.yard.runs(job_id)
        async with client.http.get(f"{JOBS}/{job_id}/events/") as reply:
            await asyncio.wait_for(reply.content.readuntil(b": still there\n\n"), 20)


async def test_clients_that_leave_are_forgotten(tmp_path: Path) -> None:
    async with jobs_server("", tmp_path) as client:
        job_id = await client.yard.create()
        await client.yard.runs(job_id)
        signals = client.yard.sessions.signals
        for _ in range(5):
            async with client.http.get(f"{JOBS}/{job_id}/events/") as reply:
                await anext(sse(reply))
                await eventually(lambda: signals.has_subscribers(Topic.JOB_NEWS, job_id), "the client is followed")
                reply.close()
        await eventually(lambda: not signals.has_subscribers(Topic.JOB_NEWS), "all are forgotten", within_s=5)


async def test_however_many_follow_a_job_it_is_read_once_for_each_piece_of_news_and_never_while_nothing_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "KEEP_ALIVE_S", 0.05)
    async with jobs_server("", tmp_path) as client:
        job_id = await client.yard.create()
        context = await client.yard.runs(job_id)
        statements: list[str] = []

        def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            if "job_events" in statement and statement.startswith("SELECT"):
                statements.append(statement)

        event.listen(client.yard.sessions._reader.sync_engine, "before_cursor_execute", note)
        async with AsyncExitStack() as stack:
            streams = []
            for _ in range(100):
                reply = await stack.enter_async_context(client.http.get(f"{JOBS}/{job_id}/events/"))
                streams.append(sse(reply))
                await anext(streams[-1])
            assert len(statements) == 1, "the first opened the feed"
            await asyncio.sleep(0.5)
            assert len(statements) == 1, "nothing came"
            for number in range(3):
                await context.event(f"event {number}")
            for stream in streams:
                seen = [json.loads((await anext(stream))["data"])["message"] for _ in range(3)]
                assert seen == ["event 0", "event 1", "event 2"]
            assert len(statements) <= 4


# SQLite can be read while others hold it.
@pytest.mark.parametrize("database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
async def test_followers_wait_for_a_database_that_is_away_and_a_fault_of_it_ends_their_streams(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with jobs_server(database_url, tmp_path) as client:
        job_id = await client.yard.create()
        context = await client.yard.runs(job_id)
        async with client.http.get(f"{JOBS}/{job_id}/events/") as reply:
            stream = sse(reply)
            await anext(stream)
            with away(database_url):
                client.yard.sessions.signals.notify(Topic.JOB_NEWS, job_id)
                await eventually(lambda: "wait for the database" in caplog.text, "the feed waits")
                await asyncio.sleep(1.2)
            await context.event("It is back.")
            assert json.loads((await anext(stream))["data"])["message"].startswith("It is back")
            assert caplog.text.count("wait for the database") == 1
            async with without_table(client.yard.sessions, "job_events"):
                client.yard.sessions.signals.notify(Topic.JOB_NEWS, job_id)
                assert [event async for event in stream] == [], "the stream ends"
                assert caplog.text.count(f"task feed of job {job_id} died") == 1
        async with client.http.get(f"{JOBS}/{job_id}/events/") as reply:
            assert len([await anext(sse(reply)) for _ in range(1)]) == 1, "who comes back is served"


async def test_more_followers_than_are_allowed_are_told_to_come_back(tmp_path: Path) -> None:
    async with jobs_server("", tmp_path) as client:
        first, second = [await client.yard.create() for _ in range(2)]
        await client.yard.runs(first)
        await client.yard.runs(second)
        client.runner.feeds._limits = feeds.FollowerLimits(per_job=2, in_all=3)

        async def refused(job_id: uuid.UUID) -> bool:
            async with client.http.get(f"{JOBS}/{job_id}/events/") as reply:
                if reply.status == 200:
                    return False
                error = (await reply.json())["error"]
                assert (reply.status, error["code"]) == (503, "too_many_followers")
                assert int(reply.headers["Retry-After"]) > 0
                return True

        async with AsyncExitStack() as stack:

            async def joins(job_id: uuid.UUID) -> None:
                reply = await stack.enter_async_context(client.http.get(f"{JOBS}/{job_id}/events/"))
                await anext(sse(reply))

            await joins(first)
            await joins(first)
            assert await refused(first), "as many as may follow one job"
            await get(client, f"/{first}/events/", follow="false")
            await joins(second)
            assert await refused(second), "as many as may follow at all"
        await eventually(lambda: client.runner.feeds._followers == 0, "all have left")
        assert client.runner.feeds._feeds == {}
        assert not await refused(first)


async def test_a_last_event_id_that_is_no_number_is_422(tmp_path: Path) -> None:
    async with jobs_server("", tmp_path) as client:
        job_id = await client.yard.create()
        async with client.http.get(f"{JOBS}/{job_id}/events", headers={"Last-Event-ID": "x"}) as reply:
            assert reply.status == 422


# Logs


async def test_a_log_is_read_whole_or_by_its_last_lines_and_an_absent_one_is_empty(tmp_path: Path) -> None:
    async with jobs_server("", tmp_path) as client:
        job_id = await client.yard.create()
        context = await client.yard.runs(job_id)

        async def log(**parameters: Any) -> str:
            async with client.http.get(f"{JOBS}/{job_id}/log/", params=parameters) as reply:
                assert reply.status == 200
                assert reply.content_type == "text/plain"
                assert reply.headers["X-Content-Type-Options"] == "nosniff"
                return await reply.text()

        assert await log() == ""
        context.log.write_bytes("first\n<b>zwölf\n".encode() + b"\xff\xfe\n")
        assert await log() == "first\n<b>zwölf\n\ufffd\ufffd\n"
        assert await log(tail=2) == "<b>zwölf\n\ufffd\ufffd\n"
        async with client.http.get(f"{JOBS}/{job_id}/log/", params={"tail": 0}) as reply:
            assert reply.status == 422


@pytest.mark.parametrize(
    ("data", "lines", "expected"),
    [
        (b"", 3, ""),
        (b"one", 3, "one"),
        (b"one", 1, "one"),
        (b"one\n", 1, "one\n"),
        (b"one\ntwo", 1, "two"),
        (b"one\ntwo\n", 1, "two\n"),
        (b"one\ntwo\n", 2, "one\ntwo\n"),
        (b"one\ntwo\n", 3, "one\ntwo\n"),
        (b"one\n\n\n", 2, "\n\n"),
        (b"10%\r20%\r30%\nnext\n", 2, "10%\r20%\r30%\nnext\n"),
        ("a\u2028b\x0cc\nlast\n".encode(), 1, "last\n"),
        (b"one\ntwo\n", None, "one\ntwo\n"),
    ],
)
def test_only_newlines_end_a_line(tmp_path: Path, data: bytes, lines: int | None, expected: str) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(data)
    assert read_tail(path, lines) == expected


@pytest.mark.parametrize("ending", ["", "\n"])
def test_the_tail_of_a_long_log_is_what_the_whole_of_it_ends_with(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "log.txt"
    whole = "\n".join(f"line {number} {'ä' * (number % 90)}" for number in range(20_000)) + ending
    path.write_text(whole, "utf-8")
    expected = whole.splitlines(keepends=True)
    for lines in (1, 2, 100, 5_000, 19_999, 20_000, 20_001, 10**9):
        assert read_tail(path, lines) == "".join(expected[-lines:]), lines
    assert read_tail(path, None) == whole


def test_a_log_beyond_the_limit_loses_whole_lines_at_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("".join(f"line {number:05}\n" for number in range(1000)), "utf-8")
    for lines in (None, 900):
        assert read_tail(path, lines, limit=25) == "line 00998\nline 00999\n"
    path.write_text("x" * 100, "utf-8")
    assert read_tail(path, None, limit=25) == "x" * 25
