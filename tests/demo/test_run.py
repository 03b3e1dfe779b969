"""The demo as a user runs it: a real server, the imitation engine, and the printed commands pasted into a shell."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelyard.demo import tiny_llama
from modelyard.demo.client import Call
from tests.eventually import PATIENCE_S
from tests.server import ENGINE_PYTHON, environment, serving


class DemoProcess:
    """A demo in a process of its own, without its training, and all that it has printed so far."""

    def __init__(self, folder: Path, *arguments: str, **settings: str) -> None:
        self.data_dir = folder / "data"
        self.output = folder / "output.txt"
        defaults = {
            "MODELYARD_DATA_DIR": str(self.data_dir),
            "MODELYARD_PORT": "0",
            "MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON),
            "MODELYARD_ENGINE_MAX_RESTARTS": "0",
        }
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "modelyard", "demo", "--no-tune", *arguments],
                cwd=folder, env=environment(**defaults | settings), stdin=subprocess.DEVNULL,
                stdout=output, stderr=output,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text("utf-8")

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the demo has not ended:\n{self.text}") from None

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not re.search(pattern, self.text):
            assert self.process.poll() is None, f"the demo ended:\n{self.text}"
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text}"
            time.sleep(0.02)

    def left_behind(self) -> list[str]:
        """Return the command lines of processes that still work in the data folder."""
        mine, found = os.fsencode(self.data_dir), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                about = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if any(mine in text for text in about):
                found.append(about[0].replace(b"\0", b" ").decode(errors="replace"))
        return found


@contextmanager
def demo(folder: Path, *arguments: str, **settings: str) -> Iterator[DemoProcess]:
    running = DemoProcess(folder, *arguments, **settings)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)
            running.process.wait(PATIENCE_S)


def with_tiny(folder: Path, **misbehaviour: object) -> dict[str, str]:
    """Put the demo's own model, with a word to the imitation engine, into an import directory."""
    tiny_llama.make_llama(folder / "import" / "tiny-llama")
    # Within a file that a loader reads: any other JSON beside a model stays out of the store.
    file = folder / "import" / "tiny-llama" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "misbehave": misbehaviour}), "utf-8")
    return {"MODELYARD_IMPORT_DIR": str(folder / "import")}


def test_once_shows_everything_ends_by_itself_and_leaves_nothing(tmp_path: Path) -> None:
    with demo(tmp_path, "--once") as running:
        assert running.wait() == 0, running.text
        for step in ("1. A server", "2. A model in its store", "3. In service", "4. An answer", "All of it worked"):
            assert step in running.text
        assert " tok0 tok1 tok2" in running.text
        # The server is gone then: its address is no place to send anybody.
        assert "/api/docs" in running.text
        assert not re.search(r"http://\S+/api/docs", running.text)
        assert running.left_behind() == []


def test_every_command_that_it_prints_works_when_pasted(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    key = "a key for the tests"
    with demo(tmp_path, MODELYARD_ADMIN_KEY=key) as running:
        running.wait_for("The server runs until Ctrl-C")
        commands = re.findall(r"^  \$ (curl .*)$", running.text, re.MULTILINE)
        assert len(commands) == 8
        assert key not in running.text
        for command in commands:
            pasted = command.replace("-N ", "-N -m 5 " if "/jobs/" in command else "-N ").replace(
                "curl ", "curl -sSf ", 1
            )
            done = subprocess.run(
                ["bash", "-c", pasted], env=environment(MODELYARD_ADMIN_KEY=key), capture_output=True, text=True,
                timeout=PATIENCE_S, check=False,
            )  # fmt: skip
            # A deployment's events go on for as long as it is in service: 28 is curl's word for our -m.
            assert done.returncode == 0 or (done.returncode == 28 and "/events/" in command), (command, done.stderr)
            assert done.stdout, command
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0, running.text
        assert running.left_behind() == []


def test_a_second_demo_on_the_same_folder_takes_the_model_that_is_there(tmp_path: Path) -> None:
    for _ in range(2):
        with demo(tmp_path, "--once") as running:
            assert running.wait() == 0, running.text
        said = "It was in service when the server ended, and comes back. What happened so far:"
        assert (said in running.text) == ("local:tiny-llama is there already" in running.text)
    assert "local:tiny-llama is there already" in running.text


def test_a_server_that_runs_already_is_asked_and_left_running(tmp_path: Path) -> None:
    settings = with_tiny(tmp_path) | {"MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON)}
    with serving(tmp_path / "served", **settings) as server:
        with demo(tmp_path, MODELYARD_PORT=str(server.port)) as running:
            assert running.wait() == 0, running.text
        assert "One runs already" in running.text
        assert server.get("/api/v1/deploy/").json()["state"] == "READY"


def test_something_else_on_the_port_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    stranger = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=stranger.serve_forever, daemon=True).start()
    try:
        with demo(tmp_path, "--once", MODELYARD_PORT=str(stranger.server_port)) as running:
            assert running.wait() == 1
        assert "is no Modelyard server. Set MODELYARD_PORT to a free port" in running.text
        assert not running.data_dir.exists()
    finally:
        stranger.shutdown()
        stranger.server_close()


def test_a_server_that_dies_at_its_start_shows_why_and_where_its_log_lies(tmp_path: Path) -> None:
    with serving(tmp_path / "data"), demo(tmp_path, "--once") as running:
        assert running.wait() == 1
    assert "Another server (process" in running.text
    assert f"Its log: {tmp_path / 'data' / 'server.log'}" in running.text


def test_a_deployment_that_fails_shows_its_cause_and_where_its_log_lies_once_the_server_is_gone(tmp_path: Path) -> None:
    settings = with_tiny(tmp_path, die_at_start={"stderr": "ValueError: nothing works", "exit_code": 3})
    with demo(tmp_path, "--once", **settings) as running:
        assert running.wait() == 1
        failed = running.text.partition("The demo failed: DEPLOY_local:tiny-llama: ")[2]
        assert "curl" not in failed, running.text
        log = re.search(r"What its process wrote: (/\S+/log\.txt)", failed)
        assert log is not None, running.text
        assert "ValueError: nothing works" in Path(log[1]).read_text("utf-8")
        assert running.left_behind() == []


def test_a_download_that_fails_on_a_server_that_stays_shows_the_command_for_its_log(tmp_path: Path) -> None:
    with serving(tmp_path / "served", MODELYARD_IMPORT_DIR=str(tmp_path)) as server:
        with demo(tmp_path, "--model", "local:nowhere", MODELYARD_PORT=str(server.port)) as running:
            assert running.wait() == 1
        path = re.search(r"\$ curl '?http://127\.0\.0\.1:\d+(/api/v1/jobs/[0-9a-f-]{36}/log/\?tail=50)", running.text)
        assert path is not None, running.text
        assert server.get(path[1]).status == 200


def test_a_model_that_does_not_exist_fails_with_the_servers_own_words(tmp_path: Path) -> None:
    with demo(tmp_path, "--once", "--model", "local:nowhere") as running:
        assert running.wait() == 1
    assert "The import directory has no folder 'nowhere'" in running.text


def test_waiting_is_never_silent_and_ctrl_c_in_the_middle_ends_everything(tmp_path: Path) -> None:
    with demo(tmp_path, **with_tiny(tmp_path, never="complete")) as running:
        running.wait_for(r"Starting vLLM with local:tiny-llama \.\.\. [4-9] s")
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 130, running.text
        assert running.left_behind() == []


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    with demo(tmp_path, MODELYARD_PORT="many") as running:
        assert running.wait() == 2
    assert running.text.count("\n") == 1
    assert running.text.startswith("modelyard: MODELYARD_PORT=many: ")


def test_a_command_survives_the_shell_whatever_is_in_it() -> None:
    body = {"messages": [{"role": "user", "content": """It's "$HOME" & `this` \\ that; é"""}]}
    curl = Call("POST", "/v1/x?a=b&c=d", body, streams=True).curl("http://127.0.0.1:1", with_key=True)
    shown = subprocess.run(
        ["bash", "-c", f'curl() {{ printf "%s\\0" "$@"; }}; {curl}'],
        env=environment(MODELYARD_ADMIN_KEY="secret"), capture_output=True, text=True, check=True,
    ).stdout.split("\0")[:-1]  # fmt: skip
    assert shown[:6] == ["-N", "-X", "POST", "http://127.0.0.1:1/v1/x?a=b&c=d", "-H", "Authorization: Bearer secret"]
    assert json.loads(shown[-1]) == body
    assert "secret" not in curl
