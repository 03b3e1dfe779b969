"""The number of lines in a forward pass: as many as were asked for, or as many as memory takes, which is tried.

What was found is kept beside the checkpoints at once, so that an attempt which goes on finds no other: another size
sums in another order, and the weights would not be the same. Where memory does not suffice later on, passes become
smaller from that step on; a step's rows stay the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modelyard.errors import JobFailure
from modelyard.evidence import in_words
from modelyard.plurals import counted
from modelyard.trainer import memory, ranks
from modelyard.trainer.batches import Micro, Rows, collate, in_lines
from modelyard.trainer.checkpoints import sync
from modelyard.trainer.failures import is_out_of_memory, size
from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Spec
from modelyard.trainer.stepping import random_tensors, set_random_tensors

SIZES = "forward_passes.json"
#: A forward pass that is estimated to take less than this of what is free is not tried before.
SURELY_FITS = 0.25


class Sizing:
    """The sizes of one training's forward passes: `taken` are pairs of a step and the lines from that step on.

    `capacity` as in `batches.micros`; `loss` is the training's, `fingerprint` that of its checkpoints.
    """

    def __init__(
        self, spec: Spec, model: Any, rows: Rows, pad: int, capacity: int, report: Reports, fingerprint: str,
        loss: Callable[[Any, Micro], Any],
    ) -> None:  # fmt: skip
        self.taken: list[list[int]] = []
        self._spec = spec
        self._asked = spec.hyperparameters.batch_size
        self._model = model
        self._rows = rows
        self._pad = pad
        self._capacity = capacity
        self._report = report
        self._fingerprint = fingerprint
        self._loss = loss

    def at(self, step: int) -> int:
        """Return how many lines a forward pass has at a step."""
        return next(lines for begin, lines in reversed(self.taken) if begin <= step)

    def begin(self, rows_per_step: int, accumulation: int) -> None:
        """Take over what an attempt before found, or find it. Raises JobFailure as `choose` does."""
        self._read()
        if self._needed(self._asked or rows_per_step) > SURELY_FITS * self._free():
            memory.be_thrifty()
        if not self.taken:
            self.choose(rows_per_step, accumulation)

    def choose(self, rows_per_step: int, accumulation: int) -> None:
        """Find how many of the longest fit.

        Raises:
            JobFailure: `out_of_memory`: not even one, or not as many as were asked for.
        """
        rows = self._asked or max(1, rows_per_step // accumulation)
        free = self._free()
        while self._asked is None and rows > 1 and self._needed(rows) > free:
            rows = max(1, rows // 2)
        while self._needed(rows) > SURELY_FITS * free:
            error = self._try(rows)
            if error is None:
                break
            if self._asked is not None or rows == 1:
                raise self._too_large(rows, error)
            rows = max(1, rows // 2)
        rows = ranks.least(rows, self._model.device)
        self._set(0, rows)
        if self._asked is None:
            self._report.note(
                f"Steps have {counted(rows_per_step, 'row')}, {rows} at most in a forward pass.",
                rows_per_step=rows_per_step,
                batch_size=rows,
            )

    def shrink(self, step: int, error: BaseException) -> None:
        """Take half from a step on. Raises JobFailure `out_of_memory` if it may not."""
        rows = self.at(step)
        if self._asked is not None or rows == 1:
            raise self._too_large(rows, error)
        self._set(step, max(1, rows // 2))
        self._report.note(
            f"Memory did not suffice for {counted(rows, 'row')} in a forward pass: {max(1, rows // 2)} from step "
            f"{step + 1} on. Steps have the same rows as before.",
            "WARNING",
            batch_size=max(1, rows // 2),
        )

    def make_room(self) -> None:
        """Give back what a forward pass left."""
        memory.collect(self._spec.memory_bytes)

    def _needed(self, rows: int) -> int:
        """Estimate what a forward and backward pass of so many of the longest rows takes."""
        dtype_bytes = next(self._model.get_base_model().parameters()).element_size()
        return memory.step_bytes(self._model.config, dtype_bytes, rows, int(self._rows.lengths.max()))

    def _free(self) -> int:
        trained = sum(each.numel() for each in self._model.parameters() if each.requires_grad)
        return memory.budget(self._spec.memory_bytes).free_bytes - memory.adapter_bytes(trained)

    def _try(self, count: int) -> BaseException | None:
        """Take the longest rows forward and back and forget it; return the error if memory did not suffice."""
        before = random_tensors()
        longest = sorted(range(len(self._rows)), key=lambda row: -int(self._rows.lengths[row]))[:count]
        micro = collate(self._rows, in_lines(self._rows, longest, 0), self._pad)
        if self._capacity:
            # As if two rows were in each: only then there is a mask.
            half = micro.input_ids.shape[1] // 2
            micro = replace(micro, positions=torch.arange(2 * half).remainder(half).expand(len(longest), -1))
        shortage = None
        self._model.train()
        try:
            self._loss(self._model, micro).backward()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Without its frames, which hold the tensors that were too many.
            shortage = error.with_traceback(None)
        for each in self._model.parameters():
            each.grad = None
        self.make_room()
        set_random_tensors(before)
        return shortage

    def _too_large(self, rows: int, error: BaseException) -> JobFailure:
        # The error's frames hold what was too much, and would count as taken.
        error = error.with_traceback(None)
        self.make_room()
        longest = int(self._rows.lengths.max())
        allowed = memory.budget(self._spec.memory_bytes)
        needed = self._needed(rows)
        fitting = memory.suggestions(max(needed, allowed.free_bytes), allowed.free_bytes, rows, longest)
        words = " or ".join(f"{name} {value}" for name, value in fitting.items())
        return JobFailure(
            "out_of_memory",
            f"A forward pass of {counted(rows, 'row')} of up to {counted(longest, 'token')} takes about "
            f"{size(needed)}, and of the {size(allowed.total_bytes)} that this training may take "
            f"{size(allowed.free_bytes)} are free.",
            (f"What should fit: {words}. " if words else "Train a smaller model, or give it more memory. ")
            + ("With batch_size auto it looks by itself for what fits." if self._asked else ""),
            [in_words(error)],
        )

    def _set(self, step: int, rows: int) -> None:
        self.taken.append([step, rows])
        if not ranks.is_first():
            return
        path = Path(self._spec.work_dir) / SIZES
        beside = path.with_name(f".{path.name}.partial")
        beside.write_text(json.dumps({"fingerprint": self._fingerprint, "sizes": self.taken}))
        sync(beside)
        os.rename(beside, path)

    def _read(self) -> None:
        """Take over what an attempt before found, be it after its last checkpoint."""
        try:
            found = json.loads((Path(self._spec.work_dir) / SIZES).read_text("utf-8"))
        except (OSError, ValueError):
            return
        if found.get("fingerprint") == self._fingerprint:
            self.taken = [[int(step), int(rows)] for step, rows in found["sizes"]]
