"""A real uvicorn on a free port with the jobs routes on it, in the event loop of the test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response

from modelyard.errors import ModelyardError
from modelyard.http import error_response
from modelyard.jobs.routes import api
from modelyard.jobs.runner import JobRunner
from tests.eventually import eventually
from tests.jobs.yard import JobYard, job_yard


def application(yard: JobYard) -> FastAPI:
    app = FastAPI(redirect_slashes=False)
    app.state.services = SimpleNamespace(sessions=yard.sessions, runner=yard.runner)
    app.include_router(api)

    @app.exception_handler(ModelyardError)
    async def answer(_request: Request, error: ModelyardError) -> Response:
        return error_response(error)

    return app


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Serve the application for the block and yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve([listening]))
        try:
            await eventually(lambda: server.started, "uvicorn answers")
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


class Client:
    """What a test asks of the server; `yard` is what stands behind it."""

    def __init__(self, yard: JobYard, http: aiohttp.ClientSession) -> None:
        self.yard = yard
        self.http = http

    @property
    def runner(self) -> JobRunner:
        return self.yard.runner


@asynccontextmanager
async def jobs_server(url: str, root: Path, *, limits: Mapping[str, int] | None = None) -> AsyncIterator[Client]:
    """Run a yard and a server on it for the block."""
    async with (
        job_yard(url, root, limits=limits) as yard,
        serving(application(yard)) as base,
        aiohttp.ClientSession(base, timeout=aiohttp.ClientTimeout(total=30)) as http,
    ):
        yield Client(yard, http)
