"""The trainer of one training, from start to end: adopted after a restart, replaced when it dies, followed and stopped.

A trainer that was killed is replaced by another, which goes on from the newest checkpoint, for as long as that brings
the training further; one that left by itself without a result is not. Whatever ends this ends the trainer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from modelyard.db import Sessions
from modelyard.errors import JobFailure, UnsafePath
from modelyard.finetune import attempts, checkpoints
from modelyard.finetune.accelerator import Share
from modelyard.finetune.following import Follower
from modelyard.finetune.tables import Finetune
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.models.tables import Model
from modelyard.paths import below
from modelyard.processes import Child, Children
from modelyard.settings import Settings

log = logging.getLogger(__name__)

POLL_S = 0.1
#: Attempts in a row that die without a new checkpoint, and attempts that die at all, before a training is given up.
FRUITLESS_DEATHS, DEATHS = 2, 5
PAUSE_S = 1.0
#: A server that stops waits for the storage no longer than this: the checkpoint is on its disk all the same.
LAST_COPY_S = 10.0

NoteTaken = Callable[[int], Awaitable[None]]


class TrainerRuns:
    """Runs the trainer of a job. `note_taken` is told how much memory it has taken, in bytes."""

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        children: Children,
        job: JobContext,
        row: Finetune,
        base: Model,
        *,
        work: Path,
        data: Path,
        keeper: checkpoints.Keeper,
        note_taken: NoteTaken,
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._children = children
        self._job = job
        self._row = row
        self._base = base
        self._work = work
        self._data = data
        self._keeper = keeper
        self._note_taken = note_taken
        self._number = attempts.newest(job.folder)
        #: Most memory that the trainer has said to have taken.
        self._taken = 0

    async def adopted(self) -> dict[str, Any] | None:
        """Go on with a trainer that an earlier run of the server has started, as long as it lasts.

        Returns its result; None if there was none, or it ended without one.

        Raises:
            JobFailure: what it says of its failure.
            JobInterrupted: it has been ended.
        """
        child = await self._children.adopt(self._folder()) if self._number else None
        if child is None:
            return None
        kills = await asyncio.to_thread(attempts.Kills.so_far)
        lives = child.is_alive
        if lives:
            await self._job.event("The trainer has gone on while the server was away.")
        result = _done(await self._follow(child))
        if result is None and lives:
            died = await asyncio.to_thread(attempts.death, child, self._job.log, kills, None, self._taken)
            await self._job.event(f"{died['message']} Going on from the last checkpoint.", level="warning")
        return result

    async def to_the_end(self, share: Share) -> dict[str, Any]:
        """Run trainers until one has done the work, and return its result.

        Raises:
            JobFailure: what it says of its failure; or `trainer_killed`, `trainer_died`, `no_process`.
            JobInterrupted: it has been ended, with a checkpoint if it could write one.
        """
        fruitless = deaths = 0
        while True:
            kills = await asyncio.to_thread(attempts.Kills.so_far)
            before = await self._newest_step()
            child = await self._start(share)
            result = _done(await self._follow(child))
            if result is not None:
                return result
            died = await asyncio.to_thread(attempts.death, child, self._job.log, kills, share.memory_bytes, self._taken)
            deaths += 1
            fruitless = 0 if await self._newest_step() > before else fruitless + 1
            # What it had was not enough, and another would have as much: only a checkpoint could change that.
            is_hopeless = died["code"] == "trainer_died" or (died["code"] == "out_of_memory" and fruitless > 0)
            if is_hopeless or fruitless >= FRUITLESS_DEATHS or deaths >= DEATHS:
                times = f" It did so {deaths} times." if deaths > 1 else ""
                hint = died["hint"].replace("{id}", str(self._row.id))
                raise JobFailure(died["code"], died["message"] + times, hint, died["evidence"])
            await self._job.event(
                f"{died['message']} Going on from the last checkpoint.", level="warning", data={"code": died["code"]}
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await self._job.interrupted.wait()
            if self._job.interrupted.is_set():
                raise JobInterrupted

    async def _start(self, share: Share) -> Child:
        self._number += 1
        folder = self._folder()
        spec = attempts.spec_of(
            self._row, self._base, self._settings,
            data=self._data, work=self._work, folder=folder, memory_bytes=share.memory_bytes,
        )  # fmt: skip
        await asyncio.to_thread(spec.write, folder / "training.json")
        command = attempts.command(self._settings, folder, share.env, share.processes)
        try:
            return await self._children.start(
                folder, command, log=self._job.log, stop_timeout_s=self._settings.trainer_stop_timeout_s
            )
        except RuntimeError as error:
            raise JobFailure(
                "no_process", f"The trainer could not be started: {error}.", "Free memory, then resume the training."
            ) from error

    async def _follow(self, child: Child) -> dict[str, Any] | None:
        """Watch a child to its end and return its result; None if it left none."""
        followed = self._row.followed or {}
        follower = Follower(
            self._sessions,
            self._job,
            self._row.id,
            attempt=self._number,
            path=child.folder / "progress.jsonl",
            offset=followed["offset"] if followed.get("attempt") == self._number else 0,
            on_checkpoint=self._offer,
        )
        if (here := await asyncio.to_thread(checkpoints.newest_here, self._work)) is not None:
            self._keeper.offer(*here)  # an earlier run of the server may have had no time to copy it
        try:
            await self._watch(child, follower)
            await follower.finish()
        except asyncio.CancelledError:
            await child.stop()
            await follower.finish()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_COPY_S):
                    await self._keeper.finish()
            raise
        result = await asyncio.to_thread(attempts.read_result, child.folder)
        if self._job.interrupted.is_set() and (result is None or "adapter_dir" not in result):
            raise JobInterrupted
        return result

    def _offer(self, step: int, folder: Path) -> None:
        """Have a checkpoint that the trainer reports kept, where it lies in the training's own folder."""
        try:
            self._keeper.offer(step, below(self._work, str(folder).removeprefix(f"{self._work}/")))
        except UnsafePath:
            log.warning("training %s reports a checkpoint in another folder: %r", self._row.id, str(folder)[:200])

    async def _watch(self, child: Child, follower: Follower) -> None:
        """Follow a child until it has ended, which it is asked to when the job is interrupted."""
        ended = asyncio.ensure_future(child.wait())
        stopping: asyncio.Task[Any] | None = None
        self._taken = 0
        while not ended.done():
            await asyncio.wait({ended}, timeout=POLL_S)
            await follower.look()
            if follower.memory_bytes > self._taken:
                self._taken = follower.memory_bytes
                try:
                    await self._note_taken(self._taken)
                except SQLAlchemyError as error:  # a figure that got lost is no reason to fail: the next one tells more
                    log.warning("the memory of training %s could not be written: %s", self._row.id, error)
            if self._job.interrupted.is_set() and stopping is None:
                stopping = asyncio.create_task(child.stop(), name=f"stop training {self._row.id}")

    async def _newest_step(self) -> int:
        found = await asyncio.to_thread(checkpoints.newest_here, self._work)
        return found[0] if found is not None else -1

    def _folder(self) -> Path:
        return self._job.folder / f"attempt-{self._number}"


def _done(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the result of a trainer that has done its work; None if it left none, or was stopped from outside.

    Raises:
        JobFailure: what it says of its failure.
    """
    failure = (result or {}).get("failure")
    if failure is not None:
        raise JobFailure(failure["code"], failure["message"], failure["hint"], failure.get("evidence", ()))
    return result if result is not None and "adapter_dir" in result else None
