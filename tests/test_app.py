"""The whole application on a real server: every path with either ending, and an answer to whatever is wrong."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from modelyard.http import ANTHROPIC_PATHS, BODY_LIMIT, PLAIN_TEXT_PATHS
from tests.eventually import eventually
from tests.server import Answer, Server, serving
from tests.walk import SAMPLES, application, every_path, other_ending

JOB = SAMPLES["job_id"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("app") / "data") as server:
        yield server


def without_chance(answer: Answer) -> tuple[int, str | None, bytes]:
    """Return what of an answer must be the same the next time."""
    body = b"" if answer.headers.get("content-type", "").startswith("text/plain; version") else answer.body
    return answer.status, answer.headers.get("content-type"), body


def test_every_route_answers_the_same_with_and_without_a_trailing_slash_and_with_no_redirect(server: Server) -> None:
    seen = 0
    for method, path in every_path(application()):
        first, second = server.request(method, path), server.request(method, other_ending(path))
        assert not 300 <= first.status < 400, (method, path)
        if first.status in (404, 405) and method != "HEAD":
            assert first.error_code not in ("no_such_path", "method_not_allowed"), (method, path)
        if path.rstrip("/") != "/api/v1/models/add":  # it makes a job, which has another id each time
            quoted = path.encode(), other_ending(path).encode()
            assert without_chance(first)[:2] == without_chance(second)[:2], (method, path)
            assert without_chance(first)[2].replace(*quoted) == without_chance(second)[2].replace(*quoted), path
        seen += 1
    assert seen > 30


@pytest.mark.parametrize("path", ["/", "/api", "/api/v1", "/v1", "/no/such", "/api/v1/jobsx", "//api/v1/jobs",
                                  "/health/x", "/api/v1/jobs//", "/%00", "/api/v1/jobs/%0d%0aX-Evil:1",
                                  "/..%2f..%2fetc/passwd"])  # fmt: skip
def test_an_unknown_path_is_told_in_the_envelope(server: Server, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        answer = server.request(method, path)
        assert (answer.status, answer.error_code) == (404, "no_such_path"), method
        assert "/api/docs" in answer.json()["error"]["message"]


def test_a_wrong_method_is_told_with_all_those_that_the_path_has(server: Server) -> None:
    allowed: dict[str, set[str]] = {}
    for method, path in every_path(application()):
        allowed.setdefault(path.rstrip("/"), set()).add(method)
    # A model or an alias may have the name of another path: what is not that path's own method goes to it.
    for room in ("models", "aliases"):
        for path in [path for path in allowed if path.startswith(f"/api/v1/{room}/")]:
            allowed[path] |= allowed[f"/api/v1/{room}/no/such"]
    wrong = 0
    for path, methods in allowed.items():
        if "GET" in methods:
            methods = {*methods, "HEAD"}
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - methods:
            answer = server.request(method, path)
            assert answer.status == 405, (method, path)
            assert path in PLAIN_TEXT_PATHS | ANTHROPIC_PATHS or answer.error_code == "method_not_allowed", (
                method,
                path,
            )
            assert set(answer.headers["allow"].split(", ")) == methods, (method, path)
            wrong += 1
    assert wrong > 100


def test_head_answers_as_get_does_without_a_body(server: Server) -> None:
    seen = 0
    for method, path in every_path(application()):
        if method != "GET":
            continue
        for way in (path, other_ending(path)):
            got, head = server.get(way), server.request("HEAD", way)
            assert (head.status, head.body) == (got.status, b""), way
            own = {"date", "content-length"} if path.startswith("/metrics") else {"date"}
            assert {name: value for name, value in head.headers.items() if name not in own} == {
                name: value for name, value in got.headers.items() if name not in own
            }, way
        seen += 1
    assert seen > 20
    for path in ("/health", "/ready", "/v1/models", "/api/v1/models/", "/api/v1/jobs/", "/api/docs"):
        assert server.request("HEAD", path).status == 200, path


def test_head_of_a_stream_that_never_ends_ends(server: Server) -> None:
    job = server.post("/api/v1/models/add/?model_id=no/such").json()["id"]
    answer = server.request("HEAD", f"/api/v1/jobs/{job}/events/")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("//v1/models", "/v1/models"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/v1/chat/completions/", "/v1/chat/completions/"),
        ("/api/v1/v1/chat/completions", "/api/v1/chat/completions"),
        ("/api/v1/api/v1/deploy/", "/api/v1/deploy/"),
        ("/v1/api/v1/jobs/", "/api/v1/jobs/"),
        ("/v1//v1/messages", "/v1/messages"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/embeddings", "/v1/embeddings"),
        ("/generate-one", "/api/generate-one"),
        ("/finetune/", "/api/v1/finetune/"),
    ],
)
def test_a_path_with_a_base_too_many_or_too_few_is_told_the_right_one(server: Server, asked: str, meant: str) -> None:
    answer = server.post(asked, {})
    assert answer.status == 404
    assert meant in ANTHROPIC_PATHS or answer.error_code == "no_such_path"
    assert f" the right path is {meant}. " in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/messages", b'{"model": "nope", "messages": [], "max_tokens": 4}', 404, "not_found_error"),
        ("/api/v1/messages/", b"{", 400, "invalid_request_error"),
        ("/v1/messages/count_tokens", b"[]", 400, "invalid_request_error"),
        ("/v1/messages", b"", 400, "invalid_request_error"),
        ("/v1/messages", b" " * (33 << 20), 413, "request_too_large"),
        ("/v1/messages/batches", b"{}", 404, "not_found_error"),
        ("/api/v1/messages/batches/7/results/", b"{}", 404, "not_found_error"),
        ("//v1/v1/messages", b"{}", 404, "not_found_error"),
    ],
)
def test_errors_of_anthropics_interface_have_its_form(
    server: Server, path: str, body: bytes, status: int, kind: str
) -> None:
    answer = server.request("POST", path, body=body, headers={"Content-Type": "application/json"})
    error = answer.json()
    assert (answer.status, error["type"], error["error"]["type"]) == (status, "error", kind)
    assert len(error["error"]["message"]) > 20
    assert (set(error), set(error["error"])) == ({"type", "error"}, {"type", "message"})
    refused = server.get(path, {"Host": "elsewhere.example.org"})
    assert refused.json()["error"]["type"] == "permission_error"
    wrong_method = "invalid_request_error" if path.removesuffix("/") in ANTHROPIC_PATHS else "not_found_error"
    assert server.get(path).json()["error"]["type"] == wrong_method


@pytest.mark.parametrize(
    ("body", "place"),
    [(b'{"model_id": ', "character 13"), (b"", None), (b"{'model_id': 1}", "character 1"), (b"\xff\xfe{", None),
     (b'{"model_id": "\xff"}', None), (b"[" * 100_000, None), (b'{"a":' * 100_000, None), (b"nonsense", "character 0"),
     (b'{"model_id": ' + b"9" * 10_000 + b"}", None)],
)  # fmt: skip
def test_a_body_that_is_not_json_is_told_with_the_place(server: Server, body: bytes, place: str | None) -> None:
    answer = server.request("POST", "/api/v1/deploy/", body=body, headers={"Content-Type": "application/json"})
    if body:
        assert (answer.status, answer.error_code) == (400, "invalid_json")
        assert answer.json()["error"]["message"].startswith("The body is not JSON: ")
        assert place is None or place in answer.json()["error"]["message"]
    else:
        assert (answer.status, answer.error_code) == (422, "invalid_value")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", ""])
def test_a_body_of_another_type_is_told_which_header_to_send(server: Server, kind: str) -> None:
    body = json.dumps({"model_id": "no/such"}).encode()
    answer = server.request("POST", "/api/v1/deploy/", body=body, headers={"Content-Type": kind})
    assert (answer.status, answer.error_code) == (422, "invalid_value")
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "param", "words"),
    [
        ("GET", "/api/v1/jobs/?limit=0", None, "limit", "query limit: Input should be greater than or equal to 1."),
        ("GET", "/api/v1/jobs/?limit=x", None, "limit", "query limit: Input should be a valid integer"),
        ("GET", "/api/v1/jobs/?status=DONE", None, "status", "query status: Input should be 'CREATED', 'RUNNING'"),
        ("GET", "/api/v1/jobs/?before=x&limit=0", None, "limit", "(and 1 more)"),
        ("GET", "/api/v1/jobs/7/status", None, "job_id", "path job_id: '7' is not an id: that is a UUID, such as "),
        ("GET", "/api/v1/jobs/?before=x", None, "before", "query before: 'x' is not an id"),
        ("POST", "/api/v1/models/add/", None, "model_id", "query model_id: Field required."),
        ("POST", "/api/v1/deploy/", {}, "model_id", "body model_id: Field required."),
        ("POST", "/api/v1/deploy/", None, "body", "body: there is none: send JSON, with the header 'Content-Type: "),
        ("POST", "/api/v1/deploy/", [], "body", "body: Input should be a JSON object."),
        ("POST", "/api/v1/deploy/", {"model_id": "m", "options": {"seed": -1}}, "options.seed", "body options.seed: "),
        ("POST", "/api/v1/deploy/", {"model_id": "m", "adapter_ids": ["", "b"]}, "adapter_ids.0", "at least 1 char"),
        ("POST", "/api/v1/deploy/", {"model_id": "m", "nonsense": 1}, "nonsense", "nonsense: There is no such field; "),
        ("POST", "/api/v1/deploy/", {"model_id": "m", "options": {"model": "/etc"}}, "options.model", "no such field"),
        ("GET", f"/api/v1/jobs/{JOB}/log?tail=-1", None, "tail", "query tail: "),
    ],
)
def test_a_value_that_cannot_be_is_told_with_its_place_and_what_it_should_be(
    server: Server, method: str, path: str, body: object, param: str, words: str
) -> None:
    answer = server.request(method, path, json_body=body)
    assert (answer.status, answer.error_code) == (422, "invalid_value")
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


def test_a_body_that_is_announced_as_too_large_is_refused_before_it_comes(server: Server) -> None:
    request = (
        f"POST /api/v1/deploy/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {BODY_LIMIT + 1}\r\n\r\n{{"
    )
    answer = server.send_bytes(request.encode())
    assert b" 413 " in answer.splitlines()[0]
    assert b'"body_too_large"' in answer


def test_a_body_that_grows_too_large_is_refused_while_it_comes(server: Server) -> None:
    head = (
        "POST /api/v1/deploy/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
    # It has no end: who waited for one would never answer.
    answer = server.send_bytes(head.encode() + piece * (BODY_LIMIT // 65536 + 1))
    assert b" 413 " in answer.splitlines()[0]
    assert b"larger than the 1 MiB" in answer


def test_a_body_of_the_largest_size_is_read(server: Server) -> None:
    body = json.dumps({"model_id": "nobody/asked-for"}).encode().ljust(BODY_LIMIT)
    answer = server.request("POST", "/api/v1/deploy/", body=body, headers={"Content-Type": "application/json"})
    assert (answer.status, answer.error_code) == (404, "model_not_found")


def test_requests_to_engines_have_a_limit_of_their_own(server: Server) -> None:
    body = json.dumps({"model": "no/such", "prompt": "x" * BODY_LIMIT}).encode()
    answer = server.request("POST", "/v1/completions", body=body, headers={"Content-Type": "application/json"})
    assert (answer.status, answer.error_code) == (404, "model_not_found")


ODD = ["", " ", "0", "-1", "1e999", "9" * 40, "\x00", "a\x00b", "\r\nX: 1", "../../etc/passwd", "%s%n", "ü" * 300,
       "'; DROP TABLE jobs", "\ud800", "🙂", "null", "true", "[]", "{}", "default", "local:", "local:../x",
       "a" * 10_000]  # fmt: skip


@pytest.mark.slow
def test_no_odd_value_makes_a_route_fail_inside(database_url: str, tmp_path: Path) -> None:
    with serving(tmp_path / "data", MODELYARD_DATABASE_URL=database_url, HF_ENDPOINT="http://127.0.0.1:9") as server:
        schema = server.get("/api/openapi.json").json()
        asked = 0
        for path, methods in schema["paths"].items():
            for method, operation in methods.items():
                parameters = operation.get("parameters", [])
                for odd in ODD:
                    values: dict[str, Any] = {"path": {}, "query": {}, "header": {}}
                    for parameter in parameters:
                        is_job = parameter["name"] == "job_id" and odd != ODD[0]
                        values[parameter["in"]][parameter["name"]] = str(uuid.uuid4()) if is_job else odd
                    url = path
                    for name, value in values["path"].items():
                        url = url.replace(f"{{{name}}}", quote(value, safe="", errors="surrogatepass"))
                    url += "?" + urlencode(values["query"], errors="surrogatepass")
                    headers = {name: value for name, value in values["header"].items() if value.isdigit()}
                    body = (
                        {name: odd for name in ("model_id", "model", "prompt", "input")} if method == "post" else None
                    )
                    answer = server.request(method.upper(), url, json_body=body, headers=headers)
                    assert answer.status < 500 or answer.status == 503, (method, url, answer.body, server.log)
                    asked += 1
                    if not parameters and body is None:
                        break
        assert asked > 300
        assert "Traceback" not in server.log


async def test_what_fails_inside_is_told_without_its_cause_which_the_log_has(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        with sqlite3.connect(server.data_dir / "modelyard.db") as database:
            database.execute(
                "INSERT INTO jobs (id, kind, name, spec, status, interrupt_requested, created_at)"
                " VALUES (?, 'DOWNLOAD', 'x', '{}', 'NONSENSE', 0, '2026-01-01 00:00:00.000000')",
                (uuid.UUID(JOB).hex,),
            )
        database.close()
        answer = server.get(f"/api/v1/jobs/{JOB}/status/")
        assert (answer.status, answer.error_code) == (500, "internal_error")
        assert answer.json()["error"]["type"] == "server_error"
        assert "NONSENSE" not in answer.text
        await eventually(lambda: "NONSENSE" in server.log, "the cause in the log")
        assert server.get("/health").status == 200


async def test_a_server_whose_job_runner_dies_ends_with_a_status_that_has_it_started_again(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        with sqlite3.connect(server.data_dir / "modelyard.db") as database:
            # No program writes such a row; reading it is what kills the runner.
            database.execute(
                "INSERT INTO jobs (id, kind, name, spec, status, interrupt_requested, created_at)"
                " VALUES (?, 'DOWNLOAD', 'x', 'this is not JSON', 'CREATED', 0, '2026-01-01 00:00:00.000000')",
                (uuid.UUID(JOB).hex,),
            )
        database.close()
        assert server.wait() == 1
        assert "The job runner ended. The server stops." in server.log
        assert "JSONDecodeError" in server.log, "and why"
