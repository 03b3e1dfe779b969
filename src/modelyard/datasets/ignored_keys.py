"""Counts the keys of a file's rows that mean nothing there: whatever their maker meant by them is not learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelyard.datasets.raw_values import key_name

#: Different keys that are told one by one; the others are told together, as `OTHERS`.
MOST_KEYS = 100
OTHERS = "*"
LISTED_LINES = 20
MOST_CHARACTERS = 100


class IgnoredKeys:
    """The keys so far. What is kept does not grow with the file."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], int] = {}
        self._lines: dict[tuple[str, str], list[int]] = {}

    def see_all(self, key: tuple[str, str], lines: Sequence[int]) -> None:
        """Count one key of several rows."""
        if key in self._rows:
            self._rows[key] += len(lines)
            room = LISTED_LINES - len(self._lines[key])
            self._lines[key] += lines[: max(0, room)]
        else:
            for line in lines:
                self.see((key,), line)

    def see(self, keys: tuple[tuple[str, str], ...], line: int) -> None:
        """Count the keys of one row, each once."""
        for key in {key if self._is_told(key) else ("", OTHERS) for key in keys}:
            self._rows[key] = self._rows.get(key, 0) + 1
            lines = self._lines.setdefault(key, [])
            if len(lines) < LISTED_LINES:
                lines.append(line)

    def _is_told(self, key: tuple[str, str]) -> bool:
        return key in self._rows or (len(self._rows) < MOST_KEYS and len(key[1]) <= MOST_CHARACTERS)

    def report(self) -> list[dict[str, Any]]:
        """Return each key with its place, how many rows have it and the first lines of these, most frequent first."""
        ordered = sorted(self._rows, key=lambda key: (-self._rows[key], key_name(key)))
        return [{"key": key_name(key), "rows": self._rows[key], "lines": self._lines[key]} for key in ordered]
