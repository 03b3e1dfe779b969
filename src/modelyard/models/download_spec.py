"""The spec of a download child, as a file between the two. Imports nothing that either would mind."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

GIB = 1024**3


@dataclass(frozen=True)
class Spec:
    """One download. Paths are absolute; sizes in bytes."""

    model_id: str
    revision: str
    models_dir: str
    partial_dir: str
    progress: str
    result: str
    reserve_bytes: int
    quota_bytes: int | None
    import_dir: str | None

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Read the file that `write` wrote."""
        return cls(**json.loads(path.read_text("utf-8")))

    def write(self, path: Path) -> None:
        """Write it down, in a folder that may have to be made."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(json.dumps(asdict(self)), "utf-8")
