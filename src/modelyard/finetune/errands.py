"""Short runs of the trainer that a request waits for: a plan, a merge. No job, no row: who asked gets the answer.

An errand has a folder of its own below `jobs/errands`, which is gone when the errand is over, however that is: the one
who leaves the `errand` block ends its child and removes it, and what a killed server left is swept at the next start.
They run one at a time, in the order in which they came: each takes as much memory as a training, and holds it in the
ledger (`capacity`) while its child runs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from modelyard import evidence
from modelyard.capacity.one_shot import OneShotMemory
from modelyard.errors import BadGateway, JobFailure, ModelNotFound, ModelyardError, Unavailable, Unprocessable
from modelyard.finetune import attempts
from modelyard.processes import Child, Children, Outcome
from modelyard.settings import Settings
from modelyard.trainer.spec import Spec

log = logging.getLogger(__name__)

#: Failures that may pass by themselves, or when somebody makes room.
PASSING = frozenset({"out_of_memory", "disk_full", "no_process", "stopped"})
RETRY_AFTER_S = 60
#: The fields of a request that failures speak of.
PARAMS = {
    "max_seq_len_too_long": "hyperparameters.max_seq_len",
    "unknown_target_modules": "hyperparameters.target_modules",
    "experts_without_dropout": "hyperparameters.dropout",
    "packing_unsupported": "hyperparameters.packing",
    "quantization_needs_gpu": "hyperparameters.quantization",
    "nothing_to_learn": "dataset_id",
    **dict.fromkeys(
        (
            "bad_chat_template",
            "bad_configuration",
            "bad_tokenizer",
            "bad_weights",
            "broken_model",
            "loads_from_elsewhere",
            "no_stop_token",
            "remote_code",
            "tokens_beyond_embedding",
            "unsupported_architecture",
            "unsupported_quantization",
            "unsupported_tokenizer",
        ),
        "model_id",
    ),
}

STOP_TIMEOUT_S = 5.0
LOG = "log.txt"
#: How much of its log shows how a child died.
LAST_LINES, LAST_BYTES = 5, 4096


@dataclass(frozen=True)
class Work:
    """The work of one errand: what its child is told, and by which variables it sees its accelerator."""

    spec: Spec
    env: Mapping[str, str] = field(default_factory=dict)


class Errands:
    """Runs errands for the server that has `children`, until `close`. `memory` is for what they hold."""

    def __init__(self, settings: Settings, children: Children, memory: OneShotMemory) -> None:
        self._settings = settings
        self._children = children
        self.memory = memory
        self._folder = settings.jobs_dir / "errands"
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()
        self._is_ending = False

    async def sweep(self) -> None:
        """Remove what a server that was killed has left. For the start of a server, when strays have been ended."""
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def end(self) -> None:
        """Have what runs and what waits end, and begin nothing more. Safe to repeat."""
        self._is_ending = True
        for task in self._running:
            task.cancel()

    async def close(self) -> None:
        """End it all, and wait until nothing of it is left. Safe to repeat."""
        self.end()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self.memory.close()

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[Path]:
        """Give an errand its folder for the block."""
        folder = self._folder / uuid4().hex
        await asyncio.to_thread(folder.mkdir, parents=True, mode=0o700)
        try:
            yield folder
        finally:
            await _surely(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))

    async def run(self, folder: Path, turn: Callable[[], AbstractAsyncContextManager[Work]]) -> dict[str, Any]:
        """Have the trainer do the work that `turn` gives when it is its turn, and return its result.

        The block of `turn`, which holds the memory, lasts until the child has ended. Cancelling it ends the child and
        waits until nothing of it is left.

        Raises:
            ModelNotFound: the model or the adapter was deleted meanwhile.
            ModelyardError: it failed, was killed or died; the cause and what to do.
        """
        if self._is_ending:
            raise _stopping()
        begun: list[Spec] = []
        task = asyncio.create_task(self._run(folder, turn, begun), name=f"errand {folder.name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except JobFailure as failure:
            if begun and (deleted := await asyncio.to_thread(_deleted, begun[0])) is not None:
                raise ModelNotFound(deleted, hint="It was deleted while the trainer read it.") from failure
            raise refusal(failure) from failure
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if self._is_ending and own is not None and not own.cancelling():
                raise _stopping() from None
            task.cancel()
            await _surely(asyncio.gather(task, return_exceptions=True))
            raise

    async def _run(
        self, folder: Path, turn: Callable[[], AbstractAsyncContextManager[Work]], begun: list[Spec]
    ) -> dict[str, Any]:
        async with self._turn, turn() as work:
            begun.append(work.spec)
            await asyncio.to_thread(work.spec.write, folder / "training.json")
            command = attempts.command(self._settings, folder, work.env)
            try:
                child = await self._children.start(folder, command, log=folder / LOG, stop_timeout_s=STOP_TIMEOUT_S)
            except RuntimeError as error:
                log.error("an errand's child did not start: %s", error)
                raise JobFailure(
                    "no_process", "The trainer could not be started.", "Free memory on the server, and try again."
                ) from error
            try:
                outcome = await child.wait()
            except asyncio.CancelledError:
                await _surely(child.stop())
                raise
            return await asyncio.to_thread(_result, child, outcome, Path(work.spec.result))


def refusal(failure: JobFailure) -> ModelyardError:
    """Return what to answer to the request of an errand that failed."""
    message = f"{failure.message} {failure.hint}".strip()
    error: ModelyardError
    if failure.code in PASSING:
        error = Unavailable(message, retry_after_s=RETRY_AFTER_S, code=failure.code)
    elif failure.code == "trainer_failed":
        error = BadGateway(message, code=failure.code)
    else:
        error = Unprocessable(message, param=PARAMS.get(failure.code), code=failure.code)
    error.evidence = failure.evidence
    return error


def _deleted(spec: Spec) -> str | None:
    """Return which of the spec's models has no folder any more."""
    read = ((spec.model_id, spec.model_dir), (spec.adapter_id, spec.adapter_dir))
    return next((model_id for model_id, folder in read if folder and not Path(folder).is_dir()), None)


def _stopping() -> ModelyardError:
    return refusal(JobFailure("stopped", "The server is being stopped.", "Try again when it is back."))


async def _surely(work: Any) -> None:
    """Await something to its end, although this task is being cancelled, even twice."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})


def _result(child: Child, outcome: Outcome, path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        words = evidence.clipped(_last_words(child.folder / LOG))
        log.warning("the trainer ended without a result (%s): %s", outcome.describe(), " | ".join(words))
        if (shortage := attempts.shortage_of(outcome, words)) is not None:
            raise JobFailure(
                "out_of_memory",
                f"Memory did not suffice: {shortage}, and the trainer ended ({outcome.describe()}).",
                "Free some and try again, or take fewer or shorter rows.",
                words,
            ) from None
        raise JobFailure(
            "out_of_memory" if outcome.signal == signal.SIGKILL else "trainer_failed",
            f"The trainer ended before its work was done ({outcome.describe()}).",
            "The system ends processes when memory runs short: free some, and try again."
            if outcome.signal == signal.SIGKILL
            else "The server's log has its last words.",
            words,
        ) from None
    failure = result.get("failure")
    if failure is not None:
        raise JobFailure(failure["code"], failure["message"], failure["hint"], failure.get("evidence", ()))
    if result.get("stopped"):
        raise JobFailure("stopped", "The trainer was stopped before its work was done.", "Try again.")
    return result


def _last_words(path: Path) -> list[str]:
    """Return the last lines of a log that may not be there."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:]
    return []
