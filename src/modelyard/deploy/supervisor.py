"""The supervisor of a deployment: the function of its DEPLOY job, and the only writer of its state.

It gathers the facts, asks `steps.next_step`, does that one thing, and looks again when the child ended, an interrupt
came or time passed. Everything that it must remember is in the row and in the job's folder: a server that was killed
at any point finds the live engine again (`attempt-N`, the newest) or starts another.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from modelyard.db import Sessions, utcnow
from modelyard.deploy import actions, attempts
from modelyard.deploy.engine_client import EngineClient, Health
from modelyard.deploy.failures import explain
from modelyard.deploy.machine import this_machine
from modelyard.deploy.routing import Routing
from modelyard.deploy.schemas import EngineOptions
from modelyard.deploy.steps import ChildState, Facts, Step, next_step
from modelyard.deploy.tables import MOVES, Deployment, DeploymentState, Wanted
from modelyard.deploy.vllm_args import AdapterFiles, ModelFiles, engine_command, socket_path
from modelyard.errors import JobFailure
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.models.tables import Model
from modelyard.processes import Child, Children, Outcome
from modelyard.settings import Settings
from modelyard.states import move

log = logging.getLogger(__name__)
T = TypeVar("T")

PROBE_EVERY_S = 0.2
HEALTH_EVERY_S = 5.0
#: An engine that is silent or unwell this many times in a row is ended, and started again.
UNWELL_LIMIT = 6
#: An engine that stood this long has its restarts forgotten.
STABLE_S = 300.0
LONGEST_DELAY_S = 60.0
STILL_STARTING_EVERY_S = 5.0
ENGINE_GONE = "the server was restarted, and the engine is gone"


class Supervisor:
    """Gives every deployment its supervising task. `serve` is the function of the job kind DEPLOY."""

    def __init__(self, settings: Settings, sessions: Sessions, children: Children, routing: Routing) -> None:
        self.settings = settings
        self.sessions = sessions
        self.children = children
        self.routing = routing
        #: Set and replaced whenever a deployment has given its memory back.
        self.room_made = asyncio.Event()

    async def serve(self, context: JobContext) -> None:
        """Keep the job's deployment in service until it is interrupted.

        Raises:
            JobInterrupted: it was taken out of service, and nothing of it runs.
            JobFailure: it was given up, and nothing of it runs.
        """
        async with self.sessions.read() as session:
            row = await actions.of_job(session, context.id)
        # What the client to engines needs takes a while to load the first time: not in the way of requests.
        await asyncio.to_thread(importlib.import_module, "aiohttp")
        service = _Service(self, context, row)
        try:
            await service.run()
        finally:
            await service.close()

    async def check_before_serving(self) -> None:
        """Correct what the table says of engines that ended while no server looked. For the start of a server.

        Until then a request could be sent to an engine that is not there.
        """
        async with self.sessions.read() as session:
            live = await actions.live(session)
        for row in live:
            attempt = attempts.newest(self.settings.jobs_dir / str(row.job_id))
            if row.state == DeploymentState.READY and (attempt is None or not await self.children.is_running(attempt)):
                async with self.sessions.begin() as session:
                    await move(session, Deployment, row.id, "state", MOVES, DeploymentState.STARTING, ENGINE_GONE)

    def tell_room(self) -> None:
        """Wake the deployments that wait for memory."""
        self.room_made.set()
        self.room_made = asyncio.Event()


class _Service:
    """One deployment being supervised: the facts in memory, and the steps as methods."""

    def __init__(self, supervisor: Supervisor, context: JobContext, row: Deployment) -> None:
        self.yard = supervisor
        self.settings = supervisor.settings
        self.context = context
        self.row = row
        self.child: Child | None = None
        self.client: EngineClient | None = None
        self.was_ready = row.ready_at is not None
        self.delay_until = 0.0
        self.started_at = self.told_at = time.monotonic()
        self.stable_at = time.monotonic() + STABLE_S
        self.unwell = 0
        self.outcome: Outcome | None = None
        self.said_waiting = False
        self.complaint: str | None = None

    async def run(self) -> None:
        """Do one step after the other, until the deployment has ended one way or the other."""
        if self.row.state == DeploymentState.STOPPED:
            raise JobInterrupted  # the server was killed between the end of the deployment and that of its job
        if self.row.state == DeploymentState.FAILED:
            raise await self._cause()
        try:
            await self._take_up()
            while True:
                step = next_step(await self._facts())
                if step == Step.FINISH:
                    await self._move(DeploymentState.STOPPING, "no longer wanted", wanted=Wanted.DOWN)
                    await self._end(DeploymentState.STOPPED, "its engine is gone")
                    raise JobInterrupted
                if step == Step.GIVE_UP:
                    raise await self._cause()
                await self._do(step)
        except JobInterrupted:
            raise
        except Exception as error:  # whatever it was, no engine may be left without a deployment
            if self.child is not None:
                await self.child.stop()
            await self._end(DeploymentState.FAILED, error.code if isinstance(error, JobFailure) else "internal_error")
            raise

    async def close(self) -> None:
        """End the engine, if one still runs: the server stops in good order. Safe to repeat."""
        if self.client is not None:
            await self.client.close()
            self.client = None
        if self.child is not None and self.child.is_alive:
            await self.child.stop()

    async def _do(self, step: Step) -> None:
        if step == Step.START:
            await self._start()
        elif step == Step.PROBE:
            await self._probe()
        elif step == Step.CHECK_HEALTH:
            await self._check_health()
        elif step == Step.BACK_OFF:
            await self._back_off()
        elif step == Step.STOP:
            await self._move(DeploymentState.STOPPING, "no longer wanted", wanted=Wanted.DOWN)
            assert self.child is not None
            await self.child.stop()
            self.child = None
        elif step == Step.WAIT_FOR_ROOM:
            if not self.said_waiting:
                self.said_waiting = True
                await self.context.event("Waiting for the deployment before this one to give its memory back.")
            await self._sleep(1.0, self.yard.room_made.wait())
        else:
            await self._sleep(max(0.0, self.delay_until - time.monotonic()))

    async def _facts(self) -> Facts:
        wanted = Wanted.DOWN if self.context.interrupted.is_set() else Wanted.UP
        child = ChildState.NONE
        if self.child is not None:
            child = ChildState.ALIVE if self.child.is_alive else ChildState.ENDED
        return Facts(
            wanted=wanted,
            state=DeploymentState(self.row.state),
            child=child,
            was_ready=self.was_ready,
            restarts=self.row.restarts,
            max_restarts=self.settings.engine_max_restarts,
            room=child != ChildState.NONE or await self._has_room(),
            delay_over=time.monotonic() >= self.delay_until,
        )

    async def _has_room(self) -> bool:
        """Whether no older deployment of this task still holds memory that it is about to give back."""
        async with self.yard.sessions.read() as session:
            live = await actions.live(session, self.row.task)
        return not any(one.wanted == Wanted.DOWN and one.number < self.row.number for one in live)

    async def _take_up(self) -> None:
        """Find what an earlier server left of this deployment."""
        folder = attempts.newest(self.context.folder)
        if folder is None:
            return
        child = await self.yard.children.adopt(folder)
        if child is not None and child.is_alive and self.row.engine_url is not None:
            self.child = child
            self.client = EngineClient(self.row.engine_url)
            await self.context.event("Adopted the running engine after a restart of the server.")
            return
        if self.row.state == DeploymentState.READY:
            await self._move(DeploymentState.STARTING, ENGINE_GONE)

    async def _start(self) -> None:
        number, folder = attempts.following(self.context.folder)
        # A short path: a socket's may have no more than 107 bytes.
        scratch = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="modelyard-engine-"))
        url = f"unix:{socket_path(scratch)}"
        try:
            async with self.yard.sessions.read() as session:
                model, adapters = await actions.model_rows(session, self.row)
            options = EngineOptions(**self.row.options).over(self.settings)
            command = engine_command(
                self.settings.engine_python or Path(sys.executable),
                await asyncio.to_thread(self._files, model),
                [AdapterFiles(one.model_id, self.settings.models_dir / one.path) for one in adapters],
                options,
                await asyncio.to_thread(this_machine),
                scratch,
                self.settings.data_dir / "cache",
            )
            await self._move(DeploymentState.STARTING, f"attempt {number}", engine_url=url)
            await asyncio.to_thread(attempts.begin_log, self.context.log, number, command.argv)
            self.child = await self.yard.children.start(
                folder,
                command,
                log=self.context.log,
                stop_timeout_s=self.settings.engine_stop_timeout_s,
            )
        except BaseException:
            if self.child is None:
                await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
            raise
        self.client = EngineClient(url)
        self.started_at = self.told_at = time.monotonic()
        self.complaint = None
        await self.context.event(f"Starting the engine (attempt {number}).", data={"attempt": number})

    def _files(self, model: Model) -> ModelFiles:
        path = self.settings.models_dir / model.path
        try:
            config = json.loads((path / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise JobFailure(
                "broken_model",
                f"The configuration of {model.model_id} cannot be read: {error}.",
                "Delete the model and add it again.",
            ) from error
        return ModelFiles(model.model_id, path, model.size_bytes, config, model.task)

    async def _probe(self) -> None:
        """Ask the engine to do its work once; READY if it does."""
        assert self.client is not None
        waited_s = self._waited_s()
        health = await self._unless_it_ends(self.client.health())
        if health == Health.GOOD:
            for name in [self.row.model_id, *self.row.adapter_ids]:
                # The first generation compiles and may take long; the time for the whole start bounds it too.
                left_s = max(1.0, self.settings.engine_start_timeout_s - waited_s)
                self.complaint = await self._unless_it_ends(self.client.generates(name, self.row.task, left_s))
                if self.complaint != "":
                    break
            else:
                await self._ready()
                return
        waited_s = self._waited_s()
        if waited_s > self.settings.engine_start_timeout_s:
            raise JobFailure(
                "engine_never_ready",
                f"The engine did not generate a token within {self.settings.engine_start_timeout_s:.0f} s"
                + (f"; its answer was {self.complaint}." if self.complaint else "."),
                "Read the job's log; a large model may need a longer MODELYARD_ENGINE_START_TIMEOUT_S.",
            )
        if time.monotonic() - self.told_at > STILL_STARTING_EVERY_S:
            self.told_at = time.monotonic()
            await self.context.event(
                f"Still starting, {waited_s:.0f} s so far.", level="debug", data={"seconds": round(waited_s, 1)}
            )
        await self._sleep(PROBE_EVERY_S)

    def _waited_s(self) -> float:
        return time.monotonic() - self.started_at

    async def _ready(self) -> None:
        seconds = round(self._waited_s(), 2)
        self.was_ready = True
        self.unwell = 0
        self.stable_at = time.monotonic() + STABLE_S
        await self._move(DeploymentState.READY, "it generated a token", ready_at=utcnow())
        await self.context.event(
            f"Ready: {self.row.model_id} did its first work after {seconds:.1f} s.",
            data={"state": "READY", "seconds": seconds},
        )

    async def _check_health(self) -> None:
        assert self.client is not None
        assert self.child is not None
        if await self._sleep(HEALTH_EVERY_S):
            return
        health = await self._unless_it_ends(self.client.health())
        self.unwell = 0 if health == Health.GOOD else self.unwell + 1
        if self.row.restarts and time.monotonic() > self.stable_at:
            async with self.yard.sessions.begin() as session:
                row = await actions.of_job(session, self.context.id)
                row.restarts = self.row.restarts = 0
        if self.unwell >= UNWELL_LIMIT and self.child.is_alive:
            await self.context.event(f"The engine has been {health} for a while; ending it.", level="warning")
            await self.child.stop()

    async def _back_off(self) -> None:
        assert self.child is not None
        self.outcome = await self.child.wait()
        cause = await self._cause()
        delay_s = min(self.settings.engine_restart_delay_s * 2**self.row.restarts, LONGEST_DELAY_S)
        self.child = None
        if self.client is not None:
            await self.client.close()
        await self._move(DeploymentState.BACKOFF, cause.code, restarts=self.row.restarts + 1, engine_url=None)
        self.delay_until = time.monotonic() + delay_s
        await self.context.event(
            f"The engine died. {cause.message} It is started again in {delay_s:.0f} s "
            f"(restart {self.row.restarts} of {self.settings.engine_max_restarts}).",
            level="warning",
            data={"code": cause.code, "restart": self.row.restarts},
        )

    async def _cause(self) -> JobFailure:
        if self.child is not None and not self.child.is_alive:
            self.outcome = self.child.outcome
        text = await asyncio.to_thread(attempts.newest_log, self.context.log)
        failure = explain(text, self.outcome)
        failure.hint = failure.hint.replace("<id>", str(self.context.id))
        return failure

    async def _end(self, to: DeploymentState, reason: str) -> None:
        """Write the end, and let go of the models."""
        self.child = None
        await self._move(to, reason, wanted=Wanted.DOWN, engine_url=None, ended_at=utcnow())
        async with self.yard.sessions.begin() as session:
            await actions.release(session, self.row.id)
        self.yard.tell_room()

    async def _move(self, to: DeploymentState, reason: str, **values: object) -> None:
        """Write a state and its columns; being there already only writes the columns."""
        async with self.yard.sessions.begin() as session:
            row = await actions.of_job(session, self.context.id)
            if row.state != to:
                await move(session, Deployment, row.id, "state", MOVES, to, reason)
            for name, value in values.items():
                setattr(row, name, value)
            self.row = row
        self.yard.routing.changed()

    async def _unless_it_ends(self, question: Awaitable[T]) -> T | None:
        """Await the engine's answer, but no longer than it lives and is wanted."""
        assert self.child is not None
        asking = asyncio.ensure_future(question)
        others = [
            asyncio.ensure_future(self.child.wait()),
            asyncio.ensure_future(self.context.interrupted.wait()),
        ]
        try:
            await asyncio.wait([asking, *others], return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
        finally:
            for task in (asking, *others):
                task.cancel()
            await asyncio.gather(asking, *others, return_exceptions=True)

    async def _sleep(self, seconds: float, *wake: Awaitable[object]) -> bool:
        """Sleep until time has passed, the engine ended, an interrupt came or `wake`; return whether it was woken."""
        reasons = [asyncio.ensure_future(one) for one in (self.context.interrupted.wait(), *wake)]
        if self.child is not None:
            reasons.append(asyncio.ensure_future(self.child.wait()))
        try:
            done, _ = await asyncio.wait(reasons, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            for task in reasons:
                task.cancel()
            await asyncio.gather(*reasons, return_exceptions=True)
