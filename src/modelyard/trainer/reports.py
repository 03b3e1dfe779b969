"""The trainer's reports while it works: one JSON line per report, appended to the file that the server reads.

`spec` lists the kinds. A line is written by one call, so that a reader sees whole lines but perhaps the last, and a
killed trainer takes none along that it has said. Reporting never ends a training: what cannot be written (a full
disk) is dropped and counted, except that the loss of the result itself is an error elsewhere.
Numbers that are none become null, since JSON has no word for them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Progress is said at most this often; its first and its last word always.
PROGRESS_EVERY_S = 0.25


class Reports:
    """Appends reports to `path`. `seconds` is how long each phase took so far."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._phase = ""
        self._since = time.monotonic()
        self._spent: dict[str, float] = {}
        self._progress_at = -math.inf
        self.dropped = 0

    def phase(self, name: str) -> None:
        """Say what begins: loading, tokenizing, training, evaluating or saving."""
        if name == self._phase:
            return
        self._close_phase()
        self._phase = name
        self._write("phase", {"phase": name})

    def note(self, message: str, level: str = "INFO", **data: Any) -> None:
        """Tell whoever follows the job something; `level` is INFO, WARNING or ERROR."""
        self._write("note", {"level": level, "message": message, "data": data})

    def prepared(self, facts: Mapping[str, Any]) -> None:
        """Say what the rows turned out to be."""
        self._write("prepared", facts)

    def estimate(self, estimate: Mapping[str, Any]) -> None:
        """Say what the training is expected to take."""
        self._write("estimate", estimate)

    def point(self, step: int, **values: float | int | None) -> None:
        """Say what was measured at a step; what is None was not."""
        self._write("point", {"step": step} | {key: value for key, value in values.items() if value is not None})

    def checkpoint(self, step: int, folder: Path) -> None:
        """Say that a whole checkpoint is in place."""
        self._write("checkpoint", {"step": step, "folder": str(folder)})

    def progress(self, done: int, total: int, unit: str) -> None:
        """Say how far it is, as often as is worth reading."""
        now = time.monotonic()
        if 0 < done < total and now - self._progress_at < PROGRESS_EVERY_S:
            return
        self._progress_at = now
        self._write("progress", {"done": done, "total": total, "unit": unit})

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, the present one with what it took until now."""
        self._close_phase()
        return {name: round(spent, 3) for name, spent in self._spent.items()}

    def _close_phase(self) -> None:
        now = time.monotonic()
        if self._phase:
            self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._since = now

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        line = json.dumps(finite({"kind": kind, **values}), ensure_ascii=False, allow_nan=False, default=str)
        data = line.encode("utf-8", "replace") + b"\n"
        try:
            if os.write(self._file, data) < len(data):
                # What follows must not be read as the rest of a line cut short.
                os.write(self._file, b"\n")
                self.dropped += 1
        except OSError:
            self.dropped += 1


def finite(value: Any) -> Any:
    """Return a value for JSON, with null for each number that is none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
