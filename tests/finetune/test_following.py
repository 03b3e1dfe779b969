"""What a trainer's reports become, on both databases: each line once, and what is none passed over."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text, update

from modelyard.db import Sessions
from modelyard.finetune import actions, curves
from modelyard.finetune.following import READ_BYTES, Follower
from modelyard.finetune.tables import Finetune, Phase
from modelyard.jobs import actions as jobs
from modelyard.jobs.runner import JobContext
from modelyard.jobs.tables import Job, JobEvent
from tests.finetune.rows import add_dataset, database, start


@dataclass
class Trainer:
    """A training whose reports the test writes."""

    sessions: Sessions
    row: Finetune
    path: Path
    context: JobContext
    checkpoints: list[tuple[int, Path]] = field(default_factory=list)

    def say(self, *lines: dict[str, Any] | bytes) -> None:
        with self.path.open("ab") as file:
            for line in lines:
                file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")

    async def follower(self) -> Follower:
        """Return a follower as a server makes it that was just started."""
        row = await self.now()
        return Follower(
            self.sessions,
            self.context,
            row.id,
            attempt=1,
            path=self.path,
            offset=(row.followed or {"offset": 0})["offset"],
            on_checkpoint=lambda step, folder: self.checkpoints.append((step, folder)),
        )

    async def now(self) -> Finetune:
        async with self.sessions.read() as session:
            return await actions.get(session, self.row.id)

    async def job(self) -> Job:
        async with self.sessions.read() as session:
            return await jobs.get(session, self.row.job_id)

    async def events(self) -> list[JobEvent]:
        async with self.sessions.read() as session:
            return list(await jobs.events_after(session, self.row.job_id, 0, 1000))

    async def steps(self) -> list[int]:
        async with self.sessions.read() as session:
            return [point.step for point in (await curves.read(session, self.row.id, 10_000))[0]]


@asynccontextmanager
async def trainer(url: str, tmp_path: Path) -> AsyncIterator[Trainer]:
    async with database(url, tmp_path) as sessions:
        row = await start(sessions, await add_dataset(sessions))
        async with sessions.read() as session:
            job = await jobs.get(session, row.job_id)
        context = JobContext(job, tmp_path / "job", sessions)
        yield Trainer(sessions, row, tmp_path / "progress.jsonl", context)


def point(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "point", "step": step, "loss": 1.0 / step} | values


async def test_reports_become_rows_events_and_progress(database_url: str, tmp_path: Path) -> None:
    async with trainer(database_url, tmp_path) as one:
        follower = await one.follower()
        await follower.look()
        one.say(
            {"kind": "phase", "phase": "loading"},
            {"kind": "note", "level": "WARNING", "message": "It is old.", "data": {"age": 3}},
            {"kind": "prepared", "rows": 40, "held_out_rows": 2, "truncated_rows": 0, "tokens": 900, "steps": 4},
            # Once more, after the rows: that is not said again.
            {"kind": "phase", "phase": "loading"},
            {"kind": "estimate", "seconds": 61.0, "memory_bytes": 3 * 1024**3, "tokens_per_s": 10.0},
            {"kind": "phase", "phase": "training"},
            point(1, memory_bytes=700),
            point(2, memory_bytes=600),
            {"kind": "checkpoint", "step": 2, "folder": "/there/step-2"},
            {"kind": "progress", "done": 2, "total": 4, "unit": "steps of a very long name"},
        )
        await follower.finish()
        row, job = await one.now(), await one.job()
        assert (row.phase, row.prepared["tokens"] if row.prepared else None) == (Phase.TRAINING, 900)
        assert row.estimate == {"seconds": 61.0, "memory_bytes": 3 * 1024**3, "tokens_per_s": 10.0}
        assert row.first_step_at is not None
        assert (job.progress_done, job.progress_total, job.progress_unit) == (2, 4, "steps of a very ")
        assert [(event.level, event.message) for event in await one.events()] == [
            ("info", "Loading the model."),
            ("warning", "It is old."),
            ("info", "The rows are prepared: 40 to learn from, 2 held back, 900 tokens."),
            ("info", "Expected: 61 s of training, 3.0 GiB of memory."),
            ("info", "Training."),
            ("info", "Step 2: loss 0.5."),
        ]
        assert one.checkpoints == [(2, Path("/there/step-2"))]
        assert follower.memory_bytes == 700
        one.say({"kind": "phase", "phase": "evaluating"})
        await follower.finish()
        assert (await one.now()).phase == Phase.EVALUATING


async def test_a_server_that_comes_back_reads_on_where_the_last_one_stopped(database_url: str, tmp_path: Path) -> None:
    async with trainer(database_url, tmp_path) as one:
        for first in (1, 11, 21):
            one.say(*(point(step) for step in range(first, first + 10)), b'{"kind": "poi')
            await (await one.follower()).finish()
            one.say(b'nt", "step": 1000}\n')
        await (await one.follower()).finish()
        assert await one.steps() == [*range(1, 31), 1000]
        told = [point["step"] for event in await one.events() for point in event.data["points"]]
        assert sorted(told) == [*range(1, 31), 1000, 1000, 1000]


async def test_what_cannot_be_read_is_passed_over_and_what_follows_is_not(tmp_path: Path) -> None:
    async with trainer(f"sqlite:///{tmp_path / 'test.db'}", tmp_path) as one:
        one.say(
            b"\n", b"not json\n", b"[1]\n", b'{"kind": 3}\n', b'{"kind": []}\n', b"\xff\xfe\n", {"kind": "what?"},
            {"kind": "point", "step": "two"}, {"kind": "phase", "phase": "dancing"}, b"x" * (READ_BYTES + 5) + b"\n",
            {"kind": "checkpoint", "step": None}, {"kind": "progress", "done": "much"}, {"kind": "note"}, point(7),
        )  # fmt: skip
        await (await one.follower()).finish()
        assert await one.steps() == [7]
        assert one.checkpoints == []


async def test_points_are_held_together_for_a_while_and_all_else_is_written_at_once(tmp_path: Path) -> None:
    async with trainer(f"sqlite:///{tmp_path / 'test.db'}", tmp_path) as one:
        follower = await one.follower()
        one.say({"kind": "phase", "phase": "training"}, point(1))
        await follower.look()
        assert await one.steps() == [1]
        one.say(point(2))
        await follower.look()
        assert await one.steps() == [1]
        one.say({"kind": "phase", "phase": "saving"})
        await follower.look()
        assert await one.steps() == [1, 2]


async def test_a_database_that_is_away_delays_reports_and_loses_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trainer(f"sqlite:///{tmp_path / 'test.db'}", tmp_path) as one:
        follower = await one.follower()
        one.say(point(1))
        async with one.sessions.begin() as session:
            await session.execute(text("ALTER TABLE finetune_points RENAME TO away"))
        await follower.look()
        assert "could not be written yet" in caplog.text
        one.say(point(2))
        async with one.sessions.begin() as session:
            await session.execute(text("ALTER TABLE away RENAME TO finetune_points"))
        await follower.finish()
        assert await one.steps() == [1, 2]


async def test_a_training_that_came_further_than_ever_is_not_at_risk_any_more(
    database_url: str, tmp_path: Path
) -> None:
    def progress(done: int, unit: str) -> dict[str, Any]:
        return {"kind": "progress", "done": done, "total": 100, "unit": unit}

    async with trainer(database_url, tmp_path) as one:

        async def is_at_risk_after(*reports: dict[str, Any]) -> bool:
            """Return whether a job at risk still is, when a server that was just started has read these reports."""
            async with one.sessions.begin() as session:
                await session.execute(update(Job).values(at_risk=True))
            one.context = JobContext(await one.job(), tmp_path / "job", one.sessions)
            one.say(*reports)
            await (await one.follower()).finish()
            assert one.context.is_at_risk == (await one.job()).at_risk
            return one.context.is_at_risk

        assert not await is_at_risk_after(progress(90, "bytes"), progress(10, "steps"))
        # Begun again: the rows are prepared anew, and the same steps are done again.
        assert await is_at_risk_after(progress(100, "bytes"))
        assert await is_at_risk_after(progress(100, "bytes"))
        assert not await is_at_risk_after(progress(10, "steps"))
