"""One deployment being supervised: the facts about it, and the steps as methods. The only writer of its state.

It gathers the facts, asks `steps.next_step`, does that one thing, and looks again when the child ended, an interrupt
or another wish came, or time passed. Everything that it must remember is in the row and in the job's folder: a server
that was killed at any point finds the live engine again (`attempt-N`, the newest) or starts another.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from pathlib import Path
from typing import Any

from modelyard.db import utcnow
from modelyard.deploy.adapter_changes import AdapterChanges
from modelyard.deploy.draining import Requests
from modelyard.deploy.fitting import Fitting
from modelyard.deploy.open_requests import FRESH_S
from modelyard.deploy.record import Record
from modelyard.deploy.shared import Shared
from modelyard.deploy.steps import Facts, Room, Step, next_step
from modelyard.deploy.tables import Deployment, DeploymentState, Wanted
from modelyard.engine import adapter_loading, attempts, socket_dir
from modelyard.engine.adapter_loading import Adapter
from modelyard.engine.child_state import ChildState
from modelyard.engine.client import Health
from modelyard.engine.command import socket_path, start_warnings
from modelyard.engine.failures import explain, not_started
from modelyard.engine.plugins import cures
from modelyard.engine.readiness import Readiness
from modelyard.engine.running_engine import PROBE_EVERY_S, RunningEngine
from modelyard.errors import JobFailure
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.models import store
from modelyard.plurals import counted
from modelyard.retry import Backoff
from modelyard.signals import Topic

log = logging.getLogger(__name__)

DRAIN_EVERY_S = 0.1
HEALTH_EVERY_S = 5.0
#: An engine that stood this long has its restarts forgotten.
STABLE_S = 300.0
LONGEST_DELAY_S = 60.0
STILL_STARTING_EVERY_S = 5.0
#: Others that come, leave or end change what may be done for this one.
_WAKING = (Topic.DEPLOYMENTS, Topic.MEMORY)
ENGINE_GONE = "the server was restarted, and the engine is gone"


class Service:
    """The work on one deployment, from the taking up of its job to the end of its engine."""

    def __init__(self, shared: Shared, context: JobContext, row: Deployment) -> None:
        self.settings = shared.settings
        self.context = context
        self.record = Record(context, shared.sessions, row)
        self.engine = RunningEngine(context, shared.settings.engine_busy_timeout_s)
        self.requests = Requests(shared.open_requests, shared.settings.engine_drain_timeout_s)
        self.changes = AdapterChanges(context, self.record, self.engine, self.requests)
        self.fitting = Fitting(shared.settings, shared.sessions)
        #: Where each adapter that is wanted lies, as the store says.
        self.adapters: list[Adapter] = []
        #: Set when a deployment was written or memory given back; cleared before the row is read.
        self.woken = asyncio.Event()
        self.has_served = row.has_served
        self.delay_until = 0.0
        self.told_at = self.looked_at = time.monotonic()
        self.stable_at = time.monotonic() + STABLE_S
        self.said_waiting = False
        self.readiness = Readiness(row.model_id, row.task)
        #: The plugins that the engine was started with.
        self.plugins: list[str] = []
        self._children, self._tokenizers = shared.children, shared.tokenizers
        self._sharing_memory, self._signals = shared.sharing_memory, shared.sessions.signals
        for topic in _WAKING:
            self._signals.subscribe(topic, self.woken.set)

    @property
    def row(self) -> Deployment:
        """The deployment as it was last read."""
        return self.record.row

    async def run(self) -> None:
        """Do one step after the other, until the deployment has ended one way or the other."""
        if self.row.state == DeploymentState.STOPPED:
            raise JobInterrupted  # the server was killed between the end of the deployment and that of its job
        if self.row.state == DeploymentState.FAILED:
            await self._restore_what_left()
            raise await self.record.failure() or await self.engine.cause_of_death()
        try:
            await self._take_up()
            while True:
                step = next_step(await self._facts())
                if step == Step.FINISH:
                    await self.record.stop(self._leaves())
                    await self._end(DeploymentState.STOPPED, "its engine is gone")
                    raise JobInterrupted
                if step == Step.GIVE_UP:
                    raise await self.engine.cause_of_death()
                await self._do(step)
        except (JobInterrupted, asyncio.CancelledError, GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # whatever it was, no engine may be left without a deployment
            if self.engine.child is not None:
                await self.engine.child.stop()
            to = DeploymentState.STOPPED if self.row.state == DeploymentState.STOPPING else DeploymentState.FAILED
            failure = error if isinstance(error, JobFailure) else None
            await self._end(to, failure.code if failure is not None else "internal_error", failure)
            await self._restore_what_left()
            raise

    async def close(self) -> None:
        """End the engine, if one still runs: the server stops in good order. Safe to repeat."""
        for topic in _WAKING:
            self._signals.unsubscribe(topic, self.woken.set)
        await self.engine.close()

    async def _do(self, step: Step) -> None:
        if step == Step.START:
            await self._start()
        elif step == Step.PROBE:
            await self._probe()
        elif step == Step.CHANGE_ADAPTERS:
            await self.changes.change(self.adapters)
        elif step == Step.CHECK_HEALTH:
            await self._check_health()
        elif step == Step.BACK_OFF:
            assert self.engine.child is not None
            self.engine.outcome = await self.engine.child.wait()
            await self._back_off(await self.engine.cause_of_death())
        elif step == Step.DRAIN:
            await self._drain()
        elif step == Step.RESUME:
            await self.record.become_ready("a request came")
            self.requests.asked()
        elif step == Step.REST:
            await self._stop_engine()
            await self.record.engine_is_gone(DeploymentState.IDLE, "nobody asked for a while")
            await self.context.event("Resting: the engine has ended, and the next request starts one.")
        elif step == Step.WAKE:
            await self.record.move(DeploymentState.STARTING, "a request came", wake_requested=False)
        elif step == Step.STOP:
            await self.record.stop(self._leaves())
            await self._stop_engine()
        elif step == Step.MAKE_ROOM:
            await self._make_room()
        elif step == Step.WAIT_FOR_ROOM:
            if not self.said_waiting:
                self.said_waiting = True
                await self.context.event(f"Waiting for memory that others hold. {self.fitting.message}".rstrip())
            await self._sleep(1.0)
        elif step == Step.WAIT_FOR_REQUEST:
            await self._sleep(HEALTH_EVERY_S)
        else:
            await self._sleep(max(0.0, self.delay_until - time.monotonic()))

    async def _facts(self) -> Facts:
        self.woken.clear()
        asked_at = time.monotonic()
        # Asked before the row is read: one that is to drain is interrupted in the same transaction, and a row from
        # before that would say that it is wanted and only its job is not, which ends its requests.
        is_interrupted = self.context.interrupted.is_set()
        rows = await self.record.look(may_let_go=not self.requests.are_leaving)
        row = self.row
        if row.state == DeploymentState.DRAINING and time.monotonic() - asked_at > FRESH_S:
            # While the database was away, requests came as before it: the routing knew no better.
            self.requests.begin_draining()
        if row.wanted == Wanted.UP:
            self.adapters = [Adapter(one.model_id, store.folder_of(self.settings.models_dir, one.path)) for one in rows]
        wanted = Wanted(row.wanted)
        if wanted == Wanted.UP and is_interrupted:
            wanted = Wanted.DOWN
        child = self.engine.child_state
        due = child == ChildState.NONE and wanted == Wanted.UP and row.state != DeploymentState.IDLE
        delay_over = time.monotonic() >= self.delay_until
        return Facts(
            wanted=wanted,
            state=DeploymentState(row.state),
            child=child,
            has_served=self.has_served,
            restarts=row.restarts,
            max_restarts=self.settings.engine_max_restarts,
            room=await self._room() if due and delay_over else Room.THERE,
            delay_over=delay_over,
            adapters_differ=[one["adapter_id"] for one in row.loaded] != row.adapter_ids,
            drained=self.requests.drained and row.state == DeploymentState.DRAINING,
            unasked=self.requests.unasked(row.idle_timeout_s) and not row.wake_requested,
            awaited=row.wake_requested,
            forgiven=self.engine.silence.is_forgiven,
        )

    async def _room(self) -> Room:
        return await self.context.patiently(lambda: self.fitting.room(self.row))

    def _leaves(self) -> Wanted:
        """Return how it leaves: an interrupted job is down, whatever its row said."""
        return Wanted.DRAINED if self.row.wanted == Wanted.DRAINED else Wanted.DOWN

    async def _take_up(self) -> None:
        """Find what an earlier server left of this deployment."""
        folder = attempts.newest(self.context.folder)
        child = await self._children.adopt(folder) if folder is not None else None
        if child is not None and child.is_alive and self.row.engine_url is not None:
            self.engine.child = child
            self._talk_to(self.row.engine_url)
            kept = {one["name"] for one in self.row.loaded}
            self.requests.leave(
                name for name in await self.engine.client.names() or [] if "@" in name and name not in kept
            )
            held = await asyncio.to_thread(self.fitting.held_by_engine, child, self.row)
            if held is not None:
                await self.record.hold(held)
            await self.context.event("Adopted the running engine after a restart of the server.")
            return
        await asyncio.to_thread(socket_dir.remove, self.row.engine_url)
        if self.row.state in (DeploymentState.READY, DeploymentState.DRAINING):
            await self.record.move(DeploymentState.STARTING, ENGINE_GONE)
        await self.record.engine_is_gone()

    def _talk_to(self, url: str) -> None:
        self.requests.of_engine(url, self.engine.connect(url))

    async def _make_room(self) -> None:
        touched = await self.record.make_room()
        if not touched:
            return
        await self.context.event(
            f"Those that it replaces leave first: {self.fitting.message}",
            data={"leaving": [str(one) for one in touched]},
        )

    async def _start(self) -> None:
        number, folder = attempts.following(self.context.folder)
        private = socket_dir.new_path()
        url = f"unix:{socket_path(private)}"
        await self.context.patiently(lambda: self.fitting.try_tokenizer(self.row, self._tokenizers))
        async with self._sharing_memory:
            if await self._room() != Room.THERE:  # another one was quicker
                return
            python = self.settings.engine_python or Path(sys.executable)
            command, allocation = await self.context.patiently(lambda: self.fitting.command(self.row, python, private))
            await self.record.begin_attempt(
                f"attempt {number}", allocation, engine_url=url, loaded=[], chat_template=self.fitting.template_source,
            )  # fmt: skip
        self.plugins = command.env["VLLM_PLUGINS"].split(",")
        try:
            private.mkdir(mode=0o700)
            await asyncio.to_thread(attempts.begin_log, self.context.log, number, command.argv)
            self.engine.child = await self._children.start(
                folder, command, log=self.context.log, stop_timeout_s=self.settings.engine_stop_timeout_s
            )
        except BaseException as error:
            if self.engine.child is None:
                await asyncio.to_thread(socket_dir.remove, url)
            if isinstance(error, RuntimeError):
                await self._back_off(not_started(error))
                return
            raise
        self._talk_to(url)
        self.engine.started_at = self.told_at = time.monotonic()
        self.readiness = Readiness(self.row.model_id, self.row.task)
        self.said_waiting = False
        data = {"attempt": number, "memory_bytes": allocation.total_bytes, "gpus": list(allocation.gpus)}
        if number == 1:
            for code, message in start_warnings(self.row.model_id, command.argv, self.fitting.template_source):
                await self.context.event(message, level="warning", data={"code": code})
        await self.context.event(f"Starting the engine (attempt {number}). {self.fitting.message}", data=data)

    async def _probe(self) -> None:
        """Ask the engine to do its work once, load its adapters; READY if all of that works."""
        waited_s = self.engine.waited_s
        health = await self.engine.answer(self.engine.client.health())
        if health == Health.GOOD:
            # The first generation compiles and may take long; the time for the whole start bounds it too.
            left_s = max(1.0, self.settings.engine_start_timeout_s - waited_s)
            try:
                works = await self.engine.answer(self.readiness.works(self.engine.client, left_s))
            except JobFailure as failure:
                failure.hint = failure.hint.replace("<id>", str(self.context.id))
                await self._back_off(failure)
                return
            if works:
                loaded = await self.changes.load_at_start(self.adapters, self.has_served)
                if loaded is not None:
                    await self._ready(loaded)
                return
        waited_s = self.engine.waited_s
        if waited_s > self.settings.engine_start_timeout_s:
            log_text = await asyncio.to_thread(attempts.newest_log, self.context.log)
            raise self.readiness.never_ready(
                self.settings.engine_start_timeout_s, tuple(explain(log_text, None).evidence)
            )
        if time.monotonic() - self.told_at > STILL_STARTING_EVERY_S:
            self.told_at = time.monotonic()
            await self.context.event(
                f"Still starting, {waited_s:.0f} s so far.", level="debug", data={"seconds": round(waited_s, 1)}
            )
        await self.engine.pause(PROBE_EVERY_S)

    async def _ready(self, loaded: list[dict[str, Any]]) -> None:
        seconds = round(self.engine.waited_s, 2)
        self.has_served = True
        self.engine.silence.end()
        self.stable_at = time.monotonic() + STABLE_S
        if await self.record.become_ready("it generated a token", ready_at=utcnow(), loaded=loaded):
            self.requests.asked()
            await self.context.survived()
            await self.context.event(
                f"Ready: {self.row.model_id} did its first work after {seconds:.1f} s.",
                data={"state": "READY", "seconds": seconds},
            )
            python = str(self.settings.engine_python or sys.executable)
            said, lacking = await asyncio.to_thread(cures.complaint, self.row.engine_url, self.plugins, python)
            if said:
                await self.context.event(said, level="warning", data={"missing_cures": lacking})

    async def _check_health(self) -> None:
        due_s = self.looked_at + HEALTH_EVERY_S - time.monotonic()
        if due_s > 0:
            if self.requests.are_leaving:
                due_s = DRAIN_EVERY_S
            elif self.row.idle_timeout_s is not None:
                due_s = min(due_s, self.row.idle_timeout_s / 4)
            if await self._sleep(due_s):
                return
        for name in await self.requests.those_that_left():
            await self.engine.client.unload_adapter(name, adapter_loading.UNLOAD_TIMEOUT_S)
        if self.row.idle_timeout_s is not None:
            await self.requests.look()
        if time.monotonic() - self.looked_at < HEALTH_EVERY_S:
            return
        self.looked_at = time.monotonic()
        if time.monotonic() > self.stable_at:
            self.engine.silence.count = 0
            if self.row.restarts:
                await self.record.write(restarts=0)
        await self.engine.check_health()

    async def _drain(self) -> None:
        """Keep new requests away, and look how many of the others are left."""
        if self.row.state != DeploymentState.DRAINING:
            reason = "no longer wanted" if self.row.wanted == Wanted.DRAINED else "nobody asked for a while"
            await self.record.move(DeploymentState.DRAINING, reason)
            self.requests.begin_draining()
            await self.context.event(f"Draining: {reason}; requests in progress are let end.")
        open_requests = await self.requests.look_whether_drained()
        if self.requests.drained and open_requests:
            await self.context.event(
                f"{counted(open_requests, 'request')} did not end within {self.settings.engine_drain_timeout_s:.0f} s "
                "(MODELYARD_ENGINE_DRAIN_TIMEOUT_S): cut off.",
                level="warning", data={"open_requests": open_requests},
            )  # fmt: skip
        if not self.requests.drained:
            await self._sleep(DRAIN_EVERY_S)

    async def _stop_engine(self) -> None:
        await self.engine.stop()
        self.requests.engine_is_gone()

    async def _back_off(self, cause: JobFailure) -> None:
        is_forgiven = self.engine.silence.is_forgiven
        if not self.has_served or (self.row.restarts >= self.settings.engine_max_restarts and not is_forgiven):
            raise cause
        delay_s = Backoff(self.settings.engine_restart_delay_s, LONGEST_DELAY_S).pause_s(self.row.restarts + 1)
        await self._stop_engine()
        self.engine.silence.end()
        restarts = self.row.restarts + (0 if is_forgiven else 1)
        await self.record.engine_is_gone(DeploymentState.BACKOFF, cause.code, restarts=restarts)
        self.delay_until = time.monotonic() + delay_s
        await self.context.event(
            f"{cause.message} The engine is started again in {delay_s:.0f} s "
            + (
                "(which does not count)."
                if is_forgiven
                else f"(restart {restarts} of {self.settings.engine_max_restarts})."
            ),
            level="warning",
            data={"code": cause.code, "restart": restarts},
        )

    async def _end(self, to: DeploymentState, reason: str, failure: JobFailure | None = None) -> None:
        """Write the end, and let go of the models."""
        self.engine.child = None
        await self.record.end(to, reason, self._leaves(), None if self.context.interrupted_before_start else failure)

    async def _restore_what_left(self) -> None:
        """Want back what made room for this deployment since it was last ready."""
        job = await self.record.restore_what_left()
        if job is not None:
            await self.context.event(f"{job.name} is wanted again (job {job.id}).", data={"restored": str(job.id)})

    async def _sleep(self, seconds: float) -> bool:
        """Sleep until time has passed, the engine ended, or a wish came; return whether it was woken."""
        return await self.engine.pause(seconds, self.woken)
