"""Both storages keep the same promises; the S3 one against a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import random
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from modelyard.errors import (
    ObjectNotFound,
    StartRefused,
    StorageUnavailable,
    TooLarge,
    Unprocessable,
    UploadRefused,
)
from modelyard.settings import Settings
from modelyard.storage import FolderStorage, S3Storage, SignedUpload, Storage, delete_prefix, open_storage
from modelyard.storage.s3 import PART_BYTES
from modelyard.storage.streams import THREADS
from tests.eventually import eventually
from tests.fixtures import S3Server

MIB = 1024 * 1024
JSONL = "application/jsonl"


async def chunks_of(data: bytes, size: int = 64 * 1024) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def read(storage: Storage, key: str, *, start: int = 0, length: int | None = None) -> bytes:
    return b"".join([block async for block in storage.get(key, start=start, length=length)])


async def keys(storage: Storage, prefix: str = "") -> list[str]:
    return [listed.key async for listed in storage.list(prefix)]


def leftovers(storage: Storage, request: pytest.FixtureRequest) -> list[str]:
    """Whatever lies in the store beside whole objects, seen without the storage's own eyes."""
    if isinstance(storage, FolderStorage):
        return [path.name for path in (storage.root / ".incoming").iterdir()]
    server: S3Server = request.getfixturevalue("s3_server")
    client = server.client()
    uploads = client.list_multipart_uploads(Bucket=server.bucket).get("Uploads", [])
    client.close()
    return [upload["Key"] for upload in uploads]


async def test_what_is_put_is_got_back_with_its_size_and_hash(storage: Storage) -> None:
    data = random.Random(1).randbytes(3 * MIB + 17)
    stored = await storage.put("datasets/one/data.jsonl", chunks_of(data))
    assert (stored.key, stored.size_bytes) == ("datasets/one/data.jsonl", len(data))
    assert stored.sha256 == hashlib.sha256(data).hexdigest()
    assert await storage.size("datasets/one/data.jsonl") == len(data)
    assert await read(storage, "datasets/one/data.jsonl") == data


@pytest.mark.parametrize("size", [0, 1, MIB, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 5 * MIB])
async def test_objects_of_every_size_arrive_whole(storage: Storage, size: int, request: pytest.FixtureRequest) -> None:
    data = random.Random(size).randbytes(size)
    stored = await storage.put("object", chunks_of(data, 700_001))
    assert (stored.size_bytes, stored.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert await read(storage, "object") == data
    assert leftovers(storage, request) == []


async def test_one_huge_chunk_is_read_in_small_blocks(storage: Storage) -> None:
    data = random.Random(2).randbytes(5 * MIB)
    await storage.put("object", chunks_of(data, len(data)))
    blocks = [block async for block in storage.get("object")]
    assert max(map(len, blocks)) <= MIB
    assert b"".join(blocks) == data


async def test_ranges_are_cut_to_the_byte(storage: Storage) -> None:
    data = random.Random(3).randbytes(2 * MIB + 11)
    await storage.put("object", chunks_of(data))
    for start, length in [(0, 1), (1, 5), (MIB - 1, 2), (MIB, None), (len(data) - 3, 100), (0, None), (7, 0)]:
        assert await read(storage, "object", start=start, length=length) == data[start:][:length]
    assert await read(storage, "object", start=len(data)) == b""
    assert await read(storage, "object", start=len(data) + 10, length=4) == b""


async def test_a_second_put_takes_the_place_of_the_first(storage: Storage) -> None:
    await storage.put("object", chunks_of(b"first and longer"))
    await storage.put("object", chunks_of(b"second"))
    assert await read(storage, "object") == b"second"


async def test_a_reader_that_stops_early_leaves_nothing_open(storage: Storage) -> None:
    await storage.put("object", chunks_of(bytes(3 * MIB)))
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        async with aclosing(storage.get("object")) as blocks:
            assert await anext(blocks)
    if isinstance(storage, FolderStorage):
        assert set(os.listdir("/proc/self/fd")) == before
    # More abandoned readers than connections are allowed would block here.
    assert await storage.size("object") == 3 * MIB


async def test_what_is_not_there_is_not_found(storage: Storage) -> None:
    await storage.put("there/object", chunks_of(b"x"))
    for key in ("nothing", "there", "there/nothing", "there/object/below"):
        with pytest.raises(ObjectNotFound, match=key):
            await storage.size(key)
        with pytest.raises(ObjectNotFound, match=key):
            await read(storage, key)
        with pytest.raises(ObjectNotFound, match=key):
            await read(storage, key, length=0)


async def test_a_listing_is_sorted_by_key_and_cut_by_prefix(storage: Storage) -> None:
    everything = ["a-b", "a/1", "a/10", "a/2/x", "a/2/y", "a0", "b/1", "z+=@_.txt"]
    for key in reversed(everything):
        await storage.put(key, chunks_of(key.encode()))
    assert [(found.key, found.size_bytes) async for found in storage.list()] == [(k, len(k)) for k in everything]
    assert await keys(storage, "a/") == ["a/1", "a/10", "a/2/x", "a/2/y"]
    assert await keys(storage, "a/1") == ["a/1", "a/10"]
    assert await keys(storage, "a/2/") == ["a/2/x", "a/2/y"]
    assert await keys(storage, "nothing/here") == []


async def test_deleting_is_repeatable_and_takes_only_what_was_named(storage: Storage) -> None:
    for key in ("jobs/1/log", "jobs/1/result", "jobs/12/log", "jobs/2"):
        await storage.put(key, chunks_of(b"x"))
    for _ in range(2):
        await storage.delete("jobs/2")
        await storage.delete("jobs/nothing/here")
        await storage.delete("jobs")
    assert await delete_prefix(storage, "jobs/1/") == 2
    assert await delete_prefix(storage, "jobs/1/") == 0
    assert await keys(storage) == ["jobs/12/log"]
    with pytest.raises(ValueError, match="slash"):
        await delete_prefix(storage, "jobs/1")


async def test_puts_and_deletes_of_neighbours_do_not_disturb_each_other(storage: Storage) -> None:
    rounds = 40 if isinstance(storage, FolderStorage) else 4

    async def churn(name: str) -> None:
        for _ in range(rounds):
            await storage.put(f"deep/folder/{name}", chunks_of(name.encode()))
            assert await read(storage, f"deep/folder/{name}") == name.encode()
            await storage.delete(f"deep/folder/{name}")

    await asyncio.gather(*(churn(f"n{number}") for number in range(6)))
    assert await keys(storage) == []


async def test_a_put_outlives_a_delete_that_takes_its_folder_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's mkdir finds the folder there, looks what it is, and finds it gone."""
    storage = FolderStorage(tmp_path / "objects", tmp_path / "secret")
    make, races = os.mkdir, iter([True])

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if Path(path).name == "deep" and next(races, False):
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    await storage.put("deep/one", chunks_of(b"x"))
    assert await read(storage, "deep/one") == b"x"
    with pytest.raises(Unprocessable, match="below another object"):
        await storage.put("deep/one/two", chunks_of(b"x"))
    await storage.close()


@pytest.mark.parametrize("key", [
    "", "/", "/etc/passwd", "..", ".", "../x", "a/../b", "a/..", "a/./b", "a//b", "a/", "/a", "a\\b", "..\\x", "a\0b",
    "a\nb", "a\n", "~/x", ".incoming/x", ".hidden", "a/.hidden", "a b", "ä", "a/%2e%2e/b", "a?b", "a*b",
    "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/x", "x" * 201, "/".join(["x" * 100] * 6),
])  # fmt: skip
async def test_a_hostile_key_is_refused_by_every_method(storage: Storage, key: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    attempts: list[Callable[[], object]] = [
        lambda: storage.put(key, chunks_of(b"x")),
        lambda: read(storage, key),
        lambda: storage.size(key),
        lambda: storage.delete(key),
        lambda: storage.signed_upload_url(key, content_type=JSONL, max_bytes=1),
    ]
    for attempt in attempts:
        with pytest.raises(Unprocessable, match="key of an object") as refused:
            await attempt()  # type: ignore[misc]  # each makes a coroutine
        assert refused.value.code == "invalid_key"
    if key not in ("", "a/"):
        with pytest.raises(Unprocessable, match="No key can begin with"):
            await keys(storage, key)
    assert sorted(tmp_path.rglob("*")) == before


async def test_a_stream_that_is_too_long_is_refused_while_it_arrives(
    storage: Storage, request: pytest.FixtureRequest
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += MIB
            yield bytes(MIB)

    await storage.put("object", chunks_of(b"old"))
    with pytest.raises(TooLarge, match=str(20 * MIB)):
        await storage.put("object", endless(), max_bytes=20 * MIB)
    assert sent == 21 * MIB
    assert await read(storage, "object") == b"old"
    assert leftovers(storage, request) == []
    assert (await storage.put("object", chunks_of(bytes(MIB)), max_bytes=MIB)).size_bytes == MIB


@pytest.mark.parametrize("arrived", [0, MIB, 3 * PART_BYTES + MIB], ids=["nothing", "some", "several-parts"])
async def test_a_stream_that_breaks_leaves_everything_as_it_was(
    storage: Storage, arrived: int, request: pytest.FixtureRequest
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        async for chunk in chunks_of(bytes(arrived), MIB):
            yield chunk
        raise ConnectionResetError("the client went away")

    await storage.put("old", chunks_of(b"old"))
    for key in ("old", "new/object"):
        with pytest.raises(ConnectionResetError):
            await storage.put(key, broken())
    assert await keys(storage) == ["old"]
    assert await read(storage, "old") == b"old"
    assert leftovers(storage, request) == []


@pytest.mark.parametrize("arrived", [MIB, 3 * PART_BYTES + MIB], ids=["some", "several-parts"])
async def test_a_put_that_is_cancelled_halfway_leaves_nothing(
    storage: Storage, arrived: int, request: pytest.FixtureRequest
) -> None:
    stalled = asyncio.Event()

    async def stalling() -> AsyncIterator[bytes]:
        async for chunk in chunks_of(bytes(arrived), MIB):
            yield chunk
        stalled.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(storage.put("new/object", stalling()))
    await asyncio.wait_for(stalled.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await keys(storage) == []
    assert leftovers(storage, request) == []


async def test_a_put_cancelled_twice_at_any_moment_leaves_a_whole_object_or_none(
    storage: Storage, request: pytest.FixtureRequest
) -> None:
    data = bytes(2 * PART_BYTES) if isinstance(storage, S3Storage) else bytes(2 * MIB)
    started = time.monotonic()
    await storage.put("measure", chunks_of(data, MIB))
    took = time.monotonic() - started
    attempts = 6 if isinstance(storage, S3Storage) else 60
    for attempt in range(attempts):
        task = asyncio.create_task(storage.put(f"object-{attempt}", chunks_of(data, MIB)))
        await asyncio.wait([task], timeout=took * attempt / attempts)
        task.cancel()
        await asyncio.wait([task], timeout=0.001)
        task.cancel()
        await asyncio.wait([task], timeout=60)
        assert task.done()
    assert {listed.size_bytes async for listed in storage.list()} == {len(data)}
    assert leftovers(storage, request) == []


def sent(upload: SignedUpload, data: bytes, headers: dict[str, str] | None = None, url: str = "") -> int:
    """Upload as a client would, with nothing but the URL, and return the status."""
    request = urllib.request.Request(
        url or upload.url, data=data, method=upload.method, headers=dict(headers or upload.headers)
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.fixture
def s3(s3_server: S3Server, request: pytest.FixtureRequest) -> S3Storage:
    """A storage in S3 whose threads the test itself ends, where it starts any."""
    return S3Storage(
        s3_server.bucket, f"test-{request.node.name.replace('[', '-').rstrip(']')}", s3_server.endpoint_url
    )


@pytest.mark.s3
async def test_a_presigned_url_takes_an_upload_without_any_key(s3: S3Storage) -> None:
    upload = await s3.signed_upload_url("up/load+1.jsonl", content_type=JSONL, max_bytes=MIB)
    assert await asyncio.to_thread(sent, upload, b"by a stranger") == 200
    assert await read(s3, "up/load+1.jsonl") == b"by a stranger"
    await s3.close()


@pytest.mark.s3
async def test_a_presigned_url_that_was_changed_or_has_expired_is_refused_by_the_store(s3: S3Storage) -> None:
    upload = await s3.signed_upload_url("upload", content_type=JSONL, max_bytes=MIB)
    assert await asyncio.to_thread(sent, upload, b"x", {"Content-Type": "text/html"}) == 403
    for changed in (
        upload.url.replace("/upload?", "/elsewhere?"),
        upload.url.replace("X-Amz-Expires=3600", "X-Amz-Expires=360000"),
        upload.url[:-1] + ("0" if upload.url[-1] != "0" else "1"),
    ):
        assert changed != upload.url
        assert await asyncio.to_thread(sent, upload, b"x", None, changed) == 403
    brief = await s3.signed_upload_url("upload", content_type=JSONL, max_bytes=MIB, expires_s=1)
    # The store counts whole seconds; until then the URL is good.
    deadline = time.monotonic() + 20
    while await asyncio.to_thread(sent, brief, b"late") != 403:
        assert time.monotonic() < deadline
        await s3.delete("upload")
    assert await keys(s3) in ([], ["upload"])
    await s3.close()


@pytest.mark.s3
async def test_listings_of_several_pages_are_complete(s3: S3Storage, s3_server: S3Server) -> None:
    s3._client().meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 3}
    )
    expected = [f"page/{number:02}" for number in range(8)]
    await asyncio.gather(*(s3.put(key, chunks_of(b"x")) for key in expected))
    assert await keys(s3) == expected
    assert await delete_prefix(s3, "page/") == 8
    await s3.close()


@pytest.mark.s3
async def test_two_prefixes_of_one_bucket_do_not_see_each_other(s3_server: S3Server) -> None:
    one, two = (S3Storage(s3_server.bucket, prefix, s3_server.endpoint_url) for prefix in ("team/one", "team/one-two"))
    await one.put("object", chunks_of(b"1"))
    await two.put("object", chunks_of(b"22"))
    assert (await keys(one), await one.size("object"), await two.size("object")) == (["object"], 1, 2)
    await delete_prefix(one, "object/")
    await one.delete("object")
    assert await keys(two) == ["object"]
    await two.delete("object")
    await one.close()
    await two.close()


async def refusals(storage: Storage) -> set[str]:
    """What every method says of a store that does not serve us."""
    messages = set()
    for attempt in (
        storage.check(),
        storage.put("object", chunks_of(b"x")),
        storage.put("object", chunks_of(bytes(PART_BYTES + 1), MIB)),
        read(storage, "object"),
        keys(storage),
        storage.delete("object"),
    ):
        with pytest.raises(StorageUnavailable) as refused:
            await attempt
        assert refused.value.status == 503
        messages.add(refused.value.message)
    await storage.close()
    return messages


@pytest.mark.s3
async def test_a_wrong_secret_is_reported_as_such(
    s3: S3Storage, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    for message in await refusals(s3):
        assert "refuses this server (SignatureDoesNotMatch)" in message
        assert "AWS_SECRET_ACCESS_KEY" in message
        assert s3_server.bucket in message
        assert "wrong-and-secret" not in message


@pytest.mark.s3
async def test_missing_credentials_are_reported_as_such(s3: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    for message in await refusals(s3):
        assert "no credentials for" in message
        assert "AWS_ACCESS_KEY_ID" in message


@pytest.mark.s3
async def test_a_missing_bucket_is_reported_as_such(s3_server: S3Server) -> None:
    for message in await refusals(S3Storage("no-such-bucket", "", s3_server.endpoint_url)):
        assert "has no bucket 'no-such-bucket'" in message
        assert s3_server.endpoint_url in message


@pytest.mark.s3
async def test_a_store_that_is_down_is_reported_with_its_address(s3_server: S3Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        storage = S3Storage(s3_server.bucket, "", address)
        with pytest.raises(StorageUnavailable, match=f"{address} cannot be reached.*MODELYARD_S3_ENDPOINT_URL"):
            await storage.check()
        await storage.close()


@pytest.mark.s3
async def test_a_store_that_never_answers_is_given_up(s3_server: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        storage = S3Storage(s3_server.bucket, "", f"http://127.0.0.1:{mute.getsockname()[1]}", timeout_s=1.0)
        with pytest.raises(StorageUnavailable, match=r"cannot be reached \(Read timeout"):
            await asyncio.wait_for(storage.size("object"), 60)
        await storage.close()


@pytest.mark.s3
async def test_an_object_whose_connection_is_cut_is_an_error_and_never_a_shorter_object(s3_server: S3Server) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + bytes(2_000_000))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(cut, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        storage = S3Storage(s3_server.bucket, "", f"http://127.0.0.1:{port}")
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            await read(storage, "object")
        await storage.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[FolderStorage]:
    opened = FolderStorage(tmp_path / "objects", tmp_path / "upload.key")
    yield opened
    asyncio.run(opened.close())


async def refused_upload(
    folder: FolderStorage, key: str, query: dict[str, str], content_type: str | None = JSONL, now: float | None = None
) -> UploadRefused:
    with pytest.raises(UploadRefused) as refused:
        folder.verify_upload(key, query, content_type=content_type, now=now)
    return refused.value


async def test_a_folders_upload_url_grants_what_it_was_made_for(folder: FolderStorage) -> None:
    upload = await folder.signed_upload_url("up/load+1.jsonl", content_type=JSONL, max_bytes=MIB, expires_s=60)
    address = urlsplit(upload.url)
    assert (address.scheme, address.netloc, upload.method) == ("", "", "PUT")
    assert unquote(address.path) == "/api/v1/uploads/up/load+1.jsonl"
    assert upload.headers == {"Content-Type": JSONL}
    assert time.time() < upload.expires_at <= time.time() + 60
    grant = folder.verify_upload("up/load+1.jsonl", dict(parse_qsl(address.query)), content_type=JSONL)
    assert (grant.key, grant.content_type, grant.max_bytes) == ("up/load+1.jsonl", JSONL, MIB)


async def test_a_folders_upload_url_is_refused_when_changed_expired_or_for_another_type(folder: FolderStorage) -> None:
    upload = await folder.signed_upload_url("upload", content_type=JSONL, max_bytes=MIB)
    query = dict(parse_qsl(urlsplit(upload.url).query))
    for name, value in [
        ("max", str(MIB + 1)), ("max", f" {MIB}"), ("max", ""), ("expires", str(upload.expires_at + 1)),
        ("expires", "never"), ("type", "text/html"), ("signature", "0" * 64), ("signature", ""),
        ("signature", "\udcff"), ("signature", "ä"), ("type", "\udcff"),
    ]:  # fmt: skip
        assert "signature" in (await refused_upload(folder, "upload", {**query, name: value})).message
    for name in query:
        short = {other: value for other, value in query.items() if other != name}
        assert (await refused_upload(folder, "upload", short)).code == "upload_refused"
    assert "signature" in (await refused_upload(folder, "upload2", query)).message
    for content_type in ("text/html", None):
        assert JSONL in (await refused_upload(folder, "upload", query, content_type)).message
    assert (await refused_upload(folder, "upload", query, now=upload.expires_at)).code == "upload_expired"
    assert folder.verify_upload("upload", query, content_type=JSONL, now=upload.expires_at - 1)
    with pytest.raises(Unprocessable):
        folder.verify_upload("../upload", query, content_type=JSONL)


@pytest.mark.parametrize("content_type", ["", "jsonl", "text/html\nx: y", "text/plain\r", "a/b/c", "text /plain"])
async def test_an_upload_url_needs_a_real_content_type(storage: Storage, content_type: str) -> None:
    with pytest.raises(Unprocessable, match="content type"):
        await storage.signed_upload_url("upload", content_type=content_type, max_bytes=1)


@pytest.mark.parametrize(("max_bytes", "expires_s"), [(0, 60), (-1, 60), (1, 0), (1, 7 * 24 * 3600 + 1)])
async def test_an_upload_url_needs_bounds_that_the_stores_know(
    storage: Storage, max_bytes: int, expires_s: int
) -> None:
    with pytest.raises(ValueError, match="604800"):
        await storage.signed_upload_url("upload", content_type=JSONL, max_bytes=max_bytes, expires_s=expires_s)


async def test_the_secret_of_upload_urls_is_private_and_outlives_a_restart(
    folder: FolderStorage, tmp_path: Path
) -> None:
    upload = await folder.signed_upload_url("upload", content_type=JSONL, max_bytes=1)
    secret = tmp_path / "upload.key"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert secret.read_text() not in upload.url
    query = dict(parse_qsl(urlsplit(upload.url).query))
    again = FolderStorage(folder.root, secret)
    assert again.verify_upload("upload", query, content_type=JSONL).key == "upload"
    await again.close()
    other = FolderStorage(folder.root, tmp_path / "other.key")
    with pytest.raises(UploadRefused):
        other.verify_upload("upload", query, content_type=JSONL)
    await other.close()


def test_servers_that_start_at_the_same_moment_agree_on_one_secret(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def start(number: int) -> bytes:
        barrier.wait()
        opened = FolderStorage(tmp_path / f"objects-{number}", tmp_path / "upload.key")
        asyncio.run(opened.close())
        return opened._secret

    with ThreadPoolExecutor(8) as threads:
        secrets = set(threads.map(start, range(8)))
    assert len(secrets) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["upload.key"]


def test_an_empty_secret_file_is_never_signed_with(tmp_path: Path) -> None:
    (tmp_path / "upload.key").touch()
    with pytest.raises(StartRefused, match=r"upload\.key does not hold a secret"):
        FolderStorage(tmp_path / "objects", tmp_path / "upload.key")


async def test_objects_in_a_folder_are_private_files_under_their_keys(folder: FolderStorage) -> None:
    await folder.put("datasets/one.jsonl", chunks_of(b"{}"))
    path = folder.root / "datasets" / "one.jsonl"
    assert path.read_bytes() == b"{}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await folder.delete("datasets/one.jsonl")
    assert [path.name for path in folder.root.iterdir()] == [".incoming"]


async def test_a_folder_cannot_hold_an_object_below_another_one_and_says_so(folder: FolderStorage) -> None:
    await folder.put("a", chunks_of(b"x"))
    await folder.put("b/c", chunks_of(b"x"))
    for key in ("a/below", "a/far/below", "b"):
        with pytest.raises(Unprocessable, match="below another"):
            await folder.put(key, chunks_of(b"y"))
    assert await keys(folder) == ["a", "b/c"]
    assert list((folder.root / ".incoming").iterdir()) == []


async def test_a_put_survives_that_its_folder_is_removed_as_empty_under_it(folder: FolderStorage) -> None:
    ended = threading.Event()

    def tidy() -> None:
        while not ended.is_set():
            for empty in ("deep/er", "deep"):
                with contextlib.suppress(OSError):
                    (folder.root / empty).rmdir()

    with ThreadPoolExecutor(1) as threads:
        tidying = threads.submit(tidy)
        try:
            for number in range(200):
                await folder.put(f"deep/er/{number}", chunks_of(b"x"))
                await folder.delete(f"deep/er/{number}")
        finally:
            ended.set()
        tidying.result()


async def test_a_full_disk_is_reported_and_leaves_nothing(folder: FolderStorage) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, hard))  # the kernel's own refusal, as of a full disk
    try:
        with pytest.raises(StorageUnavailable, match="no room left") as refused:
            await folder.put("object", chunks_of(bytes(5 * MIB)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.code == "storage_full"
    assert await keys(folder) == []
    assert list((folder.root / ".incoming").iterdir()) == []


async def test_a_folder_that_hangs_is_given_up_and_gives_back_what_it_holds_when_it_comes_out_of_it(
    tmp_path: Path,
) -> None:
    """A pipe that nobody writes to hangs whoever opens it, as a network folder does whose server is gone."""
    folder = FolderStorage(tmp_path / "objects", tmp_path / "upload.key", 0.3)
    os.mkfifo(folder.root / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    began = time.monotonic()
    # More than there are threads: the last ones do not even begin.
    asking = [asyncio.create_task(read(folder, "pipe")) for _ in range(THREADS + 4)]
    try:
        for answer in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(answer, StorageUnavailable), answer
            assert str(folder.root) in answer.message
        assert time.monotonic() - began < 3
        with pytest.raises(StorageUnavailable, match="does not answer"):
            await folder.put("object", chunks_of(b"x"))
    finally:
        writer = os.open(folder.root / "pipe", os.O_RDWR)
    await eventually(lambda: len(os.listdir("/proc/self/fd")) == before + 1, "what was opened late is closed")
    os.close(writer)
    (folder.root / "pipe").unlink()
    await folder.put("object", chunks_of(b"x"))
    assert await keys(folder) == ["object"]
    assert list((folder.root / ".incoming").iterdir()) == []
    await folder.close()


async def test_a_put_whose_write_hangs_is_given_up_and_tidied_up_after_it(
    folder: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = FolderStorage(folder.root, folder.root.parent / "upload.key", 0.3)
    hung, published = threading.Event(), os.fsync

    def hangs(descriptor: int) -> None:
        hung.wait(30)
        published(descriptor)

    monkeypatch.setattr(os, "fsync", hangs)
    try:
        with pytest.raises(StorageUnavailable, match="does not answer"):
            await impatient.put("object", chunks_of(b"x"))
    finally:
        monkeypatch.undo()
        hung.set()
    await eventually(lambda: list((folder.root / ".incoming").iterdir()) == [], "nothing half is left")
    assert await keys(folder) == []
    await impatient.close()


async def test_a_folder_that_vanished_is_reported(folder: FolderStorage) -> None:
    await folder.check()
    shutil.rmtree(folder.root)
    with pytest.raises(StorageUnavailable, match="gone"):
        await folder.check()
    with pytest.raises(StorageUnavailable, match="cannot be used"):
        await folder.put("object", chunks_of(b"x"))


KILLED_PUT = """
import asyncio, sys
from pathlib import Path
from modelyard.storage import FolderStorage

async def main():
    async def stalling():
        yield bytes(3 * 1024 * 1024)
        sys.stdout.write("stalled\\n")
        sys.stdout.flush()
        await asyncio.Event().wait()
    await FolderStorage(Path(sys.argv[1]), Path(sys.argv[2])).put("object", stalling())

asyncio.run(main())
"""


async def test_what_a_killed_server_left_is_removed_but_never_what_a_live_one_writes(
    folder: FolderStorage, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", KILLED_PUT, str(folder.root), str(tmp_path / "upload.key")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            assert await asyncio.to_thread(writer.stdout.readline) == b"stalled\n"
            [leftover] = (folder.root / ".incoming").iterdir()
            assert leftover.stat().st_size == 3 * MIB
            os.utime(leftover, (1, 1))
            await FolderStorage(folder.root, tmp_path / "upload.key").close()
            assert leftover.exists()
        finally:
            writer.kill()
    await FolderStorage(folder.root, tmp_path / "upload.key").close()
    assert not leftover.exists()
    assert await keys(folder) == []


def settings(tmp_path: Path, **values: str) -> Settings:
    return Settings(data_dir=tmp_path / "data", **values)  # type: ignore[arg-type]  # checked by pydantic


@pytest.mark.parametrize(("url", "place"), [("", "data/objects"), ("file://{}/my%20objects", "my objects")])
async def test_the_storage_url_picks_a_folder(tmp_path: Path, url: str, place: str) -> None:
    opened = open_storage(settings(tmp_path, storage_url=url.format(tmp_path)))
    await opened.put("object", chunks_of(b"x"))
    assert (tmp_path / place / "object").read_bytes() == b"x"
    assert stat.S_IMODE((tmp_path / "data" / "upload.key").stat().st_mode) == 0o600
    await opened.close()


@pytest.mark.s3
async def test_the_storage_url_picks_a_bucket_and_a_prefix(tmp_path: Path, s3_server: S3Server) -> None:
    opened = open_storage(
        settings(tmp_path, storage_url=f"s3://{s3_server.bucket}/my/prefix/", s3_endpoint_url=s3_server.endpoint_url)
    )
    await opened.check()
    await opened.put("object", chunks_of(b"x"))
    client = s3_server.client()
    assert client.head_object(Bucket=s3_server.bucket, Key="my/prefix/object")["ContentLength"] == 1
    client.close()
    await opened.delete("object")
    await opened.close()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("url", "reason"), [
    ("s3:///prefix", "bucket is missing"), ("s3://bucket/../x", "a key has names"), ("s3://bucket?x=1", "no meaning"),
    ("file:///", "folder is missing"), ("file:///dev/null/objects", "/dev/null/objects: Not a directory"),
    ("s3://[bucket", "invalid IPv6"), ("s3://bucket:9000/x", "'bucket:9000' is no bucket's name"),
    ("s3://my bucket", "is no bucket's name"), ("file:///objects%00", "null byte"), ("s3://AK:hunter2@x", "no cred"),
    ("s3://\N{SNOWMAN}", "is no bucket's name"), ("s3://[::1]/x", "is no bucket's name"),
])  # fmt: skip
def test_a_storage_url_that_makes_no_sense_stops_the_start_with_one_line(tmp_path: Path, url: str, reason: str) -> None:
    with pytest.raises(StartRefused, match=reason) as refused:
        open_storage(settings(tmp_path, storage_url=url))
    assert "\n" not in str(refused.value)
    assert "hunter2" not in str(refused.value)


@pytest.mark.s3
async def test_a_key_that_only_the_settings_know_opens_the_store(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    place = {"storage_url": f"s3://{s3_server.bucket}/from-env", "s3_endpoint_url": s3_server.endpoint_url}
    for named, problem in (
        ({"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1"}, None),
        ({"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": "wrong"}, "refuses this server"),
        ({}, "no credentials"),
    ):
        opened = open_storage(settings(tmp_path, **place, **named))
        if problem is None:
            await opened.check()
            await opened.put("object", chunks_of(b"x"))
            await opened.delete("object")
        else:
            with pytest.raises(StorageUnavailable, match=problem):
                await opened.check()
        await opened.close()


def test_half_a_key_stops_the_start_with_one_line(tmp_path: Path) -> None:
    place = {"storage_url": "s3://bucket"}
    with pytest.raises(StartRefused, match="AWS_SECRET_ACCESS_KEY is not set, but its other half is"):
        open_storage(settings(tmp_path, **place, AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY=""))
    with pytest.raises(StartRefused, match="AWS_ACCESS_KEY_ID is not set"):
        open_storage(settings(tmp_path, **place, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="x"))


async def test_a_store_that_never_answers_is_asked_but_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelyard.storage.s3.CHECK_TIMEOUT_S", 0.3)
    named = {"aws_access_key_id": "x", "aws_secret_access_key": "y"}
    with socket.create_server(("127.0.0.1", 0)) as mute:
        storage = S3Storage("bucket", "", f"http://127.0.0.1:{mute.getsockname()[1]}", named)
        with pytest.raises(StorageUnavailable, match=r"cannot be reached \(Read timeout"):
            await storage.check()
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            await storage.check()
        assert time.monotonic() - began < 3, "it is not asked again"
        await storage.close()


def test_starting_the_server_does_not_pay_for_boto3() -> None:
    code = "import modelyard.storage, sys; sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_what_a_killed_upload_in_parts_left_in_a_bucket_is_removed_below_its_prefix_only(
    s3_server: S3Server,
) -> None:
    storage = S3Storage(s3_server.bucket, "unfinished", s3_server.endpoint_url)
    client = s3_server.client()
    for key in ("unfinished/one/data", "unfinished/two/data"):
        client.create_multipart_upload(Bucket=s3_server.bucket, Key=key)
    await storage.remove_unfinished("one/")
    await storage.remove_unfinished("one/")
    left = client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix="unfinished/").get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["unfinished/two/data"]
    await storage.remove_unfinished("")
    assert not client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix="unfinished/").get("Uploads", [])
    client.close()
    await storage.close()
