"""Settings that a request leaves open: rows of a step, epochs, learning rate, retention, by what there is to learn.

Memory has no say here: it bounds a forward pass, and a step has as many of them as it takes (`sizing`). The same rows,
settings and model give the same choice, so that every attempt at a training makes the same one. The numbers are those
of a sweep over small sets on a real small model (benchmarks/teaching.py; its results are in benchmarks/RESULTS.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelyard.trainer.spec import Hyperparameters

#: Rows of a step: a small set is taught by many small steps; a large one has enough, and larger ones are steadier.
FEWEST_ROWS, MOST_ROWS = 4, 16
#: Steps that an epoch has before its steps become larger than the smallest.
EPOCH_STEPS = 25
#: Steps that teach a small set what each of its rows says alone, and how often its rows are seen for that, at least and
#: at most. What they all say is learnt sooner, and then the training ends (`ending`).
ENOUGH_STEPS = 160
FEWEST_EPOCHS, MOST_EPOCHS = 3, 12
#: The loss per learnt token of an epoch below which rows are learnt. At twice that the loss of what is held back is as
#: low as it gets, but a third of 50 facts was still answered wrong.
LEARNT_LOSS = 0.1
#: Weight of the divergence from the base on ordinary texts (`retention`).
RETENTION = 1.0
#: The learning rate of steps of `FEWEST_ROWS`, of an adapter of rank `RANK` with twice that as alpha, on a model of
#: hidden size `HIDDEN`.
RATE, RANK, HIDDEN = 8e-4, 16, 576
#: Wider models take smaller steps, by this power of their width. Only `HIDDEN` was tried here; the rule brings a width
#: of 4,096 near to the 2e-4 that is usual there.
WIDTH_POWER = 0.75
#: Larger steps allow a higher rate. The root of their rows is what Adam's noise allows (S. Malladi et al., NeurIPS
#: 2022); this is less, since in the sweep higher rates cost the perplexity of ordinary text first.
ROWS_POWER = 0.25
LOWEST_RATE, HIGHEST_RATE = 2e-5, 2e-3


@dataclass(frozen=True)
class Chosen:
    """A value for a setting that was left open, and the reason in a sentence."""

    value: float | int
    why: str


def rows_per_step(settings: Hyperparameters, rows: int) -> int:
    """Return how many of so many rows one step learns from."""
    wanted = settings.batch_size or min(MOST_ROWS, max(FEWEST_ROWS, rows // EPOCH_STEPS))
    return max(1, min(wanted * settings.gradient_accumulation, rows))


def choose(settings: Hyperparameters, rows: int, config: Any) -> dict[str, Chosen]:
    """Return what is chosen for each of `batch_size`, `epochs`, `learning_rate` and `retention` that was left open.

    `rows` are those that are learnt from, `config` is the model's. `batch_size` is that of a step.
    """
    found: dict[str, Chosen] = {}
    per_step = rows_per_step(settings, rows)
    per_epoch = math.ceil(rows / per_step)
    if settings.batch_size is None:
        found["batch_size"] = Chosen(per_step, _why_rows(settings, rows, per_step, per_epoch))
    if settings.epochs is None and settings.max_steps is None:
        epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, ENOUGH_STEPS // per_epoch))
        found["epochs"] = Chosen(epochs, _why_epochs(epochs, per_epoch))
    if settings.learning_rate is None:
        found["learning_rate"] = _rate(settings, per_step, _width(config))
    if settings.retention is None:
        found["retention"] = Chosen(RETENTION, _WHY_RETENTION)
    return found


def filled(settings: Hyperparameters, chosen: Mapping[str, Chosen]) -> Hyperparameters:
    """Return the settings with what was chosen, and with the loss that ends epochs which were chosen.

    `batch_size` stays open: what was chosen is the rows of a step, and how many a forward pass has is up to memory.
    """
    named = {name: one.value for name, one in chosen.items() if name != "batch_size"}
    level = LEARNT_LOSS if "epochs" in chosen else settings.learnt_loss
    return replace(settings, **named, learnt_loss=level)  # type: ignore[arg-type]


def told(chosen: Mapping[str, Chosen]) -> dict[str, dict[str, Any]]:
    """Return a choice as JSON: `{name: {"value", "why"}}`."""
    return {name: {"value": one.value, "why": one.why} for name, one in chosen.items()}


def _why_rows(settings: Hyperparameters, rows: int, per_step: int, per_epoch: int) -> str:
    times = settings.gradient_accumulation
    steps = f"{rows} rows make {per_epoch} steps of {per_step} an epoch"
    if times > 1:
        return f"{steps}: {per_step // times or 1} times the gradient_accumulation of {times}."
    if per_step >= MOST_ROWS:
        return f"{steps}: more rows in a step would not make it steadier by much."
    if per_step > FEWEST_ROWS:
        return f"{steps}: enough of them that each may learn from more than {FEWEST_ROWS} rows."
    return f"{steps}: of few rows more is learnt by many small steps than by few large ones."


_WHY_RETENTION = (
    f"With a weight of {RETENTION:g} the adapter is held to what the base says of ordinary texts, of which each step "
    "reads one: without that a small set costs them a fifth of their perplexity and more."
)


def _why_epochs(epochs: int, per_epoch: int) -> str:
    steps = f"At most {epochs} epochs of {per_epoch} steps, {epochs * per_epoch} in all"
    ends = (
        f"it ends with the epoch after the one in which the rows' loss falls below {LEARNT_LOSS:g}, or in which the "
        "loss of the rows that are held back grows, if those are enough to tell. Estimates are for all epochs."
    )
    if epochs == FEWEST_EPOCHS:
        return f"{steps}: a set of this size has seen enough by then; {ends}"
    return f"{steps}, since a small set may have to be seen often; {ends}"


def _rate(settings: Hyperparameters, per_step: int, width: int | None) -> Chosen:
    # What a step of an adapter does to the model grows with its alpha, and alpha over the root of the rank keeps that
    # the same for all ranks (D. Kalajdzievski, arXiv:2312.03732, 2023).
    by_rows = (per_step / FEWEST_ROWS) ** ROWS_POWER
    by_rank = (2 * math.sqrt(RANK)) / (settings.alpha / math.sqrt(settings.rank))
    by_width = (HIDDEN / (width or 4 * HIDDEN)) ** WIDTH_POWER
    exact = min(HIGHEST_RATE, max(LOWEST_RATE, RATE * by_rows * by_rank * by_width))
    value = float(f"{exact:.2g}")
    of = f"of hidden size {width}" if width else "whose hidden size is not known"
    return Chosen(
        value,
        f"For steps of {per_step} rows, an adapter of rank {settings.rank} and alpha {settings.alpha:g}, and a model "
        f"{of}: more rows allow a higher rate, a larger adapter or a wider model wants a lower one.",
    )


def _width(config: Any) -> int | None:
    size = getattr(config.get_text_config(), "hidden_size", None)
    return size if isinstance(size, int) and size > 0 else None
