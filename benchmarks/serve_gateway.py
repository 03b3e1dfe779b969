"""The gateway alone, before one engine, as the server runs it: uvicorn, uvloop, httptools, one process."""

from __future__ import annotations

import argparse
import asyncio
import functools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from modelyard.connection_register import Connections, Limits
from modelyard.connections import Connection
from modelyard.deploy.open_requests import OpenRequest
from modelyard.errors import ModelNotFound
from modelyard.gateway.metrics import Metrics
from modelyard.gateway.relay import Gateway, Target
from modelyard.gateway.routes import api
from modelyard.gateway.upstream import Engines


@dataclass(frozen=True)
class Only:
    """The one model in service."""

    name: str
    url: str
    task: str = "generate"
    state: str = "READY"
    root: str | None = None
    created_at: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    open: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def model_id(self) -> str:
        return self.name

    @property
    def served_name(self) -> str:
        return self.name

    async def resolve(self, name: str | None, task: str) -> Only:
        if name != self.name:
            raise ModelNotFound(name or "", where="in service", known=[self.name])
        return self

    def request(self, target: Target) -> OpenRequest:
        return OpenRequest(self.open, (target.url, target.served_name))

    async def listing(self) -> Sequence[Only]:
        return [self]

    @property
    def is_away(self) -> bool:
        return False

    def expect_database(self, name: str | None = None) -> None:
        return None


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()

    connections = Connections(Limits(4096, 64 << 10, 10.0, 60.0, 5.0))

    async def sweep() -> None:
        while True:
            connections.sweep()
            await asyncio.sleep(0.1)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engines = Engines()
        sweeping = asyncio.create_task(sweep())
        gateway = Gateway(Only(given.model, given.engine), engines, Metrics(CollectorRegistry()), 32 << 20)
        app.state.services = SimpleNamespace(gateway=gateway)
        yield
        sweeping.cancel()
        await engines.close()

    app = FastAPI(lifespan=lifespan)
    app.include_router(api)
    uvicorn.run(
        app,
        http=functools.partial(Connection, connections),  # type: ignore[arg-type]  # uvicorn's type names classes only
        port=given.port,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )


if __name__ == "__main__":
    main()
