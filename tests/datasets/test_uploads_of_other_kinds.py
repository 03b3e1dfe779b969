"""Files of other kinds through the real server: taken as JSONL, or named with a conversion that works as printed."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from modelyard.datasets.recognition import recognise
from tests.datasets.forms import FORM_HEADERS, form, jsonl, part, questions
from tests.eventually import PATIENCE_S, eventually
from tests.manual import TEXTS
from tests.server import Server, serving

MIB = 1024 * 1024
UPLOAD = "/api/v1/datasets/upload/"
ROWS = [{"question": f"How far is mill {number}?", "answer": f"{number} miles"} for number in range(5)]
MAPPED = [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS]
MAPPING = json.dumps({"prompt": "question", "completion": "answer"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("kinds") / "data", MODELYARD_MAX_DATASET_GIB="0.01") as found:
        yield found


def mapping(text: str = MAPPING) -> bytes:
    return part(text.encode(), "mapping", None)


def put(server: Server, *parts: bytes, query: str = "") -> Any:
    return server.request("POST", UPLOAD + query, body=form(*parts), headers=FORM_HEADERS)


def stored(server: Server, dataset: dict[str, Any]) -> list[Any]:
    body = server.get(f"/api/v1/datasets/{dataset['id']}/").body
    return [json.loads(line) for line in body.splitlines()]


def test_an_array_is_stored_as_jsonl_and_said(server: Server) -> None:
    answer = put(server, part(json.dumps(MAPPED, indent=1).encode(), filename="train.json"))
    assert answer.status == 200, answer.text
    dataset = answer.json()
    assert (dataset["converted_from"], dataset["rows"], dataset["name"]) == ("json_array", 5, "train.json")
    assert stored(server, dataset) == MAPPED
    download = server.get(f"/api/v1/datasets/{dataset['id']}/")
    assert 'filename="train.jsonl"' in download.headers["content-disposition"]
    assert len(download.body) == dataset["size_bytes"]
    report = server.get(f"/api/v1/datasets/{dataset['id']}/report").json()
    assert (report["converted_from"], report["mapping"]) == ("json_array", None)
    assert server.get("/api/v1/datasets/").json()[-1] == dataset
    assert server.delete(f"/api/v1/datasets/{dataset['id']}/").json() == dataset


@pytest.mark.parametrize("is_first", [True, False])
def test_a_mapping_stands_before_the_file_or_behind_a_small_one(server: Server, is_first: bool) -> None:
    parts = [mapping(), part(gzip.compress(jsonl(*ROWS)))]
    answer = put(server, *(parts if is_first else reversed(parts)))
    assert answer.status == 200, answer.text
    assert answer.json()["converted_from"] == "gzip"
    assert stored(server, answer.json()) == MAPPED
    report = server.get(f"/api/v1/datasets/{answer.json()['id']}/report").json()
    assert report["mapping"] == json.loads(MAPPING)


def test_the_command_of_the_manual_maps_a_table_as_printed(server: Server, tmp_path: Path) -> None:
    (command,) = re.findall(r"curl -X POST \S+ \\\n[^\n]*mapping=[^\n]*", TEXTS["docs/datasets.md"])
    (tmp_path / "questions.csv").write_text("question,answer,source\nHow far?,Two miles.,ledger\n", "utf-8")
    shell = f"{command.replace('http://127.0.0.1:8080', server.address)} --silent --noproxy '*'"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    dataset = json.loads(done.stdout)
    assert (dataset["converted_from"], dataset["format"], dataset["rows"]) == ("csv", "prompt_completion", 1)
    assert stored(server, dataset) == [{"prompt": "How far?", "completion": "Two miles.", "source": "ledger"}]


async def test_a_child_that_is_killed_is_said_and_nothing_is_kept(server: Server) -> None:
    body = form(part(gzip.compress(questions(30_000), 0)))
    head = f"POST {UPLOAD} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: {FORM_HEADERS['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + body[:-1000])
        (pid,) = await eventually(lambda: converters(server), "a child converts it")
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not converters(server), "it is gone")
        connection.sendall(body[-1000:])
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b" 503 " in answer.partition(b"\r\n")[0]
    assert b"validation_failed" in answer
    assert "Traceback" not in server.log


def test_a_mapping_behind_a_large_file_is_refused_with_what_to_do(server: Server) -> None:
    answer = put(server, part(questions(15_000)), mapping())
    assert (answer.status, answer.error_code) == (400, "mapping_after_file")
    assert "put it in front" in answer.text


def test_a_second_mapping_is_refused(server: Server) -> None:
    answer = put(server, mapping(), mapping('{"prompt": "question"}'), part(jsonl(*ROWS)))
    assert (answer.status, answer.error_code) == (400, "more_than_one_mapping")
    assert answer.json()["error"]["param"] == "mapping"


def test_keys_of_another_name_are_told_the_mapping_to_send(server: Server) -> None:
    answer = put(server, part(jsonl(*ROWS)))
    assert answer.status == 422
    said = re.search(r"mapping=(\{.*?\})", answer.json()["error"]["message"])
    assert said is not None
    again = put(server, mapping(said[1]), part(jsonl(*ROWS)))
    assert again.status == 200, again.text
    assert stored(server, again.json()) == MAPPED


@pytest.mark.parametrize("half", ['{"prompt": "question"}', '{"completion": "answer"}'])
@pytest.mark.parametrize("is_table", [False, True])
def test_half_a_mapping_is_told_the_whole_one_in_the_names_of_the_file(
    server: Server, half: str, is_table: bool
) -> None:
    table = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)
    file = part(table.encode() if is_table else jsonl(*ROWS))
    answer = put(server, mapping(half), file)
    assert answer.status == 422
    said = re.search(r"send mapping=(\{.*?\})", answer.json()["error"]["message"])
    assert said is not None, answer.text
    again = put(server, mapping(said[1]), file)
    assert again.status == 200, again.text
    assert stored(server, again.json()) == MAPPED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question", "not a JSON object of texts"),
        ('["question"]', "not a JSON object of texts"),
        ("{}", "It is empty"),
        ('{"question": "prompt"}', "'question' is no key of a row"),
        ('{"prompt": "question", "output": "answer"}', "'output', 'prompt' belong to different forms"),
        ('{"prompt": ""}', "must be a name of"),
    ],
)
def test_a_mapping_that_is_none_is_refused(server: Server, text: str, said: str) -> None:
    answer = put(server, mapping(text), part(jsonl(*ROWS)))
    assert (answer.status, answer.error_code) == (422, "bad_mapping")
    assert said in answer.json()["error"]["message"]
    assert "such as mapping=" in answer.text.replace("\\", "")


def test_bad_rows_of_a_table_are_refused_or_left_out(server: Server) -> None:
    data = b"prompt,completion\nq,a\nq,a,b\nr,c\n"
    answer = put(server, part(data, filename="train.csv"))
    assert (answer.status, answer.error_code) == (422, "invalid_dataset")
    assert "1 of its 3 rows cannot be learnt from; row 2 (line 3 of the file): $: has 3 cells" in answer.text
    (problem,) = answer.json()["report"]["problems"]["listed"]
    assert (problem["line"], problem["file_line"]) == (2, 3)
    skipped = put(server, part(data, filename="train.csv"), query="?on_error=skip")
    assert skipped.status == 200, skipped.text
    assert (skipped.json()["rows"], skipped.json()["skipped_lines"]) == (2, 1)
    rows = server.get(f"/api/v1/datasets/{skipped.json()['id']}/rows").json()["rows"]
    assert [row["line"] for row in rows] == [1, 3]


def test_what_unpacks_to_more_than_a_dataset_may_have_is_refused_and_leaves_nothing(server: Server) -> None:
    before = server.get("/api/v1/datasets/").json()
    answer = put(server, part(gzip.compress(b'{"prompt": "q", "completion": "a"}\n' * MIB)))
    assert (answer.status, answer.error_code) == (413, "dataset_too_large")
    assert server.get("/api/v1/datasets/").json() == before


async def test_an_upload_of_an_archive_that_breaks_off_leaves_nothing_and_no_process(server: Server) -> None:
    def objects() -> int:
        return sum(path.is_file() for path in (server.data_dir / "objects").rglob("*"))

    before = objects()
    body = form(part(gzip.compress(questions(30_000), 0)))
    head = f"POST {UPLOAD} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {FORM_HEADERS['Content-Type']}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) * 3 // 4])
        await eventually(lambda: converters(server), "a child converts it")
    await eventually(lambda: not converters(server) and objects() == before, "nothing of it is left")
    assert "Traceback" not in server.log


def converters(server: Server) -> list[int]:
    """Return the children of the server that convert."""
    tasks = Path(f"/proc/{server.pid}/task").iterdir()
    found = [int(pid) for task in tasks for pid in (task / "children").read_text("ascii").split()]
    converting = []
    for pid in found:
        with suppress(OSError):  # gone meanwhile
            if b"modelyard.datasets.converter" in Path(f"/proc/{pid}/cmdline").read_bytes():
                converting.append(pid)
    return converting


def archived(make: Callable[[Any], None]) -> bytes:
    file = io.BytesIO()
    make(file)
    return file.getvalue()


def tarred(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("train.jsonl")
        info.size = len(jsonl(*MAPPED))
        archive.addfile(info, io.BytesIO(jsonl(*MAPPED)))


def zipped(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train.jsonl", jsonl(*MAPPED))


def by_pyarrow(kind: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(MAPPED)
    sink = io.BytesIO()
    if kind == "orc":
        from pyarrow import orc

        orc.write_table(table, sink)
    else:
        make = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with make(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def by_program(*command: str) -> bytes:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, input=jsonl(*MAPPED), capture_output=True, check=True, timeout=30).stdout


KINDS: dict[str, tuple[str, Callable[[], bytes | str]]] = {
    "tar": ("a tar archive", lambda: archived(tarred)),
    "zip": ("a zip archive", lambda: archived(zipped)),
    "lz4": ("an lz4 archive", lambda: by_program("lz4", "-c")),
    "xz": ("an xz archive", lambda: by_program("xz", "-c")),
    "bzip2": ("a bzip2 archive", lambda: by_program("bzip2", "-c")),
    "pickle": ("a pickle of Python's", lambda: pickle.dumps(MAPPED)),
    "yaml": ("YAML", lambda: "".join(f"- prompt: {r['prompt']}\n  completion: {r['completion']}\n" for r in MAPPED)),
    "old Mac": ("line ends of old Macs", lambda: jsonl(*MAPPED).replace(b"\n", b"\r")),
    "utf-16": ("UTF-16", lambda: jsonl(*MAPPED).decode().encode("utf-16")),
    "utf-32": ("UTF-32", lambda: jsonl(*MAPPED).decode().encode("utf-32")),
    "objects over lines": ("several lines", lambda: b"".join(json.dumps(row, indent=1).encode() for row in MAPPED)),
    "an array in an object": ("several lines", lambda: json.dumps({"data": MAPPED}, indent=1).encode()),
    "Arrow stream": ("an Arrow stream", lambda: by_pyarrow("stream")),
    "Arrow file": ("an Arrow file", lambda: by_pyarrow("file")),
    "ORC": ("an ORC file", lambda: by_pyarrow("orc")),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_named_with_a_command_that_converts_it(name: str, tmp_path: Path) -> None:
    what, make = KINDS[name]
    made = make()
    data = made.encode() if isinstance(made, str) else made
    said = recognise(data[:4096])
    assert said is not None
    assert what in said
    assert converted_as_said(said, data, tmp_path) == MAPPED


def test_one_column_and_plain_text_are_named_with_a_command_that_makes_texts_of_them(tmp_path: Path) -> None:
    column = "text\nhello there\nhello, you\n"
    text = "It was a wet day, and the mill stood still.\n\nNobody came by, all the same.\n"
    titled = "The mill at Hald\n" + text
    said = [recognise(one.encode()) or "" for one in (column, text, titled)]
    assert said[2] == said[1]
    assert "a table of one column" in said[0]
    assert "plain text" in said[1]
    assert converted_as_said(said[0], column.replace("hello, you", "hello you").encode(), tmp_path)[0] == {
        "text": "hello there"
    }
    assert converted_as_said(said[1], text.encode(), tmp_path) == [{"text": line} for line in text.splitlines() if line]


def converted_as_said(said: str, data: bytes, folder: Path) -> list[Any]:
    """Run the command as it is printed, with the test's own Python."""
    found = re.search(r": ((?:python3|[a-z0-9]+) .*?train\.jsonl)", said)
    assert found is not None, said
    if shutil.which(found[1].split()[0]) is None:
        pytest.skip(f"{found[1].split()[0]} is not installed")
    (folder / "FILE").write_bytes(data)
    command = found[1].replace("python3", sys.executable)
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 886\n", "git lfs pull"),
        (b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml", "save it as CSV in UTF-8, or convert it: python3"),
        (b"SQLite format 3\x00", "an SQLite database"),
    ],
)  # fmt: skip
def test_what_no_command_converts_here_is_named(data: bytes, said: str) -> None:
    assert said in (recognise(data) or "")


@pytest.mark.parametrize(
    "data",
    [
        questions(3),
        b"\xef\xbb\xbf" + questions(1),
        b"# a word\n" + questions(2),
        b"",
        b"\n\n",
        b'{"text": "a\\r"}',
        b'{"text": "a"}\r',
        questions(3).replace(b"\n", b"\r\n"),
    ],
)
def test_jsonl_is_not_taken_for_something_else(data: bytes) -> None:
    assert recognise(data) is None
