"""A few steps of a training, to measure them: its own steps, on its own rows, which nobody learns from in the end.

First the longest step there can be, for memory and to warm up, then typical ones, twice, since the first step of a
shape pays for its kernels. Steps of many forward passes are measured by one of theirs, and no further step is begun
after about half a minute.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modelyard.trainer.batches import Rows, Step, in_lines, padded_tokens
from modelyard.trainer.checkpoints import Checkpoints
from modelyard.trainer.examples import Prepared
from modelyard.trainer.loop import Training
from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Spec
from modelyard.trainer.stepping import Stepper

#: Steps that stand for all: those at the middles of so many equal parts of the steps by length.
TYPICAL = 4
MEASURING_S = 30.0


class _Never:
    """Nobody asks a trial to end: it has nothing to bring into safety first."""

    asked = False


class Trial(Training):
    """The training itself, but for which steps it takes, and for what happens after each."""

    @classmethod
    def of(cls, spec: Spec, model: Any, rows: Rows, prepared: Prepared, tokenizer: Any, report: Reports) -> Trial:
        """Return a trial of a training; its work folder is made where there is none."""
        work_dir = Path(spec.work_dir)
        work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        checkpoints = Checkpoints(work_dir, "plan", spec.disk_reserve_bytes, report)
        held_out = Rows([one.example for one in prepared.held_out])
        return cls(spec, model, rows, held_out, pad, report, checkpoints, _Never(), prepared.ordinary)

    def measure(self) -> tuple[float, int]:
        """Take the steps; return the seconds and the tokens of those that count.

        Raises:
            JobFailure: `out_of_memory`.
        """
        self.sizing.choose(self.course.rows_per_step, self.settings.gradient_accumulation)
        self.retention.begin(self.logits, self.model)
        longest, typical = self._chosen()
        taken = [replace(step, number=number) for number, step in enumerate([longest, *typical, *typical])]
        self._times: list[float] = []
        with tempfile.TemporaryDirectory(prefix=".plan-", dir=self._spec.work_dir) as folder:
            stepper = Stepper(self, taken, 0, None, folder)
            self._since = time.monotonic()
            self._deadline = self._since + MEASURING_S
            stepper.train()
        # Of the second round what there was of it, else of the first, else the longest step alone.
        done = len(self._times)
        first = next(begin for begin in (1 + len(typical), 1, 0) if begin < done)
        counted = list(zip(self._times, taken, strict=False))[first:]
        return sum(seconds for seconds, _ in counted), sum(step.tokens for _, step in counted)

    def after_step(self, stepper: Stepper, step: Step) -> bool:
        """Note how long a step took; return whether it was the last one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        self._times.append(now - self._since)
        self._since = now
        return now > self._deadline

    def validation_seconds(self) -> float:
        """Return what validation takes in all, by doing it once."""
        if not len(self._held_out):
            return 0.0
        began = time.monotonic()
        self.validation_loss()
        once = time.monotonic() - began
        return once * sum(self._validation_is_due(done) for done in range(1, self.total_steps + 1))

    def _chosen(self) -> tuple[Step, list[Step]]:
        """Return a step of the longest rows, and typical ones of the first epoch, by their length."""
        size = self.sizing.at(0)
        steps = sorted(self.steps().epoch(0), key=lambda chosen: padded_tokens(self.rows, chosen, size, self.capacity))
        typical = [steps[(2 * part + 1) * len(steps) // (2 * TYPICAL)] for part in range(TYPICAL)]
        longest = sorted(range(len(self.rows)), key=lambda row: -int(self.rows.lengths[row]))[:size]
        return self._step(longest), [self._step(self._middle(chosen, size)) for chosen in typical]

    def _step(self, chosen: Sequence[int]) -> Step:
        tokens, learnt = (int(each[list(chosen)].sum()) for each in (self.rows.lengths, self.rows.learnt))
        return Step(0, tuple(chosen), tokens, learnt)

    def _middle(self, chosen: Sequence[int], size: int) -> Sequence[int]:
        """Return the rows of the middle one of a step's forward passes."""
        lines = in_lines(self.rows, chosen, self.capacity)
        if len(lines) <= size:
            return chosen
        first = (-(-len(lines) // size) // 2) * size
        taken = {row for line in lines[first : first + size] for row in line}
        return [row for row in chosen if row in taken]
