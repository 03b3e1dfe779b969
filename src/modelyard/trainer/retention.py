"""Retention: a training holds on to what the base says of ordinary texts while an adapter learns something else.

Beside its rows each step reads one of a few ordinary texts and answers (`ordinary.jsonl`), and what the adapter
predicts there is drawn to what the base does: the loss has the Kullback-Leibler divergence per token, times a weight,
beside it (Z. Li and D. Hoiem, "Learning without Forgetting", arXiv:1606.09282, with texts of ours in place of the new
task's). Nobody learns what the texts say. Without it a small set that is taught in a minute changes how likely any
text is: by a fifth and more in perplexity, measured in benchmarks/RESULTS.md.

The base's predictions are made once, before the first step: of each token the likeliest, and all others as one. The
same step reads the same text, so that a training that goes on takes the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelyard.trainer import ranks
from modelyard.trainer.batches import IGNORED, Micro, Rows, collate
from modelyard.trainer.examples import Example

#: Predictions in a text, or in an answer, that are held: more cost time in every step.
MOST_TOKENS = 64
#: Tokens that are told apart at a position; they have nearly all of the probability.
LIKELIEST = 256


@dataclass(frozen=True)
class Known:
    """The base's predictions at the chosen positions: tokens, their log probabilities, and that of all others."""

    tokens: Any
    likely: Any
    others: Any


class Retention:
    """The texts of one training with the base's predictions. `weight` is that of their divergence in the loss."""

    def __init__(self, examples: Sequence[Example], weight: float, pad: int) -> None:
        rows = Rows([_begun(one) for one in examples])
        self._micros = [collate(rows, [(row,)], pad) for row in range(len(rows)) if rows.learnt[row]] if weight else []
        self._weight = weight
        self._known: list[Known] = []

    def begin(self, logits: Callable[[Any, Micro], Any], model: Any) -> None:
        """Note what the base predicts. `model` is the PeftModel, `logits` gives those of a micro's chosen positions."""
        if not self._micros:
            return
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), model.disable_adapter():
                self._known = [known_of(logits(model, micro)) for micro in self._micros]
        finally:
            model.train(was_training)

    def loss(self, logits: Callable[[Any, Micro], Any], model: Any, step: int) -> Any:
        """Return what a step's loss has beside that of its rows; None: nothing, or another process has it."""
        if not self._known or not ranks.is_first():
            return None
        number = step % len(self._known)
        return self._weight * divergence(self._known[number], logits(model, self._micros[number]))


def _begun(whole: Example) -> Example:
    """Return the beginning of a text, or a question with the beginning of its answer."""
    held = [at for at, label in enumerate(whole.labels) if label != IGNORED][:MOST_TOKENS]
    end = held[-1] + 1 if held else 1
    return Example(whole.line, whole.input_ids[:end], whole.labels[:end])


def known_of(logits: Any) -> Known:
    """Return what the base predicts, of its logits (tokens, all)."""
    likely, tokens = torch.log_softmax(logits, -1).topk(min(LIKELIEST, logits.shape[-1] - 1))
    return Known(tokens, likely, _others(logits, tokens))


def divergence(known: Known, logits: Any) -> Any:
    """Return the mean Kullback-Leibler divergence from the base's predictions to those of logits (tokens, all)."""
    likely = torch.log_softmax(logits, -1).gather(-1, known.tokens)
    of_likely = (known.likely.exp() * (known.likely - likely)).sum(-1)
    of_others = known.others.exp() * (known.others - _others(logits, known.tokens))
    return (of_likely + of_others).mean()


def _others(logits: Any, tokens: Any) -> Any:
    """Return the log of the probability of all tokens but these."""
    left = logits.scatter(-1, tokens, -torch.inf)
    return torch.logsumexp(left, -1) - torch.logsumexp(logits, -1)
