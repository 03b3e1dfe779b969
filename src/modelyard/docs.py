"""The interface's own description: the OpenAPI schema at /api/openapi.json and Swagger UI at /api/docs.

Swagger UI's files are installed with the server, so that it works with no internet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from modelyard.http import AnthropicErrorOut, ErrorOut, router

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
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "The admin key, if the server has one."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-KEY", "description": "The same key, another way."},
}


def add_docs(app: FastAPI, open_paths: frozenset[str]) -> None:
    """Serve the schema, the documentation page and its files; `open_paths` are those that never want a key."""
    api = router()
    made: list[bytes] = []

    async def schema() -> Response:
        if not made:
            made.append(msgspec.json.encode(complete(app.openapi(), open_paths)))
        return Response(made[0], media_type="application/json")

    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    for path, endpoint in (
        ("/api/openapi.json", schema),
        ("/api/docs", _answering(PAGE, "text/html", headers)),
        ("/api/docs/start.js", _answering(START, "text/javascript", headers)),
    ):
        api.add_api_route(path, endpoint, include_in_schema=False)
    app.include_router(api)
    folder = Path(str(files("fastapi_offline"))) / "static"
    app.mount("/api/docs/files", StaticFiles(directory=folder), name="docs-files")


def _answering(content: str, media_type: str, headers: dict[str, str]) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return answer


def complete(schema: dict[str, Any], open_paths: frozenset[str]) -> dict[str, Any]:
    """Return FastAPI's schema with what it does not know: the form of errors, the key, and null in examples."""
    _, shared = models_json_schema(
        [(ErrorOut, "serialization"), (AnthropicErrorOut, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    schema = _with_enums(schema)
    shared = _with_enums(shared)
    known = schema.get("components", {})
    schemas = dict(sorted({**known.get("schemas", {}), **shared["$defs"]}.items()))
    paths = {
        path: {
            method: {**_with_nulls(operation, schemas), **({"security": []} if path in open_paths else {})}
            for method, operation in methods.items()
        }
        for path, methods in schema["paths"].items()
    }
    return {
        **schema,
        "paths": paths,
        # Any one of them will do. The empty one: without a key the server listens to its own machine alone.
        "security": [{}, *({name: []} for name in SECURITY_SCHEMES)],
        "components": {
            **known,
            "schemas": _with_nulls(schemas, schemas),
            "securitySchemes": SECURITY_SCHEMES,
        },
    }


def _with_enums(part: Any) -> Any:
    """Return a part of the schema whose constants are lists of one value.

    It is the same to a validator; but common generators of clients read `const` as a promise that holds for the whole
    of an `anyOf`, and then refuse its other branches.
    """
    if isinstance(part, list):
        return [_with_enums(item) for item in part]
    if not isinstance(part, dict):
        return part
    # A property may be called so: then what it holds is a schema.
    if "const" in part and not isinstance(part["const"], dict):
        part = {("enum" if name == "const" else name): ([value] if name == "const" else value)
                for name, value in part.items()}  # fmt: skip
    return {name: _with_enums(value) for name, value in part.items()}


def _with_nulls(part: Any, schemas: dict[str, Any]) -> Any:
    """Return a part of the schema whose examples have again the nulls that FastAPI drops."""
    if isinstance(part, list):
        return [_with_nulls(item, schemas) for item in part]
    if not isinstance(part, dict):
        return part
    found = {name: _with_nulls(value, schemas) for name, value in part.items()}
    if isinstance(found.get("schema"), dict) and "example" in found:
        found["example"] = _filled(found["example"], found["schema"], schemas)
    if isinstance(found.get("examples"), list):
        found["examples"] = [_filled(example, found, schemas) for example in found["examples"]]
    return found


def _filled(example: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if isinstance(example, list) and "items" in schema:
        return [_filled(item, schema["items"], schemas) for item in example]
    if not isinstance(example, dict) or "properties" not in schema:
        return example
    fields = schema["properties"]
    missing = {name: None for name in schema.get("required", ()) if name not in example}
    return {name: _filled(value, fields.get(name, {}), schemas) for name, value in example.items()} | missing
