"""When a training of which nobody said how long it is ends: a table, since nothing of it needs a model."""

from __future__ import annotations

from typing import Any

import pytest

from modelyard.trainer.batches import Course
from modelyard.trainer.ending import ENOUGH_HELD_OUT, Ending
from tests.trainer.runs import needs_training

COURSE = Course(rows_per_step=4, steps_per_epoch=5, total_steps=40)


def ended(
    losses: list[float], validations: list[float] | None = None, *, level: float | None = 0.2, held_out: int = 0,
    resumed_at: int | None = None,
) -> tuple[int, list[str]]:  # fmt: skip
    """Return the steps of a training whose epochs have these losses, and what it says; the last loss goes on."""
    import torch

    ending, said, done = Ending(level, COURSE, held_out), [], 0
    while done < ending.total_steps:
        epoch = done // COURSE.steps_per_epoch
        value = losses[min(epoch, len(losses) - 1)]
        # Steps of an epoch differ, and so does how much they teach: the mean is that of the tokens.
        ending.add(torch.tensor(value / 2 if done % 5 == 0 else value), 0 if done % 5 == 0 else 30)
        done += 1
        validation = validations[min(epoch, len(validations) - 1)] if validations else None
        if (why := ending.after_step(done, validation)) is not None:
            said.append(why)
        if done == resumed_at:
            state = ending.state()
            ending = Ending(level, COURSE, held_out)
            ending.restore(state)
    return done, said


@pytest.mark.parametrize(
    ("losses", "validations", "level", "held_out", "steps"),
    [
        # What all rows say is learnt in two epochs, and one more follows.
        ([1.7, 0.15], None, 0.2, 0, 15),
        ([1.2, 0.7, 0.5, 0.35, 0.24, 0.15], None, 0.2, 0, 35),
        # The first epoch alone does not tell.
        ([0.1, 0.3, 0.3], None, 0.2, 0, 40),
        ([2.0, 1.9], None, 0.2, 0, 40),
        # With the last epoch but one it would end anyway.
        ([2.0, 1, 1, 1, 1, 1, 0.1], None, 0.2, 0, 40),
        ([1.7, 0.15], None, None, 0, 40),
        ([2.0, 1.5], [2.0, 1.9, 1.8, 1.85], 0.2, ENOUGH_HELD_OUT, 25),
        ([2.0, 1.5], [2.0, 2.1], 0.2, ENOUGH_HELD_OUT, 15),
        ([2.0, 1.5], [2.0, 2.1], 0.2, ENOUGH_HELD_OUT - 1, 40),
        ([2.0, 1.5], [2.0, 2.1], None, ENOUGH_HELD_OUT, 40),
    ],
)
def test_it_ends_an_epoch_after_its_rows_are_learnt_or_no_longer_help(
    losses: list[float], validations: list[float] | None, level: float | None, held_out: int, steps: int
) -> None:
    needs_training()
    done, said = ended(losses, validations, level=level, held_out=held_out)
    assert done == steps
    assert len(said) == (steps < 40)
    assert all(f"until step {steps}" in one for one in said)
    for resumed_at in range(1, steps):
        again = ended(losses, validations, level=level, held_out=held_out, resumed_at=resumed_at)
        assert again == (done, said), resumed_at


def test_the_last_epoch_begins_at_the_rate_of_the_one_before_and_ends_near_zero() -> None:
    ending = Ending(0.2, COURSE, 0)
    assert [ending.share(step) for step in range(40)] == [1.0] * 40
    state: dict[str, Any] = {**ending.state(), "last_from": 10}
    ending.restore(state)
    assert ending.total_steps == 15
    assert [ending.share(step) for step in range(10, 16)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
