"""Access as a client meets it, on a real server: who is let in, and who is not."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelyard.auth import access
from modelyard.http import ANTHROPIC_PATHS, PLAIN_TEXT_PATHS
from modelyard.settings import Settings
from tests.server import Server, run_modelyard, serving
from tests.walk import application, every_path, other_ending

KEY = "a-key-of-the-tests"
PAGE = "https://chat.example.org"
ELSEWHERE = "https://elsewhere.example.org"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """No key: open to this machine, and to the pages of one origin."""
    with serving(tmp_path_factory.mktemp("open") / "data", MODELYARD_CORS_ORIGINS=PAGE) as server:
        yield server


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("locked") / "data"
    settings = {"MODELYARD_ADMIN_KEY": KEY, "MODELYARD_CORS_ORIGINS": PAGE, "MODELYARD_WRONG_KEY_DELAY_S": "0"}
    with serving(folder, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def ways() -> list[tuple[str, str]]:
    found = sorted(set(every_path(application())))
    assert ("POST", "/api/v1/deploy/") in found
    return found


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST"])
def test_without_a_key_this_machine_is_let_in_by_each_of_its_names_at_any_port(open_server: Server, name: str) -> None:
    for host in (name, f"{name}:{open_server.port}", f"{name}:1"):
        assert open_server.get("/api/v1/jobs/", {"Host": host}).status == 200, host


@pytest.mark.parametrize(
    "host",
    [
        "rebound.example.org", "rebound.example.org:8080", "localhost.example.org", "127.0.0.1.example.org",
        "127.0.0.1:80@example.org", "localhost:80:80", "[::1", "[::1]example.org", "[::2]", "example.org#localhost",
        "127.0.0.1:", "192.168.0.1", "0.0.0.0", "2130706433", " ", "",
    ],
)  # fmt: skip
def test_a_name_that_was_bound_to_this_machine_from_outside_is_refused(open_server: Server, host: str) -> None:
    answer = open_server.get("/api/v1/jobs/", {"Host": host})
    assert (answer.status, answer.error_code) == (403, "host_not_allowed")


def test_a_request_without_a_host_is_refused(open_server: Server) -> None:
    answer = open_server.send_bytes(b"GET /api/v1/jobs/ HTTP/1.0\r\n\r\n")
    assert b" 403 " in answer.splitlines()[0]


def test_a_page_from_elsewhere_is_refused_on_every_route_and_method(
    open_server: Server, ways: list[tuple[str, str]]
) -> None:
    everywhere = {path for _, path in ways} | {"/", "/no/such/path"}
    for path in sorted(everywhere):
        for method in METHODS:
            answer = open_server.request(method, path, headers={"Origin": ELSEWHERE})
            assert answer.status == 403, (method, path)
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    ["null", "http://localhost:1", "https://127.0.0.1:{port}", "http://127.0.0.1:{port}.example.org", "http://[", "*",
     "file://", "", "http://127.0.0.1:{port}/", f"{PAGE}.example.net", PAGE.replace("https", "http"), f"{PAGE}:8443"],
)  # fmt: skip
def test_an_origin_that_only_resembles_an_allowed_one_is_refused(open_server: Server, origin: str) -> None:
    answer = open_server.get("/api/v1/jobs/", {"Origin": origin.format(port=open_server.port)})
    assert (answer.status, answer.error_code) == (403, "origin_not_allowed")


def test_a_form_that_a_page_posts_without_asking_first_is_refused_and_does_nothing(open_server: Server) -> None:
    body = b'{"model_id": "no/such"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        for origin in (ELSEWHERE, "null"):
            headers = {"Origin": origin, "Content-Type": kind}
            answer = open_server.request("POST", "/api/v1/models/add/?model_id=no/such", body=body, headers=headers)
            assert (answer.status, answer.error_code) == (403, "origin_not_allowed")
    assert open_server.get("/api/v1/jobs/").json() == []


def test_the_servers_own_pages_may_call_it(open_server: Server) -> None:
    for host in (f"127.0.0.1:{open_server.port}", f"localhost:{open_server.port}", "localhost"):
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert open_server.get("/api/v1/jobs/", headers).status == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_request_that_a_browser_marks_as_another_sites_is_refused_even_without_an_origin(
    open_server: Server, site: str
) -> None:
    for method, mode in (("GET", "no-cors"), ("GET", "cors"), ("GET", ""), ("POST", "navigate")):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
        answer = open_server.request(method, "/api/v1/jobs/", headers=headers)
        assert (answer.status, answer.error_code) == (403, "origin_not_allowed"), (method, mode)


def test_a_link_from_another_page_to_the_documentation_works(open_server: Server) -> None:
    for site in ("cross-site", "same-site", "none"):
        for path in ("/api/docs", "/api/docs/", "/api/docs/guide", "/api/docs/guide/", "/api/docs/guide/settings"):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
            assert open_server.get(path, headers).status == 200
            del headers["Sec-Fetch-Dest"]
            assert open_server.get(path, headers).status == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_link_from_another_page_leads_to_nothing_but_pages(
    open_server: Server, ways: list[tuple[str, str]], site: str
) -> None:
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    for path in sorted(path for _, path in ways if not access.is_page(path)):
        for method in ("GET", "HEAD"):
            assert open_server.request(method, path, headers=headers).status == 403, (method, path)
    assert "type other addresses" in open_server.get("/api/v1/jobs/", headers).text
    for shown_in in ("iframe", "embed", "object"):
        assert open_server.get("/api/docs", {**headers, "Sec-Fetch-Dest": shown_in}).status == 403
    assert open_server.get("/api/v1/jobs/", {**headers, "Sec-Fetch-Site": "none"}).status == 200  # typed, or a bookmark


def test_a_named_page_may_call_and_is_told_so(open_server: Server) -> None:
    answer = open_server.get("/api/v1/jobs/", {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"})
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["vary"] == "Origin"
    refused = open_server.get("/api/v1/deploy/", {"Origin": PAGE})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (404, PAGE)


def test_a_named_page_may_ask_first(open_server: Server, locked_server: Server) -> None:
    asked = "authorization, content-type"
    for server in (open_server, locked_server):
        for method in ("POST", "DELETE", "PUT", "PATCH"):
            headers = {
                "Origin": PAGE, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": asked,
            }  # fmt: skip
            answer = server.request("OPTIONS", "/api/v1/deploy/", headers=headers)
            assert (answer.status, answer.body) == (204, b"")
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert method in answer.headers["access-control-allow-methods"].split(", ")
            assert answer.headers["access-control-allow-headers"] == asked


def test_a_page_that_is_not_named_may_not_ask_first(open_server: Server, locked_server: Server) -> None:
    headers = {"Origin": ELSEWHERE, "Access-Control-Request-Method": "POST"}
    for server, status in ((open_server, 403), (locked_server, 401)):
        answer = server.request("OPTIONS", "/api/v1/deploy/", headers=headers)
        assert answer.status == status
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("name", ["Host", "Origin", "Authorization", "X-API-KEY"])
def test_a_header_that_decides_about_access_may_come_only_once(
    open_server: Server, locked_server: Server, name: str
) -> None:
    values = {"Host": "localhost", "Origin": PAGE, "Authorization": f"Bearer {KEY}", "X-API-KEY": KEY}
    lines = "".join(f"{sent}: {value}\r\n" for sent, value in values.items())
    for twice in (f"{name}: something\r\n{lines}", f"{lines}{name}: something\r\n"):
        for server in (open_server, locked_server):
            request = f"GET /api/v1/jobs/ HTTP/1.1\r\n{twice}Connection: close\r\n\r\n"
            answer = server.send_bytes(request.encode())
            assert b" 400 " in answer.splitlines()[0], answer
            assert b"header_sent_twice" in answer


def test_with_a_key_every_route_but_health_wants_it(locked_server: Server, ways: list[tuple[str, str]]) -> None:
    documented = locked_server.get("/api/openapi.json", {"X-API-KEY": KEY}).json()["paths"]
    asked = [*ways, *((method.upper(), path) for path, methods in documented.items() for method in methods)]
    asked += [("GET", "/"), ("GET", "/no/such/path"), ("POST", "/health"), ("GET", "//health"), ("GET", "/health/x")]
    let_in = set()
    for method, path in asked:
        for way in (path, other_ending(path)):
            bare = locked_server.request(method, way)
            wrong = locked_server.request(method, way, headers={"Authorization": f"Bearer {KEY}x", "X-API-KEY": "no"})
            if bare.status != 401 or wrong.status != 401:
                let_in.add(way)
                continue
            assert bare.headers["www-authenticate"] == "Bearer"
            if way.removesuffix("/") in PLAIN_TEXT_PATHS:
                assert bare.headers["content-type"].startswith("text/plain")
            elif way.removesuffix("/") in ANTHROPIC_PATHS:
                assert bare.json()["error"]["type"] == wrong.json()["error"]["type"] == "authentication_error"
            elif method != "HEAD":
                assert bare.error_code == wrong.error_code == "unauthorized"
                assert bare.json()["error"]["type"] == "authentication_error"
    assert let_in == {"/health", "/health/"}


def test_with_the_key_no_route_asks_for_it_again(locked_server: Server, ways: list[tuple[str, str]]) -> None:
    for method, path in ways:
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-KEY": KEY}):
            assert locked_server.request(method, path, headers=headers).status not in (401, 403), (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": f"Bearer{KEY}"},
        {"Authorization": "Bearer"}, {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY.upper()}"}, {"X-API-KEY": ""},
        {"X-API-KEY": f"Bearer {KEY}"}, {"X-API-KEY": f"{KEY}\xff"}, {"Api-Key": KEY},
        {"Cookie": f"X-API-KEY={KEY}"}, {"Authorization": f"Bearer {KEY}, Bearer {KEY}"},
    ],
)  # fmt: skip
def test_what_is_not_the_key_is_refused(locked_server: Server, headers: dict[str, str]) -> None:
    answer = locked_server.get("/api/v1/jobs/", headers)
    assert (answer.status, answer.error_code) == (401, "unauthorized")
    assert KEY not in answer.text


@pytest.mark.parametrize("headers", [{"Authorization": f"bearer {KEY}"}, {"Authorization": f"Bearer   {KEY}"},
                                     {"Authorization": "Bearer no", "X-API-KEY": KEY}])  # fmt: skip
def test_the_key_counts_however_its_scheme_is_written(locked_server: Server, headers: dict[str, str]) -> None:
    assert locked_server.get("/api/v1/jobs/", headers).status == 200


def test_the_key_in_the_address_is_worth_nothing(locked_server: Server) -> None:
    assert locked_server.get(f"/api/v1/jobs/?api_key={KEY}&X-API-KEY={KEY}").status == 401


def test_with_a_key_any_name_and_any_page_that_has_it_is_let_in(locked_server: Server) -> None:
    headers = {"X-API-KEY": KEY, "Host": "models.example.org", "Origin": ELSEWHERE}
    answer = locked_server.get("/api/v1/jobs/", headers)
    assert answer.status == 200
    assert "access-control-allow-origin" not in answer.headers, "a browser would not show the answer to the page"


def test_a_named_page_can_read_that_its_key_is_wrong(locked_server: Server) -> None:
    answer = locked_server.get("/api/v1/jobs/", {"Origin": PAGE, "X-API-KEY": "wrong"})
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, PAGE)


def test_the_key_is_not_in_the_log(locked_server: Server) -> None:
    locked_server.get("/api/v1/jobs/", {"X-API-KEY": KEY})
    assert KEY not in locked_server.log


def test_keys_are_compared_in_constant_time_whichever_header_they_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def watched(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return real(left, right)

    monkeypatch.setattr(hmac, "compare_digest", watched)

    async def nothing(*_: Any) -> None:
        raise AssertionError("not to be called")

    gate = access.Access(nothing, Settings(_env_file=None, admin_key=KEY))
    for headers in ({b"authorization": b"Bearer one"}, {b"x-api-key": b"two"}, {}):
        compared.clear()
        assert not gate._has_key(headers)
        assert len(compared) == 2
        assert all(right == KEY.encode() for _, right in compared)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "models.example.org"])
def test_beyond_loopback_it_does_not_start_without_a_key(tmp_path: Path, host: str) -> None:
    ended = run_modelyard("serve", cwd=tmp_path, MODELYARD_HOST=host, MODELYARD_DATA_DIR=str(tmp_path / "data"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"modelyard: MODELYARD_HOST=\S+ is reachable .* MODELYARD_ADMIN_KEY .*\n", ended.stderr)
    assert not (tmp_path / "data").exists()


ORIGINS = ("app://notes.example", "tauri://localhost", "chrome-extension://abcdefgh", "moz-extension://0a-1b", "null",
           "file://", "HTTPS://Chat.Example.org", "https://one.example.org:443/", "http://[::1]:3000")  # fmt: skip


def test_apps_extensions_and_null_can_be_allowed_one_by_one(tmp_path: Path) -> None:
    with serving(tmp_path / "data", MODELYARD_CORS_ORIGINS=", ".join(ORIGINS)) as server:
        for origin in (*ORIGINS[:6], "https://chat.example.org", "https://one.example.org", "http://[::1]:3000"):
            answer = server.get("/api/v1/jobs/", {"Origin": origin})
            assert (answer.status, answer.headers.get("access-control-allow-origin")) == (200, origin)
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            assert server.request("OPTIONS", "/api/v1/deploy/", headers=asked).status == 204
        for origin in (
            "app://other.example",
            "tauri://localhost.example",
            "chrome-extension://abcdefghi",
            "app://",
            "nul",
            "file:///",
            "file:///home/me/page.html",
        ):
            assert server.get("/api/v1/jobs/", {"Origin": origin}).status == 403, origin


def test_a_page_from_a_file_is_told_the_setting_that_lets_it_call(open_server: Server) -> None:
    refused = open_server.get("/api/v1/jobs/", {"Origin": "null"})
    assert (refused.status, refused.error_code) == (403, "origin_not_allowed")
    assert "MODELYARD_CORS_ORIGINS=null" in refused.json()["error"]["message"]


def test_wrong_keys_are_logged_and_answered_ever_later_and_the_right_one_at_once(tmp_path: Path) -> None:
    settings = {"MODELYARD_ADMIN_KEY": KEY, "MODELYARD_WRONG_KEY_DELAY_S": "0.4"}
    with serving(tmp_path / "data", **settings) as server:
        took = []
        for number in range(12):
            began = time.monotonic()
            headers = {"X-API-KEY": f"wrong-{number}"} if number % 2 else {"Authorization": f"Bearer wrong-{number}"}
            assert server.get("/api/v1/jobs/?secret=1", headers).status == 401
            took.append(time.monotonic() - began)
        # Whatever else this machine does: of several, one is quick.
        assert min(took[:5]) < 0.3
        assert took[-1] >= 0.4
        at_once = []
        for _ in range(5):
            began = time.monotonic()
            assert server.get("/api/v1/jobs/", {"X-API-KEY": KEY}).status == 200
            assert server.get("/api/v1/jobs/").status == 401, "no key at all is no guess"
            at_once.append(time.monotonic() - began)
        assert min(at_once) < 0.35
        assert server.log.count("a wrong key came from 127.0.0.1, for '/api/v1/jobs/'") == 10
        assert "wrong-" not in server.log
        assert "secret" not in server.log


def test_malformed_requests_and_wrong_keys_cannot_fill_the_log(tmp_path: Path) -> None:
    # A server of its own: refusals are counted, and the counts are logged once a minute at most.
    with serving(tmp_path / "data", MODELYARD_ADMIN_KEY=KEY, MODELYARD_WRONG_KEY_DELAY_S="0") as server:
        for _ in range(60):
            server.send_bytes(b"nonsense\r\n\r\n")
            server.get("/api/v1/jobs/", {"X-API-KEY": "wrong"})
        refused = "refused connections or requests: .*malformed_request"
        deadline = time.monotonic() + 20
        while not re.search(refused, server.log) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(re.findall(refused, server.log)) == 1
        assert 0 < len(re.findall("a wrong key came from", server.log)) <= 40


def test_beyond_loopback_it_starts_with_a_key(tmp_path: Path) -> None:
    with serving(tmp_path / "data", MODELYARD_HOST="0.0.0.0", MODELYARD_ADMIN_KEY=KEY) as server:
        assert server.get("/api/v1/jobs/").status == 401
        assert server.get("/api/v1/jobs/", {"X-API-KEY": KEY, "Host": "any.example.org"}).status == 200


@pytest.mark.parametrize("origins", ["*", "chat.example.org", f"{PAGE}/path", f"{PAGE} {ELSEWHERE}", "app://",
                                     "://notes", "app:notes", "nulls", "file:///",
                                     "file:///home/me/page.html", "https://user@chat.example.org"])  # fmt: skip
def test_a_setting_that_names_no_page_stops_the_start(tmp_path: Path, origins: str) -> None:
    ended = run_modelyard(
        "serve", cwd=tmp_path, MODELYARD_CORS_ORIGINS=origins, MODELYARD_DATA_DIR=str(tmp_path / "data")
    )
    assert ended.returncode == 2
    assert re.fullmatch(r"modelyard: MODELYARD_CORS_ORIGINS.* is not the origin of a page.*\n", ended.stderr)
    assert "Pages opened from a file have the origin null in browsers, and file:// in Electron" in ended.stderr
