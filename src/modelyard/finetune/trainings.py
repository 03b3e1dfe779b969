"""The function of FT jobs: bring the data, wait for room, run the trainer, publish its adapter, put it into service.

Every phase may begin again after a restart of the server, with what is on disk: a trainer that still runs is adopted,
one that is gone is replaced by another, which goes on from the newest checkpoint, and a result that is there is not
computed again. Only here a training's row is told what is; `trainer_runs` has the trainer, and `following` writes
down what it reports.

    <data>/finetunes/<id>/data.jsonl          the dataset, while the job runs
    <data>/finetunes/<id>/checkpoints/        the trainer's, until the training is done
    <data>/finetunes/<id>/adapter/            the trainer's, until it is in the store
    <data>/finetunes/<id>/result.json         what the trainer said when it had done its work
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import update

from modelyard.datasets import actions as datasets
from modelyard.datasets import reading
from modelyard.datasets.tables import Dataset
from modelyard.db import Sessions
from modelyard.engine import adapter_support
from modelyard.engine.model_files import model_files
from modelyard.errors import JobFailure, ModelyardError, ObjectNotFound, StorageUnavailable
from modelyard.finetune import actions, attempts, checkpoints, publishing
from modelyard.finetune.accelerator import Accelerator
from modelyard.finetune.into_service import promote, put_into_service
from modelyard.finetune.needs import Need, estimate
from modelyard.finetune.tables import Finetune, OnBusy, Phase
from modelyard.finetune.trainer_runs import TrainerRuns
from modelyard.hardware import this_machine
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.models import actions as models
from modelyard.models import store
from modelyard.models.tables import Model
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.paths import inside
from modelyard.processes import Children
from modelyard.retry import Backoff, retry
from modelyard.settings import Settings
from modelyard.storage import Storage
from modelyard.trainer.spec import Hyperparameters

log = logging.getLogger(__name__)

T = TypeVar("T")

#: For a storage that is away: 15 seconds of pauses in all.
STORAGE_BACKOFF = Backoff(first_s=1.0, longest_s=10.0)
STORAGE_TRIES = 5
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
        tokenizers: TokenizerChildren,
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._storage = storage
        self._children = children
        self._accelerator = accelerator
        self._tokenizers = tokenizers

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
            base = models.at_pin(await models.get(session, row.model_id), row.pinned)
            dataset = await datasets.get(session, row.dataset_id)
        if not await asyncio.to_thread(store.folder_of(self._settings.models_dir, base.path).is_dir):
            raise JobFailure(
                "base_lost",
                f"The training began on commit {base.commit} of {base.model_id}, whose folder is not in the store any "
                "more.",
                f"Add the model again with revision={base.commit} and resume the training, or start it anew.",
            )
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
        self.storage, self.children = yard._storage, yard._children
        self.accelerator, self.tokenizers = yard._accelerator, yard._tokenizers
        self.work = checkpoints.folder_of(self.settings.finetunes_dir, row.id)
        self.data = self.work / "data.jsonl"
        self.stored = row.checkpoint_step if row.checkpoint_step is not None else -1
        self.keeper = checkpoints.Keeper(
            self.storage, row.id, self.stored, saved=self._checkpoint_saved, failed=self._checkpoint_not_saved
        )

    async def run(self) -> None:
        """Go through the phases that are left."""
        await asyncio.to_thread(self.work.mkdir, parents=True, exist_ok=True, mode=0o700)
        result = await asyncio.to_thread(_kept_result, self.work)
        if result is None:
            try:
                result = await self._train()
            except (JobFailure, JobInterrupted):
                await self.keeper.finish()  # another machine may go on
                raise
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
        runs = TrainerRuns(
            self.settings, self.sessions, self.children, self.job, self.row, self.base,
            work=self.work, data=self.data, keeper=self.keeper, note_taken=self._note_taken,
        )  # fmt: skip
        # It is not asked for room again: it has it.
        result = await runs.adopted()
        if result is not None:
            await asyncio.to_thread(_keep_result, self.work, result)
            await self.accelerator.give_back(self.job, self.row.id)
        else:
            await self._write(phase=Phase.PREPARING)
            # A trainer has no limits of its own, and would stall or die.
            folder = self.settings.models_dir / self.base.path
            await self._or_interrupt(self.tokenizers.tried(self.base.model_id, folder))
            await self._or_interrupt(self._wait_out_storage(self._prepare))
            need = await asyncio.to_thread(self._need, await self._longest_row())
            fault = adapter_support.fault((await asyncio.to_thread(model_files, self.settings, self.base)).config)
            if fault is not None:
                remedy = adapter_support.remedy(self.row.adapter_id)
                await self.job.event(f"{self.base.model_id} {fault}. When it is trained, {remedy}", level="warning")
            on_busy, holder = OnBusy(self.row.on_busy), f"the training {self.row.name}"
            async with self.accelerator.held(self.job, self.row.id, need, on_busy, holder=holder) as share:
                result = await runs.to_the_end(share)
                # Before the accelerator is given back, which may take a while.
                await asyncio.to_thread(_keep_result, self.work, result)
        return result

    async def _note_taken(self, taken_bytes: int) -> None:
        await self.accelerator.note_taken(self.job, taken_bytes)

    def _need(self, longest_tokens: int | None) -> Need:
        files = model_files(self.settings, self.base)
        settings = Hyperparameters(**self.row.hyperparameters)
        return estimate(
            files.config, files.size_bytes, settings, characters=self.dataset.size_bytes,
            has_gpu=this_machine().has_gpu, longest_tokens=longest_tokens, processes=self.settings.trainer_processes,
        )  # fmt: skip

    async def _longest_row(self) -> int | None:
        """Return how many tokens the longest row has at most, as far as its characters tell."""
        try:
            report = (await reading.about(self.storage, self.dataset)).report
            return int(report["characters"]["longest"]) + TEMPLATE_TOKENS
        except (ModelyardError, KeyError, TypeError):
            return None

    async def _wait_out_storage(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what needs the storage, again and again for a while where that is away."""

        async def tell(error: StorageUnavailable, pause_s: float) -> None:
            await self.job.event(f"{error.message} Trying again in {pause_s:g} s.", level="warning")

        try:
            await retry(work, StorageUnavailable, STORAGE_BACKOFF, tries=STORAGE_TRIES, before_pause=tell)
        except ModelyardError as error:
            hint = "Resume the training when the storage is as it should be."
            raise JobFailure(error.code, error.message, hint) from error

    async def _prepare(self) -> None:
        """Bring the dataset, and the newest checkpoint if this machine has only older ones."""
        if not await asyncio.to_thread(self.data.exists):
            try:
                await checkpoints.fetch_file(self.storage, self.dataset.data_key, self.data, self.dataset.sha256)
            except (checkpoints.DamagedCheckpoint, ObjectNotFound):
                raise JobFailure(
                    "dataset_damaged",
                    f"The file of the dataset {self.dataset.id} in the storage is not the one that was uploaded.",
                    "Upload it again, and train on that dataset.",
                ) from None
        here = await asyncio.to_thread(checkpoints.newest_here, self.work)
        if here is not None and here[0] >= self.stored:
            return
        for step in reversed(await checkpoints.steps(self.storage, self.row.id)):
            if here is not None and here[0] >= step:
                return
            try:
                key = f"{checkpoints.prefix(self.row.id)}checkpoints/step-{step}/"
                await checkpoints.fetch(self.storage, key, self.work / "checkpoints" / f"step-{step}")
            except checkpoints.DamagedCheckpoint as error:
                await self.job.event(f"The checkpoint of step {step} is not used: {error}.", level="warning")
                continue
            await self.job.event(f"The checkpoint of step {step} is here: the training goes on from it.")
            return

    async def _checkpoint_saved(self, step: int) -> None:
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
        adapter_dir = await asyncio.to_thread(inside, self.work, Path(result["adapter_dir"]))
        about = await publishing.publish(trained, adapter_dir, self.settings.models_dir)
        await self._or_interrupt(self._store_adapter(store.folder_of(self.settings.models_dir, about["path"])))
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
            self.job, self.sessions, self.settings,
            model_id=self.row.model_id, adapter_id=self.row.adapter_id,
        )  # fmt: skip
        async with self.sessions.begin() as session:
            await session.execute(update(Finetune).where(Finetune.id == self.row.id).values(checks=checks))
            await models.note_checks(session, self.row.adapter_id, checks)
        if self.row.promote is not None:
            promotion = await promote(
                self.sessions,
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
        """Write what is. Waits while the database is away."""

        async def write() -> None:
            async with self.sessions.begin() as session:
                await session.execute(update(Finetune).where(Finetune.id == self.row.id).values(**values))

        await self.job.patiently(write)

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
