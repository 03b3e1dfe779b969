"""The end of a training of which nobody said how long it is (`epochs` auto): once its rows are learnt.

After each epoch but the first the mean loss of its rows is looked at: below a level (`choices.LEARNT_LOSS`) a further
epoch has little to teach, and where enough rows are held back, the same holds once their loss grows. One more epoch
follows in which the learning rate falls to zero, and the training ends: with the rate still high the last few rows
would count too much. What rows say once takes more epochs than what they all say, and nothing else tells the two apart.

The decision is a checkpoint's state, so that a training which goes on ends at the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelyard.trainer.batches import Course

#: Held-out rows by which a training may be ended: of fewer the loss goes up and down by chance.
ENOUGH_HELD_OUT = 8


class Ending:
    """Decides when one training ends. `level` is the loss below which rows are learnt, None: it goes to its end."""

    def __init__(self, level: float | None, course: Course, held_out_rows: int) -> None:
        self._level = level
        self._course = course
        self._heeds_validation = held_out_rows >= ENOUGH_HELD_OUT
        self._loss: Any = 0.0
        self._learnt = 0
        self._validation: float | None = None
        #: The step after which the last epoch begins; None: not known yet.
        self._last_from: int | None = None

    @property
    def total_steps(self) -> int:
        """Return the number of the training's steps, as far as it is known now."""
        if self._last_from is None:
            return self._course.total_steps
        return min(self._course.total_steps, self._last_from + self._course.steps_per_epoch)

    def share(self, step: int) -> float:
        """Return the share of its learning rate that step number `step` (from 0) has."""
        if self._last_from is None:
            return 1.0
        return max(0.0, 1.0 - (step - self._last_from) / self._course.steps_per_epoch)

    def add(self, loss: Any, learnt: int) -> None:
        """Take in the mean loss of a step's learnt tokens; nobody waits for it before the epoch ends."""
        if self._level is None or self._last_from is not None:
            return
        self._loss = self._loss + loss.detach().double() * learnt
        self._learnt += learnt

    def after_step(self, done: int, validation: float | None) -> str | None:
        """Look at the epoch that ends with step `done`, if one does; return why the next is the last one, if so.

        `validation` is the newest loss of the rows that were held back.
        """
        if self._level is None or self._last_from is not None or done % self._course.steps_per_epoch:
            return None
        epoch = done // self._course.steps_per_epoch
        mean = float(self._loss) / max(1, self._learnt)
        before, self._validation = self._validation, validation
        self._loss, self._learnt = 0.0, 0
        if epoch == 1 or done + self._course.steps_per_epoch >= self._course.total_steps:
            return None
        if mean < self._level:
            why = f"the loss of its rows was {mean:.3g} in epoch {epoch}, below {self._level:g}"
        elif self._heeds_validation and before is not None and validation is not None and validation > before:
            why = (
                f"the loss of the rows that were held back grew from {before:.4g} to {validation:.4g} in epoch {epoch}"
            )
        else:
            return None
        self._last_from = done
        return f"The next epoch is the last one, with a falling learning rate, until step {self.total_steps}: {why}."

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "loss": float(self._loss), "learnt": self._learnt, "validation": self._validation,
            "last_from": self._last_from,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned, if it is there."""
        if state:
            self._loss, self._learnt = state["loss"], state["learnt"]
            self._validation, self._last_from = state["validation"], state["last_from"]
