"""REST for datasets, through the real server; the source document's commands with real curl on all stores."""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from modelyard import db
from modelyard.datasets.tables import Dataset
from modelyard.finetune.tables import Finetune, FinetuneHold
from modelyard.jobs.tables import Job
from modelyard.models.tables import Model
from tests.datasets.forms import FORM_HEADERS, bad_at, chat, form, jsonl, part, questions, upload
from tests.eventually import PATIENCE_S
from tests.fixtures import S3Server
from tests.server import Server, serving

MIB = 1024 * 1024
END_BYTES = 1000
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


@pytest.mark.parametrize(("version", "header"), [("1.1", "Connection: close\r\n"), ("1.0", ""), ("1.1", "")])
@pytest.mark.parametrize("lines", [3, 4000])
def test_a_refusal_has_its_report_also_where_the_answer_ends_the_connection(
    server: Server, version: str, header: str, lines: int
) -> None:
    body = upload(bad_at([2], lines))
    head = f"POST {UPLOAD} HTTP/{version}\r\nHost: localhost\r\n{header}Content-Length: {len(body)}\r\n"
    head += f"Content-Type: {FORM_HEADERS['Content-Type']}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        answer = json.loads(response.read())
    assert (response.status, answer["error"]["code"]) == (422, "invalid_dataset"), answer
    assert answer["report"]["problems"]["listed"][0]["line"] == 2
    assert "Stream consumed" not in server.log


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
        (upload(b"\x1f\x8b\x08" + bytes(100)), 422, "archive_damaged"),
        (upload(b"BZh" + bytes(100)), 422, "not_jsonl"),
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


def test_the_report_and_the_rows_are_those_of_the_file(server: Server) -> None:
    data = b"\n" + questions(50_000) + jsonl({"prompt": "last", "completion": "one"})[:-1]
    dataset = put(server, data, f"?description=x&parent_id={put(server, questions(1))['id']}")
    path = f"/api/v1/datasets/{dataset['id']}"
    assert dataset["parent_id"] is not None
    report = server.get(f"{path}/report").json()
    assert (report["rows"], report["blank_lines"], report["format"]) == (50_001, 1, "mixed")
    first = server.get(f"{path}/rows?limit=2").json()
    assert first["rows"][0] == {"line": 2, "format": "messages", **chat("What is 0 plus one?", "1")}
    assert (first["offset"], first["next_offset"], first["total"]) == (0, 2, 50_001)
    middle = server.get(f"{path}/rows?offset=45000&limit=1").json()["rows"]
    assert middle == [{"line": 45_002, "format": "messages", **chat("What is 45000 plus one?", "45001")}]
    last = server.get(f"{path}/rows?offset=50000").json()
    assert last["rows"] == [{"line": 50_002, "format": "prompt_completion", **chat("last", "one")}]
    assert last["next_offset"] is None
    assert server.get(f"{path}/rows?offset=50001").json()["rows"] == []
    assert server.get(f"{path}/rows?limit=0").error_code == "invalid_value"


def test_rows_leave_out_the_lines_that_were_skipped(server: Server) -> None:
    dataset = put(server, bad_at([1, 3], 5), "?on_error=skip")
    page = server.get(f"/api/v1/datasets/{dataset['id']}/rows").json()
    assert [row["line"] for row in page["rows"]] == [2, 4, 5]
    assert server.get(f"/api/v1/datasets/{dataset['id']}/report").json()["problems"]["total"] == 2


def test_a_parent_must_be_there_and_may_go_before_its_child(server: Server) -> None:
    nobody = "00000000-0000-4000-8000-000000000000"
    answer = server.request("POST", f"{UPLOAD}?parent_id={nobody}", body=upload(questions(1)), headers=FORM_HEADERS)
    assert (answer.status, answer.json()["error"]["param"]) == (404, "parent_id")
    parent = put(server, questions(1))
    child = put(server, questions(2), f"?parent_id={parent['id']}")
    assert server.delete(f"/api/v1/datasets/{parent['id']}").status == 200
    assert server.get("/api/v1/datasets").json() == [child]


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("../../etc/passwd.jsonl", "passwd.jsonl"),
        ("C:\\\\data\\\\train.jsonl", "train.jsonl"),
        ("обучение 1.jsonl", "обучение 1.jsonl"),
        ("a\x7fb;c.jsonl", "ab;c.jsonl"),
    ],
)
def test_a_file_name_is_only_a_name(server: Server, sent: str, shown: str) -> None:
    dataset = put(server, questions(1), filename=sent)
    assert dataset["name"] == shown
    header = server.get(f"/api/v1/datasets/{dataset['id']}/").headers["content-disposition"]
    assert header.isascii()
    assert header.count('"') == 2
    assert sorted(objects(server)) == [f"{dataset['id']}/data.jsonl", f"{dataset['id']}/metadata.json"]


def test_a_page_of_another_site_may_not_upload(server: Server) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = server.request("POST", UPLOAD, body=upload(questions(1)), headers=FORM_HEADERS | headers)
        assert (answer.status, answer.error_code) == (403, "origin_not_allowed")
    assert objects(server) == []


def test_an_upload_that_breaks_off_leaves_nothing(server: Server) -> None:
    body = upload(questions(100_000))
    head = f"POST {UPLOAD} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {FORM_HEADERS['Content-Type']}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2])
        until(lambda: any(name.startswith(".incoming/") for name in objects(server)), "something of it is stored")
    until(lambda: objects(server) == [], "nothing of it is stored")
    assert server.get("/api/v1/datasets/").json() == []
    assert "Traceback" not in server.log


def validators(server: Server) -> list[int]:
    """Return the children of the server that validate; they have no keeper, and so its parent is the server."""
    found = []
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        for pid in (task / "children").read_text("ascii").split():
            with suppress(FileNotFoundError, ProcessLookupError):  # one that ends meanwhile
                if b"modelyard.datasets.validator" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return found


@contextmanager
def half_sent(server: Server, body: bytes) -> Iterator[socket.socket]:
    """Send all but the end of an upload, on a connection of its own."""
    head = f"POST {UPLOAD} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: {FORM_HEADERS['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + body[:-END_BYTES])
        yield connection


def answer_to(connection: socket.socket, body: bytes) -> bytes:
    """Send the end of an upload and return the whole answer."""
    connection.sendall(body[-END_BYTES:])
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_large_file_is_validated_by_a_child_which_goes_with_the_upload(server: Server) -> None:
    body = upload(questions(100_000))
    with half_sent(server, body) as connection:
        until(lambda: len(validators(server)) == 1, "a child validates")
        answer = answer_to(connection, body)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert b'"rows":100000,' in answer
        assert validators(server) == []
    with half_sent(server, body):
        until(lambda: len(validators(server)) == 1, "a child validates")
    until(lambda: validators(server) == [], "the child is gone with the connection")
    until(lambda: len(objects(server)) == 2, "nothing of the second one is stored")
    assert "Traceback" not in server.log


def test_a_validator_that_is_killed_is_said_and_nothing_is_kept(server: Server) -> None:
    body = upload(questions(100_000))
    with half_sent(server, body) as connection:
        until(lambda: len(validators(server)) == 1, "a child validates")
        os.kill(validators(server)[0], signal.SIGKILL)
        answer = answer_to(connection, body)
        assert answer.startswith(b"HTTP/1.1 503"), answer
        assert b'"code":"validation_failed"' in answer
        assert b"killed by SIGKILL. Nothing of it was kept" in answer
    assert server.get("/api/v1/datasets/").json() == []
    assert objects(server) == []
    assert "Traceback" not in server.log
    put(server, questions(100_000))


def test_a_server_that_ends_within_an_upload_ends_the_validator(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        for end in (server.stop, server.kill):
            with half_sent(server, upload(questions(100_000))):
                until(lambda: len(validators(server)) == 1, "a child validates")
                command = Path(f"/proc/{validators(server)[0]}/cmdline")
                end()
                until(functools.partial(has_ended, command), "the child is gone with the server")
            server.start()


def has_ended(command: Path) -> bool:
    try:
        return b"modelyard.datasets.validator" not in command.read_bytes()
    except OSError:
        return True


def peak_memory_mib(*pids: int) -> int:
    """Return the most memory that processes had so far, all together."""
    texts = [Path(f"/proc/{pid}/status").read_text("ascii") for pid in pids]
    return sum(int(text.partition("VmHWM:")[2].split()[0]) for text in texts) // 1024


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_refused_with_an_answer_of_its_own_in_little_memory(tmp_path: Path) -> None:
    before, _, after = upload(questions(2) + b'{"prompt":"HERE","completion":"a"}\n' + questions(1)).partition(b"HERE")
    with serving(tmp_path / "data") as server:
        put(server, questions(70_000))  # what is imported and kept from then on is no memory of this upload
        idle, used = peak_memory_mib(server.pid), 0

        def body() -> Iterator[bytes]:
            nonlocal used
            yield before
            for number in range(1024):
                yield b"x" * MIB
                if number in (500, 1023):
                    used = peak_memory_mib(server.pid, *validators(server)) - idle
            yield after

        refused = server.request("POST", UPLOAD, body=body(), headers=FORM_HEADERS, timeout_s=10 * PATIENCE_S)
        assert (refused.status, refused.error_code) == (422, "invalid_dataset")
        (problem,) = refused.json()["report"]["problems"]["listed"]
        assert (problem["line"], problem["path"], problem["kind"]) == (3, "$", "line_too_long")
        assert "is longer than the 16 MiB that a line may have" in problem["reason"]
        assert 0 < used < 80
        assert len(objects(server)) == 2
        answer = server.request(
            "POST", f"{UPLOAD}?on_error=skip", body=body(), headers=FORM_HEADERS, timeout_s=10 * PATIENCE_S
        )
        assert (answer.json()["rows"], answer.json()["skipped_lines"]) == (3, 1)
        rows = server.request("GET", f"/api/v1/datasets/{answer.json()['id']}/rows", timeout_s=10 * PATIENCE_S)
        assert [row["line"] for row in rows.json()["rows"]] == [1, 2, 4]
        assert peak_memory_mib(server.pid) - idle < 80


def test_a_disk_that_is_full_is_said_and_nothing_is_kept(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        kept = put(server, questions(3))
        # A file that may not grow is for the store what a full disk is: the write fails, at whatever byte.
        full = 6 * MIB + 12_345
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (full, full))
        answer = server.request("POST", UPLOAD, body=upload(questions(100_000)), headers=FORM_HEADERS)
        assert (answer.status, answer.error_code) == (503, "storage_full"), answer.text
        assert "There is no room left in" in answer.json()["error"]["message"]
        assert validators(server) == []
        assert server.get("/api/v1/datasets/").json() == [kept]
        assert len(objects(server)) == 2
        assert "Traceback" not in server.log
        put(server, questions(10))


async def test_a_dataset_that_a_training_holds_is_not_deleted(database_url: str, tmp_path: Path) -> None:
    with serving(tmp_path / "data", MODELYARD_DATABASE_URL=database_url) as server:
        dataset = put(server, questions(3))
        path = f"/api/v1/datasets/{dataset['id']}/"
        sessions = db.Sessions(db.database_url(database_url, tmp_path))
        try:
            job = Job(kind="FT", name="FT_a", spec={})
            async with sessions.begin() as session:
                (held,) = await session.scalars(select(Dataset.id))
                session.add(job)
                session.add(
                    Model(model_id="a", adapter=False, task="generate", revision="", commit="", size_bytes=1,
                          path="a", source="local")
                )  # fmt: skip
                await session.flush()
                training = Finetune(
                    job_id=job.id, name="a", model_id="a", dataset_id=held, adapter_id="ft:a",
                    hyperparameters={},
                )  # fmt: skip
                session.add(training)
                await session.flush()
                hold = FinetuneHold(finetune_id=training.id, model_id="a", dataset_id=held)
                session.add(hold)
            answer = server.delete(path)
            assert (answer.status, answer.error_code) == (409, "dataset_in_use")
            assert "in use by a training: interrupt that first" in answer.json()["error"]["message"]
            assert server.get("/api/v1/datasets/").json() == [dataset]
            assert server.get(path).body == questions(3)
            async with sessions.begin() as session:
                await session.delete(hold)
        finally:
            await sessions.close()
        assert server.delete(path).json() == dataset
        assert objects(server) == []


def test_what_is_too_large_is_refused_while_it_arrives_and_before_if_it_says_so(tmp_path: Path) -> None:
    limit = 1024 * 1024
    with serving(tmp_path / "data", MODELYARD_MAX_DATASET_GIB=str(limit / 1024**3)) as server:
        data = questions(20_000)
        assert len(data) > limit
        announced = server.request("POST", UPLOAD, body=upload(data), headers=FORM_HEADERS)
        streamed = server.request("POST", UPLOAD, body=iter([upload(data)]), headers=FORM_HEADERS)
        for answer in (announced, streamed):
            assert (answer.status, answer.error_code) == (413, "dataset_too_large")
        with half_sent(server, upload(data)) as connection:  # it may be long at it, and reads the answer only then
            assert answer_to(connection, upload(data)).startswith(b"HTTP/1.1 413")
        assert objects(server) == []
        put(server, data[: limit - 1000].rpartition(b"\n")[0])


def test_a_server_killed_within_an_upload_leaves_what_the_next_start_removes(tmp_path: Path) -> None:
    body = upload(questions(100_000))
    head = f"POST {UPLOAD} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {FORM_HEADERS['Content-Type']}\r\n"
    with serving(tmp_path / "data") as server:
        kept = put(server, questions(3))
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2])
            until(lambda: any(name.startswith(".incoming/") for name in objects(server)), "something of it is stored")
            server.kill()
        (left,) = (server.data_dir / "objects" / ".incoming").iterdir()
        # Killed a moment later its objects would have been there, and only their row not.
        with closing(sqlite3.connect(server.data_dir / "modelyard.db")) as database:
            (noted,) = database.execute("SELECT id FROM dataset_leftovers").fetchone()
        folder = server.data_dir / "objects" / str(uuid.UUID(noted))
        folder.mkdir()
        (folder / "data.jsonl").write_bytes(b"{}")
        os.utime(left, (0, 0))  # the store leaves what is younger than a minute to whoever may be writing it
        server.start()
        mine = [f"{kept['id']}/data.jsonl", f"{kept['id']}/metadata.json"]
        until(lambda: objects(server) == mine, "only what has a row is stored")
        assert server.get("/api/v1/datasets/").json() == [kept]
        with closing(sqlite3.connect(server.data_dir / "modelyard.db")) as database:
            until(lambda: not database.execute("SELECT id FROM dataset_leftovers").fetchall(), "no note is left")


def test_a_store_that_is_away_is_said_and_nothing_is_kept(tmp_path: Path) -> None:
    settings = {
        "MODELYARD_STORAGE_URL": "s3://nowhere",
        "MODELYARD_S3_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
    }
    with serving(tmp_path / "data", **settings) as server:
        until(lambda: "The storage cannot be used now" in server.log, "it is said before anybody needs it")
        assert "http://127.0.0.1:9 cannot be reached" in server.log
        answer = server.request("POST", UPLOAD, body=upload(questions(5)), headers=FORM_HEADERS)
        assert (answer.status, answer.error_code) == (503, "storage_unavailable")
        assert server.get("/api/v1/datasets/").json() == []


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until the condition is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "body",
    [
        form(part(b"x" * MIB, name="note", filename=None), part(questions(2))),
        form(part(questions(2)), part(b"x" * MIB, name="note", filename=None)),
        form(*[part(b"", name="note", filename=None) for _ in range(1000)], part(questions(2))),
        form(part(questions(2), filename="x" * MIB)),
        form(part(questions(2))) + b"\r\n" * MIB,
    ],
    ids=["before", "behind", "many", "a header", "beyond the end"],
)
def test_what_a_form_has_beside_its_file_is_bounded(server: Server, body: bytes) -> None:
    answer = server.request("POST", UPLOAD, body=body, headers=FORM_HEADERS)
    assert (answer.status, answer.error_code) in ((413, "form_too_large"), (400, "bad_form"))
    assert objects(server) == []


def test_small_fields_beside_the_file_are_passed_over(server: Server) -> None:
    body = form(part(b"x" * 30_000, name="note", filename=None), part(questions(2)), part(b"y", "z", None))
    assert server.request("POST", UPLOAD, body=body, headers=FORM_HEADERS).json()["rows"] == 2


def test_uploads_have_a_number_and_a_stalled_one_gives_its_place_back(tmp_path: Path) -> None:
    settings = {"MODELYARD_MAX_UPLOADS": "2", "MODELYARD_BODY_TIMEOUT_S": "3"}
    with serving(tmp_path / "data", **settings) as server:
        body = upload(questions(100_000))
        with half_sent(server, body), half_sent(server, body):
            until(lambda: len(validators(server)) == 2, "both are validated")
            answer = server.request("POST", UPLOAD, body=upload(questions(2)), headers=FORM_HEADERS)
            assert (answer.status, answer.error_code) == (503, "too_many_uploads")
            assert answer.headers["retry-after"]
            until(lambda: validators(server) == [] and objects(server) == [], "the stalled ones are given up")
            put(server, questions(2))


def test_files_full_of_problems_hold_up_nobody(tmp_path: Path) -> None:
    """Eight at once, the most that may go on: other requests, those that need a thread included, are answered."""
    with serving(tmp_path / "data") as server:
        body = upload(b"x\n" * (2 * MIB - 1000))
        waits: list[float] = []
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(server.request, "POST", UPLOAD, body=body, headers=FORM_HEADERS) for _ in range(8)]
            while not all(answer.done() for answer in asked):
                began = time.monotonic()
                assert server.get("/ready").status == 200
                waits.append(time.monotonic() - began)
        for answer in asked:
            assert (answer.result().status, answer.result().json()["error"]["code"]) == (422, "invalid_dataset")
            assert answer.result().json()["report"]["stopped_at_line"] == 10_001
    assert max(waits) < 3.0
