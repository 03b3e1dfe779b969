"""Rows that are held back to measure by, and those whose prompts the engine is asked for.

Drawn by the seed among the rows that are whole and have no copy among the others: a row that was learnt is no test.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from modelyard.errors import JobFailure
from modelyard.plurals import counted
from modelyard.trainer.examples import Kept
from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Spec

HELD_BACK = 0.05
#: Fewer rows than this are all learnt from, unless a part is asked for.
FEWEST_TO_SPLIT = 20
PROBED_ROWS = 4
PROBE_TOKENS = 1024


def chosen(kept: Sequence[Kept], split: float | None, seed: int) -> tuple[set[int], int]:
    """Return the lines that are held back, and how many rows have a copy, which are never held back."""
    copies = Counter(row.key for row in kept)
    duplicates = sum(number for number in copies.values() if number > 1)
    wanted = count(len(kept), split)
    candidates = [row.line for row in kept if copies[row.key] == 1 and not row.is_cut]
    if wanted:
        random.Random(seed).shuffle(candidates)
    return set(candidates[:wanted]), duplicates


def notes(kept: Sequence[Kept], lines: set[int], duplicates: int, spec: Spec, report: Reports) -> list[str]:
    """Say, as an event and in what is returned, that none of the rows can be held back to measure by, if that is so.

    Raises:
        JobFailure: `nothing_to_measure_by`: it was asked for.
    """
    settings = spec.hyperparameters
    is_wanted = count(len(kept), settings.validation_split) > 0
    if lines or not (is_wanted or settings.early_stopping is not None):
        return []
    cut = sum(row.is_cut for row in kept)
    reasons = [f"{duplicates} have a copy among the others"] * bool(duplicates) + [f"{cut} are truncated"] * bool(cut)
    why = f"Of {counted(len(kept), 'row')} none can be held back to measure by"
    why += f": {' and '.join(reasons)}." if is_wanted and reasons else "."
    asked = [f"early_stopping {settings.early_stopping}"] * (settings.early_stopping is not None)
    if settings.validation_split:
        asked.insert(0, f"validation_split {settings.validation_split:g}")
    if asked:
        raise JobFailure(
            "nothing_to_measure_by",
            f"{why} The request has {' and '.join(asked)}.",
            f"Add rows that are there once and fit into max_seq_len, or leave {' and '.join(asked)} out.",
        )
    report.note(f"{why} Nothing will tell whether the adapter is better.", "WARNING")
    return [why]


def count(rows: int, split: float | None) -> int:
    """Return how many of so many rows are held back; None is 5 %, and none of fewer than 20 rows."""
    if split is None:
        split = HELD_BACK if rows >= FEWEST_TO_SPLIT else 0
    return min(max(1, round(rows * split)), rows - 1) if split else 0


def probed(kept: Sequence[Kept], seed: int) -> set[int]:
    """Return the lines of a few rows whose prompts are compared with the engine's, short ones where there are any."""
    asked = [(row.line, row.prompt_length) for row in kept if row.prompt_length is not None]
    short = [line for line, length in asked if length <= PROBE_TOKENS] or [line for line, _ in asked]
    return set(random.Random(seed).sample(short, min(PROBED_ROWS, len(short))))
