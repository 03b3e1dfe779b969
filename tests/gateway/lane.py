"""The raw-prompt lane on a real port, with a real database, behind the real gate, before imitation engines."""

from __future__ import annotations

import http.client
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic_settings
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine
from starlette.responses import Response

from modelyard.auth.access import Access
from modelyard.db import Base, Sessions, database_url
from modelyard.errors import ModelyardError
from modelyard.gateway.metrics import Metrics
from modelyard.gateway.raw import RawLane
from modelyard.gateway.raw_routes import api
from modelyard.gateway.relay import Gateway
from modelyard.gateway.tables import Continuation
from modelyard.gateway.upstream import Engines
from modelyard.http import error_response
from modelyard.settings import Settings
from tests.gateway.conftest import Board, EngineChild, Running, listening
from tests.server import Answer

CATS = " Soft paws at dawn, naïve 🙂 eyes; the house is theirs."
DOGS = " A wag, a leap, the door flies open."
ONE, BATCH = "/api/generate-one", "/api/generate-batch"
GREEDY = {"do_sample": False}


def settings_of(folder: Path, **values: Any) -> Settings:
    """Return settings that look neither at the environment nor at a file."""

    class Only(Settings):
        model_config = pydantic_settings.SettingsConfigDict(env_prefix="MODELYARD_TESTS_ONLY_", env_file=None)

    return Only(data_dir=folder, **values)


class Lane:
    """A server with the lane alone, and what its clients do."""

    def __init__(self, running: Running, settings: Settings) -> None:
        self.running = running
        self.settings = settings

    def engine(self, model_id: str = "acme/tiny", *aliases: str, **misbehave: Any) -> EngineChild:
        """Put an engine into service that recites CATS, and DOGS to whoever mentions dogs."""
        # What a search ends at is in the model's files.
        (self.settings.data_dir / "config.json").write_text('{"eos_token_id": 257, "vocab_size": 258}', "utf-8")
        plan = {"recites": {"dogs": DOGS, "": CATS}, "model_folder": str(self.settings.data_dir), **misbehave}
        return self.running.engine(model_id, *aliases, misbehave=plan)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.opened(path, data, headers) as response:
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())

    @contextmanager
    def opened(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.running.port, timeout=30)
        try:
            connection.request("POST", path, body, dict(headers or {}))
            response = connection.getresponse()
            try:
                yield response
            finally:
                response.close()
        finally:
            connection.close()

    def one(self, request_id: str = "a", prompt: str | None = "cats?", **more: Any) -> Answer:
        body = {"request_id": request_id, "generation_config": GREEDY, **more}
        return self.post(ONE, body if prompt is None else {**body, "prompt": prompt})

    def text(self, request_id: str = "a", prompt: str | None = "cats?", **more: Any) -> str:
        answer = self.one(request_id, prompt, **more)
        assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8"), answer.text
        return answer.text

    def batch(self, *prompts: tuple[str, str | None], **more: Any) -> Answer:
        items = [{"request_id": name} | ({} if text is None else {"prompt": text}) for name, text in prompts]
        return self.post(BATCH, {"prompts": items, "generation_config": GREEDY, **more})


@contextmanager
def lane(folder: Path, **values: Any) -> Iterator[Lane]:
    """Serve the lane for the block, with settings such as `generate_top_k=7`; its database stays in the folder."""
    settings = settings_of(folder, **values)
    board, registry = Board(), CollectorRegistry()
    url = database_url("", folder)
    engine = create_engine(url.set(drivername="sqlite"))
    Base.metadata.create_all(engine, tables=[Base.metadata.tables[Continuation.__tablename__]])
    engine.dispose()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engines, sessions = Engines(), Sessions(url)
        gateway = Gateway(board, engines, Metrics(registry), 1 << 20)
        raw_lane = RawLane(gateway, sessions, settings)
        app.state.services = SimpleNamespace(raw_lane=raw_lane)
        yield
        await raw_lane.kept.close()
        await engines.close()
        await sessions.close()

    app = FastAPI(lifespan=lifespan, redirect_slashes=False)

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, ModelyardError)
        return error_response(error, request.url.path)

    app.add_exception_handler(ModelyardError, answer)
    app.include_router(api)
    app.add_middleware(Access, settings=settings)
    with listening(app, board, registry) as running:
        yield Lane(running, settings)
