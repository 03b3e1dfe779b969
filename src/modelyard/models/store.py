"""The folders of the store: where a model lies, and how it leaves without ever being half there.

    models/<name>/<commit>/      a model, whole: `ids.folder_name`, moved there by the download child
    models/.partial/<name>/      a download that is on its way, or can go on
    models/.trash/...            on its way out

Everything here blocks on the disk, may be repeated, and knows no database: `actions` says what is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path
from uuid import uuid4

from modelyard.errors import UnsafePath
from modelyard.models.ids import folder_name
from modelyard.paths import below, inside, remove_tree

PARTIAL = ".partial"
TRASH = ".trash"
#: Days after which nobody is taken to come back for an unfinished download.
PARTIAL_DAYS = 14


def partial_dir(models_dir: Path, model_id: str) -> Path:
    """Return where the unfinished download of a model lies."""
    return models_dir / PARTIAL / folder_name(model_id)


def folder_of(models_dir: Path, path: str) -> Path:
    """Return the folder that a row's `path` names, `<name>/<commit>`. Looks at no disk.

    Raises:
        UnsafePath: it names another place.
    """
    if path.count("/") > 1 or path.startswith("."):
        raise UnsafePath(path, models_dir.name)
    return below(models_dir, path)


def bytes_below(folder: Path) -> int:
    """Return the size of all files below a folder, 0 if there is none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # moved or deleted meanwhile
    return total


def remove(models_dir: Path, model_id: str) -> None:
    """Take a model's folder, all its commits and its unfinished download out of the store."""
    _discard(models_dir, models_dir / folder_name(model_id))
    _discard(models_dir, partial_dir(models_dir, model_id))


def sweep(models_dir: Path, known: Collection[str], busy: Collection[str]) -> list[Path]:
    """Remove what no row stands for, and return it. For the start of a server, before any job runs.

    `known` are the rows' paths. `busy` are the models with a download that goes on: what is in place of theirs may be
    whole, with only the row missing.
    """
    if not models_dir.is_dir():
        return []
    remove_tree(models_dir, models_dir / TRASH)
    kept = {folder_name(model_id) for model_id in busy}
    stale = [
        commit
        for folder in sorted(models_dir.iterdir())
        # A link is somebody's own doing: what it leads to is not the store's to delete.
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith(".") and folder.name not in kept
        for commit in sorted(folder.iterdir())
        if f"{folder.name}/{commit.name}" not in known
    ]
    oldest = time.time() - PARTIAL_DAYS * 86400
    partial = models_dir / PARTIAL
    stale += [folder for folder in (sorted(partial.iterdir()) if partial.is_dir() else []) if _touched(folder) < oldest]
    for folder in stale:
        _discard(models_dir, folder)
    return stale


def _touched(folder: Path) -> float:
    return max((os.lstat(path).st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)


def _discard(models_dir: Path, folder: Path) -> None:
    """Move the folder away first: a crash in the middle of deleting leaves trash, never half a model."""
    trash = models_dir / TRASH / uuid4().hex
    trash.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        os.rename(inside(models_dir, folder), inside(models_dir, trash))
    except FileNotFoundError:
        return
    remove_tree(models_dir, trash)
