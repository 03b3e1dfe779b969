"""One server per data folder and per database, refused in one line otherwise, on both databases and after any end."""

from __future__ import annotations

import os
import re
import resource
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL, create_engine, text

from modelyard.db import database_url as to_url
from modelyard.foundation import DATABASE_LOCK, Foundation, shown
from modelyard.settings import Settings
from tests.eventually import eventually
from tests.server import run_modelyard, serving

Connection = psycopg.Connection[tuple[Any, ...]]

on_postgres = pytest.mark.parametrize(
    "database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)


def refusal(tmp_path: Path, **settings: str) -> str:
    """Start a server that must be refused, and return its one line."""
    ended = run_modelyard("serve", cwd=tmp_path, **{"MODELYARD_PORT": "0", **settings})
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert re.fullmatch(r"modelyard: [^\n]+\.\n", ended.stderr), ended.stderr
    return ended.stderr


def plain(database_url: str) -> str:
    """Return the address for psycopg itself."""
    return database_url.replace("postgresql+psycopg://", "postgresql://")


def lock_holders(connection: Connection) -> list[int]:
    """Return the pids of the backends that hold the server's lock in the connection's database."""
    rows = connection.execute(
        "SELECT pid FROM pg_locks JOIN pg_database ON pg_database.oid = database"
        " WHERE locktype = 'advisory' AND granted AND datname = current_database()"
        " AND (classid::bigint << 32) + objid::bigint = %s",
        [DATABASE_LOCK],
    )
    return [pid for (pid,) in rows]


def test_a_start_on_a_full_disk_is_refused_in_one_line_and_loses_nothing(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        assert server.stop() == 0
        path = server.data_dir / "modelyard.db"
        with sqlite3.connect(path) as database:
            # A start writes of such jobs that a server died while they ran: for these, more pages than there is room.
            database.executemany(
                "INSERT INTO jobs (id, kind, name, spec, status, interrupt_requested, created_at)"
                " VALUES (?, 'UNKNOWN', 'x', ?, 'RUNNING', 0, '2026-01-01 00:00:00.000000')",
                [(uuid.uuid4().hex, f'{{"long": "{3000 * "x"}"}}') for _ in range(30)],
            )
        database.close()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # No file may have more, which SQLite takes for a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        try:
            ended = run_modelyard("serve", cwd=tmp_path, MODELYARD_PORT="0", MODELYARD_DATA_DIR=str(server.data_dir))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
        assert "Traceback" not in ended.stderr
        said = ended.stderr.splitlines()[-1]
        assert said.startswith(f"modelyard: The database sqlite:///{path} cannot be used now: ")
        assert "space" in said
        server.start()
        assert len(server.get("/api/v1/jobs/?limit=100").json()) == 30


def test_a_second_server_on_the_same_data_folder_is_refused_and_told_whose_it_is(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        line = refusal(tmp_path, MODELYARD_DATA_DIR=str(server.data_dir))
        assert f"(process {server.pid}) uses the data folder {server.data_dir}" in line
        assert "MODELYARD_DATA_DIR" in line
        assert server.get("/ready").json() == {"ready": True, "reasons": []}


def test_a_second_server_on_the_same_database_is_refused_though_its_folder_is_another(
    database_url: str, tmp_path: Path
) -> None:
    with serving(tmp_path / "data", MODELYARD_DATABASE_URL=database_url) as server:
        line = refusal(tmp_path, MODELYARD_DATA_DIR=str(tmp_path / "other"), MODELYARD_DATABASE_URL=database_url)
        assert "Another server" in line
        assert "MODELYARD_DATABASE_URL" in line
        assert shown(to_url(database_url, tmp_path)).rpartition("/")[2].partition("?")[0] in line
        assert server.get("/ready").json() == {"ready": True, "reasons": []}
    # It was given back, and the folder of the refused one is held by nobody.
    with serving(tmp_path / "other", MODELYARD_DATABASE_URL=database_url) as server:
        assert server.get("/ready").status == 200


def test_servers_with_their_own_folders_and_databases_run_side_by_side(tmp_path: Path) -> None:
    with serving(tmp_path / "one") as one, serving(tmp_path / "two") as two:
        assert one.get("/ready").status == two.get("/ready").status == 200


def test_a_killed_server_gives_its_locks_back_at_once(database_url: str, tmp_path: Path) -> None:
    with serving(tmp_path / "data", MODELYARD_DATABASE_URL=database_url) as server:
        for _ in range(3):
            server.kill()
            server.start()
        assert server.get("/ready").json() == {"ready": True, "reasons": []}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"MODELYARD_DATA_DIR": "/dev/null/data"}, "The data folder /dev/null/data cannot be used: Not a directory"),
        ({"MODELYARD_DATA_DIR": "/proc/data"}, "The data folder /proc/data cannot be used: "),
        ({"MODELYARD_DATABASE_URL": "sqlite:////dev/null/x/y.db"}, "/dev/null/x/y.db cannot be used: Not a directory"),
        ({"MODELYARD_DATABASE_URL": "sqlite:////{tmp}/folder"}, "cannot be used: unable to open database file"),
        ({"MODELYARD_DATABASE_URL": "sqlite:////{tmp}/text"}, "cannot be used: file is not a database"),
        ({"MODELYARD_DATABASE_URL": "postgresql://me:s3cret@127.0.0.1:1/x"}, "//me:***@127.0.0.1:1/x cannot be"),
        ({"MODELYARD_DATABASE_URL": "postgresql:///x?host=/nowhere&password=s3cret"}, "cannot be reached: "),
        ({"MODELYARD_DATABASE_URL": "postgresql://me:s3cret@host:port/x"}, "MODELYARD_DATABASE_URL is not an address"),
        ({"MODELYARD_DATABASE_URL": "mysql://me:s3cret@host/x"}, "must start with sqlite:/// or postgresql://"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_in_one_line_without_any_password(
    tmp_path: Path, settings: dict[str, str], words: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("this is no database, whatever its name says\n" * 100, "utf-8")
    given = {name: value.replace("/{tmp}", str(tmp_path)) for name, value in settings.items()}
    line = refusal(tmp_path, **{"MODELYARD_DATA_DIR": str(tmp_path / "data"), **given})
    assert words in line
    assert "s3cret" not in line
    assert "MODELYARD_DATA_DIR" in line or "MODELYARD_DATA_DIR" not in settings


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o500)
    # Root may write everywhere, unless that is taken from it.
    without = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override"]
    ended = run_modelyard("serve", cwd=tmp_path, through=without, MODELYARD_DATA_DIR=str(folder), MODELYARD_PORT="0")
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert "cannot be used: Permission denied" in ended.stderr


def test_a_database_of_a_newer_program_is_left_alone(database_url: str, tmp_path: Path) -> None:
    settings = {"MODELYARD_DATA_DIR": str(tmp_path / "data"), "MODELYARD_DATABASE_URL": database_url}
    assert run_modelyard("migrate", cwd=tmp_path, **settings).returncode == 0
    url: URL = to_url(database_url, tmp_path)
    engine = create_engine(url.set(drivername=url.drivername.replace("+aiosqlite", "")))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    assert "is at revision 9999, newer than this program's" in refusal(tmp_path, **settings)


def test_a_refused_start_holds_nothing(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path / "data", database_url=f"sqlite:///{tmp_path}/text")
    (tmp_path / "text").write_text("this is no database\n" * 100, "utf-8")
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(Exception, match="file is not a database"):
            Foundation(settings).lay()
        assert time.monotonic() - started < 2.5, "the second attempt did not wait for a lock of the first"


def test_what_the_server_keeps_is_for_its_user_alone(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        assert server.data_dir.stat().st_mode & 0o777 == 0o700


@on_postgres
async def test_a_lost_lock_on_the_database_is_taken_again(database_url: str, tmp_path: Path) -> None:
    with serving(tmp_path / "data", MODELYARD_DATABASE_URL=database_url) as server:
        with psycopg.connect(plain(database_url), autocommit=True) as connection:
            (holder,) = lock_holders(connection)
            connection.execute("SELECT pg_terminate_backend(%s)", [holder])

            def again() -> bool:
                holders = lock_holders(connection)
                return len(holders) == 1 and holders != [holder]

            await eventually(again, "another connection holds the lock")
        assert server.get("/ready").json() == {"ready": True, "reasons": []}
        assert "the connection that holds the lock on the database broke" in server.log
        assert "Another server uses" in refusal(
            tmp_path, MODELYARD_DATA_DIR=str(tmp_path / "other"), MODELYARD_DATABASE_URL=database_url
        )


@contextmanager
def kept_out(database_url: str, but: Connection) -> Iterator[None]:
    """Close every connection to the database but one, and let nobody connect, for the block."""
    name = to_url(database_url, Path()).database
    with psycopg.connect(plain(database_url), dbname="postgres", autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        try:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s",
                [name, but.info.backend_pid],
            )
            yield
        finally:
            connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


@on_postgres
async def test_a_server_whose_database_another_one_took_meanwhile_ends_in_good_order(
    database_url: str, tmp_path: Path
) -> None:
    with (
        serving(tmp_path / "data", MODELYARD_DATABASE_URL=database_url) as server,
        # The other server, quicker than ours.
        psycopg.connect(plain(database_url), autocommit=True) as other,
    ):
        with kept_out(database_url, but=other):

            def takes_it() -> bool:
                return other.execute("SELECT pg_try_advisory_lock(%s)", [DATABASE_LOCK]).fetchone() == (True,)

            await eventually(takes_it, "the lock is free")
            await eventually(lambda: "taking it again" in server.log, "the server sees that its lock is gone")
            assert server.get("/health").status == 200
            assert server.get("/ready").status == 503
        assert server.wait() == 1
        assert "Another server has taken the database" in server.log


@on_postgres
async def test_a_database_that_is_away_shows_in_readiness_and_in_answers_until_it_is_back(
    database_url: str, tmp_path: Path
) -> None:
    with serving(tmp_path / "data", MODELYARD_DATABASE_URL=database_url) as server:
        with psycopg.connect(plain(database_url)) as unused, kept_out(database_url, but=unused):
            answer = server.get("/ready")
            assert answer.status == 503
            assert "The database does not answer" in answer.json()["reasons"][0]
            jobs = server.get("/api/v1/jobs/")
            assert (jobs.status, jobs.error_code) == (503, "database_unavailable")
            assert int(jobs.headers["retry-after"]) > 0
            assert server.get("/health").status == 200
        await eventually(lambda: server.get("/ready").status == 200, "ready again")
        assert server.get("/api/v1/jobs/").json() == []


def test_a_lock_file_of_a_server_that_is_gone_keeps_nobody_out(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "server.lock").write_text("1\n", "ascii")
    (data_dir / "modelyard.db.lock").write_text("1\n", "ascii")
    with serving(data_dir) as server:
        assert server.get("/ready").status == 200


def test_a_sqlite_file_elsewhere_is_used_and_a_folder_for_it_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "inside" / "yard.db"
    with serving(tmp_path / "data", MODELYARD_DATABASE_URL=f"sqlite:///{path}") as server:
        assert server.get("/ready").status == 200
        assert not (server.data_dir / "modelyard.db").exists()
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
    database.close()
