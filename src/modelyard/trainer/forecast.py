"""A forecast of a training, from what a few of its steps took: the same figures before it begins and early in it.

Speed is in tokens of the rows, without padding, so that it can be compared with what the training says of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from itertools import islice
from typing import Any

from modelyard.trainer.batches import Course, Rows, Steps, in_lines, line_length, padded
from modelyard.trainer.reports import Reports

#: Steps that are measured, after one that warms up: kernels are chosen, memory is taken.
MEASURED_STEPS = 5
#: What a training before this one says of memory holds for rows of about its length.
SHORTEST, LONGEST = 0.8, 1.05


#: Measured without a GPU: for each further width of its batches a training keeps so much, in kernels of that shape and
#: in gaps between tensors, up to so many widths.
WIDTH_BYTES = 14 * 1024 * 1024
MOST_WIDTHS = 40
#: Steps by which the widths of all are known well enough.
LOOKED_AT = 1000


class Basis(StrEnum):
    """Where an estimate comes from."""

    #: Steps of this very training.
    MEASURED = "measured"
    #: A training before it, of the same model and settings on the same kind of machine.
    HISTORY = "history"


def tokens_of(rows: Rows, course: Course) -> int:
    """Return how many tokens a training takes in all."""
    return round(int(rows.lengths.sum()) * course.total_steps / course.steps_per_epoch)


def growth_bytes(rows: Rows, steps: Steps, size: int, capacity: int) -> int:
    """Return how much a training on a CPU will take beyond what its first `MEASURED_STEPS` steps took.

    `size` and `capacity` as in `batches.micros`.
    """
    widths = {
        padded(line_length(rows, line))
        for step in islice(steps, LOOKED_AT)
        for line in in_lines(rows, step.rows, capacity)[::size]
    }
    return WIDTH_BYTES * max(0, min(len(widths), MOST_WIDTHS) - MEASURED_STEPS)


def estimate(*, seconds: float, tokens: int, total_tokens: int, memory_bytes: int, basis: Basis) -> dict[str, Any]:
    """Return `{"seconds", "memory_bytes", "tokens_per_s", "basis"}`, given that so many tokens took so many seconds.

    `seconds` are those of all steps, without loading, checkpoints, validation and evaluation.
    """
    speed = tokens / max(seconds, 1e-9)
    return {
        "seconds": round(total_tokens / speed, 3),
        "memory_bytes": memory_bytes,
        "tokens_per_s": round(speed, 1),
        "basis": str(basis),
    }


class Forecast:
    """Reports an estimate once, when a training has measured its first steps."""

    def __init__(self, report: Reports, total_tokens: int, memory_bytes: Callable[[], int]) -> None:
        self._report = report
        self._total = total_tokens
        self._memory_bytes = memory_bytes
        self._origin: tuple[int, float] | None = None
        self._steps = 0

    def after_step(self, tokens: int, seconds: float) -> None:
        """Take in what all steps so far amount to."""
        if self._origin is None:
            self._origin = tokens, seconds
            return
        self._steps += 1
        if self._steps == MEASURED_STEPS:
            before, since = self._origin
            self._report.estimate(
                estimate(
                    seconds=seconds - since,
                    tokens=tokens - before,
                    total_tokens=self._total,
                    memory_bytes=self._memory_bytes(),
                    basis=Basis.MEASURED,
                )
            )


def holds(history: Mapping[str, Any] | None, *, device: str, dtype: str, rows_per_step: int, longest: int) -> bool:
    """True if what a training before took tells what one with such rows would take here."""
    if history is None:
        return False
    same = (history["device"], history["dtype"], history["rows_per_step"]) == (device, dtype, rows_per_step)
    known = int(history["longest"])
    return same and bool(history["tokens_per_s"]) and SHORTEST * known <= longest <= LONGEST * known
