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
MOST_COUNTED = 4096
GROWTH = 4


@dataclass(frozen=True)
class Rules:
    """The parameters of a search. `top_k` 0 is off. `eos_ids` are the tokens that end a text.

    `vocabulary` is how many tokens there are, where that is known: an engine refuses to tell more.
    """

    num_beams: int
    max_new_tokens: int
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    eos_ids: frozenset[int] = frozenset()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocabulary: int | None = None

    @property
    def kept(self) -> int:
        """The number of continuations looked at in a step: enough that `num_beams` of them have not ended."""
        return max(2, 1 + len(self.eos_ids)) * self.num_beams

    @property
    def least_shaped(self) -> int:
        """The number of candidates of a beam that `top_k` and `top_p` leave at least: one of them does not end."""
        return len(self.eos_ids) + 1 if self.eos_ids else 2


@dataclass(frozen=True)
class Row:
    """An engine's answer about the next token of a beam: log probabilities by token, of all tokens if `is_all`."""

    logprobs: Mapping[int, float]
    is_all: bool = False


@dataclass(frozen=True)
class Beam:
    """A text that is being searched: its new tokens, and the sum of what they scored."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class _Candidate:
    """A continuation. `place` is what it is chosen by: its score, or its score with the chance of the drawing."""

    beam: Beam
    token: int
    score: float
    place: float


@dataclass(frozen=True)
class Shaped:
    """A row by the rules: its best candidates, and by `count` the most that a token beyond so many could score."""

    candidates: list[_Candidate]
    beyond: Mapping[int, float]


class Search:
    """The search for the continuation of one prompt.

    Until `is_over`: ask the engine for the `count` likeliest next tokens of each of `open_texts` (ALL: for every
    token), hand each row to `shape` as it comes, and what is left of them to `advance`. Then `best` is the text.
    """

    def __init__(self, prompt_ids: Sequence[int], rules: Rules, chance: random.Random) -> None:
        self._prompt = list(prompt_ids)
        self._rules = rules
        self._chance = chance
        self._running = [Beam((), 0.0)]
        #: Texts that have ended, the best first, with their scores.
        self._ended: list[Beam] = []
        #: Each row has a chance of its own, so that the same seed gives the same text whatever was asked for, and when.
        self._seed = chance.getrandbits(64)
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

    def shape(self, number: int, row: Row) -> Shaped | None:
        """Score what the engine says of a text by the rules; None if it says too little for that.

        No more than `kept` candidates are left, since no beam has more of those that are kept of all: a row of a whole
        vocabulary can go.
        """
        beam, rules = self._running[number], self._rules
        penalised = self._penalised(beam, row.logprobs)
        if rules.do_sample:
            shaped = self._warped(beam, row, penalised)
            if shaped is None:
                return None
            chance = random.Random(self._seed + number)
            # The largest of scores with Gumbel noise are a draw without replacement from their softmax, in its order.
            found = (
                _Candidate(beam, token, beam.score + score, beam.score + score - math.log(chance.expovariate(1.0)))
                for token, score in shaped.items()
            )
        else:
            found = (_Candidate(beam, token, beam.score + score, beam.score + score)
                     for token, score in penalised.items())  # fmt: skip
        # Of equals the lower token, as from a flat list of all of them.
        candidates = heapq.nlargest(rules.kept, found, key=lambda one: (one.place, -one.token))
        return Shaped(candidates, {} if rules.do_sample else self._beyond(beam, row))

    def advance(self, rows: Sequence[Shaped | None]) -> bool:
        """Take one step with what is left of the rows of `open_texts`; False if they were too short for it.

        Then nothing has changed but `count`.
        """
        rules = self._rules
        shaped = [row for row in rows if row is not None]
        # The sort keeps the order of the beams among equals.
        candidates = sorted((one for row in shaped for one in row.candidates), key=lambda one: one.place, reverse=True)
        chosen = candidates[: rules.kept]
        is_known = len(shaped) == len(rows)
        if is_known and not rules.do_sample:
            threshold = chosen[-1].score if len(chosen) == rules.kept else -math.inf
            enough = [count for count in shaped[0].beyond if all(row.beyond[count] <= threshold for row in shaped)]
            is_known = bool(enough)
        if not is_known:
            self.count = self._more()
            return False
        # Next time as many as would have been enough now.
        self.count = self._first_count() if rules.do_sample else min(enough, key=lambda count: (count == ALL, count))
        self._step(chosen)
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
        return self._askable(count)

    def _more(self) -> int:
        return ALL if self.count == ALL else self._askable(self.count * GROWTH)

    def _askable(self, count: int) -> int:
        return count if count <= MOST_COUNTED and count < (self._rules.vocabulary or math.inf) else ALL

    def _warped(self, beam: Beam, row: Row, penalised: Mapping[int, float]) -> dict[int, float] | None:
        """Return the candidates of which one may be drawn."""
        rules = self._rules
        most = max(rules.top_k, rules.least_shaped) if rules.top_k > 0 else len(penalised)
        if not row.is_all and (rules.top_k <= 0 or len(penalised) < most):
            return None
        tokens = heapq.nlargest(most, penalised, key=lambda token: (penalised[token], -token))
        if not row.is_all and penalised[tokens[-1]] < self._unseen(beam, row, min(row.logprobs.values())):
            return None
        scores = {token: penalised[token] / rules.temperature for token in tokens}
        return _nucleus(scores, rules.top_p, rules.least_shaped)

    def _penalised(self, beam: Beam, logprobs: Mapping[int, float]) -> Mapping[int, float]:
        penalty = self._rules.repetition_penalty
        if penalty == 1:
            return logprobs
        occurs = {*self._prompt, *beam.ids}
        return {
            token: logprob if token not in occurs else logprob * penalty if logprob < 0 else logprob / penalty
            for token, logprob in logprobs.items()
        }

    def _unseen(self, beam: Beam, row: Row, least: float) -> float:
        """Return the most that a token can score of which a row tells nothing, if it tells none below `least`."""
        penalty = self._rules.repetition_penalty
        if penalty < 1:
            told = (token for token, logprob in row.logprobs.items() if logprob >= least)
            if not {*self._prompt, *beam.ids}.issubset(told):
                return least * penalty
        return least

    def _beyond(self, beam: Beam, row: Row) -> dict[int, float]:
        """Return the most that a token could score beyond the likeliest, for each count that could be asked for."""
        found = {self.count: -math.inf}
        count = self._first_count()
        if not row.is_all:
            found = {self.count: beam.score + self._unseen(beam, row, min(row.logprobs.values()))}
        elif count != ALL and len(row.logprobs) <= count:
            return {count: -math.inf}
        if count != self.count:
            ordered = heapq.nlargest(MOST_COUNTED, row.logprobs.values())
            while count != ALL and count != self.count and count <= len(ordered):
                found[count] = beam.score + self._unseen(beam, row, ordered[count - 1])
                count = self._askable(count * GROWTH)
        return found

    def _step(self, chosen: list[_Candidate]) -> None:
        rules = self._rules
        self._seed = self._chance.getrandbits(64)
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
