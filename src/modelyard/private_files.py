"""Files for the server's user alone: modes of what lies in the data folder, whatever they were before.

A process whose umask is `UMASK` makes nothing that others may read; the command line sets it before anything else, and
every child inherits it. What an older program, a copy or another umask left is closed at the start (`close_to_others`).
Links are not followed: what they lead to is not ours.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

UMASK = 0o077
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class NotOurs(Exception):
    """A file or a folder belongs to another user, who could read what is kept in it."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def close_to_others(path: Path) -> None:
    """Take every right of the group and of others away from a file, or from a folder and all that lies in it.

    Raises:
        NotOurs: something belongs to another user, and this one is not root.
        OSError: a mode cannot be read or changed.
    """
    _close(path, os.stat(path))
    if not path.is_dir():
        return
    folders = [os.fspath(path)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    continue
                try:
                    _close(entry.path, entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue  # a child of an earlier server works on, and removes what is its own
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


def close_database(path: Path) -> None:
    """The same for a SQLite database: the file, what SQLite keeps beside it, and its lock; none need be there."""
    for beside in ("", "-wal", "-shm", "-journal", ".lock"):
        file = path.with_name(path.name + beside)
        if file.is_file():
            _close(file, os.stat(file))


def _close(path: str | Path, found: os.stat_result) -> None:
    if os.geteuid() not in (found.st_uid, 0):
        raise NotOurs(Path(path))
    if found.st_mode & OTHERS:
        os.chmod(path, stat.S_IMODE(found.st_mode) & ~OTHERS)
