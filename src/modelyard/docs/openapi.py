"""The OpenAPI schema with what FastAPI leaves out: the form of errors, the key, and null in examples."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from modelyard.http import AnthropicErrorOut, ErrorOut

SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "The admin key, if the server has one."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-KEY", "description": "The same key, another way."},
}


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
