"""The function of FT jobs: bring the data, wait for room, run the trainer, publish its adapter, put it into service.

Every phase may begin again after a restart of the server, with what is on disk: a trainer that still runs is adopted,
one that is gone is replaced by another, which goes on from the newest checkpoint, and a result that is there is not
computed again. Only here a training's row is told what is; what it reports itself is written by `following`.

    <data>/finetunes/<id>/data.jsonl          the dataset, while the job runs
    <data>/finetunes/<id>/checkpoints/        the trainer's, until the training is done
    <data>/finetunes/<id>/adapter/            the trainer's, until it is in the store
    <data>/finetunes/<id>/result.json         what the trainer said when it had done its work
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import update

from modelyard.datasets import actions as datasets
from modelyard.datasets import reading
from modelyard.datasets.tables import Dataset
from modelyard.db import Sessions
from modelyard.deploy.fitting import model_files
from modelyard.deploy.machine import this_machine
from modelyard.errors import JobFailure, ModelyardError
from modelyard.finetune import actions, attempts, checkpoints, publishing
from modelyard.finetune.accelerator import Accelerator, Share
from modelyard.finetune.following import Follower
from modelyard.finetune.into_service import Told, promote, put_into_service
from modelyard.finetune.needs import Need, estimate
from modelyard.finetune.tables import Finetune, OnBusy, Phase
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.models import actions as models
from modelyard.models.tables import Model
from modelyard.processes import Child, Children
from modelyard.settings import Settings
from modelyard.storage import Storage
from modelyard.trainer.spec import Hyperparameters

T = TypeVar("T")

POLL_S = 0.1
#: Attempts in a row that die without a new checkpoint, and attempts that die at all, before a training is given up.
FRUITLESS_DEATHS, DEATHS = 2, 5
PAUSE_S = 1.0
#: What a chat template adds to a row's characters, at most.
TEMPLATE_TOKENS = 256
#: A server that stops waits for the storage no longer than this: the checkpoint is on its disk all the same.
LAST_COPY_S = 10.0


class Trainings:
    """Runs trainings. `run` is the job function."""

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        storage: Storage,
        children: Children,
        accelerator: Accelerator,
        told: Told,
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._storage = storage
        self._children = children
        self._accelerator = accelerator
        self._told = told

    async def run(self, job: JobContext) -> None:
        """Train the adapter of the job's spec and do with it what was asked for.

        Raises:
            JobFailure: with the cause and what to do.
            JobInterrupted: nothing of it runs; its newest checkpoint is kept.
        """
        finetune_id = UUID(job.spec["finetune_id"])
        try:
            await self._run(job, finetune_id)
        except asyncio.CancelledError:
            raise  # a server that stops goes on with it when it is back
        except BaseException:
            await self._end_trainer(job)
            # What made room for it comes back, also where it ended before it came to the trainer again.
            await self._accelerator.give_back(job, finetune_id)
            raise

    async def _end_trainer(self, job: JobContext) -> None:
        """End a trainer that an earlier run of the server has started, where nobody came to it again."""
        number = attempts.newest(job.folder)
        child = await self._children.adopt(job.folder / f"attempt-{number}") if number else None
        if child is not None and child.is_alive:
            await child.stop()

    async def _run(self, job: JobContext, finetune_id: UUID) -> None:
        _leave_if_interrupted(job)
        async with self._sessions.read() as session:
            row = await actions.get(session, finetune_id)
            base = await models.get(session, row.model_id)
            dataset = await datasets.get(session, row.dataset_id)
        training = _Training(self, job, row, base, dataset)
        try:
            await training.run()
        except (JobFailure, JobInterrupted):
            # Fetched again if it goes on; a server that stops comes back and needs it.
            await asyncio.to_thread(training.data.unlink, missing_ok=True)
            raise


class _Training:
    """One training being run."""

    def __init__(self, yard: Trainings, job: JobContext, row: Finetune, base: Model, dataset: Dataset) -> None:
        self.job, self.row, self.base, self.dataset = job, row, base, dataset
        self.settings, self.sessions = yard._settings, yard._sessions
        self.storage, self.children, self.told = yard._storage, yard._children, yard._told
        self.accelerator = yard._accelerator
        self.work = checkpoints.folder_of(self.settings.finetunes_dir, row.id)
        self.data = self.work / "data.jsonl"
        #: Step of the newest checkpoint in the storage.
        self.stored = row.checkpoint_step if row.checkpoint_step is not None else -1
        self.keeper = checkpoints.Keeper(
            self.storage, row.id, saved=self._checkpoint_saved, failed=self._checkpoint_not_saved
        )

    async def run(self) -> None:
        """Go through the phases that are left."""
        await asyncio.to_thread(self.work.mkdir, parents=True, exist_ok=True, mode=0o700)
        result = await asyncio.to_thread(_kept_result, self.work)
        if result is None:
            try:
                result = await self._train()
            finally:
                await self.keeper.close()
        else:
            await self.accelerator.give_back(self.job, self.row.id)
        await self._publish(result)
        if self.row.deploy:
            await self._into_service(result)
        await self._clear()
        await self._write(phase=Phase.DONE)

    # Training

    async def _train(self) -> dict[str, Any]:
        number = attempts.newest(self.job.folder)
        if number and (result := await self._adopted(number)) is not None:
            return result
        await self._write(phase=Phase.PREPARING)
        await self._or_interrupt(self._prepare())
        need = await asyncio.to_thread(self._need, await self._longest_row())
        holder = f"the training {self.row.name}"
        async with self.accelerator.held(self.job, self.row.id, need, OnBusy(self.row.on_busy), holder=holder) as share:
            return await self._attempts(number, share)

    async def _adopted(self, number: int) -> dict[str, Any] | None:
        """Go on with a trainer that an earlier run of the server has started, as long as it lasts.

        It is not asked for room again: it has it. Returns its result; None if it ended without one.
        """
        child = await self.children.adopt(self._folder(number))
        if child is None:
            return None
        kills = await asyncio.to_thread(attempts.Kills.so_far)
        lives = child.is_alive
        if lives:
            await self.job.event("The trainer has gone on while the server was away.")
        try:
            result = self._done(await self._follow(child, number))
        except (JobFailure, JobInterrupted):
            await self.accelerator.give_back(self.job, self.row.id)
            raise
        if result is not None:
            await self.accelerator.give_back(self.job, self.row.id)
        elif lives:
            died = await asyncio.to_thread(attempts.death, child, self.job.log, kills, None)
            await self.job.event(f"{died['message']} Going on from the last checkpoint.", level="warning")
        return result

    def _need(self, longest_tokens: int | None) -> Need:
        files = model_files(self.settings, self.base)
        settings = Hyperparameters(**self.row.hyperparameters)
        has_gpu = this_machine().has_gpu
        return estimate(files.config, files.size_bytes, settings, has_gpu=has_gpu, longest_tokens=longest_tokens)

    async def _longest_row(self) -> int | None:
        """Return how many tokens the longest row has at most, as far as its characters tell."""
        try:
            report = (await reading.about(self.storage, self.dataset)).report
            return int(report["characters"]["longest"]) + TEMPLATE_TOKENS
        except (ModelyardError, KeyError, TypeError):
            return None

    async def _prepare(self) -> None:
        """Bring the dataset, and the newest checkpoint if this machine has none."""
        if not await asyncio.to_thread(self.data.exists):
            try:
                await checkpoints.fetch_file(self.storage, self.dataset.data_key, self.data, self.dataset.sha256)
            except checkpoints.DamagedCheckpoint:
                raise JobFailure(
                    "dataset_damaged",
                    f"The file of the dataset {self.dataset.id} in the storage is not the one that was uploaded.",
                    "Upload it again, and train on that dataset.",
                ) from None
            except ModelyardError as error:
                raise JobFailure(error.code, error.message, "Resume the training when the storage is back.") from error
        if await asyncio.to_thread(checkpoints.newest_here, self.work) is not None:
            return
        try:
            for step in reversed(await checkpoints.steps(self.storage, self.row.id)):
                key = f"{checkpoints.prefix(self.row.id)}checkpoints/step-{step}/"
                try:
                    await checkpoints.fetch(self.storage, key, self.work / "checkpoints" / f"step-{step}")
                except checkpoints.DamagedCheckpoint as error:
                    await self.job.event(f"The checkpoint of step {step} is not used: {error}.", level="warning")
                    continue
                await self.job.event(f"The checkpoint of step {step} is here: the training goes on from it.")
                return
        except ModelyardError as error:
            raise JobFailure(error.code, error.message, "Resume the training when the storage is back.") from error

    async def _attempts(self, number: int, share: Share) -> dict[str, Any]:
        """Run children until one has done the work, or nothing helps any more."""
        fruitless = deaths = 0
        while True:
            number += 1
            kills = await asyncio.to_thread(attempts.Kills.so_far)
            before = await self._newest_step()
            child = await self._start(self._folder(number), share)
            result = self._done(await self._follow(child, number))
            if result is not None:
                return result
            died = await asyncio.to_thread(attempts.death, child, self.job.log, kills, share.memory_bytes)
            deaths += 1
            fruitless = 0 if await self._newest_step() > before else fruitless + 1
            if died["code"] == "trainer_died" or fruitless >= FRUITLESS_DEATHS or deaths >= DEATHS:
                times = f" It did so {deaths} times." if deaths > 1 else ""
                hint = died["hint"].replace("{id}", str(self.row.id))
                raise JobFailure(died["code"], died["message"] + times, hint, died["evidence"])
            await self.job.event(
                f"{died['message']} Going on from the last checkpoint.", level="warning", data={"code": died["code"]}
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await self.job.interrupted.wait()
            _leave_if_interrupted(self.job)

    def _done(self, result: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the result of a trainer that has done its work; None if it left none, or was stopped from outside.

        Raises:
            JobFailure: what it says of its failure.
        """
        failure = (result or {}).get("failure")
        if failure is not None:
            raise JobFailure(failure["code"], failure["message"], failure["hint"], failure.get("evidence", ()))
        if result is None or "adapter_dir" not in result:
            return None
        _keep_result(self.work, result)
        return result

    async def _start(self, folder: Path, share: Share) -> Child:
        spec = attempts.spec_of(
            self.row, self.base, self.settings,
            data=self.data, work=self.work, folder=folder, memory_bytes=share.memory_bytes,
        )  # fmt: skip
        await asyncio.to_thread(spec.write, folder / "training.json")
        command = attempts.command(self.settings, folder, share.env)
        try:
            return await self.children.start(
                folder, command, log=self.job.log, stop_timeout_s=self.settings.trainer_stop_timeout_s
            )
        except RuntimeError as error:
            raise JobFailure(
                "no_process", f"The trainer could not be started: {error}.", "Free memory, then resume the training."
            ) from error

    async def _follow(self, child: Child, number: int) -> dict[str, Any] | None:
        """Watch a child to its end and return its result; None if it left none, or was stopped from outside."""
        followed = self.row.followed or {}
        follower = Follower(
            self.sessions,
            self.job,
            self.row.id,
            attempt=number,
            path=child.folder / "progress.jsonl",
            offset=followed["offset"] if followed.get("attempt") == number else 0,
            on_checkpoint=self.keeper.offer,
        )
        ended = asyncio.ensure_future(child.wait())
        stopping: asyncio.Task[Any] | None = None
        taken = 0
        if (here := await asyncio.to_thread(checkpoints.newest_here, self.work)) is not None and here[0] > self.stored:
            self.keeper.offer(*here)  # what an earlier run of the server had no time to copy
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=POLL_S)
                await follower.look()
                if follower.memory_bytes > taken:
                    taken = follower.memory_bytes
                    await self.accelerator.note_taken(self.job, taken)
                if self.job.interrupted.is_set() and stopping is None:
                    stopping = asyncio.create_task(child.stop(), name=f"stop training {self.row.id}")
            await follower.finish()
        except asyncio.CancelledError:
            await child.stop()
            await follower.finish()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_COPY_S):
                    await self.keeper.finish()
            raise
        result = await asyncio.to_thread(attempts.read_result, child.folder)
        if self.job.interrupted.is_set():
            self._done(result)
            await self.keeper.finish()
            raise JobInterrupted
        return result

    async def _newest_step(self) -> int:
        found = await asyncio.to_thread(checkpoints.newest_here, self.work)
        return found[0] if found is not None else -1

    def _folder(self, number: int) -> Path:
        return self.job.folder / f"attempt-{number}"

    async def _checkpoint_saved(self, step: int) -> None:
        self.stored = step
        await self._write(checkpoint_step=step)

    async def _checkpoint_not_saved(self, step: int, error: ModelyardError) -> None:
        message = f"The checkpoint of step {step} is on this machine's disk only: {error.message}"
        await self.job.event(message, level="warning", data={"code": error.code})

    # The adapter

    async def _publish(self, result: dict[str, Any]) -> None:
        _leave_if_interrupted(self.job)
        found = {name: result.get(name) for name in ("figures", "evaluation", "versions")}
        await self._write(phase=Phase.PUBLISHING, **found)
        trained = publishing.Trained(self.row, self.base, self.dataset, result)
        async with self.sessions.read() as session:
            known = await models.find(session, self.row.adapter_id)
        if known is not None:
            return  # by an earlier run of the server
        about = await publishing.publish(trained, Path(result["adapter_dir"]), self.settings.models_dir)
        await self._or_interrupt(self._store_adapter(self.settings.models_dir / about["path"]))
        async with self.sessions.begin() as session:
            await models.add(session, self.row.adapter_id, publishing.REVISION, about)
        await self.job.event(f"{self.row.adapter_id} is in the store.", data={"commit": about["commit"]})

    async def _store_adapter(self, folder: Path) -> None:
        try:
            await checkpoints.save(self.storage, f"{checkpoints.prefix(self.row.id)}adapter/", folder)
        except ModelyardError as error:
            message = f"The adapter is on this machine's disk only: {error.message}"
            await self.job.event(message, level="warning", data={"code": error.code})

    async def _into_service(self, result: dict[str, Any]) -> None:
        _leave_if_interrupted(self.job)
        await self._write(phase=Phase.DEPLOYING)
        checks = await put_into_service(
            self.job, self.sessions, self.settings, self.told,
            model_id=self.row.model_id, adapter_id=self.row.adapter_id,
        )  # fmt: skip
        async with self.sessions.begin() as session:
            await session.execute(update(Finetune).where(Finetune.id == self.row.id).values(checks=checks))
            await models.note_checks(session, self.row.adapter_id, checks)
        if self.row.promote is not None:
            promotion = await promote(
                self.sessions, self.told,
                name=self.row.name, adapter_id=self.row.adapter_id, wanted=self.row.promote,
                evaluation=result.get("evaluation"),
            )  # fmt: skip
            await self._write(promotion=promotion)
            moved = "leads to the adapter now" if promotion["moved"] else "stays as it was"
            await self.job.event(f"The alias {promotion['alias']} {moved}: {promotion['why']}", data=promotion)

    async def _clear(self) -> None:
        """Remove what a training that is done does not need any more."""
        try:
            await checkpoints.remove_checkpoints(self.storage, self.row.id)
        except ModelyardError as error:
            message = f"Checkpoints are left in the storage, and go when the training is deleted: {error.message}"
            await self.job.event(message, level="warning", data={"code": error.code})
        await asyncio.to_thread(shutil.rmtree, self.work, ignore_errors=True)

    # Both

    async def _write(self, **values: Any) -> None:
        async with self.sessions.begin() as session:
            await session.execute(update(Finetune).where(Finetune.id == self.row.id).values(**values))
        self.job.tell()

    async def _or_interrupt(self, work: Awaitable[T]) -> T:
        """Return what the work does, or end it when the job is interrupted."""
        doing = asyncio.ensure_future(work)
        interrupted = asyncio.ensure_future(self.job.interrupted.wait())
        try:
            await asyncio.wait({doing, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise JobInterrupted
            return doing.result()
        finally:
            interrupted.cancel()
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)


def _leave_if_interrupted(job: JobContext) -> None:
    if job.interrupted.is_set():
        raise JobInterrupted


def _keep_result(work: Path, result: dict[str, Any]) -> None:
    beside = work / ".result.json"
    beside.write_text(json.dumps(result), "utf-8")
    os.replace(beside, work / "result.json")


def _kept_result(work: Path) -> dict[str, Any] | None:
    """Return the result of a trainer that has done its work, if its adapter is still there."""
    try:
        result: dict[str, Any] = json.loads((work / "result.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if Path(result["adapter_dir"]).is_dir() else None
