"""A gateway on a real port before real child engines, for tests that talk to it over real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from modelyard.errors import DatabaseUnavailable, EngineStarting, ModelNotFound, ModelyardError
from modelyard.gateway.metrics import Metrics
from modelyard.gateway.relay import Gateway
from modelyard.gateway.routes import api
from modelyard.gateway.upstream import Engines
from modelyard.http import error_response
from tests.servers.engine import read_record

ENGINE_PYTHON = Path(__file__).parent.parent / "servers" / "engine_python"
DEADLINE_S = 20.0


def wait_until(claim: Callable[[], bool], what: str) -> None:
    """Wait for a condition; fails the test with `what` when it does not come true in time."""
    deadline = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.005)


@dataclass(frozen=True)
class Target:
    model_id: str
    served_name: str
    url: str
    task: str = "generate"
    state: str = "READY"


@dataclass(frozen=True)
class Served:
    name: str
    model_id: str
    created_at: datetime
    root: str | None = None


@dataclass
class Board:
    """Routing kept in memory: what the deploy room does from the database."""

    targets: dict[str, Target] = field(default_factory=dict)
    current: str | None = None
    open_requests: int = 0
    is_away: bool = False

    def expect_database(self, name: str | None = None) -> None:
        if self.is_away:
            raise DatabaseUnavailable

    def put(self, target: Target, *names: str) -> None:
        for name in (target.model_id, *names):
            self.targets[name] = target
        self.current = self.current or target.model_id

    async def resolve(self, name: str | None, task: str) -> Target:
        target = self.targets.get(name or self.current or "")
        if target is None:
            raise ModelNotFound(name or "", where="in service", known=sorted(self.targets))
        if target.state == "STARTING":
            raise EngineStarting(f"The engine of '{target.model_id}' is starting.", retry_after_s=7)
        return target

    @contextmanager
    def request(self, target: object) -> Iterator[None]:
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    async def listing(self) -> Sequence[Served]:
        made = datetime(2026, 1, 2, tzinfo=UTC)
        return [Served(name, target.model_id, made) for name, target in self.targets.items()]


class EngineChild:
    """A real child process that imitates an engine."""

    def __init__(self, folder: Path, names: Sequence[str], misbehave: dict[str, Any] | None, pooling: bool) -> None:
        self.folder = folder
        self.socket = folder / "engine.sock"
        self.url = f"unix:{self.socket}"
        model = folder / "model"
        model.mkdir()
        if misbehave is not None:
            (model / "misbehave.json").write_text(json.dumps(misbehave), "utf-8")
        argv = [str(ENGINE_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
                "--served-model-name", *names, "--uds", str(self.socket)]  # fmt: skip
        if pooling:
            argv += ["--runner", "pooling"]
        self.log = folder / "engine.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]})
        wait_until(self._answers, f"an engine on {self.socket}")

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def record(self, kind: str) -> list[dict[str, Any]]:
        return read_record(self.folder, kind)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Running:
    """A gateway that listens, with what stands behind it."""

    port: int
    board: Board
    registry: CollectorRegistry
    loop: asyncio.AbstractEventLoop
    folders: list[Path]
    engines: list[EngineChild]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def engine(
        self,
        model_id: str = "acme/tiny",
        *aliases: str,
        names: Sequence[str] = (),
        misbehave: dict[str, Any] | None = None,
        pooling: bool = False,
        state: str = "READY",
    ) -> EngineChild:
        """Start an engine and put it into service."""
        folder = Path(tempfile.mkdtemp(prefix="my-gw-"))
        self.folders.append(folder)
        names = names or (model_id,)
        child = EngineChild(folder, names, misbehave, pooling)
        self.engines.append(child)
        target = Target(model_id, names[0], child.url, "embed" if pooling else "generate", state)
        self.board.put(target, *aliases)
        return child

    def change(self, model_id: str, **values: Any) -> None:
        self.board.put(replace(self.board.targets[model_id], **values))

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def gateway_app(board: Board, registry: CollectorRegistry, max_body_bytes: int) -> FastAPI:
    """An application with nothing but the gateway in it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engines = Engines()
        gateway = Gateway(board, engines, Metrics(registry), max_body_bytes)
        app.state.services = SimpleNamespace(gateway=gateway)
        yield
        await engines.close()

    app = FastAPI(lifespan=lifespan, redirect_slashes=False)

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, ModelyardError)
        return error_response(error)

    app.add_exception_handler(ModelyardError, answer)
    app.include_router(api)

    @app.get("/api/v1/models/")
    @app.get("/api/v1/models")
    @app.get("/api/v1/models/{model_id:path}")
    async def models_in_the_store() -> list[dict[str, str]]:
        return [{"model_id": "in-the-store"}]

    return app


@pytest.fixture
def gateway() -> Iterator[Running]:
    """A gateway with a body limit of 1 MiB and nothing in service yet."""
    board, registry = Board(), CollectorRegistry()
    with listening(gateway_app(board, registry, 1 << 20), board, registry) as running:
        yield running


@contextmanager
def listening(app: FastAPI, board: Board, registry: CollectorRegistry) -> Iterator[Running]:
    """Serve an application on a free port; at the end of the block its engines are killed."""
    config = uvicorn.Config(app, port=0, log_level="warning", ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="gateway")
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), "the gateway to listen")
    running = Running(server.servers[0].sockets[0].getsockname()[1], board, registry, loops[0], [], [])
    try:
        yield running
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        for child in running.engines:
            child.kill()
        for folder in running.folders:
            shutil.rmtree(folder)
