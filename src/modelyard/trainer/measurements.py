"""When a training is measured on the rows that were held back, and whether that can end it early."""

from __future__ import annotations

import math

from modelyard.trainer.batches import Course
from modelyard.trainer.spec import Hyperparameters

#: Without checkpoint_steps: a training of few epochs is measured after each of so many parts of it.
PARTS = 10


def every(settings: Hyperparameters, course: Course) -> int:
    """Return the steps between two measurements; there is another after the last step."""
    if settings.checkpoint_steps is not None:
        return settings.checkpoint_steps
    if course.total_steps >= PARTS * course.steps_per_epoch:
        return course.steps_per_epoch
    return min(course.steps_per_epoch, max(1, course.total_steps // PARTS))


def why_never_early(settings: Hyperparameters, course: Course) -> str | None:
    """Return why early stopping cannot act in a training, and what to do; None: it can, or was not asked for."""
    if settings.early_stopping is None:
        return None
    count = math.ceil(course.total_steps / every(settings, course))
    # The first one has nothing before it that it could fail to improve on, and after the last it ends anyway.
    if count > settings.early_stopping + 1:
        return None
    times = "once" if count == 1 else f"{count} times"
    return (
        f"early_stopping of {settings.early_stopping} never acts: the training is measured {times}, and that takes "
        f"{settings.early_stopping + 2} at least. Set checkpoint_steps, for more of them, or early_stopping lower."
    )
