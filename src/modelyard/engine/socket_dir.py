"""Scratch folders: where engines' sockets lie, private and with short paths: a socket's has 107 bytes at most.

The deployment's row has the address before the folder is made. The folder goes with the run of the engine; one whose
engine never started is found by that address, so that a server that is killed at any point leaves none behind.
"""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
from pathlib import Path

PREFIX = "modelyard-engine-"
_NAME = re.compile(rf"{PREFIX}[0-9a-f]{{8}}")


def new_path() -> Path:
    """Return where a scratch folder may be made."""
    return Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(4)}"


def remove(engine_url: str | None) -> None:
    """Remove the folder of an engine that does not run. Safe to repeat; blocks."""
    folder = Path((engine_url or "").removeprefix("unix:")).parent
    if _NAME.fullmatch(folder.name):
        shutil.rmtree(folder, ignore_errors=True)
