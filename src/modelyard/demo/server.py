"""The server that the demo asks: the one that runs already, or a child started for it.

The child is started as a user would (`python -m modelyard serve`), writes to a log of its own, and is ended in good
order, which ends its engines too. It gets its own session, so that Ctrl-C reaches the demo alone, which then ends it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from modelyard.demo.client import Call, Client, DemoFailed
from modelyard.demo.terminal import Terminal, Waiting
from modelyard.settings import Settings

START_TIMEOUT_S = 60.0
#: What a server may take beyond its engines' own time to end, before it is killed.
STOP_MARGIN_S = 20.0
_LISTENS = re.compile(rb"Modelyard listens on (http://\S+)")
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}


def find(settings: Settings) -> Client | None:
    """Return a client of the server that runs at the configured address, or None if nothing does.

    Raises:
        DemoFailed: something else answers there.
    """
    if settings.port == 0:
        return None
    host = _ANY_ADDRESS.get(settings.host, settings.host)
    client = Client(f"http://{host}:{settings.port}", settings.admin_key)
    try:
        answer = client.json(Call("GET", "/health"), timeout_s=5.0)
    except DemoFailed as failure:
        if isinstance(failure.__cause__, ConnectionRefusedError):
            return None
        raise DemoFailed(_taken(client.base_url)) from failure
    if not (isinstance(answer, dict) and answer.get("status") == "ok" and "version" in answer):
        raise DemoFailed(_taken(client.base_url))
    return client


def _taken(base_url: str) -> str:
    return f"{base_url} is in use by something that is no Modelyard server. Set MODELYARD_PORT to a free port."


class ServerChild:
    """A server of the demo's own, from its start to its end."""

    def __init__(self, settings: Settings, import_dir: Path) -> None:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.log = settings.data_dir / "server.log"
        self._stop_timeout_s = settings.engine_stop_timeout_s + STOP_MARGIN_S
        self._key = settings.admin_key
        self._log_starts_at = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "modelyard", "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "MODELYARD_IMPORT_DIR": str(import_dir), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def wait_until_healthy(self, waiting: Waiting) -> Client:
        """Return a client once the server answers.

        Raises:
            DemoFailed: it ended, or did not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self.is_alive:
                raise DemoFailed(
                    f"the server ended at its start (exit status {self._process.returncode}).\n{self.tail()}"
                )
            if (found := _LISTENS.search(self._log_of_this_start())) is not None:
                client = Client(found[1].decode(), self._key)
                try:
                    client.json(Call("GET", "/health"), timeout_s=5.0)
                    return client
                except DemoFailed as failure:
                    waiting.say(str(failure))
            time.sleep(0.05)
        raise DemoFailed(f"the server did not answer within {START_TIMEOUT_S:.0f} s.\n{self.tail()}")

    @property
    def is_alive(self) -> bool:
        """True if the server still runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Block until the server ends; return its exit status."""
        return self._process.wait()

    def tail(self, lines: int = 12) -> str:
        """Return the last lines that this server wrote, and where the rest lies."""
        text = self._log_of_this_start().decode("utf-8", "replace").splitlines()
        return "\n".join([*(f"  | {line}" for line in text[-lines:]), f"Its log: {self.log}"])

    def stop(self, terminal: Terminal) -> bool:
        """End the server and all that it started; return whether it ended in good order, if it still ran."""
        if not self.is_alive:
            return True
        with Waiting(terminal, "Stopping the server and its engine"):
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(self._stop_timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self._process.returncode == 0

    def _log_of_this_start(self) -> bytes:
        with self.log.open("rb") as log:
            log.seek(self._log_starts_at)
            return log.read()
