"""No name that came from elsewhere leads out of the folder that it is joined to."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

import modelyard
from modelyard.errors import UnsafePath
from modelyard.models.store import folder_of
from modelyard.paths import below, inside, remove_tree

PIECES = st.sampled_from(["", ".", "..", "a", "b.json", "\0", "~", " ", "a\\b", "C:", "...", "\n", "%2e%2e", "\u2024"])
NAMES = st.lists(PIECES, max_size=6).map("/".join) | st.text(max_size=20)


@given(NAMES)
def test_a_name_ends_below_the_folder_or_is_refused(name: str) -> None:
    folder = Path("/data/models")
    try:
        path = below(folder, name)
    except UnsafePath:
        return
    assert os.path.normpath(path) == str(path) == f"/data/models/{name}"
    assert folder in path.parents


@pytest.mark.parametrize("name", ["", ".", "..", "/", "/etc/passwd", "../x", "a/../../b", "a//b", "a/", "a/.", "a\0b"])
def test_what_leads_out_or_nowhere_is_refused(name: str) -> None:
    with pytest.raises(UnsafePath):
        below(Path("/data"), name)


@given(NAMES)
def test_a_rows_path_is_a_models_folder_and_its_commit_or_is_refused(path: str) -> None:
    try:
        found = folder_of(Path("/data/models"), path)
    except UnsafePath:
        return
    assert len(found.relative_to("/data/models").parts) in (1, 2)
    assert not found.relative_to("/data/models").parts[0].startswith(".")


@given(NAMES)
def test_nothing_outside_a_folder_is_deleted_whatever_a_path_says(name: str) -> None:
    with TemporaryDirectory() as root:
        folder, precious = Path(root, "folder"), Path(root, "precious")
        for path in (folder / "a", precious, folder / "b"):
            path.mkdir(parents=True)
        (folder / "link").symlink_to(precious)
        for path in (
            folder / name.replace("\0", ""),
            folder / "link" / "x",
            Path(root, name.replace("\0", "")),
            folder,
        ):
            if Path(os.path.normpath(path)).is_relative_to(folder) and path.resolve() != folder.resolve():
                continue  # that would be its own
            with contextlib.suppress(UnsafePath):
                remove_tree(folder, path)
            assert precious.is_dir()
            assert folder.is_dir()


def test_what_a_link_holds_is_elsewhere(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    folder.mkdir()
    (folder / "link").symlink_to(other)
    for path in (folder / "link" / "deep", other / "deep", folder / ".." / "other", tmp_path, folder):
        with pytest.raises(UnsafePath):
            inside(folder, path)
    assert inside(folder, folder / "link") == folder / "link"
    remove_tree(folder, folder / "link")
    assert (other / "deep").is_dir(), "a link is not followed"


def test_a_rows_path_reaches_the_disk_by_one_function_only() -> None:
    joined = re.compile(r"models_dir\s*/\s*[a-z_]+(?:\.path\b|\[)")
    source = Path(modelyard.__file__).parent
    found = [f"{path.relative_to(source)}: {match[0]}" for path in source.rglob("*.py")
             for match in joined.finditer(path.read_text("utf-8"))]  # fmt: skip
    assert found == []
