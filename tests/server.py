"""The real server for tests: `python -m modelyard serve` as a child, with its settings in the environment.

    with serving(tmp_path / "data", MODELYARD_ADMIN_KEY="a long secret") as server:
        assert server.get("/health").json()["status"] == "ok"
        server.kill()             # SIGKILL; its own children live on for MODELYARD_GRACE_S
        server.start()            # again, on the same data folder and another free port
        assert server.stop() == 0  # SIGTERM, and its exit status

`serving` starts one on port 0 of 127.0.0.1 and, at the end of the block, stops it and fails if that was not in good
order or left a process behind. `server.log` is what it wrote on stderr so far. `run_modelyard` runs any other command
of the command line to its end, such as a start that is refused. Both get a minimal environment and a folder without
`.env`: nothing of the developer's own settings reaches them. Everything here blocks; an async test may call it too.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.eventually import PATIENCE_S

#: The imitation engine, for MODELYARD_ENGINE_PYTHON.
ENGINE_PYTHON = Path(__file__).parent / "servers" / "engine_python"
STOP_PATIENCE_S = 30.0
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ")
# The server cannot be asked to end with the tests, so the kernel is: the wish outlives the exec.
WITH_TESTS = """import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
os.getppid() == int(sys.argv[1]) or os._exit(1)
files = int(sys.argv[2])
files and resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
os.execv(sys.argv[3], sys.argv[3:])"""


@dataclass(frozen=True)
class Answer:
    """A whole answer; header names are in lower case, and the last of equal ones counts."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def error_code(self) -> str | None:
        """The code in the error envelope; fails the test if the body is none."""
        error = self.json()["error"]
        # What a child said last stands beside it, where there is any.
        assert set(error) - {"evidence"} == {"message", "type", "param", "code"}, error
        code: str | None = error["code"]
        return code


class Server:
    """One data folder and the server on it, which may be started, killed and started again."""

    def __init__(self, data_dir: Path, settings: Mapping[str, str], files: int = 0) -> None:
        """`files`: how many it may have open at most; 0 is as many as the tests may."""
        self.data_dir = data_dir
        self.settings = dict(settings)
        self._files = files
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._scratch = data_dir.with_name(data_dir.name + "-server")
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._log = self._scratch / "stderr.txt"
        self._log.touch()
        self._was_killed = False
        self._tokens: set[bytes] = set()

    @property
    def address(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server does not run"
        return self.process.pid

    @property
    def log(self) -> str:
        """What it wrote on stderr so far, over all its starts."""
        return self._log.read_text("utf-8")

    def start(self) -> None:
        """Start it, again if need be, and wait until it answers /health."""
        assert self.process is None, "the server runs already"
        said = self._scratch / "stdout.txt"
        with said.open("wb") as stdout, self._log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", WITH_TESTS, str(os.getpid()), str(self._files),
                 sys.executable, "-m", "modelyard", "serve"],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=self._scratch,
                env=environment(MODELYARD_DATA_DIR=str(self.data_dir), MODELYARD_PORT="0") | self.settings,
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while not (line := said.read_text("utf-8")).endswith("\n"):
            self._expect_alive(deadline, "said where it listens")
        self.port = int(line.split("http://", 1)[1].split(" ", 1)[0].rpartition(":")[2])
        while not self._answers():
            self._expect_alive(deadline, "answered /health")
        self._was_killed = False

    def _expect_alive(self, deadline: float, what: str) -> None:
        assert self.process is not None
        ended = self.process.poll()
        if ended is not None:
            self.process = None
            raise AssertionError(f"the server ended with status {ended} before it {what}:\n{self.log}")
        assert time.monotonic() < deadline, f"the server has not {what} in time:\n{self.log}"
        time.sleep(0.005)

    def _answers(self) -> bool:
        try:
            return self.get("/health").status == 200
        except OSError:
            return False

    def request(
        self,
        method: str,
        path: str,
        *,
        json_body: object = None,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> Answer:
        """Send one request as it stands (the path is not tidied, no redirect is followed) and read the whole answer."""
        with self.opened(
            method, path, json_body=json_body, body=body, headers=headers, timeout_s=timeout_s
        ) as response:
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())

    @contextmanager
    def opened(
        self,
        method: str,
        path: str,
        *,
        json_body: object = None,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield its answer as it arrives, for streams; leaving the block hangs up."""
        sent = dict(headers or {})
        if json_body is not None:
            body, sent = json.dumps(json_body).encode(), {"Content-Type": "application/json", **sent}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(
                method, path, body=body, headers=sent, encode_chunked=body is not None and not isinstance(body, bytes)
            )
            response = connection.getresponse()
            try:
                yield response
            finally:
                response.close()
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, json_body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("POST", path, json_body=json_body, headers=headers)

    def delete(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("DELETE", path, headers=headers)

    def send_bytes(self, request: bytes, timeout_s: float = PATIENCE_S) -> bytes:
        """Send bytes as they are on a connection of their own, and return all that comes until it is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(request)
            received = b""
            while block := connection.recv(65536):
                received += block
            return received

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server, and to nothing else of it."""
        assert self.process is not None, "the server does not run"
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_PATIENCE_S) -> int:
        """Wait for the server's end and return its exit status; negative is the signal that killed it."""
        assert self.process is not None, "the server does not run"
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server has not ended within {timeout_s:g} s:\n{self.log}") from None
        self.process = None
        return status

    def stop(self, timeout_s: float = STOP_PATIENCE_S) -> int:
        """Ask it to end in good order (SIGTERM) and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def kill(self) -> None:
        """Kill it with SIGKILL. Its children live on for their grace, in which a new start adopts them."""
        self.signal(signal.SIGKILL)
        self.wait()
        self._was_killed = True

    def processes(self) -> dict[int, str]:
        """Return pid and command line of every process that works in the data folder, the server itself aside."""
        for spec in self.data_dir.glob("jobs/**/spec.json"):
            with suppress(OSError, ValueError):
                self._tokens.add(f"MODELYARD_CHILD={json.loads(spec.read_text('utf-8'))['token']}".encode())
        mine = os.fsencode(self.data_dir) + b"/"
        own = {os.getpid(), self.process.pid if self.process is not None else 0}
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in own:
                continue
            with suppress(OSError):
                argv = (entry / "cmdline").read_bytes()
                variables = (entry / "environ").read_bytes().split(b"\0")
                cwd = os.fsencode(os.readlink(entry / "cwd")) + b"/"
                if mine in argv or cwd.startswith(mine) or self._tokens.intersection(variables):
                    found[int(entry.name)] = argv.replace(b"\0", b" ").decode(errors="replace")
        return found

    def close(self) -> None:
        """Stop it and see to it that nothing of it is left; fails if something was, unless it had been killed."""
        status = 0
        try:
            if self.process is not None:
                status = self.stop()
        finally:
            if self.process is not None:
                self.process.kill()
                self.process.wait()
            left = self._sweep(0.0 if self._was_killed else 5.0)
        if not self._was_killed:
            assert status == 0, f"the server ended with status {status}:\n{self.log}"
            assert not left, f"the server left processes behind: {left}\n{self.log}"

    def _sweep(self, patience_s: float) -> dict[int, str]:
        """Return what still runs after a while, and kill it."""
        deadline = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        remaining = left
        while remaining:
            for pid in remaining:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
            remaining = self.processes()
        return left


@contextmanager
def serving(data_dir: Path, /, **settings: str) -> Iterator[Server]:
    """Start a server on the data folder for the block, with settings such as `MODELYARD_GRACE_S="5"`."""
    with running(Server(data_dir, settings)) as server:
        yield server


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Start a server for the block."""
    try:
        server.start()
        yield server
    except BaseException:
        # What went wrong already is what the test should say.
        with suppress(AssertionError):
            server.close()
        raise
    server.close()


def environment(**settings: str) -> dict[str, str]:
    """Return a minimal environment with these settings."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return passed_on | settings


def run_modelyard(
    *arguments: str, cwd: Path, through: Sequence[str] = (), **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line to its end, in a folder of its own; `through` is a program that starts it."""
    return subprocess.run(
        [*through, sys.executable, "-m", "modelyard", *arguments],
        cwd=cwd, env=environment(**settings), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=2 * PATIENCE_S, check=False,
    )  # fmt: skip
