"""The rows that a step learns from, and their tensors: little padding, and the same for the same seed.

A step is so many rows, in as many forward passes (`Micro`) as memory asks for and padding recommends: those of one
are a part of the step's, alike in length. The order depends on (seed, epoch) alone, so that a training that goes on
from a checkpoint sees the rows that it would have seen. Rows are padded on the right and no mask is made: attention
looks only back, so that no token that counts ever sees padding. Packed, rows follow one another in a `Line`, and their
positions, which begin anew with each, keep their attention apart (`packing`).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelyard.trainer import choices, ranks
from modelyard.trainer.examples import Example
from modelyard.trainer.spec import Hyperparameters

IGNORED = -100
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

#: Rows that follow one another in one row of a forward pass; a single one where nothing is packed.
Line = tuple[int, ...]


class Rows:
    """Tokenised rows in flat arrays: a Python list of numbers takes ten times the memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.lengths = np.fromiter((len(each.input_ids) for each in examples), np.int64, len(examples))
        self.lines = np.fromiter((each.line for each in examples), np.int64, len(examples))
        self._ends = np.cumsum(self.lengths)
        total = int(self._ends[-1]) if len(examples) else 0
        self._ids: Any = np.empty(total, np.int32)
        self._labels: Any = np.empty(total, np.int32)
        self.learnt: Any = np.zeros(len(examples), np.int64)
        for row, each in enumerate(examples):
            labels = self.labels(row)
            self.ids(row)[:], labels[:] = each.input_ids, each.labels
            # The first token of a row is never predicted.
            self.learnt[row] = np.count_nonzero(labels[1:] != IGNORED)

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
    """The length of a training: rows of a step, steps of an epoch, steps in all."""

    rows_per_step: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, settings: Hyperparameters, rows: int) -> Course:
        """Return the course of a training over so many rows; its epochs have been chosen (`choices.filled`)."""
        per_step = choices.rows_per_step(settings, rows)
        per_epoch = math.ceil(rows / per_step)
        if settings.max_steps is not None:
            return cls(per_step, per_epoch, settings.max_steps)
        assert settings.epochs is not None
        return cls(per_step, per_epoch, max(1, math.ceil(settings.epochs * per_epoch)))

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

    def __init__(self, rows: Rows, course: Course, seed: int, start: int = 0, *, is_grouped: bool = True) -> None:
        """`is_grouped`: those of a step are alike in length, where they are padded; packed they need not be."""
        self._rows = rows
        self._course = course
        self._seed = seed
        self._start = start
        self._is_grouped = is_grouped

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
        together = max(1, min(GROUPED_STEPS, self._course.steps_per_epoch // GROUPS)) if self._is_grouped else 1
        grouped = per_step * together
        lengths = self._rows.lengths
        steps = []
        for begin in range(0, len(order), grouped):
            group = sorted(order[begin : begin + grouped], key=lambda row: -int(lengths[row]))
            steps += [tuple(group[at : at + per_step]) for at in range(0, len(group), per_step)]
        chance.shuffle(steps)
        return steps


@dataclass(frozen=True)
class Micro:
    """The input of one forward pass: `input_ids` of lines by positions; of the flattened logits at the positions `kept`
    those at `chosen` are held against `targets`. `positions` are those within each row, None where a line is one row.
    """

    input_ids: Any
    kept: Any
    chosen: Any
    targets: Any
    positions: Any = None

    def to(self, device: Any) -> Micro:
        """Return it on a device."""
        if device.type == "cpu":
            return self
        parts = (self.input_ids, self.kept, self.chosen, self.targets, self.positions)
        moved = (part if part is None else part.pin_memory().to(device, non_blocking=True) for part in parts)
        return Micro(*moved)


def micros(rows: Rows, chosen: Sequence[int], size: int, pad: int, capacity: int = 0) -> Iterator[Micro]:
    """Yield this process's share of a step's rows, which come longest first, in forward passes of at most `size` lines.

    `capacity` is what of rows is packed into one line, in tokens; 0: each is a line of its own.
    """
    for part in ranks.share(passes(rows, in_lines(rows, chosen, capacity), size)):
        yield collate(rows, part, pad)


def in_lines(rows: Rows, chosen: Sequence[int], capacity: int) -> list[Line]:
    """Return rows, which come longest first, packed into few lines of so many tokens, the longest line first.

    Each goes where it leaves least free (best fit decreasing; D. S. Johnson et al., SIAM J. Comput. 3, 1974).
    """
    if not capacity:
        return [(row,) for row in chosen]
    lines: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for row in chosen:
        length = int(rows.lengths[row])
        at = bisect_left(free, (length, 0))
        if at < len(free):
            left, line = free.pop(at)
        else:
            left, line = capacity, len(lines)
            lines.append([])
        lines[line].append(row)
        insort(free, (left - length, line))
    return sorted(map(tuple, lines), key=lambda line: -line_length(rows, line))


def line_length(rows: Rows, line: Line) -> int:
    """Return how many tokens a line has."""
    return sum(int(rows.lengths[row]) for row in line)


def passes(rows: Rows, lines: Sequence[Line], size: int) -> list[Sequence[Line]]:
    """Return a step's lines, which come longest first, cut into the forward passes that cost least together.

    A pass of many lines costs their padding, many passes cost `PASS_TOKENS` each. The gradient is the same either way.
    """
    import torch

    if len(lines) * size > COMPARED:
        return [lines[begin : begin + size] for begin in range(0, len(lines), size)]
    each = GPU_PASS_TOKENS if torch.cuda.is_available() else PASS_TOKENS
    widths = [padded(line_length(rows, line)) for line in lines]
    # The least cost of the first lines, by how many they are, and where the last pass of that begins.
    costs, begins = [0], [0]
    for end in range(1, len(lines) + 1):
        cost, begin = min(
            (costs[begin] + (end - begin) * widths[begin] + each, begin) for begin in range(max(0, end - size), end)
        )
        costs.append(cost)
        begins.append(begin)
    parts, end = [], len(lines)
    while end:
        parts.append(lines[begins[end] : end])
        end = begins[end]
    return parts[::-1]


def collate(rows: Rows, lines: Sequence[Line], pad: int) -> Micro:
    """Return some lines as tensors."""
    import torch

    width = padded(max(line_length(rows, line) for line in lines))
    ids: Any = np.full((len(lines), width), pad, np.int64)
    labels: Any = np.full((len(lines), width), IGNORED, np.int64)
    positions: Any = np.zeros((len(lines), width), np.int64)
    for index, line in enumerate(lines):
        begin = 0
        for row in line:
            end = begin + int(rows.lengths[row])
            ids[index, begin:end] = rows.ids(row)
            # The first token of a row is never predicted, least of all from the row before.
            labels[index, begin + 1 : end] = rows.labels(row)[1:]
            positions[index, begin:end] = np.arange(end - begin)
            begin = end
        # What is padded is like one more row, which nobody sees.
        positions[index, begin:] = np.arange(width - begin)
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
        torch.from_numpy(positions) if any(len(line) > 1 for line in lines) else None,
    )


def padded_tokens(rows: Rows, chosen: Sequence[int], size: int, capacity: int = 0) -> int:
    """Return how many tokens a step's forward passes take with their padding."""
    parts = passes(rows, in_lines(rows, chosen, capacity), size)
    return sum(len(part) * padded(line_length(rows, part[0])) for part in parts)


def padded(length: int) -> int:
    """Return how long a row is made whose batch's longest has this length: at most a sixteenth more, or to 8 tokens."""
    unit = max(ALIGNED, (1 << (length - 1).bit_length()) // 2 // WIDTHS)
    return -(-length // unit) * unit
