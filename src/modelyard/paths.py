"""Paths made of names that came from elsewhere: a hub, a database, a child's report, an archive's manifest.

No such name is joined to a folder but by `below`, which looks at the name alone; and nothing is renamed or deleted
whose place such a name decided before `inside` has looked at the disk, where a link may lead elsewhere.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from modelyard.errors import UnsafePath


def below(folder: Path, name: str) -> Path:
    """Return the path of a name, perhaps with folders in it, below a folder. Looks at no disk.

    Raises:
        UnsafePath: the name is absolute, empty, or has a part that leads up or nowhere.
    """
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise UnsafePath(name, folder.name)
    return folder.joinpath(*parts)


def inside(folder: Path, path: Path) -> Path:
    """Return the path unchanged if what holds it lies in the folder, or is the folder. Follows links; blocks.

    Raises:
        UnsafePath: it lies elsewhere.
    """
    if path.name in ("", "..") or not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UnsafePath(str(path), folder.name)
    return path


def remove_tree(folder: Path, path: Path) -> None:
    """Delete what lies in a folder, if it is there. A link is not followed. Blocks.

    Raises:
        UnsafePath: it lies elsewhere.
    """
    shutil.rmtree(inside(folder, path), ignore_errors=True)
