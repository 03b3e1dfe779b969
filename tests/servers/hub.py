"""A small Hugging Face hub: it speaks the real protocol to the real client, and misbehaves when told to.

`Hub` serves repositories made from files in memory: model information with sizes and hashes, HEAD and GET on
`resolve` (ETag, commit, ranges), a redirect to a second origin for large files as the real one does (which must never
see the token), gated and missing repositories with the real status and error codes. `misbehave` plants a fault on
a file; `requests` tells what was asked and how many bytes were sent, so that a resumed download can be told from one
that started over. It keeps nothing and checks no signature. By hand: `python -m tests.servers.hub FOLDER [PORT]`,
with models in FOLDER/org/name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".model")
BLOCK = 16 * 1024


@dataclass
class Fault:
    """What goes wrong with a file, `times` times (None: always).

    cut, stall: after so many bytes of an answer. corrupt: other content of the same size. status: an error answer.
    slow: `bytes_per_s`. ignore_range: the whole file whatever was asked. html: a login page instead of the listing.
    """

    kind: Literal["cut", "stall", "corrupt", "status", "slow", "ignore_range", "html"]
    after: int = 0
    times: int | None = 1
    status: int = 500
    bytes_per_s: int = 0

    def take(self) -> bool:
        """Whether it strikes now; uses up one of its times."""
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


class XetStore:
    """Large files in xet storage, for the real hf_xet client: a folder takes the place of the storage's servers."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"local://{folder / 'cas'}"
        self.hashes: dict[bytes, str] = {}
        self.requests = 0
        self._folder = folder

    def put(self, content: bytes) -> None:
        """Store the content, and remember what it is called there."""
        path = self._folder / "upload"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        # In a process of its own: hf_xet leaves threads behind.
        argv = [sys.executable, "-c", _XET_UPLOAD, self.endpoint, str(path)]
        self.hashes[content] = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


_XET_UPLOAD = """
import sys, hf_xet
commit = hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1])
commit.start_upload_file(sys.argv[2])
sys.stdout.write(next(iter(commit.wait_to_finish().uploads.values())).xet_info.hash)
"""


@dataclass
class Repository:
    """The files of one repository by revision; `commit` is worked out from their content."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    approved: frozenset[str] = frozenset()
    private: bool = False
    sizes: bool = True
    xet: XetStore | None = None

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, files in self.revisions.items():
            commit = commit_of(files)
            if revision in (name, commit):
                return commit, files
        return None


@dataclass
class Request:
    """One request for a file's content, noted when it comes, and what was sent of it so far."""

    method: str
    repo: str
    file: str
    start: int
    status: int
    sent: int
    token: bool


def commit_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(f"{name}\0{sha256_of(files[name])}".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.lru_cache(maxsize=256)
def blob_id(content: bytes) -> str:
    """Return git's name for the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


@dataclass
class Saying:
    """What a hub says to every request that asks for a listing, instead of the truth."""

    body: bytes
    headers: Mapping[str, str]
    status: int = 200


class Hub:
    """The server, for use as a context manager. `endpoint` is what HF_ENDPOINT must say."""

    def __init__(self, port: int = 0) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.leaked_tokens = 0
        #: Requests that reached the second origin.
        self.strayed = 0
        self.listings = 0
        self.closing = threading.Event()
        self._faults: dict[tuple[str, str], Fault] = {}
        self.sayings: dict[str, Saying] = {}
        #: Headers that are added to every answer about a file of a repository.
        self.file_headers: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._main = _Server(("127.0.0.1", port), self, is_cdn=False)
        self._cdn = _Server(("127.0.0.1", 0), self, is_cdn=True)
        self.endpoint = f"http://127.0.0.1:{self._main.server_address[1]}"
        self.cdn = f"http://127.0.0.1:{self._cdn.server_address[1]}"
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
                         for server in (self._main, self._cdn)]  # fmt: skip

    def __enter__(self) -> Hub:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server, thread in zip((self._main, self._cdn), self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def add(
        self, repo: str, files: Mapping[str, bytes], *, revision: str = "main", gated: bool = False,
        approved: frozenset[str] = frozenset(), private: bool = False, sizes: bool = True, xet: XetStore | None = None,
    ) -> str:  # fmt: skip
        """Publish files as a revision of a repository; return the commit."""
        with self._lock:
            entry = self.repositories.setdefault(repo, Repository())
            entry.revisions[revision] = dict(files)
            entry.gated, entry.approved, entry.private, entry.sizes, entry.xet = gated, approved, private, sizes, xet
        return commit_of(files)

    def misbehave(self, repo: str, file: str, fault: Fault) -> None:
        """Plant a fault on a file's content, or with file '' on the repository's listing."""
        with self._lock:
            self._faults[repo, file] = fault

    def say(self, repo: str, body: bytes, headers: Mapping[str, str] | None = None, *, status: int = 200) -> None:
        """Answer the listing of a repository with exactly this."""
        with self._lock:
            self.sayings[repo] = Saying(body, headers or {}, status)

    def listing(self, repo: str, revision: str = "main") -> dict[str, Any]:
        """Return the true listing of a repository, to be made untrue."""
        found = self.repositories[repo].find(revision)
        assert found is not None
        siblings = [_sibling(name, content, True) for name, content in sorted(found[1].items())]
        return {"id": repo, "sha": found[0], "siblings": siblings}

    def behave(self) -> None:
        """Take every fault away."""
        with self._lock:
            self._faults.clear()

    def sent(self, repo: str, file: str) -> int:
        """Return how many bytes of the file's content were sent, over all requests."""
        return sum(request.sent for request in self.gets(repo, file))

    def starts(self, repo: str, file: str) -> list[int]:
        """Return from which byte on the file was asked for, request by request."""
        return [request.start for request in self.gets(repo, file)]

    def gets(self, repo: str, file: str) -> list[Request]:
        with self._lock:
            return [r for r in self.requests if r.method == "GET" and r.repo == repo and r.file == file]

    def fault(self, repo: str, file: str) -> Fault | None:
        with self._lock:
            found = self._faults.get((repo, file))
            return found if found is not None and found.take() else None

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], hub: Hub, *, is_cdn: bool) -> None:
        super().__init__(address, _Handler)
        self.hub = hub
        self.is_cdn = is_cdn

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests are killed in mid-air: that is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.server.is_cdn:
            hub.leaked_tokens += bool(token)
            hub.strayed += 1
            if not url.path.startswith("/cdn/"):
                return self._error(404, "", "Not Found")
            _, _, repo, commit, file = url.path.split("/", 4)
            repo = unquote(repo)
            found = hub.repositories[repo].find(commit)
            assert found is not None
            self._content(repo, unquote(file), found[1][unquote(file)], {}, token)
        elif "/xet-read-token/" in url.path:
            self._xet_token(url.path.removeprefix("/api/models/").partition("/xet-read-token/")[0])
        elif url.path.startswith("/api/models/"):
            self._listing(url.path.removeprefix("/api/models/"), parse_qs(url.query), token)
        elif "/resolve/" in url.path:
            repo, _, rest = url.path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._resolve(repo, unquote(revision), unquote(file), token)
        else:
            self._error(404, "", "Not Found")

    def _repository(self, repo: str, token: str) -> Repository | None:
        found = self.server.hub.repositories.get(repo)
        if found is None or (found.private and token not in found.approved):
            # The real hub does not tell a stranger whether a repository is missing or private.
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def _listing(self, rest: str, query: dict[str, list[str]], token: str) -> None:
        hub = self.server.hub
        hub.listings += 1
        for part in ("/revision/", "/tree/"):
            repo, found_part, revision = rest.partition(part)
            if found_part:
                break
        saying = hub.sayings.get(repo)
        if saying is not None:
            return self._send(saying.status, saying.body, saying.headers)
        fault = hub.fault(repo, "")
        if fault is not None and fault.kind == "status":
            return self._error(fault.status, "", "planted")
        if fault is not None and fault.kind == "html":
            return self._send(200, b"<html>Welcome to the airport</html>", {"Content-Type": "text/html"})
        if fault is not None and fault.kind == "stall":
            hub.closing.wait()
        entry = self._repository(repo, token)
        if entry is None:
            return None
        found = entry.find(unquote(revision.partition("/")[0]) or "main")
        if found is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        commit, files = found
        if found_part == "/tree/":
            return self._json([_tree_entry(name, files[name]) for name in sorted(files)])
        with_sizes = entry.sizes and "blobs" in query
        siblings = [_sibling(name, files[name], with_sizes) for name in sorted(files)]
        return self._json({"_id": commit[:24], "id": repo, "modelId": repo, "sha": commit, "private": entry.private,
                           "gated": "manual" if entry.gated else False, "tags": [], "siblings": siblings})  # fmt: skip

    def _resolve(self, repo: str, revision: str, file: str, token: str) -> None:
        entry = self._repository(repo, token)
        if entry is None:
            return
        found = entry.find(revision)
        if found is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        commit, files = found
        if entry.gated and token not in entry.approved:
            return self._error(403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        if file not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = files[file]
        headers = {"X-Repo-Commit": commit, **self.server.hub.file_headers.get(repo, {})}
        if not is_lfs(file):
            return self._content(repo, file, content, {**headers, "ETag": f'"{blob_id(content)}"'}, token)
        location = f"{self.server.hub.cdn}/cdn/{quote(repo, safe='')}/{commit}/{quote(file)}?Signature=abc"
        headers = {"Location": location, "X-Linked-Size": str(len(content)),
                   "X-Linked-ETag": f'"{sha256_of(content)}"'} | headers  # fmt: skip
        if entry.xet is not None and content in entry.xet.hashes:
            refresh = f"{self.server.hub.endpoint}/api/models/{repo}/xet-read-token/{commit}"
            headers = {"X-Xet-Hash": entry.xet.hashes[content], "X-Xet-Refresh-Route": refresh} | headers
        return self._send(302, b"", headers)

    def _xet_token(self, repo: str) -> None:
        store = self.server.hub.repositories[repo].xet
        assert store is not None
        store.requests += 1
        expires = str(int(time.time()) + 3600)
        headers = {"X-Xet-Cas-Url": store.endpoint, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expires}
        self._send(200, b"{}", headers)

    def _content(self, repo: str, file: str, content: bytes, headers: dict[str, str], token: str) -> None:
        hub = self.server.hub
        fault = hub.fault(repo, file) if self.command == "GET" else None
        kind = fault.kind if fault is not None else ""
        if fault is not None and kind == "status":
            hub.record(Request(self.command, repo, file, 0, fault.status, 0, bool(token)))
            return self._error(fault.status, "", "planted")
        if kind == "corrupt":
            content = bytes(byte ^ 0xFF for byte in content)
        start, status = 0, 200
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and kind != "ignore_range":
            start, status = int(asked[6:].partition("-")[0]), 206
            if start >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content) - start), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        # Noted before the client has all of it, and may look.
        request = Request(self.command, repo, file, start, status, 0, bool(token))
        hub.record(request)
        if self.command == "GET":
            self._pour(memoryview(content)[start:], fault, request)

    def _pour(self, content: memoryview, fault: Fault | None, request: Request) -> None:
        hub = self.server.hub
        broken = fault is not None and fault.kind in ("cut", "stall")
        end = min(fault.after, len(content)) if broken and fault is not None else len(content)
        pause = BLOCK / fault.bytes_per_s if fault is not None and fault.kind == "slow" else 0.0
        while request.sent < end and not hub.closing.is_set():
            block = content[request.sent : min(request.sent + BLOCK, end)]
            self.wfile.write(block)
            request.sent += len(block)
            if pause:
                hub.closing.wait(pause)
        if broken and fault is not None:
            if fault.kind == "stall":
                self._wait_for_client()
            self._cut()

    def _wait_for_client(self) -> None:
        """Say nothing until the client hangs up or the server ends."""
        self.connection.settimeout(0.1)
        while not self.server.hub.closing.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def _cut(self) -> None:
        """End the connection in the middle of the body. Not by a reset, which could swallow bytes that were sent."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {**(headers or {}), **named, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _sibling(name: str, content: bytes, with_sizes: bool) -> dict[str, Any]:
    if not with_sizes:
        return {"rfilename": name}
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
    if is_lfs(name):
        entry["lfs"] = {"size": len(content), "sha256": sha256_of(content), "pointerSize": 134}
    return entry


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
    if is_lfs(name):
        entry["lfs"] = {"size": len(content), "oid": sha256_of(content), "pointerSize": 134}
    return entry


def main(argv: list[str]) -> None:
    """Serve FOLDER/org/name as org/name until Ctrl-C."""
    root, port = Path(argv[0]), int(argv[1]) if len(argv) > 1 else 0
    with Hub(port) as hub:
        for repo in sorted(path for path in root.glob("*/*") if path.is_dir()):
            files = {str(path.relative_to(repo)): path.read_bytes() for path in repo.rglob("*") if path.is_file()}
            hub.add(str(repo.relative_to(root)), files)
        sys.stdout.write(f"HF_ENDPOINT={hub.endpoint}  {', '.join(hub.repositories)}\n")
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
