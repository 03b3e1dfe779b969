"""A bound on what strangers can make the server write to its log, whatever they send and however often.

`limit_repeats` is put on a logger whose lines are caused from outside: of each kind of line (its text before anything
is put into it) so many pass in a minute, and the next one that passes says how many were left out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LINES_A_MINUTE = 10
MINUTE_S = 60.0
#: The number of kinds of line is the program's own; this guards against one that puts foreign text into the format.
MAX_KINDS = 256


class RepeatLimit(logging.Filter):
    """Lets `LINES_A_MINUTE` lines of each kind pass in a minute."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        #: By kind: when its minute began, how many lines have passed in it, how many were left out.
        self._seen: dict[str, tuple[float, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is written; the first of a new minute is told what the last one left out."""
        kind, now = str(record.msg)[:200], self._now()
        began, passed, left_out = self._seen.get(kind, (now, 0, 0))
        if now - began >= MINUTE_S:
            began, passed = now, 0
        if passed >= LINES_A_MINUTE:
            self._seen[kind] = began, passed, left_out + 1
            return False
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} more such lines were left out)", ()
        if kind not in self._seen and len(self._seen) >= MAX_KINDS:
            self._seen.clear()
        self._seen[kind] = began, passed + 1, 0
        return True


def limit_repeats(logger: logging.Logger) -> None:
    """Bound what a logger writes. Safe to repeat."""
    if not any(isinstance(one, RepeatLimit) for one in logger.filters):
        logger.addFilter(RepeatLimit())
