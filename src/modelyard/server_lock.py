"""The lock that makes one server the only one of a data folder, and tells its children that a server lives."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from modelyard.keeper import take_lock


class ServerLock:
    """The lock that makes this the one server of a data folder. Held until `release` or until the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def take(self) -> bool:
        """Take the lock; return False if another server holds it. Safe to repeat."""
        if self._file is not None:
            return True
        self._file = take_lock(str(self.path))
        if self._file is None:
            return False
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        return True

    def holder(self) -> str:
        """Return what the holder wrote of itself, for a message only."""
        with contextlib.suppress(OSError):
            return self.path.read_text("utf-8").strip()
        return ""

    def release(self) -> None:
        """Give the lock back. Safe to repeat."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
