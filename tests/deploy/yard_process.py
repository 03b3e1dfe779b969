"""The deploy yard in a process of its own, so that a test can kill it: driven by JSON lines on a socket.

Each request is `{"op": name, ...}` and has one answer, in order: `{"ok": value}`, or `{"refused": code}` for an error
that a client would see. What the yard does at its start is what the server does. The end of the socket's other side
ends it in good order. Questions to engines run beside the requests; `answers` fetches those that have ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import select

from modelyard.deploy import succession
from modelyard.deploy.tables import LIVE, Deployment, DeploymentModel, DeploymentState, Wanted
from modelyard.errors import ModelyardError
from modelyard.jobs.tables import Job
from modelyard.routing import aliases
from modelyard.routing.snapshot import Target
from tests.deploy import yard as yards
from tests.deploy.yard import DeployYard, deploy_yard

Json = dict[str, Any]
#: Starts processes from one that has loaded everything: a fresh start of the yard takes milliseconds.
_FORKS = get_context("forkserver")
START_PATIENCE_S = 30.0


class YardProcess:
    """A yard on a data folder, which may be stopped, killed and started again. `tmp` is where its engines' sockets lie.

    What it logs is appended to the file `log`.
    """

    def __init__(self, data_dir: Path, tmp: Path, log: Path, database_url: str, settings: Json) -> None:
        self._arguments = (str(data_dir), str(tmp), str(log), database_url, settings)
        self._process: ForkServerProcess | None = None
        self._lines: Iterator[str] = iter(())
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Start it and wait until it serves."""
        _FORKS.set_forkserver_preload(["tests.deploy.yard_process", "aiohttp"])
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _FORKS.Process(target=_main, args=(theirs, *self._arguments), daemon=False)
            self._process.start()
        ours.settimeout(START_PATIENCE_S)
        self._control, self._lines = ours, ours.makefile("r", encoding="utf-8")
        assert self.ask("hello") == "hello"

    def ask(self, op: str, **arguments: Any) -> Any:
        """Have it do something and return the answer; what is refused answers as `Refused`."""
        assert self._control is not None
        line = ""
        with suppress(ConnectionError):  # that it ended says less than its own last words
            self._control.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            line = next(self._lines, "")
        assert line, f"the yard ended during {op}: {self.last_words()}"
        answer = json.loads(line)
        return Refused(answer["refused"]) if "refused" in answer else answer["ok"]

    def last_words(self) -> str:
        """Return the end of what it logged."""
        log = Path(self._arguments[2])
        if not log.parent.exists():
            return f"its folder {log.parent} is gone"
        return log.read_text("utf-8", "replace")[-3000:] if log.exists() else "it logged nothing"

    def stop(self) -> None:
        """End it in good order."""
        self._hang_up()
        assert self._process is not None
        self._process.join(START_PATIENCE_S)
        assert self._process.exitcode == 0, f"the yard ended with {self._process.exitcode}"

    def kill(self) -> None:
        """End it as a power cut would, but for its children."""
        assert self._process is not None
        self._process.kill()
        self._process.join(START_PATIENCE_S)
        self._hang_up()

    def _hang_up(self) -> None:
        if self._control is not None:
            self._lines.close()  # type: ignore[attr-defined]
            self._control.close()
            self._control = None


class Refused(str):
    """The code of an error that a client would see."""


@contextmanager
def _logging(log: str) -> Iterator[None]:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    logging.basicConfig(level=logging.WARNING, force=True)
    yield
    logging.shutdown()


def _main(control: socket.socket, data_dir: str, tmp: str, log: str, database_url: str, settings: Json) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    yards.DATABASE_URL = database_url
    os.environ["TMPDIR"] = tempfile.tempdir = tmp
    with _logging(log):
        asyncio.run(_serve(control, Path(data_dir), settings))


async def _serve(control: socket.socket, data_dir: Path, settings: Json) -> None:
    reader, writer = await asyncio.open_connection(sock=control)
    async with deploy_yard(data_dir, **settings) as yard:
        desk = _Desk(yard)
        while line := await reader.readline():
            request = json.loads(line)
            try:
                answer = {"ok": await getattr(desk, request.pop("op"))(**request)}
            except ModelyardError as error:
                answer = {"refused": error.code}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        desk.close()
    writer.close()


class _Desk:
    """The operations."""

    def __init__(self, yard: DeployYard) -> None:
        self.yard = yard
        self.open: set[asyncio.Task[None]] = set()
        self.ended: list[Json] = []

    def close(self) -> None:
        for task in self.open:
            task.cancel()

    async def hello(self) -> str:
        return "hello"

    async def add_model(self, model_id: str, misbehave: Json, task: str = "generate") -> None:
        await self.yard.add_model(model_id, misbehave=misbehave, task=task)

    async def add_adapter(self, adapter_id: str, base_model_id: str) -> None:
        await self.yard.add_adapter(adapter_id, base_model_id)

    async def deploy(self, model_id: str, adapter_ids: list[str], **wish: Any) -> str:
        return str(await self.yard.deploy(model_id, adapter_ids, **wish))

    async def interrupt(self, job_id: str) -> None:
        await self.yard.interrupt(UUID(job_id))

    async def take_down(self, job_id: str, wanted: str) -> None:
        await self.yard.take_down(UUID(job_id), Wanted(wanted))

    async def put_alias(self, name: str, target: str) -> None:
        async with self.yard.sessions.begin() as session:
            await aliases.put(session, name, target)

    async def remove_alias(self, name: str) -> None:
        async with self.yard.sessions.begin() as session:
            await aliases.remove(session, name)

    async def rows(self) -> list[Json]:
        """Return every deployment with its job and what it holds, as one view of the database."""
        async with self.yard.sessions.read() as session:
            held: dict[UUID, list[str]] = {}
            for hold in await session.scalars(select(DeploymentModel)):
                held.setdefault(hold.deployment_id, []).append(hold.model_id)
            query = select(Deployment, Job).join(Job, Job.id == Deployment.job_id).order_by(Deployment.number)
            found = (await session.execute(query)).all()
        return [
            {
                **{name: getattr(row, name) for name in (
                    "number", "model_id", "task", "adapter_ids", "wanted", "state", "loaded", "adapter_failure",
                    "memory_bytes", "engine_url", "wake_requested", "idle_timeout_s", "strategy", "replaces",
                    "restarts",
                )},
                "id": str(row.id), "job": str(job.id), "is_live": row.state in LIVE,
                "was_ready": row.ready_at is not None, "has_served": row.has_served,
                "has_ended": row.ended_at is not None, "status": job.status, "interrupted": job.interrupt_requested,
                "failure": job.failure_code,
                "why": job.failure_message, "held": sorted(held.get(row.id, [])),
            }
            for row, job in found
        ]  # fmt: skip

    async def events(self, job_id: str) -> list[str]:
        return [event.message for event in await self.yard.events(UUID(job_id))]

    async def query(self, name: str | None, task: str, tokens: int) -> None:
        """Send an engine a question as the gateway would, beside all else."""
        task_ = asyncio.create_task(self._query(name, task, tokens))
        self.open.add(task_)
        task_.add_done_callback(self.open.discard)

    async def _query(self, name: str | None, task: str, tokens: int) -> None:
        try:
            target = await self.yard.routing.resolve(name, task)
        except ModelyardError as error:
            self.ended.append({"name": name, "refused": error.code})
            return
        began = time.monotonic()
        with self.yard.routing.request(target):
            wrong = await _ask(target, tokens)
        answer = {"name": name, "id": str(target.deployment_id), "as": target.served_name, "wrong": wrong}
        self.ended.append({**answer, "from": began, "until": time.monotonic()})

    async def answers(self) -> tuple[list[Json], int]:
        """Return the questions that ended since, and how many are open."""
        ended, self.ended = self.ended, []
        return ended, len(self.open)

    async def unserved(self) -> list[str]:
        """Return what is wrong with what the engines of ready deployments serve."""
        async with self.yard.sessions.read() as session:
            live = await succession.live(session)
        wrong = []
        for row in live:
            if row.state == "READY" and row.engine_url is not None:
                for name in (row.model_id, *(one["name"] for one in row.loaded)):
                    target = Target(row.id, row.model_id, name, row.engine_url, row.task, DeploymentState.READY)
                    if said := await _ask(target, 1):
                        wrong.append(f"{name} of {row.model_id}: {said}")
        return wrong


async def _ask(target: Target, tokens: int) -> str:
    """Return what is wrong with the answer to a question; empty if it is whole."""
    path, body = "/v1/completions", {"model": target.served_name, "prompt": "x", "max_tokens": tokens}
    if target.task == "embed":
        path, body = "/v1/embeddings", {"model": target.served_name, "input": "x"}
    try:
        reader, writer = await asyncio.open_unix_connection(target.url.removeprefix("unix:"))
        try:
            data = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
            writer.write(head.encode() + b"\r\n\r\n" + data)
            said = (await reader.readuntil(b"\r\n\r\n")).lower()
            text = await reader.readexactly(int(said.partition(b"content-length:")[2].split()[0]))
        finally:
            writer.close()
    except (OSError, asyncio.IncompleteReadError) as error:
        return f"{type(error).__name__}: {error}"
    if said.split()[1] != b"200":
        return text.decode()
    whole = target.task == "embed" or json.loads(text)["choices"][0]["text"].count("tok") == tokens
    return "" if whole else f"not whole: {text!r}"
