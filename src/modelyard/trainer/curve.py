"""The curve of a training: what each step measured, checked for NaN and infinity, and told on.

Each step is told, of a long training each n-th. A step's loss lies on the device; without a GPU it is read at once,
with one a few steps later, when it has arrived by itself: nobody waits for the device only to tell about it.
TensorBoard's files get the same points; a training that goes on takes back what was said of steps that come again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from modelyard.errors import JobFailure
from modelyard.trainer import memory
from modelyard.trainer.batches import Course, Rows, Step
from modelyard.trainer.reports import Reports

#: Points of a training, about.
POINTS = 2000
#: Steps whose loss may still be on its way from a GPU.
LAG = 4
#: Rows that are named when a step's loss is no number.
NAMED_ROWS = 20


class Curve:
    """The figures measured so far. `state` is what a checkpoint keeps of it."""

    def __init__(
        self, report: Reports, course: Course, rows: Rows, state: Mapping[str, Any], tensorboard_dir: str | None
    ) -> None:
        self._report = report
        self._course = course
        self._rows = rows
        self._every = math.ceil(course.total_steps / POINTS)
        self._waiting: deque[tuple[Step, float, float, Any, Any]] = deque()
        self.tokens = int(state.get("tokens", 0))
        self.learnt_tokens = int(state.get("learnt_tokens", 0))
        self.first_loss: float | None = state.get("first_loss")
        self.last_loss: float | None = state.get("last_loss")
        self.best_loss: float | None = state.get("best_loss")
        #: Seconds of steps, without those of checkpoints and validation.
        self.seconds = float(state.get("seconds", 0.0))
        self._since = (self.tokens, self.seconds)
        self._began = time.monotonic()
        self._paused = 0.0
        self._tensorboard = _TensorBoard(tensorboard_dir, int(state.get("step", 0))) if tensorboard_dir else None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        names = ("tokens", "learnt_tokens", "first_loss", "last_loss", "best_loss", "seconds")
        return {name: getattr(self, name) for name in names}

    def begin(self) -> None:
        """Count time from now on."""
        self._began = time.monotonic()

    def add(self, step: Step, loss: Any, norm: Any, rate: float) -> None:
        """Take in a step that is done. Raises JobFailure `loss_not_finite`, of this step or one shortly before."""
        now = time.monotonic()
        self.seconds += now - self._began
        self._began = now
        self.tokens += step.tokens
        self.learnt_tokens += step.learnt
        value, arrived = _on_its_way(loss, norm)
        self._waiting.append((step, rate, self.seconds, value, arrived))
        self._tell(LAG)

    def pause(self) -> None:
        """Stop counting time, and bring all that is still on its way to where it goes: a checkpoint may follow."""
        self._tell(0)
        if self._tensorboard:
            self._tensorboard.flush()
        now = time.monotonic()
        self.seconds += now - self._began
        self._began = now

    def validation(self, step: int, loss: float) -> None:
        """Tell what the rows that were held back say after so many steps."""
        self._report.point(step, epoch=round(self._course.epoch(step), 4), validation_loss=loss)
        if self._tensorboard:
            self._tensorboard.add(step, {"validation_loss": loss})

    def close(self) -> None:
        """Bring TensorBoard's file to its end."""
        if self._tensorboard:
            self._tensorboard.close()

    def _tell(self, lag: int) -> None:
        while self._waiting and (len(self._waiting) > lag or _has_arrived(self._waiting[0][4])):
            step, rate, seconds, value, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, norm = value.tolist() if arrived is not None else value
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise _not_finite(step, rate, loss, norm, self._rows)
            self._point(step, rate, seconds, loss, norm)

    def _point(self, step: Step, rate: float, seconds: float, loss: float, norm: float) -> None:
        done = step.number + 1
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        self.best_loss = loss if self.best_loss is None else min(self.best_loss, loss)
        if done % self._every and done not in (1, self._course.total_steps):
            return
        tokens_before, seconds_before = self._since
        speed = (self.tokens - tokens_before) / (seconds - seconds_before) if seconds > seconds_before else None
        self._since = (self.tokens, seconds)
        values = {"loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens_per_s": speed}
        self._report.point(
            done,
            epoch=round(self._course.epoch(done), 4),
            tokens=self.tokens,
            memory_bytes=memory.in_use_bytes(),
            **values,
        )
        if self._tensorboard:
            self._tensorboard.add(done, values)


class _TensorBoard:
    """Events in TensorBoard's format: one for each step, with all that it measured."""

    def __init__(self, folder: str, step: int) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.proto.summary_pb2 import Summary

        self._summary = Summary
        # Steps from here on are measured again, and replace what an earlier attempt said of them.
        self._writer = SummaryWriter(folder, purge_step=step + 1 if step else None, flush_secs=10)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        told = [
            self._summary.Value(tag=f"train/{name}", simple_value=value)
            for name, value in values.items()
            if value is not None
        ]
        self._writer.file_writer.add_summary(self._summary(value=told), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _on_its_way(loss: Any, norm: Any) -> tuple[Any, Any]:
    """Return two numbers of the device, and the event after which they are there; None: at once."""
    if loss.device.type != "cuda":
        return (loss.item(), norm.item()), None
    import torch

    value = torch.empty(2, dtype=torch.float32, pin_memory=True)
    value.copy_(torch.stack((loss.float(), norm.float().to(loss.device))), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return value, arrived


def _has_arrived(event: Any) -> bool:
    return event is None or bool(event.query())


def _not_finite(step: Step, rate: float, loss: float, norm: float, rows: Rows) -> JobFailure:
    lines = sorted(int(rows.lines[row]) for row in step.rows)
    named = ", ".join(map(str, lines[:NAMED_ROWS])) + (
        f" and {len(lines) - NAMED_ROWS} more" if len(lines) > 20 else ""
    )
    what = f"The loss is no number ({loss})" if not math.isfinite(loss) else f"The gradient is no number ({norm})"
    return JobFailure(
        "loss_not_finite",
        f"{what} at step {step.number + 1}, at a learning rate of {rate:.3g}, on the rows of lines {named}.",
        "Train with a lower learning_rate or more warmup_steps; if it is the same rows again, look at those lines.",
        [f"line {line}" for line in lines[:NAMED_ROWS]],
    )
