"""The training itself: from the newest checkpoint to the adapter's last step, or to where it is asked to end.

Steps are taken by transformers' Trainer (`stepping`), which brings the optimizer's side; processes share them
(`ranks`). Logits are made only where something is learnt, and the loss is that of all of a step's learnt tokens, in
float32. A forward pass may have to be smaller than was asked for, where that is left to us; a step's rows stay the
same. The same spec and rows give the same weights, bit by bit on one machine with as many processes, however often the
training was ended and went on: neither checkpoints nor validation touch what the steps depend on.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional

from modelyard.errors import JobFailure
from modelyard.trainer import memory, ranks
from modelyard.trainer.batches import Course, Micro, Rows, Step, Steps, collate, in_lines, micros, padded_tokens
from modelyard.trainer.checkpoints import Checkpoint, Checkpoints, sync
from modelyard.trainer.curve import Curve
from modelyard.trainer.failures import is_out_of_memory, size
from modelyard.trainer.forecast import Forecast, growth_bytes, tokens_of
from modelyard.trainer.model import CONFIG, WEIGHTS, adapter_config, adapter_weights, set_adapter_weights
from modelyard.trainer.packing import capacity_of
from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Spec
from modelyard.trainer.stepping import Left, Stepper, random_tensors, set_random_tensors

OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
BEST = "best.safetensors"
#: Beside the checkpoints: how large forward passes were found to fit, so that a restart finds no other.
SIZES = "forward_passes.json"
#: Without checkpoint_steps: a checkpoint each tenth of the training, and after so many seconds, ...
CHECKPOINT_S = 180.0
PARTS = 10
#: ... but writing them takes no more of the time than this.
CHECKPOINT_SHARE = 0.05
#: Rows that validation looks at while the training runs; the scores after it are another matter.
VALIDATION_ROWS = 256
VALIDATION_BATCH = 8
#: A forward pass that is estimated to take less than this of what is free is not tried before.
SURELY_FITS = 0.25


class Stop(Protocol):
    """Whether the training was asked to end, after the step that runs."""

    asked: bool


@dataclass
class Outcome:
    """How a training went: stopped after a step, or done, with these figures."""

    stopped: bool
    step: int
    figures: dict[str, Any]


@dataclass
class Progress:
    """What a checkpoint keeps of a training beside its curve."""

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
    #: Rows of a forward pass, each from a step on.
    sizes: list[list[int]] = field(default_factory=list)


class Training:
    """One attempt at a training; `checkpoints` says where the one before got to."""

    def __init__(
        self, spec: Spec, model: Any, rows: Rows, held_out: Rows, pad: int, report: Reports, checkpoints: Checkpoints,
        stop: Stop,
    ) -> None:  # fmt: skip
        self.model = model
        self.rows = rows
        self.pad = pad
        self.settings = spec.hyperparameters
        self.capacity = capacity_of(model, rows) if self.settings.packing else 0
        self.course = Course.of(self.settings, len(rows))
        self.total_steps = self.course.total_steps
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

    def run(self) -> Outcome:
        """Train to the end, or to where it is asked to stop. Raises JobFailure."""
        found = self._checkpoints.newest()
        if ranks.is_first():
            self._checkpoints.discard_unusable(found)
        moments = self._restore(found) if found is not None else None
        self._read_sizes()
        if self._needed(self.settings.batch_size or self.course.rows_per_step) > SURELY_FITS * self._free():
            memory.be_thrifty()
        if not self.progress.sizes:
            self._choose_size()
        self._curve = Curve(
            self._report, self.course, self.rows, found.state if found else {}, self._spec.tensorboard_dir
        )
        if found is None:
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

    def size_at(self, step: int) -> int:
        """Return how many rows a forward pass has at a step."""
        return next(size for begin, size in reversed(self.progress.sizes) if begin <= step)

    def shrink(self, step: int, error: BaseException) -> None:
        """Take half of the rows in a forward pass from a step on. Raises JobFailure `out_of_memory` if it may not."""
        rows = self.size_at(step)
        if self.settings.batch_size is not None or rows == 1:
            raise self._too_large(rows, error)
        self._set_size(step, max(1, rows // 2))
        self._report.note(
            f"Memory did not suffice for {rows} rows in a forward pass: {max(1, rows // 2)} from step {step + 1} on. "
            "Steps have the same rows as before.",
            "WARNING",
            batch_size=max(1, rows // 2),
        )

    def make_room(self) -> None:
        """Give back what a forward pass left."""
        memory.collect(self._spec.memory_bytes)

    def after_step(self, stepper: Stepper, step: Step) -> bool:
        """Take in a step that is done; return whether that was the last one for now."""
        self._curve.add(step, stepper.loss, stepper.norm, stepper.rate)
        if self._forecast is not None:
            self._forecast.after_step(self._curve.tokens, self._curve.seconds)
        done = self.progress.step = step.number + 1
        self.progress.padded_tokens += padded_tokens(self.rows, step.rows, self.size_at(step.number), self.capacity)
        self._report.progress(done, self.total_steps, "steps")
        if len(self._held_out) and self._validation_is_due(done):
            self._curve.pause()
            self._validate(done)
            self._curve.begin()
        if self._is_over() or stepper.is_to_end:
            return True
        if self._checkpoint_is_due(done):
            self._curve.pause()
            self._save(stepper)
            self._curve.begin()
        return False

    def loss(self, model: Any, micro: Micro) -> Any:
        """Return the sum of the losses of all that a forward pass teaches."""
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
        return functional.cross_entropy(flat.float(), micro.targets, reduction="sum")

    def expected_peak_bytes(self) -> int:
        """Return the most memory that it will have held in the end, as far as its first steps tell."""
        on_gpu = torch.cuda.is_available()
        size = self.size_at(self.progress.step)
        growth = 0 if on_gpu else growth_bytes(self.rows, self.steps(), size, self.capacity)
        return memory.peak_bytes() + growth

    # Validation.

    def _validation_is_due(self, done: int) -> bool:
        every = self.settings.checkpoint_steps
        if every is None:
            # Each epoch; of a training with few epochs, each tenth.
            every = min(self.course.steps_per_epoch, max(1, self.total_steps // PARTS))
            if self.total_steps >= PARTS * self.course.steps_per_epoch:
                every = self.course.steps_per_epoch
        return done % every == 0 or done == self.total_steps

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
        most = min(VALIDATION_BATCH, self.size_at(self.progress.step))
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
        state = {**self._curve.state(), **vars(progress), "python_random": random.getstate()}
        self._checkpoints.save(progress.step, tensors, {CONFIG: adapter_config(self.model)}, state)
        progress.checkpoints += 1
        progress.checkpoint_seconds += self._checkpoints.seconds - before
        self._saved_step, self._saved_at = progress.step, time.monotonic()

    def _restore(self, found: Checkpoint) -> dict[str, Any]:
        """Bring back what a checkpoint keeps, and return the optimizer's moments."""
        known = set(vars(self.progress))
        self.progress = Progress(**{name: value for name, value in found.state.items() if name in known})
        set_adapter_weights(self.model, found.tensors(WEIGHTS))
        if (found.folder / BEST).is_file():
            self._best = found.tensors(BEST)
        self._report.note(f"It goes on from the checkpoint of step {found.step}.", step=found.step)
        return found.tensors(OPTIMIZER)

    def _is_over(self) -> bool:
        return self.progress.finished or self.progress.step >= self.total_steps

    # How many rows a forward pass has.

    def _needed(self, rows: int) -> int:
        """Estimate what a forward and backward pass of so many of the longest rows takes."""
        dtype_bytes = next(self.model.get_base_model().parameters()).element_size()
        return memory.step_bytes(self.model.config, dtype_bytes, rows, int(self.rows.lengths.max()))

    def _free(self) -> int:
        trained = sum(each.numel() for each in self.model.parameters() if each.requires_grad)
        return memory.budget(self._spec.memory_bytes).free_bytes - memory.adapter_bytes(trained)

    def _choose_size(self) -> None:
        """Find how many rows of the longest fit. Raises JobFailure `out_of_memory` if not even what was asked for."""
        asked = self.settings.batch_size
        rows = asked or max(1, self.course.rows_per_step // self.settings.gradient_accumulation)
        free = self._free()
        while asked is None and rows > 1 and self._needed(rows) > free:
            rows = max(1, rows // 2)
        while self._needed(rows) > SURELY_FITS * free:
            error = self._try(rows)
            if error is None:
                break
            if asked is not None or rows == 1:
                raise self._too_large(rows, error)
            rows = max(1, rows // 2)
        rows = ranks.least(rows, self.model.device)
        self._set_size(0, rows)
        if asked is None:
            self._report.note(
                f"Steps have {self.course.rows_per_step} rows, {rows} at most in a forward pass.",
                rows_per_step=self.course.rows_per_step,
                batch_size=rows,
            )

    def _try(self, size: int) -> BaseException | None:
        """Take the longest rows forward and back and forget it; return the error if memory did not suffice."""
        before = random_tensors()
        longest = sorted(range(len(self.rows)), key=lambda row: -int(self.rows.lengths[row]))[:size]
        shortage = None
        self.model.train()
        try:
            self.loss(self.model, collate(self.rows, in_lines(self.rows, longest, 0), self.pad)).backward()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Without its frames, which hold the tensors that were too many.
            shortage = error.with_traceback(None)
        for each in self.model.parameters():
            each.grad = None
        self.make_room()
        set_random_tensors(before)
        return shortage

    def _too_large(self, rows: int, error: BaseException) -> JobFailure:
        # The error's frames hold what was too much, and would count as taken.
        error = error.with_traceback(None)
        self.make_room()
        longest = int(self.rows.lengths.max())
        allowed = memory.budget(self._spec.memory_bytes)
        needed = self._needed(rows)
        fitting = memory.suggestions(max(needed, allowed.free_bytes), allowed.free_bytes, rows, longest)
        words = " or ".join(f"{name} {value}" for name, value in fitting.items())
        return JobFailure(
            "out_of_memory",
            f"A forward pass of {rows} rows of up to {longest} tokens takes about {size(needed)}, and of the "
            f"{size(allowed.total_bytes)} that this training may take {size(allowed.free_bytes)} are free.",
            (f"What should fit: {words}. " if words else "Train a smaller model, or give it more memory. ")
            + ("With batch_size auto it looks by itself for what fits." if self.settings.batch_size else ""),
            [str(error).splitlines()[0][:300] if str(error) else type(error).__name__],
        )

    def _set_size(self, step: int, rows: int) -> None:
        self.progress.sizes.append([step, rows])
        if not ranks.is_first():
            return
        path = Path(self._spec.work_dir) / SIZES
        beside = path.with_name(f".{path.name}.partial")
        beside.write_text(json.dumps({"fingerprint": self._checkpoints.fingerprint, "sizes": self.progress.sizes}))
        sync(beside)
        os.rename(beside, path)

    def _read_sizes(self) -> None:
        """Take over what an attempt before found, be it after its last checkpoint."""
        try:
            found = json.loads((Path(self._spec.work_dir) / SIZES).read_text("utf-8"))
        except (OSError, ValueError):
            return
        if found.get("fingerprint") == self._checkpoints.fingerprint:
            self.progress.sizes = [[int(step), int(rows)] for step, rows in found["sizes"]]

    def figures(self) -> dict[str, Any]:
        """Return what the training came to."""
        curve, progress = self._curve, self.progress
        padding = progress.padded_tokens - curve.tokens
        return {
            "steps": progress.step,
            "epochs": round(self.course.epoch(progress.step), 4),
            "rows_per_step": self.course.rows_per_step,
            "processes": ranks.count(),
            "batch_size": self.size_at(progress.step),
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
            "peak_memory_bytes": max(progress.peak_memory_bytes, memory.peak_bytes()),
        }


def set_random(found: Checkpoint) -> None:
    """Bring back the state of chance from a checkpoint."""
    states = found.tensors(RANDOM)
    set_random_tensors([states[str(index)] for index in range(len(states))])
    version, numbers, gauss = found.state["python_random"]
    random.setstate((version, tuple(numbers), gauss))
