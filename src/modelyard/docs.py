"""Swagger UI at /api/docs, from files that are installed with the server: it works with no internet."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

# The page runs no script of its own inline, so the policy need not allow any.
POLICY = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
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


def add_docs(app: FastAPI) -> None:
    """Serve the documentation page and its files."""
    folder = Path(str(files("fastapi_offline"))) / "static"

    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    async def start() -> HTMLResponse:
        return HTMLResponse(START, media_type="text/javascript")

    app.add_api_route("/api/docs/start.js", start, include_in_schema=False)
    app.mount("/api/docs/files", StaticFiles(directory=folder), name="docs-files")
    for path in ("/api/docs", "/api/docs/"):
        app.add_api_route(path, page, include_in_schema=False)
