"""The servers that tests start run as every kind of user finds them, and none outlives the tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest

from tests.fixtures import missing
from tests.servers import postgres
from tests.servers.lifetime import ServerMissing, launched
from tests.servers.postgres import Variant

TOP = Path(__file__).parents[2]

# What a test run is to its servers: a parent that may be killed.
HOLDER = """
import sys, time
from pathlib import Path
from tests.servers import postgres, swift_s3
server = postgres.running() if sys.argv[1] == "postgres" else swift_s3.running(Path(sys.argv[2]), "a:b", "c")
with server as address:
    sys.stdout.write(address + "\\n")
    sys.stdout.flush()
    time.sleep(600)
"""


def eventually(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not claim():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def processes_with(text: str) -> list[int]:
    """The processes whose command line holds `text`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended meanwhile
            if text.encode() in line:
                found.append(int(folder.name))
    return found


@pytest.mark.postgres
@pytest.mark.parametrize("variant", ["system", "pip"])
def test_postgres_runs_from_either_source_and_takes_its_folder_away(variant: Variant) -> None:
    if postgres.binaries(variant) is None:
        missing("postgres", f"there are no {variant} binaries")
    with postgres.running(variant) as url:
        folder = Path(parse_qs(urlsplit(url).query)["host"][0])
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT 1 + 1").fetchone() == (2,)
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        assert len(processes_with(str(folder))) > 0
    assert not folder.exists()
    assert processes_with(str(folder)) == []


@pytest.mark.postgres
def test_a_killed_test_run_leaves_no_postgres() -> None:
    if postgres.binaries("any") is None:
        missing("postgres", "there are no binaries")
    with subprocess.Popen([sys.executable, "-c", HOLDER, "postgres"], cwd=TOP, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        url = holder.stdout.readline().decode().strip()
        folder = Path(parse_qs(urlsplit(url).query)["host"][0])
        assert len(processes_with(str(folder))) > 0
        holder.send_signal(signal.SIGKILL)
    eventually(lambda: processes_with(str(folder)) == [], "PostgreSQL ended")
    eventually(lambda: not folder.exists(), "its folder is gone")


@pytest.mark.s3
@pytest.mark.usefixtures("running_s3")
def test_a_killed_test_run_leaves_no_s3_server(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", HOLDER, "s3", str(tmp_path / "swift")]
    with subprocess.Popen(arguments, cwd=TOP, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().startswith(b"http://127.0.0.1:")
        assert len(processes_with(str(tmp_path / "swift"))) == 2
        holder.send_signal(signal.SIGKILL)
    eventually(lambda: processes_with(str(tmp_path / "swift")) == [], "Swift ended")


def test_a_server_that_cannot_run_here_says_why() -> None:
    with pytest.raises(ServerMissing, match="No PostgreSQL binaries found"), launched("tests.servers.postgres", "none"):
        pass


def test_a_server_that_fails_is_no_missing_part_but_an_error() -> None:
    with pytest.raises(RuntimeError, match="invalid literal for int"), launched("tests.servers.swift_s3", "d", "x"):
        pass


def test_a_missing_part_skips_unless_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_TEST_REQUIRE", "engine,s3")
    with pytest.raises(pytest.skip.Exception, match="no postgres: why"):
        missing("postgres", "why")
    with pytest.raises(pytest.fail.Exception, match="s3 is required here: why"):
        missing("s3", "why")
    monkeypatch.delenv("MODELYARD_TEST_REQUIRE")
    with pytest.raises(pytest.skip.Exception):
        missing("s3", "why")
