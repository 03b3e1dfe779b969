"""Folders of the store: taken out whole, swept at start."""

from __future__ import annotations

import os
import time
from pathlib import Path

from modelyard.models import store


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345678")
    return folder


def test_removing_takes_every_commit_and_the_unfinished_download_and_may_be_repeated(tmp_path: Path) -> None:
    for name in ("a--b/1", "a--b/2", ".partial/a--b"):
        made(tmp_path / name)
    other = made(tmp_path / "a--c" / "1")
    store.remove(tmp_path, "a/b")
    store.remove(tmp_path, "a/b")
    assert not (tmp_path / "a--b").exists()
    assert not store.partial_dir(tmp_path, "a/b").exists()
    assert other.is_dir()
    assert store.bytes_below(tmp_path) == 8


def test_sweeping_keeps_what_a_row_or_a_running_download_stands_for(tmp_path: Path) -> None:
    known, replaced, stray = (made(tmp_path / name) for name in ("a--b/2", "a--b/1", "a--c/1"))
    busy, fresh, trash = (made(tmp_path / name) for name in ("a--d/1", ".partial/a--e", ".trash/x"))
    old = made(tmp_path / ".partial" / "a--f")
    long_ago = time.time() - 86400 * (store.PARTIAL_DAYS + 1)
    for path in (old / "model.safetensors", old):
        os.utime(path, (long_ago, long_ago))
    assert set(store.sweep(tmp_path, {"a--b/2"}, {"a/d"})) == {replaced, stray, old}
    assert [folder.is_dir() for folder in (known, busy, fresh)] == [True] * 3
    assert not any(folder.exists() for folder in (replaced, stray, old, trash))


def test_sweeping_leaves_alone_what_a_link_leads_to(tmp_path: Path) -> None:
    elsewhere = made(tmp_path / "elsewhere" / "1")
    models = made(tmp_path / "models" / "a--b" / "1").parent.parent
    (models / "a--c").symlink_to(elsewhere.parent)
    (models / "a--b" / "2").symlink_to(elsewhere)
    assert set(store.sweep(models, {"a--b/1"}, set())) == {models / "a--b" / "2"}
    assert (elsewhere / "model.safetensors").is_file()


def test_sweeping_a_store_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    assert store.sweep(tmp_path / "models", set(), set()) == []
