"""What is kept is for the server's user alone, whatever its modes were before."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelyard.private_files import NotOurs, close_to_others
from tests.datasets.forms import FORM_HEADERS, upload
from tests.server import run_modelyard, serving


def open_to_others(folder: Path) -> list[str]:
    """Return the mode and the name of whatever the group or others have a right to, the folder itself included."""
    return [
        f"{stat.filemode(mode)} {path.relative_to(folder)}"
        for path in [folder, *folder.rglob("*")]
        if not path.is_symlink() and (mode := path.stat().st_mode) & 0o077
    ]


@pytest.fixture
def generous() -> Iterator[None]:
    """Start children as most shells do: what they make may be read by everybody."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_data_folder_that_others_could_read_is_closed_at_the_start(tmp_path: Path, generous: None) -> None:
    data = tmp_path / "data"
    for name in ("models/acme@tiny/commit", "jobs/one", "objects/datasets", "cache", "finetunes", "of-somebody"):
        (data / name).mkdir(parents=True)
        (data / name / "file").write_text("words", "utf-8")
    (data / "modelyard.db").touch(0o666)
    (data / "upload.key").write_text("0" * 64, "ascii")
    (data / "models" / "program").touch(0o755)
    outside = tmp_path / "outside"
    outside.write_text("not ours", "utf-8")
    (data / "link").symlink_to(outside)
    data.chmod(0o777)
    assert len(open_to_others(data)) > 15
    with serving(data) as server:
        assert open_to_others(data) == []
        assert server.get("/ready").status == 200
    assert (data / "models" / "program").stat().st_mode & 0o777 == 0o700
    assert outside.stat().st_mode & 0o777 == 0o644, "a link leads out of the folder"


def test_a_database_elsewhere_is_closed_with_all_that_lies_beside_it(tmp_path: Path, generous: None) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    database = folder / "yard.db"
    database.touch(0o666)
    neighbour = folder / "neighbour"
    neighbour.touch(0o644)
    with serving(tmp_path / "data", MODELYARD_DATABASE_URL=f"sqlite:///{database}") as server:
        body = upload(b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
        answer = server.request("POST", "/api/v1/datasets/upload/", body=body, headers=FORM_HEADERS)
        assert answer.status == 200
        found = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert found.pop("neighbour") == 0o644
    assert {"yard.db", "yard.db-wal", "yard.db-shm", "yard.db.lock"} <= set(found)
    assert set(found.values()) == {0o600}


def test_migrate_makes_a_database_for_its_user_alone(tmp_path: Path, generous: None) -> None:
    database = tmp_path / "made" / "yard.db"
    done = run_modelyard("migrate", cwd=tmp_path, MODELYARD_DATABASE_URL=f"sqlite:///{database}")
    assert done.returncode == 0, done.stderr
    assert open_to_others(database.parent) == []


def test_what_belongs_to_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(NotOurs) as foreign:
        close_to_others(tmp_path / "folder")
    assert foreign.value.path == tmp_path / "folder"


def test_sockets_and_what_only_its_owner_may_read_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "read-only").touch(0o444)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        close_to_others(tmp_path)
    assert open_to_others(tmp_path) == []
    assert (tmp_path / "read-only").stat().st_mode & 0o777 == 0o400
