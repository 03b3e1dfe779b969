"""Requests that are meant to be taken for something else: odd spellings of paths, two requests in one, other names.

Each was tried against a real server and held; here they are tried again.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.server import Server, serving
from tests.walk import application, every_path

KEY = "a-key-of-the-tests"
HEALTH = re.compile(r"/health/?")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("locked") / "data", MODELYARD_ADMIN_KEY=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def unlocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("unlocked") / "data") as server:
        yield server


def spellings(path: str) -> dict[str, str]:
    """Return the ways in which a path may be written so that some reader takes it for another one."""
    inner = path.lstrip("/")
    head, _, tail = inner.partition("/")
    return {
        "plain": path,
        "without its slash": path.rstrip("/") or "/",
        "with a slash": path.rstrip("/") + "/",
        "with two": path.rstrip("/") + "//",
        "double at the front": "//" + inner,
        "double inside": f"/{head}//{tail}",
        "all doubled": path.replace("/", "//"),
        "a dot": "/./" + inner,
        "dots": "/health/../" + inner,
        "dots in percent": "/health/%2e%2e/" + inner,
        "dots and slash in percent": "/health%2f..%2f" + inner,
        "twice in percent": "/health/%252e%252e/" + inner,
        "slashes in percent": "/" + quote(inner, safe=""),
        "letters in percent": "/" + "".join(f"%{ord(char):02X}" if char.isalpha() else char for char in inner),
        "capitals": path.upper(),
        "a backslash": path.replace("/", "\\"),
        "a backslash inside": f"/{head}\\{tail}",
        "a parameter": f"{path};x=1",
        "a parameter inside": f"/{head};/health/{tail}",
        "a query that is a path": f"{path}?/health",
        "a fragment": f"{path}#/health",
        "a fragment in percent": f"{path}%23/health",
        "a zero byte": f"{path}%00",
        "a zero byte and more": f"{path}%00/health",
        "a newline": f"{path}%0a",
        "a space": f"{path}%20",
        "health behind": f"{path.rstrip('/')}/health",
        "dots behind": f"{path.rstrip('/')}/..;/health",
        "absolute": f"http://127.0.0.1{path}",
        "absolute, elsewhere": f"http://health.example.org{path}",
        "absolute, with a user": f"http://health@127.0.0.1{path}",
        "wide slash": "/" + inner.replace("/", "%ef%bc%8f"),
        "overlong slash": "/" + inner.replace("/", "%c0%af"),
    }


def asked(connection: socket.socket, request: bytes) -> tuple[int, bytes]:
    """Send a request on a connection that stays, and return the answer's status and body."""
    connection.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received:
        block = connection.recv(65536)
        if not block:
            break
        received += block
    head, _, body = received.partition(b"\r\n\r\n")
    length = int((re.search(rb"(?i)content-length: (\d+)", head) or [b"", b"0"])[1])
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split(b" ")[1]), body


def test_no_spelling_of_any_path_is_answered_without_the_key(locked: Server) -> None:
    ways = sorted({(method, path) for method, path in every_path(application()) if not HEALTH.fullmatch(path)})
    assert len(ways) > 40
    assert len(spellings("/api/v1/jobs/")) >= 28
    answers = 0
    for method, path in ways:
        for name, spelt in spellings(path).items():
            if HEALTH.fullmatch(spelt):
                continue
            with socket.create_connection(("127.0.0.1", locked.port), timeout=30) as connection:
                head = f"{method} {spelt} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode()
                status, body = asked(connection, head)
            assert status in (400, 401), (method, name, spelt, status, body[:200])
            answers += 1
    assert answers > 28 * 40


SMUGGLED = b"GET /api/v1/jobs/ HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-KEY: a-key-of-the-tests\r\n\r\n"
POST = b"POST /api/v1/deploy/plan HTTP/1.1\r\nHost: 127.0.0.1\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(POST + b"Content-Length: 6\r\n" + CHUNKED + b"\r\n0\r\n\r\n", id="length and chunks"),
        pytest.param(POST + CHUNKED + b"Content-Length: 6\r\n\r\n0\r\n\r\n", id="chunks and length"),
        pytest.param(POST + b"Content-Length: 0\r\nContent-Length: 70\r\n\r\n", id="two lengths"),
        pytest.param(POST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n", id="two equal lengths"),
        pytest.param(POST + b"Content-Length: 0, 0\r\n\r\n", id="a list of lengths"),
        pytest.param(POST + b"Content-Length: +0\r\n\r\n", id="a sign"),
        pytest.param(POST + b"Content-Length: -1\r\n\r\n", id="a negative length"),
        pytest.param(POST + b"Content-Length: 0x0\r\n\r\n", id="a hexadecimal length"),
        pytest.param(POST + b"Content-Length: 99999999999999999999\r\n\r\n", id="a huge length"),
        pytest.param(POST + b"Content-Length : 0\r\n\r\n", id="a space before the colon"),
        pytest.param(POST + b"Content-Length\r\n: 0\r\n\r\n", id="a colon on the next line"),
        pytest.param(POST + b"X: a\r\n Content-Length: 0\r\n\r\n", id="a folded header"),
        pytest.param(POST + b"X: a\nContent-Length: 0\r\n\r\n", id="a bare newline"),
        pytest.param(POST + b"X: a\rContent-Length: 0\r\n\r\n", id="a bare return"),
        pytest.param(POST + b"X: a\0b\r\nContent-Length: 0\r\n\r\n", id="a zero byte"),
        pytest.param(POST.replace(b"\r\n", b"\n") + b"Content-Length: 0\n\n", id="newlines only"),
        pytest.param(POST + b"Transfer-Encoding: identity\r\n\r\n", id="identity"),
        pytest.param(POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", id="chunked, then identity"),
        pytest.param(POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", id="gzip, then chunked"),
        pytest.param(POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", id="nearly chunked"),
        pytest.param(POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n", id="chunked twice"),
        pytest.param(POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", id="a tab before chunked"),
        pytest.param(POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", id="a space before chunked's colon"),
        pytest.param(POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n", id="chunks in HTTP/1.0"),
        pytest.param(POST + CHUNKED + b"\r\n-1\r\n\r\n", id="a negative chunk"),
        pytest.param(POST + CHUNKED + b"\r\n0x1\r\na\r\n0\r\n\r\n", id="a chunk with a prefix"),
        pytest.param(POST + CHUNKED + b"\r\nffffffffffffffffff\r\na", id="a huge chunk"),
        pytest.param(POST + CHUNKED + b"\r\n1\r\nab\r\n0\r\n\r\n", id="a chunk that is too long"),
        pytest.param(POST + CHUNKED + b"\r\n1\na\r\n0\r\n\r\n", id="a newline behind a chunk's size"),
        pytest.param(POST + CHUNKED + b"\r\n1;a\nb\r\na\r\n0\r\n\r\n", id="a newline in an extension"),
        pytest.param(b"GET /api/v1/jobs/ HTTP/1.1 x\r\nHost: a\r\n\r\n", id="words behind the version"),
        pytest.param(b"GET /api/v1/jobs/\r\n\r\n", id="HTTP/0.9"),
        pytest.param(b"GET /api/v1/jobs/ HTTP/2.0\r\nHost: a\r\n\r\n", id="HTTP/2.0"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2 without asking"),
        pytest.param(b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: a\r\n\r\n", id="a tunnel"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
    ],
)
def test_a_request_that_two_could_read_as_different_ones_is_refused_and_nothing_behind_it_is_read(
    locked: Server, request_: bytes
) -> None:
    answer = locked.send_bytes(request_ + SMUGGLED)
    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)
    # The key is only in the second request: its answer is the only one that could be 200.
    assert statuses in ([b"400"], [b"401"], [b"401", b"400"]), answer
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["code"]
    assert locked.get("/health").status == 200


@pytest.mark.parametrize(
    "ok",
    [
        pytest.param(b"X:  \ty\t \r\nContent-Length: 1\r\n\r\nx", id="spaces around a value"),
        pytest.param(CHUNKED + b"\r\n1;name=value\r\nx\r\n0\r\n\r\n", id="an extension of a chunk"),
        pytest.param(CHUNKED + b"\r\n001\r\nx\r\n000\r\n\r\n", id="zeros before the size"),
        pytest.param(CHUNKED + b"\r\n1\r\nx\r\n0\r\nX-Trailer: y\r\n\r\n", id="a trailer"),
        pytest.param(b"Content-Length: 1\r\n\r\nx", id="a length"),
    ],
)
def test_what_only_looks_odd_is_read_as_everybody_reads_it(locked: Server, ok: bytes) -> None:
    behind = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    answer = locked.send_bytes(POST + ok + behind)
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", answer) == [b"401", b"200"]


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param("Host: rebound.example.org", id="another name"),
        pytest.param("Host: 127.0.0.1.rebound.example.org", id="a name that begins like ours"),
        pytest.param("Host: rebound.example.org\r\nHost: 127.0.0.1", id="two names"),
        pytest.param("Host: 127.0.0.1\r\nHost: rebound.example.org", id="two names, ours first"),
        pytest.param("Host: 127.0.0.1@rebound.example.org", id="a user"),
        pytest.param("Host: 127.0.0.1, rebound.example.org", id="a list"),
        pytest.param("X-Forwarded-Host: 127.0.0.1\r\nHost: rebound.example.org", id="a proxy's word"),
        pytest.param("Forwarded: host=127.0.0.1\r\nHost: rebound.example.org", id="a proxy's newer word"),
        pytest.param("Host: 127.0.0.1\r\nOrigin: http://rebound.example.org", id="another origin"),
        pytest.param("Host: 127.0.0.1\r\nOrigin: http://127.0.0.1.example.org", id="an origin that begins like ours"),
        pytest.param("Host: 127.0.0.1\r\nOrigin: https://127.0.0.1", id="another scheme"),
        pytest.param("Host: 127.0.0.1\r\nOrigin: http://127.0.0.1:1", id="another port"),
        pytest.param("Host: 127.0.0.1\r\nOrigin: null", id="no origin of a page"),
        pytest.param("Host: 127.0.0.1\r\nSec-Fetch-Site: cross-site", id="another site"),
        pytest.param("X: y", id="no name"),
    ],
)
@pytest.mark.parametrize("target", ["{path}", "http://127.0.0.1{path}"], ids=["plain", "absolute"])
def test_a_page_that_was_bound_to_this_machine_gets_nothing(unlocked: Server, headers: str, target: str) -> None:
    for method, path in (("GET", "/api/v1/jobs/"), ("POST", "/api/v1/deploy/"), ("GET", "/v1/models")):
        head = f"{method} {target.format(path=path)} HTTP/1.1\r\n{headers}\r\nConnection: close\r\n"
        answer = unlocked.send_bytes(f"{head}Content-Length: 0\r\n\r\n".encode())
        assert answer.split(b" ")[1] in (b"400", b"403"), answer


def test_a_path_is_told_as_it_came_and_leads_to_no_file(locked: Server, tmp_path: Path) -> None:
    for path in (
        "/api/docs/files/../../../../etc/passwd", "/api/docs/files/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/api/docs/files/..%2f..%2f..%2fetc/passwd", "/api/docs/files//etc/passwd", "/api/docs/files/%00",
    ):  # fmt: skip
        answer = locked.get(path, {"X-API-KEY": KEY})
        assert answer.status in (400, 404), (path, answer.status)
        assert b"root:" not in answer.body
