"""REST for datasets, through the real server; the source document's commands with real curl on all stores."""

from __future__ import annotations

import hashlib
import json
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.datasets.forms import FORM_HEADERS, bad_at, chat, form, jsonl, part, questions, upload
from tests.fixtures import S3Server
from tests.server import Server, serving

UPLOAD = "/api/v1/datasets/upload/"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("datasets") / "data") as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """A server without datasets, shared by the tests of this module."""
    yield running
    for dataset in running.get("/api/v1/datasets/").json():
        assert running.delete(f"/api/v1/datasets/{dataset['id']}/").status == 200


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def storing(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The settings of a store."""
    if request.param == "folder":
        return {"MODELYARD_STORAGE_URL": f"file://{tmp_path / 'objects'}"}
    server: S3Server = request.getfixturevalue("s3_server")
    return {
        "MODELYARD_STORAGE_URL": f"s3://{server.bucket}/test-{uuid.uuid4().hex}",
        "MODELYARD_S3_ENDPOINT_URL": server.endpoint_url,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def put(server: Server, data: bytes, query: str = "", filename: str = "train.jsonl") -> dict[str, Any]:
    answer = server.request("POST", UPLOAD + query, body=upload(data, filename), headers=FORM_HEADERS)
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def objects(server: Server) -> list[str]:
    """Return what lies in the embedded storage, temporary files included."""
    root = server.data_dir / "objects"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def curl(server: Server, command: str, cwd: Path) -> bytes:
    """Run a command of the source document as it is printed, but for the port."""
    shell = command.replace("http://localhost:8080", server.address)
    done = subprocess.run(["bash", "-c", shell], cwd=cwd, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_the_commands_of_the_source_document_run_as_printed(
    database_url: str, storing: dict[str, str], tmp_path: Path
) -> None:
    data = questions(50)
    (tmp_path / "train.jsonl").write_bytes(data)
    with serving(tmp_path / "data", MODELYARD_DATABASE_URL=database_url, **storing) as server:
        uploaded = json.loads(
            curl(
                server,
                """curl -X 'POST' \\
'http://localhost:8080/api/v1/datasets/upload/?description=My%20Description' \\
-H 'accept: application/json' \\
-H 'Content-Type: multipart/form-data' \\
-F 'file=@train.jsonl'""",
                tmp_path,
            )
        )
        dataset_id = uploaded["id"]
        assert list(uploaded)[:4] == ["id", "name", "s3_path", "description"]
        assert (uploaded["name"], uploaded["description"]) == ("train.jsonl", "My Description")
        assert uploaded["s3_path"] == f"{dataset_id}/metadata.json"
        assert (uploaded["rows"], uploaded["format"]) == (50, "messages")
        assert uploaded["sha256"] == hashlib.sha256(data).hexdigest()
        listed = json.loads(
            curl(
                server,
                """curl -X 'GET' \\
'http://localhost:8080/api/v1/datasets/' \\
-H 'accept: application/json'""",
                tmp_path,
            )
        )
        assert listed == [uploaded]
        assert (
            curl(
                server,
                f"""curl -X 'GET' \\
'http://localhost:8080/api/v1/datasets/{dataset_id}/' \\
-H 'accept: application/json'""",
                tmp_path,
            )
            == data
        )
        assert server.delete(f"/api/v1/datasets/{dataset_id}/").json() == uploaded
        assert server.get("/api/v1/datasets/").json() == []
        assert server.get(f"/api/v1/datasets/{dataset_id}/").error_code == "dataset_not_found"


def test_a_file_comes_back_whole_and_in_parts(server: Server) -> None:
    data = questions(30_000)
    assert len(data) > 3 * 1024 * 1024
    dataset = put(server, data)
    path = f"/api/v1/datasets/{dataset['id']}/"
    whole = server.get(path)
    assert (whole.status, whole.body) == (200, data)
    etag = whole.headers["etag"]
    assert etag == f'"{hashlib.sha256(data).hexdigest()}"'
    assert whole.headers["content-length"] == str(len(data))
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert whole.headers["content-disposition"].startswith('attachment; filename="train.jsonl"')
    end = len(data)
    for asked, start, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=100-1999999", 100, 2_000_000),
        (f"bytes={end - 5}-", end - 5, end),
        ("bytes=-7", end - 7, end),
        (f"bytes=5-{end * 2}", 5, end),
    ):
        answer = server.get(path, {"Range": asked})
        assert (answer.status, answer.body) == (206, data[start:stop]), asked
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{end}"
    for asked in (f"bytes={end}-", "bytes=-0"):
        answer = server.get(path, {"Range": asked})
        assert (answer.status, answer.error_code) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{end}"
    for asked in ("bytes=9-5", "lines=1-2", "bytes=0-1,5-6", "bytes=-", "bytes=x-"):
        assert (server.get(path, {"Range": asked}).status, asked) == (200, asked)
    assert server.get(path, {"Range": "bytes=0-9", "If-Range": etag}).status == 206
    assert server.get(path, {"Range": "bytes=0-9", "If-Range": '"another"'}).body == data
    assert server.get(path, {"If-None-Match": etag}).status == 304


def test_a_file_with_bad_lines_is_refused_with_a_report_and_leaves_nothing(server: Server) -> None:
    answer = server.request("POST", UPLOAD, body=upload(bad_at([7, 3596], 4000)), headers=FORM_HEADERS)
    assert (answer.status, answer.error_code) == (422, "invalid_dataset")
    body = answer.json()
    assert "2 of its 4000 lines" in body["error"]["message"]
    assert "line 7: $.messages[1].role: is 'gpt', but must be one of" in body["error"]["message"]
    assert [(found["line"], found["path"]) for found in body["report"]["problems"]["listed"]] == [
        (7, "$.messages[1].role"),
        (3596, "$.messages[1].role"),
    ]
    assert body["report"]["problems"]["kinds"] == {"wrong_value": 2}
    assert server.get("/api/v1/datasets/").json() == []
    assert objects(server) == []
    kept = put(server, bad_at([7, 3596], 4000), "?on_error=skip")
    assert (kept["rows"], kept["skipped_lines"]) == (3998, 2)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (form(part(b"x", name="other")), 400, "file_missing"),
        (form(part(jsonl(chat("a", "b"))), part(jsonl(chat("a", "b")))), 400, "more_than_one_file"),
        (upload(jsonl(chat("a", "b")), filename=""), 400, "file_missing"),
        (upload(jsonl(chat("a", "b")), filename="../.."), 400, "file_missing"),
        (form(part(jsonl(chat("a", "b")), filename=None)), 400, "file_missing"),
        (upload(jsonl(chat("a", "b")), filename="n" * 300), 422, "name_too_long"),
        (upload(jsonl(chat("a", "b")))[:-10], 400, "bad_form"),
        (b"", 400, "file_missing"),
        (b"{}", 400, "bad_form"),
        (upload(b""), 422, "dataset_empty"),
        (upload(b"\n \n\r\n"), 422, "dataset_empty"),
        (upload(b"\x1f\x8b\x08" + bytes(100)), 422, "not_jsonl"),
    ],
)
def test_what_is_no_dataset_has_a_clear_answer_and_leaves_nothing(
    server: Server, body: bytes, status: int, code: str
) -> None:
    answer = server.request("POST", UPLOAD, body=body, headers=FORM_HEADERS)
    assert (answer.status, answer.json()["error"]["code"]) == (status, code), answer.text
    assert server.get("/api/v1/datasets/").json() == []
    assert objects(server) == []


@pytest.mark.parametrize(
    ("content_type", "code"),
    [
        ("application/json", "not_a_form"),
        ("multipart/form-data", "boundary_missing"),
        ("multipart/mixed; boundary=x", "not_a_form"),
        ("", "not_a_form"),
    ],
)
def test_what_is_sent_as_something_else_than_a_form_is_refused(server: Server, content_type: str, code: str) -> None:
    answer = server.request("POST", UPLOAD, body=b"{}", headers={"Content-Type": content_type})
    assert (answer.status, answer.error_code) == (400, code)
