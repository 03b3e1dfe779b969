"""Bodies as programs really send them: packed, with a byte order mark, in other encodings, cut within an emoji."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterator

import pytest

from modelyard.bodies import as_utf8, decompressor, refuse_half_characters
from modelyard.errors import EncodingNotAllowed, InvalidJson
from tests.server import Server, serving

JSON = {"Content-Type": "application/json"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("bodies") / "data", MODELYARD_MAX_BODY_MIB="2") as server:
        yield server


async def unpacked(data: bytes, room: int = MIB, step: int = 7) -> bytes:
    gunzip = decompressor(b"gzip")
    assert gunzip is not None
    found = b""
    for at in range(0, len(data), step):
        found += await gunzip.feed(data[at : at + step], room - len(found))
        if len(found) > room:
            break
    gunzip.finish()
    return found


async def test_what_is_packed_is_unpacked_however_it_is_cut() -> None:
    text = json.dumps({"a": list(range(1000))}).encode()
    packed = gzip.compress(text)
    for step in (1, 7, 10**6):
        assert await unpacked(packed, step=step) == text
    assert await unpacked(gzip.compress(text[:100]) + gzip.compress(text[100:])) == text
    assert await unpacked(b"") == b""


async def test_a_bomb_is_unpacked_no_further_than_allowed() -> None:
    bomb = gzip.compress(bytes(200 * MIB), 9)
    gunzip = decompressor(b"gzip")
    assert gunzip is not None
    assert len(await gunzip.feed(bomb, MIB)) == MIB + 1


@pytest.mark.parametrize("data", [b"no gzip at all", gzip.compress(b"x" * 1000, mtime=0)[:-9],
                                  gzip.compress(b"x", mtime=0) + b"more",
                                  zlib.compress(b"x" * 100)])  # fmt: skip
async def test_what_is_no_gzip_is_told(data: bytes) -> None:
    with pytest.raises(InvalidJson, match="Content-Encoding"):
        await unpacked(data)


@pytest.mark.parametrize("name", [b"br", b"zstd", b"deflate", b"gzip, gzip", b"x" * 5000])
def test_another_way_of_packing_is_told_which_one_is_known(name: bytes) -> None:
    with pytest.raises(EncodingNotAllowed, match="Content-Encoding: gzip") as caught:
        decompressor(name)
    assert len(caught.value.message) < 300
    assert decompressor(b"identity") is decompressor(b"") is decompressor(None) is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("text", ['{"größe": "😀"}', "[]", "{}", ' {"a": 1}', "1"])
def test_json_in_each_of_its_encodings_becomes_utf8(encoding: str, text: str) -> None:
    assert as_utf8(text.encode(encoding)).decode() == text


@pytest.mark.parametrize("body", [b"\xff\xfe{", b"\xfe\xff{", b"\xff\xfe\0\xd8{\0"])
def test_what_begins_like_another_encoding_and_is_none_is_told(body: bytes) -> None:
    with pytest.raises(InvalidJson, match="UTF-8"):
        as_utf8(body)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (rb'{"messages": [{"role": "user", "content": "hi \ud83d"}]}', r"messages[0].content"),
        (rb'{"prompt": ["a", "\uDE00 b"]}', "prompt[1]"),
        (rb'{"a": {"b": "\ud83d\ud83d\ude00"}}', "a.b"),
        (rb'{"\ud83d": 1, "x": "\ud83d"}', "x"),
        (rb'{"a": "\\\ud83d"}', "a"),
        (rb'["\ud83d\\ude00"]', "[0]"),
    ],
)
def test_half_of_a_character_is_told_with_its_place(body: bytes, field: str) -> None:
    with pytest.raises(InvalidJson, match="half of a character") as caught:
        refuse_half_characters(body)
    assert caught.value.param == field
    at = int(caught.value.message.partition(" at byte ")[2].split()[0])
    assert body[at : at + 3].lower() == rb"\ud"


@pytest.mark.parametrize(
    "body",
    [
        rb'{"a": "\ud83d\ude00"}', rb'{"a": "\uD83D\uDE00\u00e4\n\\ud83d"}', rb'{"a": "\\\\ud83d"}', b"\\ud", b"",
        '{"a": "😀"}'.encode(), rb'{"a": "\ud7ff\ue000"}', rb'{"a": "\u12"}',
    ],
)  # fmt: skip
def test_whole_characters_and_other_faults_are_left_alone(body: bytes) -> None:
    refuse_half_characters(body)


@pytest.mark.parametrize("part", [rb"\ud83d\ude00", b"\\\\", b"a", rb"\u"])
def test_looking_for_halves_takes_one_pass(part: bytes) -> None:
    body = b'{"a": "' + part * (4 * MIB // len(part)) + rb'\ud83d"}'
    began = time.process_time()
    with pytest.raises(InvalidJson, match="The body has half"):
        refuse_half_characters(body)
    assert time.process_time() - began < 2.0


def test_each_route_with_a_body_takes_it_packed_and_in_another_encoding(server: Server) -> None:
    asked = {
        "model": "nope",
        "model_id": "nope",
        "dataset_id": "no",
        "prompt": "größe",
        "request_id": "a",
        "target": "x",
    }
    ways = {
        "as it is": (json.dumps(asked).encode(), {}),
        "gzip": (gzip.compress(json.dumps(asked).encode()), {"Content-Encoding": "gzip"}),
        "mark": (b"\xef\xbb\xbf" + json.dumps(asked).encode(), {}),
        "utf-16": (json.dumps(asked, ensure_ascii=False).encode("utf-16"), {}),
    }
    for path in ("/v1/chat/completions", "/v1/messages", "/tokenize", "/api/generate-one", "/api/v1/deploy/",
                 "/api/v1/finetune/", "/api/v1/deploy/plan/"):  # fmt: skip
        answers = {
            name: server.request("POST", path, body=body, headers={**JSON, **headers})
            for name, (body, headers) in ways.items()
        }
        assert {answer.status for answer in answers.values()} in ({404}, {422}), (path, answers)
        assert {answer.body for answer in answers.values()} == {answers["as it is"].body}, path
        for name in ("zstd", "br"):
            answer = server.request("POST", path, body=b"\x28\xb5\x2f\xfd", headers={**JSON, "Content-Encoding": name})
            assert (answer.status, answer.headers["accept-encoding"]) == (415, "gzip"), path
            assert f"Content-Encoding: {name}" in answer.text
        bomb = gzip.compress(bytes(20 * MIB))
        answer = server.request("POST", path, body=bomb, headers={**JSON, "Content-Encoding": "gzip"})
        assert answer.status == 413, path
    put = server.request("PUT", "/api/v1/aliases/a", body=ways["gzip"][0], headers={**JSON, **ways["gzip"][1]})
    assert put.status == 422


def test_half_of_a_character_is_never_a_failure_of_the_server(server: Server) -> None:
    half = r'"hi \ud83d"'
    for path, body in (
        ("/v1/chat/completions", f'{{"model": "nope", "messages": [{{"role": "user", "content": {half}}}]}}'),
        ("/v1/completions", f'{{"prompt": {half}}}'),
        ("/api/generate-one", f'{{"request_id": "a", "prompt": {half}}}'),
        ("/api/v1/deploy/", f'{{"model_id": {half}}}'),
        ("/api/v1/finetune/", f'{{"name": {half}, "model_id": "a", "dataset_id": {half}}}'),
        ("/api/v1/models/add/?model_id=%ED%A0%BD", "{}"),
        ("/api/v1/datasets/upload/?description=%ED%A0%BD", "{}"),
    ):
        answer = server.request("POST", path, body=body.encode(), headers=JSON)
        assert answer.status in (400, 404, 422), (path, answer.text)
    answer = server.request("PUT", "/api/v1/aliases/a", body=f'{{"target": {half}}}'.encode(), headers=JSON)
    assert answer.status in (400, 422), answer.text
    assert "Traceback" not in server.log


def test_an_upload_that_is_packed_as_a_whole_is_told_so(server: Server) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": "gzip"}
    answer = server.request("POST", "/api/v1/datasets/upload/", body=gzip.compress(b"--x--"), headers=headers)
    assert (answer.status, answer.error_code) == (415, "encoding_not_allowed")
