"""The function of DOWNLOAD jobs: start or adopt the child, tell its progress, restart it while that helps.

A watchdog sees to it that something happens: when neither a byte is added on disk nor a line to the progress file for
`download_stall_s`, the child is ended and started again without xet. Failures that may pass (network, a hub that
is down, a child that was killed) are tried again; `download_attempts` in a row without a new byte end the job with the
last cause. What has arrived stays, so that an interrupt, a failure or a crash costs nothing but time. The row is
written last, when the folder is whole and in place.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from modelyard import evidence
from modelyard.child_environment import child_environment
from modelyard.db import Sessions
from modelyard.errors import JobFailure, Unprocessable
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.models import actions, adapter_facts, adapter_rendering, config_file, store
from modelyard.models.adapter_checks import check_facts
from modelyard.models.adapter_facts import AdapterFacts
from modelyard.models.chat_template import GUESSED_HINT, GUESSED_WARNING, TemplateSource
from modelyard.models.download_spec import GIB, Spec
from modelyard.models.mistral_format import is_mistral_format
from modelyard.models.stored_adapters import with_facts
from modelyard.models.tables import Model
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.processes import Child, Children, Command
from modelyard.retry import Backoff
from modelyard.settings import Settings

POLL_S = 0.2
STOP_TIMEOUT_S = 5.0
BACKOFF = Backoff(first_s=0.25, longest_s=15.0)
#: A connection that says nothing for so long is taken up again by the child itself.
READ_TIMEOUT_S = 20
#: A busy machine may take its time to start a process: that is no stall.
START_TIMEOUT_S = 60.0
#: How much of its log shows how a child died.
LAST_LINES, LAST_BYTES = 5, 4096
#: Failures by which a hub says nothing about a model.
UNANSWERED = frozenset({"no_network", "connection_lost", "hub_failed", "hub_busy", "stalled"})

_PHASES = {
    "configuration": "Fetching and checking the configuration.",
    "weights": "Fetching the weights.",
    "publish": "Moving the model into the store.",
}


class Downloads:
    """Runs downloads. `run` is the job function."""

    def __init__(
        self, sessions: Sessions, children: Children, settings: Settings, tokenizers: TokenizerChildren
    ) -> None:
        self._sessions = sessions
        self._children = children
        self._settings = settings
        self._tokenizers = tokenizers

    async def run(self, job: JobContext) -> None:
        """Bring the model of the job's spec into the store; done at once if it is there.

        Raises:
            JobFailure: with the cause and what to do.
            JobInterrupted: the child is gone; what has arrived stays.
        """
        model_id, revision = job.spec["model_id"], job.spec["revision"]
        _leave_if_interrupted(job)
        async with self._sessions.read() as session:
            model = await actions.is_there(session, model_id, revision)
            before = await actions.find(session, model_id)
        if model is not None and not store.folder_of(self._settings.models_dir, model.path).is_dir():
            model = None
        if model is not None and actions.is_fixed(model, revision):
            await self._name_base(job, model.adapter)
            await job.event(f"{model_id} is in the store already, at commit {model.commit}.")
            return
        try:
            result = await self._attempts(job, asks_only=model is not None)
        except _NotAsked as failure:
            assert model is not None
            await self._name_base(job, model.adapter)
            await job.event(
                f"{model_id} is in the store already, at commit {model.commit}. Whether {revision} has moved since "
                f"could not be asked: {failure}",
                level="warning",
            )
            return
        _refuse_base_of_a_model(job, result["adapter"])
        if "base_model_id" in job.spec and (facts := adapter_facts.from_json(result.get("adapter_facts"))) is not None:
            await self._check_base(job, facts)
        result["base_model_id"] = _base_of(job, result, before)
        async with self._sessions.begin() as session:
            await actions.add(session, model_id, revision, result)
        await asyncio.to_thread(shutil.rmtree, job.folder / "hub", ignore_errors=True)
        # Facts may have thousands of layers, and are the row's.
        told = {name: value for name, value in result.items() if name != "adapter_facts"}
        await job.event(_arrived(model_id, revision, model, result["commit"]), data=told)
        if result.get("chat_template") == TemplateSource.GUESSED:
            message = f"{GUESSED_WARNING.format(model_id=model_id)} {GUESSED_HINT}"
            await job.event(message, level="warning", data={"code": "chat_template_guessed"})
        await self._compare(job, model_id)
        left_out = result.get("left_out") or []
        if left_out:
            await job.event(_told(left_out), data={"left_out": left_out})

    async def _compare(self, job: JobContext, model_id: str) -> None:
        """Say what an adapter carries otherwise than its base, or an arriving base than its adapters do."""
        async with self._sessions.read() as session:
            model = await actions.get(session, model_id)
            base = model if not model.adapter else await actions.find(session, model.base_model_id or "")
            adapters = [model] if model.adapter else await actions.adapters_of(session, model_id)
        if base is None or base.adapter or not adapters:
            return
        warnings = await adapter_rendering.compare(
            self._sessions, self._settings.models_dir, self._tokenizers, base, adapters
        )
        for adapter_id, said in warnings.items():
            await job.event(said, level="warning", data={"code": adapter_rendering.EVENT, "adapter_id": adapter_id})

    async def _name_base(self, job: JobContext, adapter: bool) -> None:
        _refuse_base_of_a_model(job, adapter)
        base = job.spec.get("base_model_id")
        if base is None:
            return
        async with self._sessions.read() as session:
            row = await actions.get(session, job.spec["model_id"])
        [stored] = await with_facts(self._sessions, self._settings.models_dir, [row])
        await self._check_base(job, stored.facts)
        async with self._sessions.begin() as session:
            await actions.name_base(session, await actions.get(session, job.spec["model_id"]), base)

    async def _check_base(self, job: JobContext, facts: AdapterFacts) -> None:
        """Refuse a base that the request names and the adapter does not fit, as a deploy would.

        A base that is still on its way is left to the deploy, and so is an adapter that fits none.
        """
        async with self._sessions.read() as session:
            base = await actions.find(session, job.spec["base_model_id"])
        if base is None or base.adapter or facts.refusal is not None:
            return
        folder = store.folder_of(self._settings.models_dir, base.path)
        try:
            await asyncio.to_thread(_check_fits, facts, folder, job.spec["model_id"])
        except Unprocessable as refused:
            raise JobFailure(
                refused.code,
                f"It does not fit {base.model_id}, which base_model_id names. {refused.message}",
                "Name the model that it was trained on, or add it without base_model_id.",
            ) from refused

    async def _attempts(self, job: JobContext, *, asks_only: bool = False) -> dict[str, Any]:
        """Run children until one brings the model, or nothing helps any more.

        Raises:
            _NotAsked: with `asks_only`: the hub did not answer, so that nobody knows whether there is more to bring.
        """
        partial = store.partial_dir(self._settings.models_dir, job.spec["model_id"])
        number = len(list(job.folder.glob("attempt-*")))
        child = await self._children.adopt(job.folder / f"attempt-{number}") if number else None
        fruitless, best, xet = 0, await asyncio.to_thread(store.bytes_below, partial), True
        while True:
            if child is None:
                number += 1
                child = await self._start(job, job.folder / f"attempt-{number}", partial, xet=xet)
            result = await self._follow(job, child, partial)
            failure = result.get("failure")
            if failure is None:
                return result
            present = await asyncio.to_thread(store.bytes_below, partial)
            if asks_only and failure["code"] in UNANSWERED and not present:
                raise _NotAsked(failure["message"])
            fruitless = 0 if present > best else fruitless + 1
            best, child = max(present, best), None
            xet = xet and failure["code"] != "stalled"
            if not failure["transient"] or fruitless >= self._settings.download_attempts:
                raise JobFailure(failure["code"], failure["message"], failure["hint"], failure.get("evidence", ()))
            await job.event(f"{failure['message']} Trying again.", level="warning", data={"code": failure["code"]})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BACKOFF.pause_s(fruitless + 1)):
                    await job.interrupted.wait()
            _leave_if_interrupted(job)

    async def _start(self, job: JobContext, folder: Path, partial: Path, *, xet: bool) -> Child:
        settings = self._settings
        quota = settings.store_quota_gib
        spec = Spec(
            model_id=job.spec["model_id"],
            revision=job.spec["revision"],
            models_dir=str(settings.models_dir),
            partial_dir=str(partial),
            progress=str(folder / "progress.jsonl"),
            result=str(folder / "result.json"),
            reserve_bytes=int(settings.disk_reserve_gib * GIB),
            quota_bytes=int(quota * GIB) if quota is not None else None,
            import_dir=str(settings.import_dir) if settings.import_dir is not None else None,
        )
        spec.write(folder / "download.json")
        extra = {
            "HF_ENDPOINT": settings.hf_endpoint,
            # A home of its own: neither a token nor a cache of the server's user is looked at.
            "HF_HOME": str(job.folder / "hub"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(max(1, min(READ_TIMEOUT_S, int(settings.download_stall_s)))),
        }
        if settings.hf_token is not None:
            extra["HF_TOKEN"] = settings.hf_token
        if not xet:
            extra["HF_HUB_DISABLE_XET"] = "1"
        argv = (sys.executable, "-P", "-m", "modelyard.models.download_child", str(folder / "download.json"))
        command = Command(argv, child_environment(extra, hub=True))
        return await self._children.start(folder, command, log=job.log, stop_timeout_s=STOP_TIMEOUT_S)

    async def _follow(self, job: JobContext, child: Child, partial: Path) -> dict[str, Any]:
        """Watch a child to its end and return its result, or the failure that its end amounts to."""
        clock, patience_s = asyncio.get_running_loop().time, self._settings.download_stall_s
        teller = _Teller(job, child.folder / "progress.jsonl")
        ended = asyncio.ensure_future(child.wait())
        seen: object = None
        moved_at = clock()
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=POLL_S)
                if job.interrupted.is_set():
                    await child.stop()
                    raise JobInterrupted
                await teller.tell()
                now_seen = (teller.offset, await asyncio.to_thread(store.bytes_below, partial))
                if now_seen != seen:
                    seen, moved_at = now_seen, clock()
                elif clock() - moved_at > (patience_s if teller.offset else max(patience_s, START_TIMEOUT_S)):
                    await child.stop()
                    return _stalled(patience_s)
            await teller.tell()
        except asyncio.CancelledError:
            await child.stop()
            raise
        return await asyncio.to_thread(_result_of, child, self._settings.models_dir, job.log)


class _NotAsked(Exception):
    """The hub did not answer a question that could wait."""


class _Teller:
    """Reads what the child appends to its progress file, and passes it on."""

    def __init__(self, job: JobContext, path: Path) -> None:
        self.offset = 0
        self._job = job
        self._path = path
        self._phase = ""

    async def tell(self) -> None:
        """Tell the newest progress, and each phase that began."""
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                lines = file.read()
        except FileNotFoundError:
            return
        whole = lines[: lines.rfind(b"\n") + 1]
        self.offset += len(whole)
        state = None
        for line in whole.splitlines():
            state = json.loads(line)
            phase = state["phase"]
            if phase != self._phase and phase in _PHASES:
                await self._job.event(_PHASES[phase], data={"total": state["total"]})
            self._phase = phase
        if state is not None and state["total"]:
            await self._job.progress(max(0, min(state["done"], state["total"])), state["total"], "bytes")


def _arrived(model_id: str, revision: str, before: Model | None, commit: str) -> str:
    """Return one sentence on what is in the store now."""
    if before is None:
        return f"{model_id} is in the store, at commit {commit}."
    if before.commit == commit:
        return f"{model_id} is in the store already, at commit {commit}: {revision} has not moved."
    return (
        f"{model_id} is in the store, at commit {commit}: {revision} has moved on from {before.commit}. What serves or "
        "trains on that one stays with it; deploy it again to move."
    )


def _told(left_out: list[dict[str, Any]]) -> str:
    """Return one sentence on what was not fetched."""
    kinds = []
    for one in left_out:
        more = ", ..." if one["count"] > len(one["files"]) else ""
        kinds.append(f"{', '.join(one['files'])}{more} ({one['reason']})")
    return f"Left out: {'; '.join(kinds)}."


def _refuse_base_of_a_model(job: JobContext, adapter: bool) -> None:
    if "base_model_id" in job.spec and not adapter:
        raise JobFailure(
            "not_an_adapter",
            f"{job.spec['model_id']} is a whole model: it is put on no base.",
            "Add it without base_model_id.",
        )


def _base_of(job: JobContext, result: dict[str, Any], before: Model | None) -> str | None:
    """Return which model an adapter belongs to: as the job says, or as was said of the same files before, or a hint."""
    said: str | None = job.spec.get("base_model_id")
    hint: str | None = result["base_model_id"]
    if said is None and before is not None and (hint is None or result["commit"] == before.commit):
        return before.base_model_id
    return said or hint


def _check_fits(facts: AdapterFacts, base: Path, adapter_id: str) -> None:
    if base.is_dir() and not is_mistral_format(base):
        check_facts(facts, config_file.read(base), adapter_id=adapter_id, base_folder=base)


def _leave_if_interrupted(job: JobContext) -> None:
    if job.interrupted.is_set():
        raise JobInterrupted


def _result_of(child: Child, models_dir: Path, log: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads((child.folder / "result.json").read_text("utf-8"))
    except FileNotFoundError:
        how = child.outcome.describe() if child.outcome is not None else "unknown"
        died = _transient(
            "download_died",
            f"The download process ended before its work was done ({how}).",
            "Look at the job's log; if the machine is short of memory, free some. Then add the model again.",
        )
        died["failure"]["evidence"] = evidence.clipped(_last_words(log))
        return died
    # Checked like everything that comes from outside: what reads a hostile hub wrote it.
    if "failure" not in result and not store.folder_of(models_dir, result["path"]).is_dir():
        return _transient("download_lost", "The model's folder vanished before its job ended.", "Add it again.")
    return result


def _last_words(log: Path) -> list[str]:
    """Return the last lines of a log that may not be there."""
    with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:]
    return []


def _stalled(seconds: float) -> dict[str, Any]:
    return _transient(
        "stalled",
        f"The download stalled: no new byte for {seconds:g} s.",
        "Check the network and HF_ENDPOINT, then add the model again: it goes on where it stopped.",
    )


def _transient(code: str, message: str, hint: str) -> dict[str, Any]:
    return {"failure": {"code": code, "message": message, "hint": hint, "transient": True}}
