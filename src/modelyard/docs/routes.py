"""Routes of the documentation: /api/openapi.json, Swagger UI at /api/docs, the manual below /api/docs/guide/.

Swagger UI's files and the manual's pages are installed with the server, so that both work with no internet. Each page
of the manual has a route of its own; it is rendered when it is first asked for, in a thread, and then kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path

import msgspec
from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from modelyard.docs import guide
from modelyard.docs.openapi import complete
from modelyard.http import router

Answer = Callable[[], Awaitable[Response]]

# The page runs no script of its own inline, so the policy need not allow any.
POLICY = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
#: The manual needs its style sheet, and nothing else.
GUIDE_POLICY = (
    "default-src 'none'; style-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Modelyard API</title>
<link rel="stylesheet" href="/api/docs/files/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/api/docs/files/swagger-ui-bundle.js"></script>
<script src="/api/docs/start.js"></script>
</body>
</html>
"""
START = """SwaggerUIBundle({url: "/api/openapi.json", dom_id: "#swagger-ui", deepLinking: true,
  tryItOutEnabled: true, displayRequestDuration: true, persistAuthorization: true});
"""


def add_docs(app: FastAPI, open_paths: frozenset[str]) -> None:
    """Serve the schema, Swagger UI and the manual; `open_paths` are those that never want a key."""
    api = router()
    made: list[bytes] = []

    async def schema() -> Response:
        if not made:
            made.append(msgspec.json.encode(complete(app.openapi(), open_paths)))
        return Response(made[0], media_type="application/json")

    for path, endpoint in (
        ("/api/openapi.json", schema),
        ("/api/docs", _answering(PAGE, "text/html", POLICY)),
        ("/api/docs/start.js", _answering(START, "text/javascript", POLICY)),
        (guide.STYLE_PATH, _answering(guide.STYLE, "text/css", GUIDE_POLICY)),
        *((guide.address(name), _showing(name)) for name in guide.PAGES),
    ):
        api.add_api_route(path, endpoint, include_in_schema=False)
    app.include_router(api)
    folder = Path(str(files("fastapi_offline"))) / "static"
    app.mount("/api/docs/files", StaticFiles(directory=folder), name="docs-files")


def _answering(content: str, media_type: str, policy: str) -> Answer:
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}

    async def answer() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return answer


def _showing(name: str) -> Answer:
    async def answer() -> Response:
        # A long page takes some 50 ms, for which no stream may stand still.
        content = await asyncio.to_thread(guide.page, name)
        return await _answering(content, "text/html", GUIDE_POLICY)()

    return answer
