"""The certainty that a loss is lower: the confidence interval of a difference, from the rows that were held back.

Base and adapter are measured on the same rows, so that what counts is each row's own difference: that some rows are
harder than others makes it no less sure. The loss per token is a ratio of two sums over rows; its standard error is
that of the residuals (the delta method for ratio estimators; Cochran, Sampling Techniques, chapter 6), and Student's t
makes the interval as wide as few rows ask for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
#: Student's t of 97.5 % for 1 to 10 degrees of freedom, and what it comes to for many.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.96

#: The sum of a row's losses, and of how many tokens.
RowLoss = tuple[float, int]


@dataclass(frozen=True)
class Lowered:
    """By how much the loss per token is lower, and the interval that has the true figure in it in 95 of 100 cases."""

    mean: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """True if the interval is on one side of zero."""
        return self.low > 0 or self.high < 0


def lowered(base: Sequence[RowLoss], adapter: Sequence[RowLoss]) -> Lowered | None:
    """Return by how much the second loss is lower than the first on the same rows; None: that cannot be said.

    It cannot of fewer than two rows with learnt tokens, nor where a loss is no number.
    """
    rows = [(one - other, tokens) for (one, tokens), (other, _) in zip(base, adapter, strict=True) if tokens]
    if len(rows) < 2 or not all(math.isfinite(lower) for lower, _ in rows):
        return None
    tokens = sum(count for _, count in rows)
    mean = sum(lower for lower, _ in rows) / tokens
    residuals = sum((lower - mean * count) ** 2 for lower, count in rows)
    error = math.sqrt(len(rows) / (len(rows) - 1) * residuals) / tokens
    half = _quantile(len(rows) - 1) * error
    return Lowered(mean, mean - half, mean + half)


def _quantile(freedom: int) -> float:
    # The first terms of its expansion in 1/freedom: right to 0.002 from 10 on.
    return _T[freedom - 1] if freedom <= len(_T) else _NORMAL + 2.372 / freedom + 2.82 / freedom**2
