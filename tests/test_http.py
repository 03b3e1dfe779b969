"""What all routes share: either slash, documented errors, one mapping from errors to answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from fastapi import APIRouter, FastAPI

from modelyard import errors
from modelyard.http import FAMILIES, documented, error_response, router
from tests.jobs.server import serving


def application() -> FastAPI:
    api = router("/api/things", "Things")

    @api.get("/")
    async def everything() -> str:
        return "everything"

    @api.post("/add/")
    async def add(body: dict[str, int]) -> dict[str, int]:
        return body

    @api.get("/{name}/status")
    async def status(name: str) -> str:
        return f"status of {name}"

    @api.delete("/{name:path}")
    async def remove(name: str) -> str:
        return name

    app, outer = FastAPI(redirect_slashes=False), APIRouter(prefix="/outer")
    outer.include_router(api)
    app.include_router(api)
    app.include_router(outer)
    return app


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with serving(application()) as base, aiohttp.ClientSession(base) as http:
        yield http


@pytest.mark.parametrize("prefix", ["", "/outer"])
async def test_a_path_answers_with_and_without_its_slash_and_a_post_keeps_its_body(prefix: str) -> None:
    async with client() as http:
        for end in ("", "/"):
            for method, path, body, expected in (
                ("GET", "/api/things", None, "everything"),
                ("POST", "/api/things/add", {"a": 1}, {"a": 1}),
                ("GET", "/api/things/one/status", None, "status of one"),
            ):
                url = prefix + path + end
                async with http.request(method, url, json=body, allow_redirects=False) as reply:
                    assert (reply.status, await reply.json()) == (200, expected), url


async def test_a_name_that_holds_slashes_does_not_swallow_the_last_one() -> None:
    async with client() as http:
        for name in ("one", "organisation/model", "a/b/c"):
            for end in ("", "/"):
                async with http.delete(f"/api/things/{name}{end}", allow_redirects=False) as reply:
                    assert (reply.status, await reply.json()) == (200, name)


async def test_only_one_slash_may_be_added() -> None:
    async with client() as http:
        for path in ("/api/things//", "/api/thing", "/api/thingsx", "/api/things/one/statusx"):
            async with http.get(path, allow_redirects=False) as reply:
                assert reply.status in (404, 405), path


def test_the_schema_names_each_path_once() -> None:
    paths = application().openapi()["paths"]
    assert len({path.rstrip("/") for path in paths}) == len(paths)


def test_a_documented_route_names_the_errors_that_every_route_can_have_and_its_own() -> None:
    assert list(documented()) == [401, 403]
    found = documented(409, 404)
    assert list(found) == [401, 403, 404, 409]
    assert all(found[status]["description"] == FAMILIES[int(status)] for status in found)


def every_error(family: type[errors.ModelyardError] = errors.ModelyardError) -> list[type[errors.ModelyardError]]:
    return [family, *(found for child in family.__subclasses__() for found in every_error(child))]


def test_every_status_of_the_tree_can_be_documented() -> None:
    assert {family.status for family in every_error()} - {500} <= set(FAMILIES)


def test_an_error_becomes_the_one_envelope() -> None:
    response = error_response(errors.JobNotFound("x"))
    assert (response.status_code, response.media_type) == (404, "application/json")
    assert json.loads(bytes(response.body)) == {
        "error": {
            "message": "There is no job x. GET /api/v1/jobs/ lists them.",
            "type": "invalid_request_error",
            "param": "job_id",
            "code": "job_not_found",
        }
    }


def test_an_error_that_will_pass_says_when_to_come_back_and_one_for_want_of_a_key_how_to_show_it() -> None:
    assert error_response(errors.EngineStarting("Loading.", retry_after_s=7)).headers["Retry-After"] == "7"
    assert error_response(errors.Unauthorized("No key.")).headers["WWW-Authenticate"] == "Bearer"
    assert "Retry-After" not in error_response(errors.Conflict("No.")).headers
