"""Beam search as transformers' `generate` defines it, over log probabilities that somebody else computes.

The source of the definition is `GenerationMixin._beam_search` of transformers 5, with `early_stopping` false: every
step scores `kept` continuations of all beams together (`max(2, 1 + ending tokens) * num_beams`); one that ends is
taken up if it is among the first `num_beams` of them, with its sum divided by its length, the prompt not counted, to
the power of `length_penalty`; and the search is over when the best running beam cannot beat the worst of `num_beams`
texts that have ended. Repetition penalty applies to log probabilities, of the prompt's tokens too. With `do_sample`,
temperature, `top_k` and `top_p` shape each beam's candidates, and the continuations are drawn without replacement.

An engine gives the likeliest tokens of a beam and not all of them. `advance` works out whether those suffice for
exactly the result that all would give, and asks for more where they do not: a penalty below 1 can lift a token from
far below, and one above 1 can push down all that are known.

Two things differ on purpose. Sums are kept in double precision. And transformers marks what is missing with a score of
-1e9; a strong negative `length_penalty` comes below it, and then it answers nothing. Here what is missing is missing.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Asks for every token of the vocabulary.
ALL = -1
#: Above this many candidates it is all of them.
MOST_COUNTED = 2048
GROWTH = 4


@dataclass(frozen=True)
class Rules:
    """What the search is to do. `top_k` 0 is off. `eos_ids` are the tokens that end a text."""

    num_beams: int
    max_new_tokens: int
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    eos_ids: frozenset[int] = frozenset()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def kept(self) -> int:
        """How many continuations are looked at in a step: enough that `num_beams` of them have not ended."""
        return max(2, 1 + len(self.eos_ids)) * self.num_beams

    @property
    def least_shaped(self) -> int:
        """How many candidates of a beam `top_k` and `top_p` leave at least: one of them does not end."""
        return len(self.eos_ids) + 1 if self.eos_ids else 2


@dataclass(frozen=True)
class Row:
    """What an engine says of the next token of a beam: log probabilities by token, of all tokens if `is_all`."""

    logprobs: Mapping[int, float]
    is_all: bool = False


@dataclass(frozen=True)
class Beam:
    """A text that is being searched: its new tokens, and the sum of what they scored."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class _Candidate:
    beam: Beam
    token: int
    score: float


class Search:
    """The search for the continuation of one prompt.

    Ask the engine for the `count` likeliest next tokens of each of `open_texts` (ALL: for every token), and hand the
    rows to `advance`, until `is_over`; then `best` is the text.
    """

    def __init__(self, prompt_ids: Sequence[int], rules: Rules, chance: random.Random) -> None:
        self._prompt = list(prompt_ids)
        self._rules = rules
        self._chance = chance
        self._running = [Beam((), 0.0)]
        #: Texts that have ended, the best first, with their scores.
        self._ended: list[Beam] = []
        self.is_over = False
        self.count = self._first_count()

    @property
    def open_texts(self) -> list[list[int]]:
        """The running beams, each with the prompt before it."""
        return [self._prompt + list(beam.ids) for beam in self._running]

    @property
    def best(self) -> list[int]:
        """The new tokens of the best text, which is complete once the search is over."""
        return list(self._ended[0].ids)

    def advance(self, rows: Sequence[Row]) -> bool:
        """Take one step with what the engine says of `open_texts`; False if that is too little for it.

        Then nothing has changed but `count`.
        """
        shaped = [self._shape(beam, row) for beam, row in zip(self._running, rows, strict=True)]
        candidates = [one for each in shaped if each is not None for one in each]
        if None in shaped or not self._suffices(candidates, rows):
            self.count = self._more()
            return False
        self.count = self._least_count(candidates, rows)
        self._step(self._choose(candidates))
        return True

    def _first_count(self) -> int:
        rules = self._rules
        if rules.do_sample:
            if rules.top_k <= 0:
                return ALL
            count = max(rules.top_k, rules.least_shaped)
        else:
            count = rules.kept
        if rules.repetition_penalty != 1:
            count *= 2
        return count if count <= MOST_COUNTED else ALL

    def _more(self) -> int:
        count = self.count * GROWTH
        return count if self.count != ALL and count <= MOST_COUNTED else ALL

    def _shape(self, beam: Beam, row: Row) -> list[_Candidate] | None:
        """Return a beam's candidates with their scores as the rules have them; None if the row is too short for it."""
        rules = self._rules
        penalised = self._penalised(beam, row.logprobs)
        if rules.do_sample:
            most = max(rules.top_k, rules.least_shaped) if rules.top_k > 0 else len(penalised)
            if not row.is_all and (rules.top_k <= 0 or len(penalised) < most):
                return None
            tokens = heapq.nlargest(most, penalised, key=lambda token: (penalised[token], -token))
            if not row.is_all and penalised[tokens[-1]] < self._unseen(beam, row):
                return None
            scores = {token: penalised[token] / rules.temperature for token in tokens}
            penalised = _nucleus(scores, rules.top_p, rules.least_shaped)
        return [_Candidate(beam, token, beam.score + score) for token, score in penalised.items()]

    def _penalised(self, beam: Beam, logprobs: Mapping[int, float]) -> Mapping[int, float]:
        penalty = self._rules.repetition_penalty
        if penalty == 1:
            return logprobs
        occurs = {*self._prompt, *beam.ids}
        return {
            token: logprob if token not in occurs else logprob * penalty if logprob < 0 else logprob / penalty
            for token, logprob in logprobs.items()
        }

    def _unseen(self, beam: Beam, row: Row, least: float | None = None) -> float:
        """Return the most that a token can score which the row does not tell, or none at or below `least`."""
        least = min(row.logprobs.values()) if least is None else least
        penalty = self._rules.repetition_penalty
        if penalty < 1:
            told = (token for token, logprob in row.logprobs.items() if logprob >= least)
            if not {*self._prompt, *beam.ids}.issubset(told):
                return least * penalty
        return least

    def _suffices(self, candidates: list[_Candidate], rows: Sequence[Row]) -> bool:
        """Whether no token that the rows do not tell could be among those that are kept."""
        if self._rules.do_sample or all(row.is_all for row in rows):
            return True
        if len(candidates) < self._rules.kept:
            return False
        threshold = self._threshold(candidates)
        return all(
            row.is_all or beam.score + self._unseen(beam, row) <= threshold
            for beam, row in zip(self._running, rows, strict=True)
        )

    def _threshold(self, candidates: list[_Candidate]) -> float:
        return heapq.nlargest(self._rules.kept, (one.score for one in candidates))[-1]

    def _least_count(self, candidates: list[_Candidate], rows: Sequence[Row]) -> int:
        """Return how many tokens to ask for next: as many as would have sufficed now."""
        count = self._first_count()
        if self._rules.do_sample or self.count == count or len(candidates) < self._rules.kept:
            return count
        threshold = self._threshold(candidates)
        ordered = [sorted(row.logprobs.values(), reverse=True) for row in rows]
        while count != ALL and (self.count == ALL or count < self.count):
            if all(
                beam.score + self._unseen(beam, row, values[min(count, len(values)) - 1]) <= threshold
                for beam, row, values in zip(self._running, rows, ordered, strict=True)
            ):
                return count
            count = count * GROWTH if count * GROWTH <= MOST_COUNTED else ALL
        return self.count

    def _choose(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Return the continuations of this step in their order: the best, or as they were drawn."""
        if not self._rules.do_sample:
            # Of equals the one of the earlier beam and the lower token, as from a flat list of all of them.
            place = {id(beam): number for number, beam in enumerate(self._running)}
            return heapq.nlargest(
                self._rules.kept, candidates, key=lambda one: (one.score, -place[id(one.beam)], -one.token)
            )
        # The largest of scores with Gumbel noise are a draw without replacement from their softmax, in its order.
        noisy = [(one.score - math.log(self._chance.expovariate(1.0)), one) for one in candidates]
        return [one for _, one in heapq.nlargest(self._rules.kept, noisy, key=lambda each: each[0])]

    def _step(self, chosen: list[_Candidate]) -> None:
        rules = self._rules
        length = len(self._running[0].ids) + 1
        is_last = length >= rules.max_new_tokens
        running: list[Beam] = []
        for number, one in enumerate(chosen):
            ids = (*one.beam.ids, one.token)
            if not is_last and one.token not in rules.eos_ids:
                running.append(Beam(ids, one.score))
            elif number < rules.num_beams:
                self._ended.append(Beam(ids, one.score / length**rules.length_penalty))
        self._ended = sorted(self._ended, key=lambda beam: beam.score, reverse=True)[: rules.num_beams]
        self._running = sorted(running, key=lambda beam: beam.score, reverse=True)[: rules.num_beams]
        self.is_over = not self._running or (
            len(self._ended) == rules.num_beams
            and self._running[0].score / length**rules.length_penalty <= self._ended[-1].score
        )


def _nucleus(scores: dict[int, float], top_p: float, least: int) -> dict[int, float]:
    """Return the likeliest of the scores, given the best first, that hold `top_p` of the probability."""
    if top_p >= 1:
        return scores
    most = next(iter(scores.values()))
    weights = [math.exp(score - most) for score in scores.values()]
    whole, above, kept = math.fsum(weights), 0.0, {}
    for number, ((token, score), weight) in enumerate(zip(scores.items(), weights, strict=True)):
        if number >= least and above / whole >= top_p:
            break
        kept[token] = score
        above += weight
    return kept
