"""Every way into the application: its routes as they are registered, so that no new one escapes a test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fastapi import FastAPI
from starlette.routing import BaseRoute, Mount, Route

from modelyard.app import create_app
from modelyard.foundation import Foundation
from modelyard.settings import Settings

#: What stands for a parameter in a path: well formed, and nothing that exists.
NOBODY = "00000000-0000-4000-8000-000000000000"
SAMPLES = {
    "job_id": NOBODY,
    "dataset_id": NOBODY,
    "finetune_id": NOBODY,
    "deployment_id": NOBODY,
    "model_id": "no/such",
    "name": "no/such",
    "number": "7000000",
}
FILES = {"/api/docs/files": ["/api/docs/files/swagger-ui.css", "/api/docs/files/swagger-ui-bundle.js"]}


def application() -> FastAPI:
    """Return the application as the server makes it; nothing is started or opened."""
    return create_app(Foundation(Settings(_env_file=None, data_dir=Path("/nonexistent"))))


def every_path(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Yield a method and a path for every route and every method of it; for mounted files, some of them."""
    for route in app.routes:
        yield from _ways(route)


def _ways(route: BaseRoute) -> Iterator[tuple[str, str]]:
    if isinstance(route, Route):
        path = re.sub(r"\{(\w+)(:\w+)?\}", lambda found: SAMPLES[found[1]], route.path)
        for method in sorted(route.methods or ()):
            yield method, path
    elif isinstance(route, Mount):
        for path in FILES[route.path]:
            yield "GET", path
    else:
        raise AssertionError(f"tests/walk.py does not know how to ask for {route!r}")


def other_ending(path: str) -> str:
    """Return the path with its trailing slash if it has none, and without it if it has one."""
    return path.removesuffix("/") if path.endswith("/") else f"{path}/"
