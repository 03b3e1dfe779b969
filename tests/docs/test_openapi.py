"""The interface describes itself completely, by a schema that is valid, with no word from the internet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from modelyard.http import ANTHROPIC_PATHS, PLAIN_TEXT_PATHS
from tests.server import Server, serving
from tests.walk import application, every_path

Json = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("docs") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def schema(server: Server) -> Json:
    answer = server.get("/api/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    found: Json = answer.json()
    return found


def operations(schema: Json) -> Iterator[tuple[str, Json]]:
    assert len(schema["paths"]) > 50
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def resolved(schema: Json, part: Json) -> Json:
    while "$ref" in part:
        found: Any = schema
        for name in part["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        part = found
    return part


def example(schema: Json, part: Json, where: str) -> Any:
    """Build an example of a schema from those of its parts, as Swagger UI does; fail where there is none."""
    part = resolved(schema, part)
    for name in ("example", "const", "default"):
        if name in part:
            return part[name]
    if "examples" in part:
        return part["examples"][0]
    if "enum" in part:
        return part["enum"][0]
    for name in ("anyOf", "oneOf"):
        if name in part:
            if {"type": "null"} in part[name]:
                return None
            return example(schema, part[name][0], where)
    if part.get("format") == "uuid":
        return "3f2b8a94-5c1d-4e6f-9a70-b1c2d3e4f506"
    if part.get("format") == "date-time":
        return "2026-11-20T21:15:00Z"
    if part.get("type") == "array":
        return [example(schema, part["items"], f"{where}[]")]
    if part.get("type") == "boolean":
        return False
    assert "properties" in part, f"{where} has no example: {part}"
    return {name: example(schema, field, f"{where}.{name}") for name, field in part["properties"].items()}


def check_content(schema: Json, content: Json, where: str) -> None:
    """Check that every media type has a schema and an example that fits it."""
    assert content, f"{where} has no content"
    for media_type, described in content.items():
        assert described.get("schema"), f"{where} {media_type} has no schema"
        shown = described.get("example") or example(schema, described["schema"], where)
        with_parts = {**described["schema"], "components": schema["components"]}
        faults = [fault.message for fault in Draft202012Validator(with_parts).iter_errors(shown)]
        assert not faults, f"the example of {where} does not fit its schema: {faults}"


def test_the_schema_is_valid(schema: Json) -> None:
    assert schema["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(schema).validate()


def test_the_schema_has_nothing_that_common_generators_of_clients_misread(schema: Json) -> None:
    def parts(part: Any, where: str) -> Iterator[tuple[str, Json]]:
        if isinstance(part, dict):
            yield where, part
            for name, value in part.items():
                if name not in {"example", "examples", "default"}:
                    yield from parts(value, f"{where}.{name}")
        elif isinstance(part, list):
            for number, value in enumerate(part):
                yield from parts(value, f"{where}[{number}]")

    assert not [where for where, part in parts(schema, "$") if "const" in part]
    sizes = schema["components"]["schemas"]["HyperparametersIn"]["properties"]["batch_size"]["anyOf"]
    assert {"type": "string", "enum": ["auto"]} in sizes


def test_the_schema_of_a_stream_is_that_of_each_of_its_events(server: Server, schema: Json) -> None:
    described = {
        where: answer["content"]["text/event-stream"]
        for where, operation in operations(schema)
        for answer in operation["responses"].values()
        if "text/event-stream" in answer.get("content", {})
    }
    assert {"POST /v1/chat/completions", "GET /api/v1/jobs/{job_id}/events/"} <= set(described)
    job = server.post("/api/v1/models/add/?model_id=no/such").json()["id"]
    server.post(f"/api/v1/jobs/{job}/interrupt/")
    text = server.get(f"/api/v1/jobs/{job}/events/").text
    events = [
        dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        for block in text.strip().split("\n\n")
    ]
    assert [event["event"] for event in events][-1] == "end"
    for where, content in described.items():
        for event in [*events, content["example"]]:
            assert not list(Draft202012Validator(content["schema"]).iter_errors(event)), where


def test_the_schema_of_errors_fits_those_that_engines_make(schema: Json) -> None:
    made = {"error": {"message": "messages: too few.", "type": "BadRequestError", "param": None, "code": 400}}
    ours = {"error": {"message": "No.", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}}
    part = {"$ref": "#/components/schemas/ErrorOut", "components": schema["components"]}
    for body in (made, ours):
        assert not list(Draft202012Validator(part).iter_errors(body))
    answers = schema["paths"]["/v1/messages"]["post"]["responses"]["404"]["content"]["application/json"]
    assert answers["schema"] == {"$ref": "#/components/schemas/AnthropicErrorOut"}


def test_the_schema_holds_every_route_once(schema: Json) -> None:
    documented = {
        (method.upper(), re.sub(r"\{\w+\}", "*", path.rstrip("/")))
        for path, methods in schema["paths"].items()
        for method in methods
    }
    real = set()
    for method, path in every_path(application()):
        if path.startswith(("/api/docs", "/api/openapi.json")):
            continue
        path = re.sub(r"no/such|7000000|00000000-0000-4000-8000-000000000000", "*", path.rstrip("/"))
        real.add((method, path))
    assert documented == real
    assert sum(len(methods) for methods in schema["paths"].values()) == len(documented)


def test_every_operation_has_a_summary_a_description_a_tag_and_a_name_of_its_own(schema: Json) -> None:
    names = []
    for where, operation in operations(schema):
        assert operation.get("summary"), where
        assert len(operation.get("description", "")) > 15, where
        assert len(operation.get("tags", ())) == 1, where
        names.append(operation["operationId"])
        assert re.fullmatch(r"[a-z][a-z0-9_]*", names[-1]), where
    assert len(names) == len(set(names))


def test_every_tag_is_described(schema: Json) -> None:
    used = {tag for _, operation in operations(schema) for tag in operation["tags"]}
    assert used == {tag["name"] for tag in schema["tags"] if tag["description"]}


def test_every_good_answer_has_a_schema_and_an_example_that_fits_it(schema: Json) -> None:
    for where, operation in operations(schema):
        good = [answer for status, answer in operation["responses"].items() if status.startswith("2")]
        assert good, where
        for answer in good:
            check_content(schema, answer["content"], f"{where} 2xx")


def test_every_request_body_has_a_schema_and_an_example_that_fits_it(schema: Json) -> None:
    bodies = 0
    for where, operation in operations(schema):
        if "requestBody" in operation:
            bodies += 1
            check_content(schema, operation["requestBody"]["content"], f"{where} body")
    assert bodies > 10


def test_every_parameter_is_described(schema: Json) -> None:
    for where, operation in operations(schema):
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description"), f"{where} {parameter['name']}"


def test_every_operation_documents_its_errors_in_their_one_form(schema: Json) -> None:
    for where, operation in operations(schema):
        bad = {status: answer for status, answer in operation["responses"].items() if not status.startswith("2")}
        if where == "GET /health/":
            assert not bad
            continue
        assert {"401", "403"} <= bad.keys(), where
        if operation.get("parameters"):
            assert {"404", "422"} & bad.keys(), where
        if "requestBody" in operation:
            assert {"400", "413"} <= bad.keys(), where
        for status, answer in bad.items():
            if (where, status) == ("GET /ready/", "503"):
                continue
            assert answer["description"], where
            check_content(schema, answer["content"], f"{where} {status}")
            media_types = {name: described["schema"] for name, described in answer["content"].items()}
            form = {"application/json": {"$ref": "#/components/schemas/ErrorOut"}}
            if where.partition(" ")[2] in ANTHROPIC_PATHS:
                form = {"application/json": {"$ref": "#/components/schemas/AnthropicErrorOut"}}
            if where.partition(" ")[2] in PLAIN_TEXT_PATHS:
                form = {"text/plain": {"type": "string"}}
            assert media_types == form, (where, status)
    assert "HTTPValidationError" not in schema["components"]["schemas"]


def test_the_key_is_documented_and_health_wants_none(schema: Json) -> None:
    assert {part["type"] for part in schema["components"]["securitySchemes"].values()} == {"http", "apiKey"}
    assert {} in schema["security"], "without a key the server is open to its own machine"
    assert schema["paths"]["/health/"]["get"]["security"] == []


@pytest.mark.parametrize("path", ["/api/docs", "/api/docs/"])
def test_the_documentation_names_no_other_host_and_all_that_it_names_is_there(server: Server, path: str) -> None:
    page = server.get(path)
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(named) == 4
    for address in named:
        if address == "data:,":
            continue
        assert re.match(r"/(?!/)", address), "a path of this server"
        answer = server.get(address)
        assert answer.status == 200
        assert len(answer.body) > 100
    assert "//" not in page.text
    start = server.get("/api/docs/start.js")
    assert start.headers["content-type"] == "text/javascript; charset=utf-8"
    assert "//" not in start.text
    assert '"/api/openapi.json"' in start.text


def test_what_is_not_among_the_documentations_files_is_not_served(server: Server) -> None:
    for path in (
        "/api/docs/files/",
        "/api/docs/files/no.js",
        "/api/docs/files/../core.py",
        "/api/docs/files/%2e%2e/core.py",
    ):
        answer = server.get(path)
        assert (answer.status, answer.error_code) == (404, "no_such_path"), path
