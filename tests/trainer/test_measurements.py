"""When a training is measured on the rows that were held back, and whether that can end it early."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelyard.trainer.batches import Course
from modelyard.trainer.measurements import every, why_never_early
from tests.trainer.runs import DEFAULTS


@pytest.mark.parametrize(
    ("total", "epoch", "checkpoint_steps", "steps"),
    [
        (100, 100, None, 10),
        (100, 50, None, 10),
        (100, 7, None, 7),
        (100, 3, None, 3),
        (5, 5, None, 1),
        (100, 10, 40, 40),
    ],
)
def test_it_is_measured_after_each_epoch_or_each_tenth_or_as_asked(
    total: int, epoch: int, checkpoint_steps: int | None, steps: int
) -> None:
    settings = replace(DEFAULTS, checkpoint_steps=checkpoint_steps)
    assert every(settings, Course(4, epoch, total)) == steps


@pytest.mark.parametrize(
    ("early_stopping", "checkpoint_steps", "says"),
    [
        (None, 50, None),
        # After 10, 20, ... 100: the first that could act is the last but one.
        (8, 10, None),
        (9, 10, "measured 10 times, and that takes 11 at least"),
        (1, 40, None),
        (2, 40, "measured 3 times"),
        (1, 100, "measured once"),
    ],
)
def test_early_stopping_that_could_not_act_is_told_with_the_numbers(
    early_stopping: int | None, checkpoint_steps: int, says: str | None
) -> None:
    settings = replace(DEFAULTS, early_stopping=early_stopping, checkpoint_steps=checkpoint_steps)
    why = why_never_early(settings, Course(4, 10, 100))
    assert why is None if says is None else why is not None and says in why
