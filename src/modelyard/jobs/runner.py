"""The runner: starts what is due, follows wishes to interrupt, and writes every job's status.

One runner per database (the server's lock sees to it). Each job in progress is one guarded task that awaits the
function of its kind. The contract of such a function:

- it returns: the job is FINISHED; it raises `JobFailure`: FAILED, with that cause;
- when `context.interrupted` is set it ends its child and raises `JobInterrupted`: KILLED. It may be set from the
  beginning: a job that is interrupted while it waits is called all the same, to clear what its request prepared;
- it is cancelled: the server stops in good order. It ends its child and lets the cancellation through; the job stays
  RUNNING, and the function is called again at the next start, as it is after a crash of the server;
- it may be called again at any point of its work, with the same spec and the same folder; that is done, too, when
  what it raises is an outage of the database (`outages`), which it has not waited out itself (`context.patiently`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard import outages, tasks
from modelyard.db import Sessions, utcnow
from modelyard.errors import IllegalMove, JobFailure
from modelyard.jobs import actions, survival
from modelyard.jobs.feeds import Feeds, FollowerLimits
from modelyard.jobs.tables import ACTIVE, MOVES, Job, JobStatus
from modelyard.retry import Backoff, retry
from modelyard.signals import Topic
from modelyard.states import move

log = logging.getLogger(__name__)
T = TypeVar("T")

# A wake-up that got lost must not stop the yard: the runner also looks by itself this often.
LOOK_AGAIN_S = 2.0
PROGRESS_EVERY_S = 0.5
#: How long a server that stops waits for its database.
GOOD_END_S = 5.0
UNLIMITED = 1_000_000


class JobInterrupted(Exception):
    """A job's function has done what an interrupt asks for: nothing of the job runs any more."""


class JobContext:
    """The context of a job's function: what is wanted, a folder of its own, and ways to tell how it goes."""

    def __init__(self, job: Job, folder: Path, sessions: Sessions) -> None:
        self.id: UUID = job.id
        self.kind: str = job.kind
        self.name: str = job.name
        self.spec: dict[str, Any] = job.spec
        self.folder = folder
        self.log = folder / "log.txt"
        self.interrupted = asyncio.Event()
        if job.interrupt_requested:
            self.interrupted.set()
        self.interrupted_before_start = job.interrupt_requested and job.status == JobStatus.CREATED
        self._sessions = sessions
        self._progress_at = 0.0
        #: How far it had come when the function was called: further, and it is not what ended an earlier server.
        self.done_before, self.unit_before = job.progress_done or 0, job.progress_unit
        self._started_at = asyncio.get_running_loop().time()
        self.is_at_risk = True

    async def event(self, message: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """Append to the job's event list. Waits while the database is away."""

        async def append() -> None:
            async with self._sessions.begin() as session:
                await actions.append_event(session, self.id, message, level=level, data=data)

        await self.patiently(append)

    async def patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work on the database, which may be repeated, and wait while that is away; an event tells of it after."""
        return await outages.wait_out(f"job {self.name} ({self.id})", work, self._tell_of)

    async def _tell_of(self, outage: outages.Outage) -> None:
        await self.event(f"{outage}; what runs went on meanwhile.", level="warning", data={"seconds": outage.seconds})

    async def progress(self, done: int, total: int, unit: str) -> None:
        """Write how far the job is; calls that come too soon after another are dropped, the last one is not."""
        now = asyncio.get_running_loop().time()
        if done < total and now - self._progress_at < PROGRESS_EVERY_S:
            return
        self._progress_at = now
        try:
            async with self._sessions.begin() as session:
                await actions.set_progress(session, self.id, done, total, unit)
                is_further = self.is_at_risk and done > self.done_before
                if is_further:
                    await survival.note_survival(session, [self.id])
            self.is_at_risk = self.is_at_risk and not is_further
        except SQLAlchemyError as error:  # a figure that got lost is no reason to fail: the next one tells more
            log.warning("the progress of job %s could not be written: %s", self.id, error)

    async def survived(self) -> None:
        """Say that the job has done its work once: deaths of the server are never counted against it again."""

        async def note() -> None:
            async with self._sessions.begin() as session:
                await survival.note_survival(session, [self.id], for_good=True)

        await self.patiently(note)
        self.is_at_risk = False

    @property
    def has_run_long(self) -> bool:
        """True if it ran for long enough to say that it survives, and nobody has said so yet."""
        return self.is_at_risk and asyncio.get_running_loop().time() - self._started_at > survival.SURVIVED_S


JobFunction = Callable[[JobContext], Awaitable[None]]
#: What else is to be written when a job of a kind ends, however it does: in the same transaction as its status.
JobEnding = Callable[[AsyncSession, UUID], Awaitable[None]]


class JobRunner:
    """Runs jobs. `functions` maps a kind to what it does, `limits` to how many of it run at the same time.

    `endings` maps a kind to what is written together with the end of such a job.
    """

    def __init__(
        self,
        sessions: Sessions,
        functions: Mapping[str, JobFunction],
        limits: Mapping[str, int],
        jobs_dir: Path,
        endings: Mapping[str, JobEnding] | None = None,
        followers: FollowerLimits | None = None,
    ) -> None:
        self.feeds = Feeds(sessions, followers or FollowerLimits())
        self._sessions = sessions
        self._functions = functions
        self._limits = limits
        self._endings = endings or {}
        self._jobs_dir = jobs_dir
        self._wake = asyncio.Event()
        sessions.signals.subscribe(Topic.JOBS, self.wake)
        self._running: dict[UUID, tuple[JobContext, asyncio.Task[None]]] = {}

    def wake(self) -> None:
        """Look at the table now, as at each commit that writes a job."""
        self._wake.set()

    def log_of(self, job_id: UUID) -> Path:
        """Return where the job's children write their log; the file may not be there."""
        return self._jobs_dir / str(job_id) / "log.txt"

    def running(self, kind: str) -> int:
        """Return how many jobs of a kind run."""
        return sum(context.kind == kind for context, _ in self._running.values())

    async def folders_in_use(self) -> set[Path]:
        """Return the folders of the jobs that have not ended: whatever lives in or below them is theirs."""
        async with self._sessions.read() as session:
            active = (await session.scalars(select(Job.id).where(Job.status.in_(ACTIVE)))).all()
        return {self._jobs_dir / str(job_id) for job_id in active}

    async def end_deadly(self) -> None:
        """Fail the jobs during which servers died again and again. For the start of a server, before any job runs."""
        async with self._sessions.begin() as session:
            deadly = await survival.count_deaths(session)
        for job in deadly:
            to, failure = JobStatus.FAILED, survival.failure(job)
            log.error("job %s (%s) is not resumed: the server died %s times while it ran", job.name, job.id, job.deaths)
            await self._move(job.id, to, failure.code, failure=failure, ending=self._endings.get(job.kind))

    async def run(self) -> None:
        """Run jobs until cancelled; on cancellation every function is cancelled and waited for.

        An outage of the database ends nothing that runs.

        Raises:
            SQLAlchemyError: the jobs cannot be read or written for a reason that would never pass, such as a table
                that is not there. Every function is cancelled then, too.
        """
        try:
            while True:
                self._wake.clear()
                await outages.wait_out("the job runner", self._look)
                # Not wait_for: until Python 3.12 it loses a cancellation that comes just after the wake-up.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_AGAIN_S):
                        await self._wake.wait()
        finally:
            await tasks.end(*(task for _, task in self._running.values()))
            await self._note_good_end()

    async def _note_good_end(self) -> None:
        """Write that no job ended this server: it stops in good order."""
        try:
            async with asyncio.timeout(GOOD_END_S), self._sessions.begin() as session:
                await survival.note_good_end(session)
        except (SQLAlchemyError, TimeoutError) as error:
            log.warning("that the server ends in good order could not be written: %s", error)

    async def _look(self) -> None:
        # Taken before the rows are read: a row that says otherwise than this and has no task by now is just ending.
        known = set(self._running)
        async with self._sessions.read() as session:
            active = (await session.scalars(select(Job).where(Job.status.in_(ACTIVE)).order_by(Job.number))).all()
        # Those that an earlier server left RUNNING come first, so that they count when the others' turn is decided.
        for job in sorted(active, key=lambda job: job.status != JobStatus.RUNNING):
            entry = self._running.get(job.id)
            if entry is not None:
                if job.interrupt_requested:
                    entry[0].interrupted.set()
            elif job.id in known:
                continue
            elif job.status == JobStatus.RUNNING or job.interrupt_requested:
                # One that is interrupted while it waits is called too, to clear what its request had prepared.
                self._start(job)
            elif self.running(job.kind) < self._limits.get(job.kind, UNLIMITED) and await self._move(
                job.id, JobStatus.RUNNING, "its turn", started_at=utcnow(), at_risk=True
            ):
                self._start(job)

        long = {job_id: context for job_id, (context, _) in self._running.items() if context.has_run_long}
        if long:
            async with self._sessions.begin() as session:
                await survival.note_survival(session, long)
            for context in long.values():
                context.is_at_risk = False

    def _start(self, job: Job) -> None:
        context = JobContext(job, self._jobs_dir / str(job.id), self._sessions)
        self._running[job.id] = (context, tasks.spawn(f"job {job.name}", self._perform(context)))

    async def _perform(self, context: JobContext) -> None:
        failure: JobFailure | None = None
        to, reason = JobStatus.FINISHED, "done"
        try:
            context.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            await self._call(context)
        except JobInterrupted:
            to, reason = JobStatus.KILLED, "interrupted"
        except JobFailure as error:
            to, reason, failure = JobStatus.FAILED, error.code, error
        except (KeyboardInterrupt, GeneratorExit):
            raise  # the process ends
        except BaseException as error:  # the edge of a supervised task: a library's panic is no Exception
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # the server stops; a cancellation that nobody asked this task for is a failure like any other
            log.exception("job %s (%s) failed inside the server", context.name, context.id)
            failure = _internal_error(context)
            to, reason = JobStatus.FAILED, failure.code
        if context.interrupted_before_start:
            to, reason, failure = JobStatus.KILLED, "interrupted before it started", None
        await self._settle(context, to, reason, failure)
        self._running.pop(context.id, None)
        self.wake()

    async def _call(self, context: JobContext) -> None:
        """Call the job's function, and again where an outage of the database ended it: its contract allows that."""

        async def note(error: SQLAlchemyError, _pause_s: float) -> None:
            said = outages.first_line(error)
            log.warning("job %s (%s) is begun again: the database is away (%s)", context.name, context.id, said)

        def work() -> Awaitable[None]:
            return self._functions[context.kind](context)

        always = Backoff(LOOK_AGAIN_S, LOOK_AGAIN_S)
        await retry(work, SQLAlchemyError, always, passes=outages.is_passing, before_pause=note)

    async def _settle(self, context: JobContext, to: JobStatus, reason: str, failure: JobFailure | None) -> None:
        """Write how a job ended: a database that is away must not leave it RUNNING.

        Where its end itself cannot be written, it is FAILED without what its kind writes beside.

        Raises:
            SQLAlchemyError: not even that can be written, for a reason that would not pass. The job keeps its place
                among those that run, so that it is not begun again and again.
        """
        what, finished_at = f"the end of job {context.name} ({context.id})", utcnow()

        async def write() -> None:
            ending = self._endings.get(context.kind)
            await self._move(context.id, to, reason, failure=failure, ending=ending, finished_at=finished_at)

        async def write_fault() -> None:
            fault = _internal_error(context)
            await self._move(context.id, JobStatus.FAILED, fault.code, failure=fault, finished_at=finished_at)

        try:
            await outages.wait_out(what, write)
        except SQLAlchemyError:
            log.exception("%s (%s) could not be written", what, to)
            await outages.wait_out(what, write_fault)

    async def _move(
        self,
        job_id: UUID,
        to: JobStatus,
        reason: str,
        *,
        failure: JobFailure | None = None,
        ending: JobEnding | None = None,
        **values: object,
    ) -> bool:
        """Write a status, with its event; return False if the job has moved already."""
        if to in (JobStatus.KILLED, JobStatus.FINISHED, JobStatus.FAILED):
            values.setdefault("finished_at", utcnow())
        message, level, data = f"{to.title()}: {reason}.", "info", {"status": str(to)}
        if failure is not None:
            values |= {
                "failure_code": failure.code,
                "failure_message": failure.message,
                "failure_hint": failure.hint,
                "failure_evidence": list(failure.evidence),
            }
            message, level = f"Failed: {failure.message} {failure.hint}".strip(), "error"
            data |= {"code": failure.code}
        try:
            async with self._sessions.begin() as session:
                await move(session, Job, job_id, "status", MOVES, to, reason, **values)
                await actions.append_event(session, job_id, message, level=level, data=data)
                if ending is not None:
                    await ending(session, job_id)
        except IllegalMove:
            log.warning("job %s could not become %s: it has moved already", job_id, to)
            return False
        return True


def _internal_error(context: JobContext) -> JobFailure:
    return JobFailure(
        "internal_error",
        "Something failed inside the server itself; its log has the cause.",
        f"Look for job {context.id} in the server's log, and report it as a bug.",
    )
