"""Fifty-one families' templates: prompts token by token as the engine makes them, then an answer with one end."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from modelyard.demo.tiny_llama import make_llama
from modelyard.trainer.completions import THOUGHT
from modelyard.trainer.engine_messages import Refused
from modelyard.trainer.labels import IGNORED, Labelled
from modelyard.trainer.messages import as_sent
from tests.fixtures import missing
from tests.trainer import template_families
from tests.trainer.template_families import (
    BESIDE,
    DROPPED,
    MERGED,
    REFUSED,
    SPLIT,
    TABLE,
    Family,
    prompt_of,
    template_of,
)
from tests.trainer.templates import byte_tokenizer, ids_of, need_transformers
from tests.trainer.test_completions import TALKING
from tests.trainer.test_rendering import Messages, Trained, says, system, user

pytestmark = [pytest.mark.slow]
NAMES = [one.name for one in TABLE]
ENGINE_S = 300


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    """Return each family with one tokenizer that has all of their tokens."""
    need_transformers()
    everybodys = byte_tokenizer(None)
    everybodys.add_special_tokens({"additional_special_tokens": template_families.special_tokens()})
    found = {}
    for family in TABLE:
        tokenizer = copy.copy(everybodys)
        tokenizer.eos_token, tokenizer.chat_template = family.ends[0], template_of(family)
        found[family.name] = Trained(tokenizer, ids_of(tokenizer, family.ends))
    return found


def spans(row: Labelled) -> Iterator[tuple[int, int]]:
    """Yield where each learnt run of tokens begins and ends."""
    places = [number for number, label in enumerate(row.labels) if label != IGNORED]
    for number, place in enumerate(places):
        if not number or places[number - 1] != place - 1:
            begin = place
        if number + 1 == len(places) or places[number + 1] != place + 1:
            yield begin, place + 1


def check(trained: Trained, family: Family, messages: Messages) -> list[tuple[Messages, list[int]]]:
    """Compare what is learnt with the facts; return the prompts, as messages and as tokens."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = []
    learnt = [(row, begin, end) for row in trained.rows(messages) for begin, end in spans(row)]
    assert len(learnt) == len(turns)
    for turn, (row, begin, end) in zip(turns, learnt, strict=True):
        content = str(messages[turn]["content"])
        wanted = family.says.replace("{}", content.strip() if family.strips else content)
        assert trained.text(row.input_ids[begin:end]) == wanted
        assert [token for token in row.input_ids[begin:end] if token in trained.renderer.stop_ids] == [
            row.input_ids[end - 1]
        ]
        assert row.labels[begin:end] == row.input_ids[begin:end]
        asked = prompt_of(family, messages[:turn])
        assert trained.text(row.input_ids[:begin]) == asked
        assert row.input_ids[:begin].tolist() == trained.labeller.ids(asked).tolist()
        prompts.append((messages[:turn], row.input_ids[:begin].tolist()))
    return prompts


TWO_TURNS = [user("Hi there"), says("Hello you"), user("More?"), says("No more.")]
CONVERSATIONS: tuple[Messages, ...] = (
    TWO_TURNS,
    [user("  Привет,\n\n世界! 🙂 \n"), says(" x  = 10_000.5;\n\n\tНет ")],
    [system("Be brief."), *TWO_TURNS, user("Sure?"), says("Yes")],
    [user("?"), says("Here are\n\nthree: |> <| [ ] { } and user, system, assistant")],
)


THOUGHTS = [user("1+1?"), says("<think>\neasy\n</think>\n\n2"), user("2+2?"), says("<think>\nhm\n</think>\n\n4")]


def conversations_for(family: Family) -> list[Messages]:
    return [one for one in CONVERSATIONS if family.system != REFUSED or one[0]["role"] != "system"]


@pytest.mark.parametrize("family", TABLE, ids=NAMES)
def test_each_family_learns_its_answers_with_one_end_after_the_engines_prompt(
    trained: dict[str, Trained], family: Family
) -> None:
    for messages in conversations_for(family):
        check(trained[family.name], family, messages)
    if family.system == REFUSED:
        assert "System role not supported" in trained[family.name].refusal([system("Be brief."), *TWO_TURNS])


def test_there_are_fifty_families_with_a_source_each() -> None:
    assert len(set(NAMES)) == len(TABLE) >= 50
    assert all(one.source for one in TABLE)
    assert {MERGED, REFUSED} < {str(one.system) for one in TABLE}
    assert {"", SPLIT, DROPPED, BESIDE} == {one.thoughts for one in TABLE}


@pytest.mark.parametrize("family", TABLE, ids=NAMES)
def test_an_answer_that_speaks_of_tags_is_learnt_whole_or_refused(trained: dict[str, Trained], family: Family) -> None:
    for text in (*TALKING, f"It ends with {family.ends[-1]} here", f"{family.asks or family.user[0]} is the opening"):
        try:
            rows = trained[family.name].rows([user("Which tag?"), says(text), user("And?"), says("Fine.")])
        except Refused:
            continue
        (begin, end), *_ = spans(rows[0])
        learnt = trained[family.name].text(rows[0].input_ids[begin:end])
        thought = THOUGHT.match(text)
        assert text[thought.end() if thought else 0 :].strip() in learnt
        assert not thought or thought[1].strip() in learnt


@pytest.mark.parametrize("family", TABLE, ids=NAMES)
def test_a_thought_is_learnt_once_or_refused_with_the_reason(trained: dict[str, Trained], family: Family) -> None:
    messages = THOUGHTS
    if "thought" in family.asks or family.asks.endswith("</think>\n\n"):
        assert "closes the thought before an answer" in trained[family.name].refusal(messages)
        return
    rows = trained[family.name].rows(messages)
    learnt = [(row, begin, end) for row in rows for begin, end in spans(row)]
    for (row, begin, end), thought, answer in zip(learnt, ("easy", "hm"), "24", strict=True):
        said = trained[family.name].text(row.input_ids[begin:end])
        assert said.count(thought) == 1
        assert answer in said.partition(thought)[2]
        assert row.input_ids[end - 1] in trained[family.name].renderer.stop_ids
        if family.thoughts:
            asked = family.asks.count("<think>")
            assert (asked + said.count("<think>"), said.count("</think>")) == (1, 1)


#: Without half surrogates, and what no tokenizer keeps apart from its own tokens.
texts = some.text(some.characters(exclude_categories=["Cs"], exclude_characters="<[]"), max_size=40)
answers = texts.filter(lambda text: bool(text.strip()))


@settings(max_examples=200, deadline=None)
@given(
    name=some.sampled_from(NAMES),
    first=some.none() | texts,
    turns=some.lists(some.tuples(texts, answers), min_size=1, max_size=3),
)
def test_of_any_conversation_exactly_the_answers_and_one_end_are_learnt(
    trained: dict[str, Trained], name: str, first: str | None, turns: Sequence[tuple[str, str]]
) -> None:
    family = TABLE[NAMES.index(name)]
    messages = [message for asked, said in turns for message in (user(asked), says(said))]
    if first is not None and family.system != REFUSED:
        messages.insert(0, system(first))
    check(trained[name], family, messages)


@pytest.fixture(scope="module")
def engines(trained: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], list[list[int]]]:
    """Return the function that asks vLLM's chat rendering for prompts, in a child."""
    if importlib.util.find_spec("vllm") is None:
        missing("engine", "vLLM is not installed: make test installs it")
    folder = tmp_path_factory.mktemp("families") / "model"
    make_llama(folder)
    trained[NAMES[0]].tokenizer.save_pretrained(folder)

    def ask(requests: list[dict[str, Any]]) -> list[list[int]]:
        program = Path(__file__).with_name("engine_prompts.py")
        done = subprocess.run(
            [sys.executable, str(program), str(folder)],
            input="".join(json.dumps(one) + "\n" for one in requests),
            capture_output=True,
            text=True,
            timeout=ENGINE_S,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    return ask


def test_every_familys_prompts_are_the_engines_token_by_token(
    trained: dict[str, Trained], engines: Callable[[Any], list[list[int]]]
) -> None:
    requests, wanted = [], []
    for family in TABLE:
        of_family = trained[family.name]
        for messages in conversations_for(family):
            for asked, ids in check(of_family, family, messages):
                template = of_family.renderer.template
                requests.append({"template": template, "eos": family.ends[0], "messages": asked})
                wanted.append((family.name, asked, ids))
        # Thoughts of earlier answers go to the engine as a client sends them.
        takes = of_family.renderer.takes_thoughts(with_tools=False)
        sent = as_sent(THOUGHTS[:3], takes_thoughts=takes)
        requests.append({"template": of_family.renderer.template, "eos": family.ends[0], "messages": sent})
        prompt = of_family.renderer.prompt(THOUGHTS[:3])
        wanted.append((family.name, sent, of_family.labeller.ids(prompt).tolist()))
    found = engines(requests)
    assert len(found) == len(wanted) > 200
    for ids, (name, asked, ours) in zip(found, wanted, strict=True):
        assert ids == ours, (name, asked)
