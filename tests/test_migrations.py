"""The tables are what the migrations make, both ways, on both databases, and a failed migration leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import URL, Engine, inspect, text

import modelyard.datasets.tables
import modelyard.deploy.tables
import modelyard.finetune.tables
import modelyard.gateway.tables
import modelyard.jobs.tables
import modelyard.models.tables
import modelyard.routing.tables
import modelyard.states  # noqa: F401  # all tables, on one metadata
from modelyard import db
from modelyard.db import Base, sync_engine
from modelyard.errors import StartRefused
from modelyard.foundation import migrate, migrations_dir, newest_revision
from tests.server import environment, run_modelyard

BROKEN = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "9001", "{newest}", None, None


def upgrade():
    op.create_table("half_made", sa.Column("id", sa.Integer(), primary_key=True))
    op.execute("INSERT INTO half_made VALUES (1)")
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("more", sa.Integer()))
    op.execute("INSERT INTO there_is_no_such_table VALUES (1)")
"""


@pytest.fixture
def url(database_url: str, tmp_path: Path) -> URL:
    return db.database_url(database_url, tmp_path)


def tables(url: URL) -> set[str]:
    engine = sync_engine(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def columns(url: URL, table: str) -> set[str]:
    engine = sync_engine(url)
    try:
        return {column["name"] for column in inspect(engine).get_columns(table)}
    finally:
        engine.dispose()


def alembic(url: URL) -> Config:
    config = Config(attributes={"url": url})
    config.set_main_option("script_location", str(migrations_dir()))
    return config


def drift(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))


def test_the_migrations_make_exactly_the_tables_that_the_rooms_declare(url: URL) -> None:
    assert migrate(url)
    engine = sync_engine(url)
    try:
        assert drift(engine) == []
        # The comparison sees what it is there to see.
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE jobs ADD COLUMN forgotten INTEGER"))
            connection.execute(text("DROP INDEX ix_job_events_job_id_number"))
        assert {found[0] for found in drift(engine)} == {"remove_column", "add_index"}
    finally:
        engine.dispose()


def test_migrating_again_changes_nothing_and_says_so(url: URL) -> None:
    assert migrate(url)
    made = tables(url)
    assert made == set(Base.metadata.tables) | {"alembic_version"}
    assert not migrate(url)
    assert tables(url) == made


def test_every_migration_can_be_taken_back_and_made_again(url: URL) -> None:
    migrate(url)
    command.downgrade(alembic(url), "base")
    assert tables(url) == {"alembic_version"}
    assert migrate(url)
    engine = sync_engine(url)
    try:
        assert drift(engine) == []
    finally:
        engine.dispose()


def test_a_migration_that_fails_leaves_the_database_as_it_was(url: URL, tmp_path: Path) -> None:
    migrate(url)
    before = tables(url)
    broken = tmp_path / "100% broken"
    shutil.copytree(migrations_dir(), broken)
    script = BROKEN.format(newest=newest_revision(migrations_dir()))
    (broken / "versions" / "9001_broken.py").write_text(script, "utf-8")
    with pytest.raises(StartRefused, match=r"could not be migrated: .*there_is_no_such_table"):
        migrate(url, broken)
    assert tables(url) == before
    assert "more" not in columns(url, "jobs")
    assert not migrate(url), "the right program goes on where it was"


def test_a_first_migration_that_fails_leaves_no_table_at_all(url: URL, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(migrations_dir(), broken)
    script = BROKEN.format(newest=newest_revision(migrations_dir()))
    (broken / "versions" / "9001_broken.py").write_text(script, "utf-8")
    with pytest.raises(StartRefused):
        migrate(url, broken)
    assert tables(url) == set()
    assert migrate(url)


def test_a_database_of_a_newer_program_is_not_touched(url: URL) -> None:
    migrate(url)
    engine = sync_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StartRefused, match=r"is at revision 9999, newer than this program's .*Update Modelyard"):
        migrate(url)


def test_two_that_migrate_at_the_same_moment_take_turns(database_url: str, url: URL, tmp_path: Path) -> None:
    def one(number: int) -> subprocess.CompletedProcess[str]:
        data_dir = str(tmp_path / f"data-{number}")
        return run_modelyard("migrate", cwd=tmp_path, MODELYARD_DATA_DIR=data_dir, MODELYARD_DATABASE_URL=database_url)

    with ThreadPoolExecutor(3) as threads:
        ended = list(threads.map(one, range(3)))
    assert [(each.returncode, each.stderr) for each in ended] == [(0, "")] * 3
    assert any("brought up to date" in each.stdout for each in ended)
    assert tables(url) == set(Base.metadata.tables) | {"alembic_version"}


def test_every_migration_follows_the_one_before_it_by_number() -> None:
    scripts = sorted((migrations_dir() / "versions").glob("*.py"))
    found = []
    for script in scripts:
        names: dict[str, Any] = {}
        exec(compile(script.read_text("utf-8"), str(script), "exec"), names)
        found.append((script.name.split("_")[0], names["revision"], names["down_revision"]))
    numbers = [f"{number:04d}" for number in range(1, len(scripts) + 1)]
    assert found == list(zip(numbers, numbers, [None, *numbers[:-1]], strict=True))
    assert newest_revision(migrations_dir()) == numbers[-1]


@pytest.mark.slow
def test_an_installed_wheel_migrates_from_any_folder(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("modelyard-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    shutil.unpack_archive(wheel, packages, "zip")
    # Everything else comes from here; not the .pth beside it, by which this checkout is installed.
    borrowed = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    asked = subprocess.run(
        [python, "-c", "import modelyard.foundation as f; print(f.__file__, f.migrations_dir(), sep='\\n')"],
        cwd=tmp_path, env=environment(PYTHONPATH=borrowed), capture_output=True, text=True, check=True,
    )  # fmt: skip
    for line in asked.stdout.splitlines():
        assert Path(line).is_relative_to(packages), "the installed one runs, with its own migrations"
    for expected in ("brought up to date.", "up to date already."):
        ended = subprocess.run(
            [python, "-m", "modelyard", "migrate"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env=environment(PYTHONPATH=borrowed, MODELYARD_DATA_DIR=str(tmp_path / "data")),
        )  # fmt: skip
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.endswith(f"modelyard.db: {expected}\n")
