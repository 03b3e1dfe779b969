"""Thousands of requests made from the API's own description, right and wrong: each has an answer that it describes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from modelyard.http import PLAIN_TEXT_PATHS
from tests.server import Server, serving
from tests.walk import NOBODY, application

#: For each of some seventy operations: 4,000 requests in all, at least.
CASES = 62
#: A request that takes longer hangs.
PATIENCE_S = 30.0
#: What every path may answer, whatever its description says: not this path (a parameter had a slash in it), not now.
EVERYWHERE = {404, 405}
SCHEMA: dict[str, Any] = application().openapi()
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "\0", "..", "../../etc/passwd", "%00", "a" * 3000, "null", "0", "-1", "NaN", "1e999", "\U0001f600",
         "{}", "[]", "'; DROP TABLE jobs; --", "local:x", "org/model", "id@2", "\u202e", "9" * 40, "true", NOBODY]
    ),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), TEXTS
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    described: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def operations() -> list[Operation]:
    return [
        Operation(method.upper(), path, described)
        for path, item in sorted(SCHEMA["paths"].items())
        for method, described in sorted(item.items())
        if method in {"get", "post", "put", "patch", "delete", "head"}
    ]


def values_of(schema: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Return values that a schema allows, as far as this reader understands it, and sometimes others."""
    if depth > 6:
        return SCALARS
    if "$ref" in schema:
        found = SCHEMA
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return values_of(found, depth + 1)
    allowed: st.SearchStrategy[Any]
    if "const" in schema or "enum" in schema:
        allowed = st.sampled_from(schema.get("enum") or [schema["const"]])
    elif choices := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        allowed = st.one_of(*(values_of(choice, depth + 1) for choice in choices))
    elif schema.get("type") == "object":
        named = {name: values_of(inner, depth + 1) for name, inner in schema.get("properties", {}).items()}
        required = set(schema.get("required", ()))
        allowed = st.fixed_dictionaries(
            {name: inner for name, inner in named.items() if name in required},
            optional={name: inner for name, inner in named.items() if name not in required},
        )
    elif schema.get("type") == "array":
        allowed = st.lists(values_of(schema.get("items", {}), depth + 1), max_size=4)
    elif schema.get("type") == "integer":
        allowed = st.integers(int(schema.get("minimum", -1000)), int(schema.get("maximum", 1000)))
    elif schema.get("type") == "number":
        allowed = st.floats(schema.get("minimum", -1e6), schema.get("maximum", 1e6))
    elif schema.get("type") == "boolean":
        allowed = st.booleans()
    elif schema.get("type") == "string":
        allowed = st.sampled_from([NOBODY, *map(str, schema.get("examples", ()))]) | TEXTS
    else:
        allowed = ANYTHING
    # One in five: what is right nearly everywhere gets furthest.
    return st.integers(0, 4).flatmap(lambda number: ANYTHING if number == 0 else allowed)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@st.composite
def requests(draw: st.DrawFn, operation: Operation) -> tuple[str, bytes, dict[str, str]]:
    """Return the target, the body and the headers of a request to an operation."""
    target, query, headers = operation.path, [], {}
    for parameter in operation.described.get("parameters", ()):
        if not parameter.get("required") and draw(st.booleans()):
            continue
        value = as_text(draw(values_of(parameter.get("schema", {}))))
        if parameter["in"] == "path":
            target = target.replace(
                "{" + parameter["name"] + "}", quote(value.encode(errors="replace"), safe="") or "x"
            )
        elif parameter["in"] == "query":
            query.append((parameter["name"], value.encode(errors="replace")))
        elif parameter["in"] == "header":
            headers[parameter["name"]] = "".join(char for char in value if " " <= char <= "~")[:200]
    body = b""
    content = operation.described.get("requestBody", {}).get("content", {})
    if content:
        kind = draw(st.sampled_from(sorted(content)))
        headers["Content-Type"] = kind
        if "multipart" in kind:
            headers["Content-Type"] += "; boundary=x"
            inner = draw(st.binary(max_size=200))
            body = (
                b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
                + inner
                + b"\r\n--x--\r\n"
            )
        else:
            body = json.dumps(draw(values_of(content[kind].get("schema", {})))).encode()
        if draw(st.integers(0, 9)) == 0:
            body = draw(st.binary(max_size=50))
    return (f"{target}?{urlencode(query)}" if query else target), body, headers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on which nothing is; its hub refuses every connection."""
    with serving(
        tmp_path_factory.mktemp("described") / "data",
        HF_ENDPOINT="http://127.0.0.1:1", MODELYARD_DOWNLOAD_ATTEMPTS="1", MODELYARD_MAX_DOWNLOADS="1",
    ) as started:  # fmt: skip
        yield started


def test_there_are_operations_enough_for_four_thousand_requests() -> None:
    assert len(operations()) * CASES >= 4000


@pytest.mark.slow
@pytest.mark.parametrize("operation", operations(), ids=str)
def test_whatever_is_asked_is_answered_as_described(server: Server, operation: Operation) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    described = {int(status) for status in operation.described["responses"] if status.isdigit()} | EVERYWHERE

    @settings(
        max_examples=CASES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(requests(operation))
    def asked(request: tuple[str, bytes, dict[str, str]]) -> None:
        target, body, headers = request
        connection.request(operation.method, target, body or None, headers)
        response = connection.getresponse()
        answer = response.read()
        said = (operation.method, target, body, headers, response.status, answer[:500])
        assert response.status in described, said
        assert response.status < 500 or response.status in (502, 503), said
        if response.status < 400 or operation.method == "HEAD" or response.status == 503:
            return
        if operation.path.removesuffix("/") in PLAIN_TEXT_PATHS:
            assert response.getheader("Content-Type") == "text/plain; charset=utf-8", said
            assert answer.decode(), said
            return
        error = json.loads(answer)["error"]
        assert error["message"], said
        assert "Traceback" not in answer.decode(), said

    try:
        asked()
    finally:
        connection.close()
