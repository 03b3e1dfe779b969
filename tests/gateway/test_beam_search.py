"""The search itself, with no engine: beside transformers' own on a small model, and where it is easy to err."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.gateway.beam_search import ALL, Row, Rules, Search

A, B, C, END = 0, 1, 2, 3
Model = Callable[[tuple[int, ...]], Mapping[int, float]]


def searched(prompt: list[int], rules: Rules, model: Model, seed: int = 0) -> tuple[list[int], list[int]]:
    """Search with what a model says; return the text, and how many tokens were asked for in each step."""
    search, asked = Search(prompt, rules, random.Random(seed)), []
    while not search.is_over:
        rows = []
        for text in search.open_texts:
            told = sorted(model(tuple(text)).items(), key=lambda each: each[1], reverse=True)
            is_all = search.count == ALL or search.count >= len(told)
            rows.append(Row(dict(told if is_all else told[: search.count]), is_all))
        asked.append(search.count)
        search.advance([search.shape(number, row) for number, row in enumerate(rows)])
    return search.best, asked


def of_chances(table: Mapping[tuple[int, ...], Mapping[int, float]]) -> Model:
    """A model that says what a table of probabilities says of the end of the text."""

    def say(text: tuple[int, ...]) -> Mapping[int, float]:
        [chances] = [chances for end, chances in table.items() if text[len(text) - len(end) :] == end][:1]
        return {token: math.log(chance) for token, chance in chances.items()}

    return say


#: A greedy reader takes A (0.6), from which everything is unlikely; two beams find B, C.
GARDEN = of_chances(
    {
        (9,): {A: 0.6, B: 0.38, C: 0.01, END: 0.01},
        (A,): {A: 0.3, B: 0.3, C: 0.3, END: 0.1},
        (B,): {A: 0.04, B: 0.03, C: 0.9, END: 0.03},
        (C,): {A: 0.05, B: 0.04, C: 0.01, END: 0.9},
    }
)
#: The short text ends at once (0.5), the long one is sure of itself afterwards.
SHORT = of_chances(
    {
        (9,): {A: 0.45, B: 0.04, C: 0.01, END: 0.5},
        (A,): {A: 0.01, B: 0.97, C: 0.01, END: 0.01},
        (B,): {A: 0.01, B: 0.01, C: 0.97, END: 0.01},
        (C,): {A: 0.01, B: 0.01, C: 0.01, END: 0.97},
        (END,): {A: 0.25, B: 0.25, C: 0.25, END: 0.25},
    }
)


@pytest.mark.parametrize(
    ("model", "rules", "text"),
    [
        (GARDEN, {"num_beams": 1}, [A, A, A, A]),
        (GARDEN, {"num_beams": 2}, [B, C, END]),
        (GARDEN, {"num_beams": 2, "max_new_tokens": 1}, [A]),
        (GARDEN, {"num_beams": 3, "max_new_tokens": 2}, [B, C]),
        # log 0.5 / 1 = -0.69 against log(0.45 * 0.97**3) / 4 = -0.22: the mean of a long text is better.
        (SHORT, {"num_beams": 2}, [A, B, C, END]),
        # Undivided, -0.69 against -0.89: the short one.
        (SHORT, {"num_beams": 2, "length_penalty": 0.0}, [END]),
        (SHORT, {"num_beams": 2, "length_penalty": -1.0}, [END]),
        # A score far below transformers' marks for what is missing (-1e9) is a score all the same.
        (SHORT, {"num_beams": 2, "length_penalty": -40.0, "eos_ids": frozenset(), "max_new_tokens": 3}, [A, B, C]),
        # What is repeated becomes unlikely, from the prompt's tokens on: B and C are dear when they stand there.
        (GARDEN, {"num_beams": 2, "repetition_penalty": 3.0}, [B, C, END]),
    ],
)
def test_a_table_of_texts(model: Model, rules: dict[str, Any], text: list[int]) -> None:
    given_rules = Rules(**{"max_new_tokens": 4, "eos_ids": frozenset({END}), **rules})
    assert searched([9], given_rules, model)[0] == text


def test_a_token_of_the_prompt_is_penalised_as_one_of_the_text() -> None:
    rules = Rules(num_beams=2, max_new_tokens=1, repetition_penalty=1.5, eos_ids=frozenset({END}))
    model = of_chances({(): {A: 0.6, B: 0.38, C: 0.01, END: 0.01}})
    assert searched([9], rules, model)[0] == [A]
    assert searched([A, 9], rules, model)[0] == [A], "1.5 * log 0.6 is still more than log 0.38"
    assert searched([A, 9], Rules(2, 1, repetition_penalty=3.0), model)[0] == [B]
    assert searched([C, 9], Rules(2, 1, repetition_penalty=0.01), model)[0] == [C], "a penalty below 1 is a reward"


def test_draws_are_those_of_sampling_without_replacement() -> None:
    chances = {A: 0.5, B: 0.25, C: 0.15, END: 0.1}
    rules = Rules(num_beams=2, max_new_tokens=1, do_sample=True)
    runs = 4000
    search = [searched([9], rules, of_chances({(): chances}), seed)[0] for seed in range(runs)]
    # The better of the first two that are drawn: A, unless both are others.
    others = [(one, other) for one, other in product((B, C, END), repeat=2) if one != other]
    expected = 1 - sum(chances[one] * chances[other] / (1 - chances[one]) for one, other in others)
    found = search.count([A]) / runs
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / runs), (found, expected)
    assert searched([9], rules, of_chances({(): chances}), 5) == searched([9], rules, of_chances({(): chances}), 5)


@pytest.mark.parametrize(
    ("rules", "drawn"),
    [
        ({"top_k": 2}, {A, B}),
        ({"top_k": 1}, {A, B}),  # at least two, so that one of them does not end
        ({"top_k": 3, "top_p": 0.7}, {A, B}),
        ({"top_p": 0.76}, {A, B, C}),
        ({"top_p": 0.74}, {A, B}),
        ({"top_p": 0.76, "temperature": 0.5}, {A, B}),
        ({"top_k": 3, "repetition_penalty": 4.0}, {A, B, END}),  # C is in the prompt
    ],
)
def test_only_candidates_that_top_k_and_top_p_leave_are_drawn(rules: dict[str, Any], drawn: set[int]) -> None:
    model = of_chances({(): {A: 0.5, B: 0.25, C: 0.15, END: 0.1}})
    found = set()
    for seed in range(200):
        search = Search([C, 9], Rules(num_beams=1, max_new_tokens=1, do_sample=True, **rules), random.Random(seed))
        search.advance([search.shape(0, Row(model((9,)), is_all=True))])
        found.add(search.best[0])
    assert found == drawn


VOCABULARY = 60


@cache
def noise(text: tuple[int, ...]) -> Mapping[int, float]:
    """A model that nobody trained: log probabilities that depend on the whole text."""
    chance = random.Random(hash(text))
    logits = [chance.gauss(0, 3) for _ in range(VOCABULARY)]
    whole = math.log(sum(map(math.exp, logits)))
    return {token: logit - whole for token, logit in enumerate(logits)}


rules_of_all_kinds = st.builds(
    Rules,
    num_beams=st.integers(1, 5), max_new_tokens=st.integers(1, 9),
    length_penalty=st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0]),
    repetition_penalty=st.sampled_from([0.01, 0.5, 0.9, 1.0, 1.2, 5.0]),
    eos_ids=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=3),
    do_sample=st.booleans(), temperature=st.sampled_from([0.1, 1.0, 2.0]), top_k=st.sampled_from([0, 1, 3, 20]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(rules_of_all_kinds, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30))
def test_the_likeliest_tokens_give_what_all_tokens_give(rules: Rules, prompt: list[int]) -> None:
    def all_of_them(search: Search) -> list[int]:
        while not search.is_over:
            rows = [Row(noise(tuple(text)), is_all=True) for text in search.open_texts]
            assert search.advance([search.shape(number, row) for number, row in enumerate(rows)])
        return search.best

    text, _ = searched(prompt, rules, noise)
    assert text == all_of_them(Search(prompt, rules, random.Random(0)))
    assert len(text) <= rules.max_new_tokens
    assert len(text) == rules.max_new_tokens or text[-1] in rules.eos_ids
    assert not set(text[:-1]) & rules.eos_ids


def test_a_step_that_needed_more_is_followed_by_one_that_asks_for_as_many_as_that_needed() -> None:
    def model(text: tuple[int, ...]) -> Mapping[int, float]:
        """The second token can only be chosen well by who sees all: the prompt's token comes from far below."""
        if len(text) == 1:
            return {token: -0.01 * token - 3.0 for token in range(1, 5000)} | {0: -10_000.0}
        return {token: -50.0 if token < 10 else -0.01 * token - 9.0 for token in range(1, 5000)} | {0: -20.0}

    text, asked = searched([0], Rules(2, 4, repetition_penalty=0.3), model)
    assert text[1] == 0
    assert asked[:2] == [8, 32]
    assert ALL in asked
    with_all = Rules(2, 4, repetition_penalty=0.3)
    search = Search([0], with_all, random.Random(0))
    while not search.is_over:
        search.advance([search.shape(n, Row(model(tuple(t)), is_all=True)) for n, t in enumerate(search.open_texts)])
    assert text == search.best


def test_no_more_is_asked_for_than_a_step_needs() -> None:
    rules = Rules(num_beams=4, max_new_tokens=6, eos_ids=frozenset({END}))
    assert set(searched([9], rules, noise)[1]) == {8}, "twice the beams, and the engine is asked once a step"
    assert ALL not in searched([9], Rules(4, 6, do_sample=True, top_k=50), noise)[1]
    assert set(searched([9], Rules(4, 6, do_sample=True), noise)[1]) == {ALL}, "nothing limits what may be drawn"


@pytest.mark.slow
def test_the_text_is_that_of_transformers() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.6, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip

    @cache
    def say(text: tuple[int, ...]) -> Mapping[int, float]:
        with torch.no_grad():
            return dict(enumerate(model(torch.tensor([text])).logits[0, -1].log_softmax(-1).tolist()))

    chance, ended = random.Random(0), 0
    for number in range(40):
        prompt = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 12))]
        rules = Rules(
            num_beams=chance.choice([2, 3, 5]),
            max_new_tokens=chance.randint(1, 14),
            length_penalty=chance.choice([-1.5, 0.0, 0.6, 1.0, 2.0]),
            repetition_penalty=chance.choice([0.6, 1.0, 1.0, 1.3, 3.0]),
            eos_ids=frozenset(chance.sample(range(2, VOCABULARY), chance.randint(1, 3))),
        )
        [ids] = model.generate(
            torch.tensor([prompt]), do_sample=False, num_beams=rules.num_beams, max_new_tokens=rules.max_new_tokens,
            length_penalty=rules.length_penalty, repetition_penalty=rules.repetition_penalty,
            eos_token_id=sorted(rules.eos_ids),
        )  # fmt: skip
        found, _ = searched(prompt, rules, say)
        assert found == ids[len(prompt) :].tolist(), (number, rules)
        ended += found[-1] in rules.eos_ids
    assert 8 < ended < 32, "of those that end and those that are cut off there are enough"
