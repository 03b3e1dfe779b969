"""Which rows a step learns from, and how they become tensors: little padding, and the same for the same seed.

A step is so many rows, in as many forward passes (`Micro`) as memory asks for and padding recommends: those of one
are a part of the step's, alike in length. The order depends on (seed, epoch) alone, so that a training that goes on
from a checkpoint sees the rows that it would have seen. Rows are padded on the right and no mask is made: attention
looks only back, so that no token that counts ever sees padding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelyard.trainer import ranks
from modelyard.trainer.rows import Example
from modelyard.trainer.spec import Hyperparameters

IGNORED = -100
#: Rows of a step where the batch size is left to us: enough for a steady gradient.
AUTO_ROWS = 16
#: Steps of an epoch at least, where the batch size is left to us: few rows are not all learnt at once.
AUTO_STEPS = 5
#: Rows of so many steps are sorted by length together, ...
GROUPED_STEPS = 50
#: ... but an epoch has so many groups at least, or its batches would be the same each time.
GROUPS = 4
#: Lengths are rounded up to so many steps between a power of two and the next, of 8 tokens at least: kernels are made
#: for each shape that they see, which takes more time and memory than some padding.
WIDTHS = 16
ALIGNED = 8
#: What a forward pass costs beside its tokens, as so many of them: on a processor, and on a GPU (estimated).
PASS_TOKENS, GPU_PASS_TOKENS = 128, 2048
#: Of steps with more to compare than this, forward passes are all of one size but the last.
COMPARED = 1 << 16


class Rows:
    """Tokenised rows in flat arrays: a Python list of numbers takes ten times the memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.lengths = np.fromiter((len(each.input_ids) for each in examples), np.int64, len(examples))
        self.lines = np.fromiter((each.line for each in examples), np.int64, len(examples))
        self._ends = np.cumsum(self.lengths)
        total = int(self._ends[-1]) if len(examples) else 0
        self._ids = np.fromiter((token for each in examples for token in each.input_ids), np.int32, total)
        self._labels = np.fromiter((label for each in examples for label in each.labels), np.int32, total)
        # The first token of a row is never predicted.
        self.learnt = np.fromiter(
            (sum(label != IGNORED for label in each.labels[1:]) for each in examples), np.int64, len(examples)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, row: int) -> Any:
        """Return a row's tokens."""
        return self._ids[self._ends[row] - self.lengths[row] : self._ends[row]]

    def labels(self, row: int) -> Any:
        """Return what a row's tokens teach: themselves, or IGNORED."""
        return self._labels[self._ends[row] - self.lengths[row] : self._ends[row]]

    def update(self, digest: Any) -> None:
        """Feed a hash with all that is learnt from these rows."""
        for array in (self.lengths, self.lines, self._ids, self._labels):
            digest.update(np.ascontiguousarray(array).tobytes())


@dataclass(frozen=True)
class Course:
    """How long a training is: rows of a step, steps of an epoch, steps in all."""

    rows_per_step: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, settings: Hyperparameters, rows: int) -> Course:
        """Return the course of a training over so many rows."""
        wanted = settings.batch_size or max(1, min(AUTO_ROWS, rows // AUTO_STEPS))
        per_step = min(wanted * settings.gradient_accumulation, rows)
        per_epoch = math.ceil(rows / per_step)
        if settings.max_steps is not None:
            return cls(per_step, per_epoch, settings.max_steps)
        return cls(per_step, per_epoch, max(1, math.ceil((settings.epochs or 1.0) * per_epoch)))

    def epoch(self, step: int) -> float:
        """Return how many times the rows were seen after a step."""
        return step / self.steps_per_epoch


@dataclass(frozen=True)
class Step:
    """One step of the optimizer: its rows, longest first. `tokens` are those of the rows, without padding."""

    number: int
    rows: tuple[int, ...]
    tokens: int
    learnt: int


class Steps:
    """The steps of a training from `start` on, in their order."""

    def __init__(self, rows: Rows, course: Course, seed: int, start: int = 0) -> None:
        self._rows = rows
        self._course = course
        self._seed = seed
        self._start = start

    def __len__(self) -> int:
        return self._course.total_steps - self._start

    def __iter__(self) -> Iterator[Step]:
        number = self._start
        while number < self._course.total_steps:
            epoch, first = divmod(number, self._course.steps_per_epoch)
            for chosen in self.epoch(epoch)[first : first + self._course.total_steps - number]:
                tokens, learnt = (int(each[list(chosen)].sum()) for each in (self._rows.lengths, self._rows.learnt))
                yield Step(number, chosen, tokens, learnt)
                number += 1

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """Return the rows of each step of an epoch."""
        chance = random.Random(f"{self._seed}:{epoch}")
        order = list(range(len(self._rows)))
        chance.shuffle(order)
        per_step = self._course.rows_per_step
        grouped = per_step * max(1, min(GROUPED_STEPS, self._course.steps_per_epoch // GROUPS))
        lengths = self._rows.lengths
        steps = []
        for begin in range(0, len(order), grouped):
            group = sorted(order[begin : begin + grouped], key=lambda row: -int(lengths[row]))
            steps += [tuple(group[at : at + per_step]) for at in range(0, len(group), per_step)]
        chance.shuffle(steps)
        return steps


@dataclass(frozen=True)
class Micro:
    """What one forward pass takes: `input_ids` of rows by positions; of the flattened logits at the positions `kept`
    those at `chosen` are held against `targets`.
    """

    input_ids: Any
    kept: Any
    chosen: Any
    targets: Any

    def to(self, device: Any) -> Micro:
        """Return it on a device."""
        if device.type == "cpu":
            return self
        parts = (self.input_ids, self.kept, self.chosen, self.targets)
        return Micro(*(part.pin_memory().to(device, non_blocking=True) for part in parts))


def micros(rows: Rows, chosen: Sequence[int], size: int, pad: int) -> Iterator[Micro]:
    """Yield this process's share of a step's rows, which come longest first, in forward passes of at most `size`."""
    for part in ranks.share(passes(rows, chosen, size)):
        yield collate(rows, part, pad)


def passes(rows: Rows, chosen: Sequence[int], size: int) -> list[Sequence[int]]:
    """Return a step's rows, which come longest first, cut into the forward passes that cost least together.

    A pass of many rows costs their padding, many passes cost `PASS_TOKENS` each. The gradient is the same either way.
    """
    import torch

    if len(chosen) * size > COMPARED:
        return [chosen[begin : begin + size] for begin in range(0, len(chosen), size)]
    each = GPU_PASS_TOKENS if torch.cuda.is_available() else PASS_TOKENS
    widths = [padded(int(rows.lengths[row])) for row in chosen]
    # The least cost of the first rows, by how many they are, and where the last pass of that begins.
    costs, begins = [0], [0]
    for end in range(1, len(chosen) + 1):
        cost, begin = min(
            (costs[begin] + (end - begin) * widths[begin] + each, begin) for begin in range(max(0, end - size), end)
        )
        costs.append(cost)
        begins.append(begin)
    parts, end = [], len(chosen)
    while end:
        parts.append(chosen[begins[end] : end])
        end = begins[end]
    return parts[::-1]


def collate(rows: Rows, chosen: Sequence[int], pad: int) -> Micro:
    """Return some rows as tensors."""
    import torch

    longest = max(int(rows.lengths[row]) for row in chosen)
    width = padded(longest)
    ids: Any = np.full((len(chosen), width), pad, np.int64)
    labels: Any = np.full((len(chosen), width), IGNORED, np.int64)
    for index, row in enumerate(chosen):
        length = rows.lengths[row]
        ids[index, :length] = rows.ids(row)
        labels[index, :length] = rows.labels(row)
    # What stands at a position is predicted from the one before.
    following = labels[:, 1:]
    learnt = following != IGNORED
    kept = np.flatnonzero(learnt.any(axis=0))
    learnt_kept = learnt[:, kept]
    return Micro(
        torch.from_numpy(ids),
        torch.from_numpy(kept),
        torch.from_numpy(np.flatnonzero(learnt_kept)),
        torch.from_numpy(following[:, kept][learnt_kept]),
    )


def padded_tokens(rows: Rows, chosen: Sequence[int], size: int) -> int:
    """Return how many tokens a step's forward passes take with their padding."""
    return sum(len(part) * padded(int(rows.lengths[part[0]])) for part in passes(rows, chosen, size))


def padded(length: int) -> int:
    """Return how long a row is made whose batch's longest has this length: at most a sixteenth more, or to 8 tokens."""
    unit = max(ALIGNED, (1 << (length - 1).bit_length()) // 2 // WIDTHS)
    return -(-length // unit) * unit
