"""A server's worth of parts for the tests of downloads: database, runner, children, with no HTTP in front.

`open_yard` runs them in the test's own loop. `python -m tests.models.yard DATA_DIR ENDPOINT` runs the same in a
process of its own, for tests that kill the server; it prints one line when it runs.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pydantic_settings
from sqlalchemy import make_url

from modelyard import tasks
from modelyard.db import Base, Sessions
from modelyard.jobs import actions as jobs
from modelyard.jobs.runner import JobRunner
from modelyard.jobs.schemas import EventOut, FailureOut, JobOut
from modelyard.jobs.tables import ACTIVE, JobStatus
from modelyard.models import actions, store
from modelyard.models.downloads import Downloads
from modelyard.models.tables import Model
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.processes import Children
from modelyard.server_lock import ServerLock
from modelyard.settings import Settings
from tests.eventually import eventually
from tests.servers.lifetime import end_with_parent


@dataclass
class Yard:
    """The parts, and the few things that tests do with them."""

    settings: Settings
    sessions: Sessions
    runner: JobRunner

    @property
    def models_dir(self) -> Path:
        return self.settings.models_dir

    def partial(self, model_id: str) -> Path:
        return store.partial_dir(self.models_dir, model_id)

    async def add(self, model_id: str, revision: str | None = None) -> UUID:
        """Ask for a model, as the route does."""
        async with self.sessions.begin() as session:
            job = await actions.request_download(session, model_id, revision)
        return job.id

    async def interrupt(self, job_id: UUID) -> None:
        async with self.sessions.begin() as session:
            await jobs.interrupt(session, job_id)

    async def job(self, job_id: UUID) -> JobOut:
        async with self.sessions.read() as session:
            return JobOut.of(await jobs.get(session, job_id))

    async def ended(self, job_id: UUID) -> JobOut:
        """Wait until the job has ended and return it."""

        async def has_ended() -> bool:
            return (await self.job(job_id)).status not in ACTIVE

        await eventually(has_ended, f"the end of job {job_id}; its log: {self.log(job_id)[-2000:]}", within_s=60)
        return await self.job(job_id)

    async def bring(self, model_id: str, revision: str | None = None) -> JobOut:
        """Add a model and wait for the end of its job."""
        return await self.ended(await self.add(model_id, revision))

    async def events(self, job_id: UUID) -> list[EventOut]:
        async with self.sessions.read() as session:
            return [EventOut.of(event) for event in await jobs.events_after(session, job_id, 0, 1000)]

    async def model(self, model_id: str) -> Model | None:
        async with self.sessions.read() as session:
            return await actions.find(session, model_id)

    def log(self, job_id: UUID) -> str:
        path = self.runner.log_of(job_id)
        return path.read_text("utf-8") if path.exists() else ""

    def folder(self, model: Model) -> Path:
        return self.models_dir / model.path


def make_settings(data_dir: Path, endpoint: str, **values: Any) -> Settings:
    """Return settings that look neither at the environment nor at a file, but for what tests name."""

    class Only(Settings):
        model_config = pydantic_settings.SettingsConfigDict(env_prefix="MODELYARD_TESTS_ONLY_", env_file=None)

    defaults: dict[str, Any] = {"download_stall_s": 20.0, "download_attempts": 3, "disk_reserve_gib": 0.0}
    return Only(data_dir=data_dir, HF_ENDPOINT=endpoint, **{"HF_TOKEN": "", **defaults, **values})


@asynccontextmanager
async def open_yard(settings: Settings) -> AsyncIterator[Yard]:
    """Run the parts for as long as the block lasts, and end them in good order."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    lock = ServerLock(settings.data_dir / "server.lock")
    await eventually(lock.take, "the lock of the data folder")
    sessions = Sessions(make_url(f"sqlite+aiosqlite:///{settings.data_dir / 'modelyard.db'}"))
    async with sessions._writer.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    downloads = Downloads(sessions, Children(lock.path, settings.grace_s), settings, TokenizerChildren())
    limits = {actions.DOWNLOAD: settings.max_downloads}
    runner = JobRunner(sessions, {actions.DOWNLOAD: downloads.run}, limits, settings.jobs_dir)
    running = tasks.spawn("runner", runner.run(), eternal=True)
    try:
        yield Yard(settings, sessions, runner)
    finally:
        await tasks.end(running)
        await sessions.close()
        lock.release()


def failure_of(job: JobOut) -> FailureOut:
    """Return why a job failed."""
    assert job.status == JobStatus.FAILED, job
    assert isinstance(job.failure, FailureOut)
    assert job.failure.hint
    return job.failure


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def fetched(yard: Yard, model_id: str, at_least: int) -> None:
    """Wait until so many bytes of a download are on disk."""
    await eventually(
        lambda: store.bytes_below(yard.partial(model_id)) >= at_least, f"{at_least} bytes of {model_id} on disk"
    )


def child_pid(job_folder: Path) -> int:
    """Return the pid of the download process itself, below its keeper."""
    for folder in Path("/proc").iterdir():
        try:
            argv = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"modelyard.models.download_child" in argv and any(str(job_folder).encode() in part for part in argv):
            return int(folder.name)
    return 0


async def serve(data_dir: Path, endpoint: str) -> None:
    async with open_yard(make_settings(data_dir, endpoint)):
        sys.stdout.write("running\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))
