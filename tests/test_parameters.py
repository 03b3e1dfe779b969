"""Parameters that a route does not have, or that are given twice, and ids that are none, at every route."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from modelyard.app import describe_invalid
from modelyard.deploy.schemas import DeployIn
from modelyard.errors import Unprocessable
from modelyard.finetune.schemas import FinetuneIn
from modelyard.gateway.routes import api as gateway_api
from modelyard.health.routes import api as health_api
from modelyard.http import ManagementRoute
from modelyard.parameters import check_query
from modelyard.routing.schemas import AliasIn
from tests.server import Server, serving
from tests.walk import NOBODY, SAMPLES, application

ROUTES = [route for route in application().routes if isinstance(route, ManagementRoute)]
#: Parameters that are ids.
IDS = {name for name, value in SAMPLES.items() if value == NOBODY}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("parameters") / "data") as found:
        yield found


def paths(**instead: str) -> list[tuple[str, str, list[str]]]:
    """Return the method, the path and the names of the ids in it, of every management route."""
    values = SAMPLES | instead
    return [
        (method, re.sub(r"\{(\w+)(:\w+)?\}", lambda found: values[found[1]], route.path), names)
        for route in ROUTES
        for method in sorted(route.methods or ())
        for names in [[name for name in route.param_convertors if name in IDS]]
    ]


def test_the_routes_are_those_of_the_management_api() -> None:
    assert len(ROUTES) > 35
    assert all(route.path.startswith("/api/v1/") for route in ROUTES)
    others = [route for api in (gateway_api, health_api) for route in api.routes]
    assert not any(isinstance(route, ManagementRoute) for route in others)


def test_a_parameter_that_a_route_does_not_have_is_refused_with_those_that_it_has(server: Server) -> None:
    for method, path, _ in paths():
        answer = server.request(method, f"{path}?drian=false", json_body={} if method in ("POST", "PUT") else None)
        error = answer.json()["error"]
        assert (answer.status, error["code"], error["param"]) == (422, "unknown_parameter", "drian"), (method, path)
    said = server.get("/api/v1/jobs/?limits=3").json()["error"]["message"]
    assert said == "There is no query parameter 'limits' here; there are limit, before, kind, status."
    assert server.get("/api/v1/jobs/?limit=1&limit=2").error_code == "repeated_parameter"
    assert server.get("/api/v1/jobs/?limit=1").status == 200


@pytest.mark.parametrize("path", ["/health?verbose=1", "/ready?x=y", "/v1/models?after=1", "/metrics?name=a"])
def test_elsewhere_parameters_of_clients_are_passed_over(server: Server, path: str) -> None:
    assert server.get(path).status == 200


def test_an_id_that_is_none_is_told_so_by_every_route(server: Server) -> None:
    seen = set()
    for method, path, names in paths(**dict.fromkeys(IDS, "not-an-id")):
        for name in names:
            seen.add(name)
            answer = server.request(method, path)
            error = answer.json()["error"]
            assert (answer.status, error["code"], error["param"]) == (422, "invalid_value", name), (method, path)
            assert error["message"].startswith(f"path {name}: 'not-an-id' is not an id: that is a UUID, such as ")
    assert seen == IDS
    assert server.get("/api/v1/nothing/not-an-id").error_code == "no_such_path"
    assert server.get("/api/v1/datasets/upload/").status == 405
    assert server.get(f"/api/v1/datasets/{NOBODY}/nothing").error_code == "no_such_path"


@pytest.mark.parametrize(
    ("given", "known", "words"),
    [
        ([("a", "1")], {}, "no query parameter 'a' here; this path takes none."),
        ([("a", "1")], {"b": False}, "no query parameter 'a' here; there is b."),
        ([("x" * 200, "")], {}, f"'{'x' * 100}...'"),
        ([("b", "1"), ("b", "1")], {"b": False}, "'b' is given more than once"),
    ],
)
def test_a_refusal_names_the_parameter(given: list[tuple[str, str]], known: dict[str, bool], words: str) -> None:
    with pytest.raises(Unprocessable, match=re.escape(words)):
        check_query(given, known)
    check_query([("b", "1"), ("b", "2"), ("c", "3")], {"b": True, "c": False})


def leaves(model: type[BaseModel], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each field of a body, those of nested objects too."""
    for name, field in model.model_fields.items():
        place = (*before, field.alias or name)
        yield place
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from leaves(kind, place)


class _Nothing:
    """A value that no field can have."""


@pytest.mark.parametrize("model", [FinetuneIn, DeployIn, AliasIn])
def test_a_refusal_names_the_field_as_it_was_sent(model: type[BaseModel]) -> None:
    asked = list(leaves(model))
    for place in asked:
        body: Any = _Nothing()
        for name in reversed(place):
            body = {name: body}
        with pytest.raises(ValidationError) as caught:
            TypeAdapter(model).validate_python(body)
        faults = [fault for fault in caught.value.errors() if fault["loc"][: len(place)] == place]
        error = describe_invalid([{**one, "loc": ("body", *one["loc"])} for one in faults])
        assert error.param == ".".join(place)
    if model is FinetuneIn:
        assert {("promote", "if"), ("hyperparameters", "rank")} <= set(asked)
