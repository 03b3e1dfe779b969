"""The training itself: from the newest checkpoint to the adapter's last step, or to where it is asked to end.

Steps are taken by transformers' Trainer (`stepping`), which brings the optimizer's side; processes share them
(`ranks`). Logits are made only where something is learnt, and the loss is that of all of a step's learnt tokens, in
float32. How much of a step one forward pass takes is up to `sizing`. The same spec and rows give the same weights, bit
by bit on one machine with as many processes, however often the training was ended and went on: neither checkpoints nor
validation touch what the steps depend on. Where nobody said how long it is, `ending` does.
"""

from __future__ import annotations

import inspect
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from modelyard.trainer import measurements, memory, ranks
from modelyard.trainer.batches import Course, Micro, Rows, Step, Steps, micros, padded_tokens
from modelyard.trainer.checkpoints import Checkpoint, Checkpoints
from modelyard.trainer.curve import Curve
from modelyard.trainer.ending import Ending
from modelyard.trainer.examples import Example
from modelyard.trainer.forecast import Forecast, growth_bytes, tokens_of
from modelyard.trainer.model import CONFIG, WEIGHTS, adapter_config, adapter_weights, set_adapter_weights
from modelyard.trainer.packing import capacity_of
from modelyard.trainer.reports import Reports
from modelyard.trainer.retention import Retention
from modelyard.trainer.sizing import Sizing
from modelyard.trainer.spec import Spec
from modelyard.trainer.stepping import WARMUP_SHARE, Left, Stepper, rate_share, set_random_tensors

OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
BEST = "best.safetensors"
#: Without checkpoint_steps: a checkpoint each tenth of the training, and after so many seconds, ...
CHECKPOINT_S = 180.0
PARTS = 10
#: ... but writing them takes no more of the time than this.
CHECKPOINT_SHARE = 0.05
#: Rows that validation looks at while the training runs; the scores after it are another matter.
VALIDATION_ROWS = 256
VALIDATION_BATCH = 8
#: Steps after which every layer that learns has had a gradient, and the layers named that had none.
FIRST_STEPS = 3
NAMED_LAYERS = 3


class Stop(Protocol):
    """True if the training was asked to end, after the step that runs."""

    @property
    def asked(self) -> bool: ...


@dataclass
class Outcome:
    """The result of a training: stopped after a step, or done, with these figures."""

    stopped: bool
    step: int
    figures: dict[str, Any]


@dataclass
class Progress:
    """The part of a training that a checkpoint keeps beside its curve."""

    step: int = 0
    finished: bool = False
    padded_tokens: int = 0
    best_validation: float | None = None
    best_step: int | None = None
    last_validation: float | None = None
    without_improvement: int = 0
    validation_seconds: float = 0.0
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0
    peak_memory_bytes: int = 0
    #: Adapted layers that had no gradient in the first steps. None: not known yet.
    untrained_layers: list[str] | None = None


class Training:
    """One attempt at a training; `checkpoints` says where the one before got to."""

    def __init__(
        self, spec: Spec, model: Any, rows: Rows, held_out: Rows, pad: int, report: Reports, checkpoints: Checkpoints,
        stop: Stop, ordinary: Sequence[Example] = (),
    ) -> None:  # fmt: skip
        self.model = model
        self.rows = rows
        self.pad = pad
        self.settings = spec.hyperparameters
        self.capacity = capacity_of(model, rows) if self.settings.packing else 0
        self.sizing = Sizing(spec, model, rows, pad, self.capacity, report, checkpoints.fingerprint, self.loss)
        self.course = Course.of(self.settings, len(rows))
        self.ending = Ending(self.settings.learnt_loss, self.course, len(held_out))
        self.retention = Retention(ordinary, self.settings.retention or 0.0, pad)
        self.progress = Progress()
        self._spec = spec
        self._held_out = held_out
        self._report = report
        self._checkpoints = checkpoints
        self._stop = stop
        self._takes_kept = "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters
        self._best: dict[str, Any] = {}
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._curve: Curve
        #: An attempt that goes on knows already what was expected.
        self._forecast: Forecast | None = None

    @property
    def total_steps(self) -> int:
        """Return the number of its steps, as far as it is known now."""
        return self.ending.total_steps

    def run(self) -> Outcome:
        """Train to the end, or to where it is asked to stop. Raises JobFailure."""
        found = self._newest()
        if ranks.is_first():
            self._checkpoints.discard_unusable(found)
        moments = self._restore(found) if found is not None else None
        self.sizing.begin(self.course.rows_per_step, self.settings.gradient_accumulation)
        self.retention.begin(self.logits, self.model)
        self._curve = Curve(
            self._report, self.course, self.rows, found.state if found else {}, self._spec.tensorboard_dir
        )
        if found is None:
            if (why := measurements.why_never_early(self.settings, self.course)) is not None:
                self._report.note(why, "WARNING")
            self._forecast = Forecast(self._report, tokens_of(self.rows, self.course), self.expected_peak_bytes)
        self._report.phase("training")
        stopped = False
        if not self._is_over():
            stopped = self._train(moments, found)
        self._curve.close()
        if not stopped and self._best:
            set_adapter_weights(self.model, self._best)
        return Outcome(stopped, self.progress.step, {} if stopped else self.figures())

    def _train(self, moments: dict[str, Any] | None, found: Checkpoint | None) -> bool:
        """Take the steps that are left; return whether it was asked to end before the last."""
        start = self.progress.step
        self._saved_step, self._saved_at = start, time.monotonic()
        steps = self.steps(start)
        with tempfile.TemporaryDirectory(prefix=".trainer-", dir=self._spec.work_dir) as folder:
            stepper = Stepper(self, steps, start, moments, folder)
            if found is not None:
                # Last of all: making a Trainer sets the seed.
                set_random(found)
            self._curve.begin()
            try:
                stepper.train()
            except Left:
                stepper.step_back()
        self._curve.pause()
        stopped = not self._is_over()
        self.progress.finished = not stopped
        if self.progress.step > self._saved_step or self.progress.finished:
            self._save(stepper)
        return stopped

    def steps(self, start: int = 0) -> Steps:
        """Return the steps from one on."""
        return Steps(self.rows, self.course, self.settings.seed, start, is_grouped=not self.capacity)

    # The owner's side of `stepping`.

    def is_to_end(self) -> bool:
        """Return whether the training was asked to end."""
        return self._stop.asked

    def after_step(self, stepper: Stepper, step: Step) -> bool:
        """Take in a step that is done; return whether that was the last one for now."""
        self._curve.add(step, stepper.loss, stepper.norm, stepper.rate)
        if self._forecast is not None:
            self._forecast.after_step(self._curve.tokens, self._curve.seconds)
        done = self.progress.step = step.number + 1
        self.ending.add(stepper.loss, step.learnt)
        self.progress.padded_tokens += padded_tokens(self.rows, step.rows, self.sizing.at(step.number), self.capacity)
        self._report.progress(done, self.total_steps, "steps")
        if self.progress.untrained_layers is None and done >= min(FIRST_STEPS, self.total_steps):
            self._name_untrained(sorted(stepper.idle))
        if len(self._held_out) and self._validation_is_due(done):
            self._curve.pause()
            self._validate(done)
            self._curve.begin()
        if (why := self.ending.after_step(done, self.progress.last_validation)) is not None:
            self._report.note(why, step=done)
        if self._is_over() or stepper.is_to_end:
            return True
        if self._checkpoint_is_due(done):
            self._curve.pause()
            self._save(stepper)
            self._curve.begin()
        return False

    def _name_untrained(self, layers: list[str]) -> None:
        self.progress.untrained_layers = layers
        if layers:
            self._report.note(
                f"{len(layers)} of the adapted layers had no gradient in the first {self.progress.step} steps and "
                f"learn nothing, such as {', '.join(layers[:NAMED_LAYERS])}: these rows do not reach them.",
                "WARNING",
                untrained_layers=len(layers),
            )

    def loss(self, model: Any, micro: Micro) -> Any:
        """Return the sum of the losses of all that a forward pass teaches."""
        micro = micro.to(self.model.device)
        return functional.cross_entropy(self.logits(model, micro), micro.targets, reduction="sum")

    def retention_loss(self, model: Any, step: int) -> Any:
        """Return what the loss of a step has beside that of its rows, or None."""
        return self.retention.loss(self.logits, model, step)

    def logits(self, model: Any, micro: Micro) -> Any:
        """Return the logits of all that a forward pass teaches, in float32."""
        micro = micro.to(self.model.device)
        inputs = {"input_ids": micro.input_ids, "use_cache": False}
        if micro.positions is not None:
            inputs["position_ids"] = micro.positions
        if self._takes_kept:
            logits = model(**inputs, logits_to_keep=micro.kept).logits
        else:
            logits = model(**inputs).logits[:, micro.kept]
        flat = logits.flatten(0, 1)
        if len(micro.chosen) < len(flat):
            flat = flat.index_select(0, micro.chosen)
        return flat.float()

    def expected_peak_bytes(self) -> int:
        """Return the most memory that it will have held in the end, as far as its first steps tell."""
        on_gpu = torch.cuda.is_available()
        size = self.sizing.at(self.progress.step)
        growth = 0 if on_gpu else growth_bytes(self.rows, self.steps(), size, self.capacity)
        return memory.peak_bytes() + growth

    def rate_share(self, step: int) -> float:
        """Return the share of the learning rate that a step has, by the schedule and by whether it is to end soon."""
        settings, total = self.settings, self.course.total_steps
        warmup = int(WARMUP_SHARE * total) if settings.warmup_steps is None else settings.warmup_steps
        return rate_share(settings.lr_schedule, step, total, warmup) * self.ending.share(step)

    # Validation.

    def _validation_is_due(self, done: int) -> bool:
        return done % measurements.every(self.settings, self.course) == 0 or done == self.total_steps

    def _validate(self, done: int) -> None:
        began = time.monotonic()
        loss = self.validation_loss()
        progress = self.progress
        progress.validation_seconds += time.monotonic() - began
        progress.last_validation = loss
        self._curve.validation(done, loss)
        if progress.best_validation is None or loss < progress.best_validation:
            progress.best_validation, progress.best_step, progress.without_improvement = loss, done, 0
            if self.settings.early_stopping is not None:
                self._best = {name: each.clone() for name, each in adapter_weights(self.model).items()}
            return
        progress.without_improvement += 1
        if self.settings.early_stopping is not None and progress.without_improvement >= self.settings.early_stopping:
            progress.finished = True
            self._report.note(
                f"It ends early, after step {done}: the validation loss was best ({progress.best_validation:.4f}) at "
                f"step {progress.best_step}, and the adapter is the one of then.",
                step=done,
            )

    def validation_loss(self) -> float:
        """Return the mean loss of the learnt tokens of rows that were held back; nothing changes by it."""
        rows = self._held_out
        chosen = sorted(range(min(len(rows), VALIDATION_ROWS)), key=lambda row: -int(rows.lengths[row]))
        most = min(VALIDATION_BATCH, self.sizing.at(self.progress.step))
        self.model.eval()
        try:
            with torch.inference_mode():
                total = torch.zeros((), device=self.model.device)
                for micro in micros(rows, chosen, most, self.pad):
                    total = total + self.loss(self.model, micro)
        finally:
            self.model.train()
        return float(ranks.summed(total.clone())) / max(1, int(rows.learnt[chosen].sum()))

    # Checkpoints.

    def _checkpoint_is_due(self, done: int) -> bool:
        every = self.settings.checkpoint_steps
        if not ranks.is_first():
            return False
        if every is not None:
            return done % every == 0
        waited = time.monotonic() - self._saved_at
        last = self._checkpoints.seconds / max(1, self._checkpoints.written)
        if waited < last / CHECKPOINT_SHARE:
            return False
        return waited >= CHECKPOINT_S or done % max(1, math.ceil(self.total_steps / PARTS)) == 0

    def _save(self, stepper: Stepper) -> None:
        if not ranks.is_first():
            return
        progress = self.progress
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, memory.peak_bytes())
        chance = {str(index): state for index, state in enumerate(stepper.random_state())}
        tensors = {WEIGHTS: adapter_weights(self.model), OPTIMIZER: stepper.moments(), RANDOM: chance}
        if self._best:
            tensors[BEST] = self._best
        before = self._checkpoints.seconds
        state = {
            **self._curve.state(), **vars(progress), "sizes": self.sizing.taken, "python_random": random.getstate(),
            "ending": self.ending.state(),
        }  # fmt: skip
        self._checkpoints.save(progress.step, tensors, {CONFIG: adapter_config(self.model)}, state)
        progress.checkpoints += 1
        progress.checkpoint_seconds += self._checkpoints.seconds - before
        self._saved_step, self._saved_at = progress.step, time.monotonic()

    def _newest(self) -> Checkpoint | None:
        """Return the newest checkpoint, unless its adapter lacks layers that this one has."""
        found = self._checkpoints.newest()
        if found is None or adapter_weights(self.model).keys() <= found.tensors(WEIGHTS).keys():
            return found
        self._report.note(
            f"The checkpoint of step {found.step} is of an adapter on other layers (an earlier version of the trainer "
            "chose them) and is not used.",
            "WARNING",
        )
        return None

    def _restore(self, found: Checkpoint) -> dict[str, Any]:
        """Bring back what a checkpoint keeps, and return the optimizer's moments."""
        known = set(vars(self.progress))
        self.progress = Progress(**{name: value for name, value in found.state.items() if name in known})
        self.sizing.taken = found.state["sizes"]
        self.ending.restore(found.state.get("ending", {}))
        set_adapter_weights(self.model, found.tensors(WEIGHTS))
        if (found.folder / BEST).is_file():
            self._best = found.tensors(BEST)
        self._report.note(f"It goes on from the checkpoint of step {found.step}.", step=found.step)
        return found.tensors(OPTIMIZER)

    def _is_over(self) -> bool:
        return self.progress.finished or self.progress.step >= self.total_steps

    def figures(self) -> dict[str, Any]:
        """Return what the training came to."""
        curve, progress = self._curve, self.progress
        padding = progress.padded_tokens - curve.tokens
        return {
            "steps": progress.step,
            "epochs": round(self.course.epoch(progress.step), 4),
            "rows_per_step": self.course.rows_per_step,
            "processes": ranks.count(),
            "batch_size": self.sizing.at(progress.step),
            "tokens": curve.tokens,
            "learnt_tokens": curve.learnt_tokens,
            "training_seconds": round(curve.seconds, 3),
            "tokens_per_s": round(curve.tokens / curve.seconds, 1) if curve.seconds else None,
            "padding_share": round(padding / progress.padded_tokens, 4) if progress.padded_tokens else 0.0,
            "first_loss": curve.first_loss,
            "last_loss": curve.last_loss,
            "best_loss": curve.best_loss,
            "last_validation_loss": progress.last_validation,
            "best_validation_loss": progress.best_validation,
            "best_step": progress.best_step,
            "checkpoints": progress.checkpoints,
            "checkpoint_seconds": round(progress.checkpoint_seconds, 3),
            "validation_seconds": round(progress.validation_seconds, 3),
            "untrained_layers": progress.untrained_layers or [],
            "peak_memory_bytes": max(progress.peak_memory_bytes, memory.peak_bytes()),
        }


def set_random(found: Checkpoint) -> None:
    """Bring back the state of chance from a checkpoint."""
    states = found.tensors(RANDOM)
    set_random_tensors([states[str(index)] for index in range(len(states))])
    version, numbers, gauss = found.state["python_random"]
    random.setstate((version, tuple(numbers), gauss))
