"""Conversations through the chat templates of many families: what is learnt, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from modelyard.errors import JobFailure
from modelyard.trainer.default_template import CHATML_TEMPLATE
from modelyard.trainer.engine_messages import Refused
from modelyard.trainer.labels import IGNORED, Labelled, Labeller
from modelyard.trainer.rendering import Renderer
from tests.trainer.templates import (
    FAMILIES,
    HEADERS,
    PARTS,
    SPECIAL,
    TRAILING_SPACE,
    VICUNA,
    byte_tokenizer,
    ids_of,
    need_transformers,
    word_tokenizer,
)

pytestmark = [pytest.mark.slow]
NOW = datetime(2026, 7, 14, 12, 30, tzinfo=UTC)

Messages = list[dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def _transformers() -> None:
    need_transformers()


class Trained:
    """A family's template with everything that training makes of it."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int] = (), **more: Any) -> None:
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, stop_ids, NOW, **more)
        self.labeller = Labeller(self.renderer)

    def rows(self, messages: Messages, tools: list[Any] | None = None) -> list[Labelled]:
        (found,) = self.labeller.label([self.renderer.pieces(messages, tools)])
        if isinstance(found, Refused):
            raise found
        return found

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def spans(self, row: Labelled) -> list[str]:
        runs = groupby(row.labels, key=lambda label: label != IGNORED)
        return [self.text(list(run)) for is_learnt, run in runs if is_learnt]

    def learnt(self, messages: Messages, tools: list[Any] | None = None) -> list[list[str]]:
        """What each example learns, span by span."""
        return [self.spans(row) for row in self.rows(messages, tools)]

    def refusal(self, messages: Messages, tools: list[Any] | None = None) -> str:
        with pytest.raises(Refused) as caught:
            self.rows(messages, tools)
        return str(caught.value)

    def asked(self, messages: Messages, tools: list[Any] | None = None) -> list[int]:
        """The tokens of a request's prompt, by transformers alone, as the engine makes them."""
        said = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        if self.renderer.template == PARTS:
            said = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in said]
        text = self.tokenizer.apply_chat_template(
            said,
            tools=tools,
            chat_template=self.renderer.template,
            add_generation_prompt=True,
            tokenize=False,
            strftime_now=NOW.strftime,
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def family(name: str) -> Trained:
    template, end, stops = FAMILIES[name]
    tokenizer = byte_tokenizer(template, end)
    return Trained(tokenizer, ids_of(tokenizer, stops))


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(name: str, arguments: dict[str, Any], text: str | None = None) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return says(text, tool_calls=[call])


def answered(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "call_1"}


TWO_TURNS = [user("Hi there"), says("Hello you"), user("More?"), says("No more.")]
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
#: What each family learns of TWO_TURNS: examples of spans.
LEARNT = {
    "tiny": [["Hello you<|end|>", "No more.<|end|>"]],
    "chatml": [["Hello you<|im_end|>", "No more.<|im_end|>"]],
    "chatml-by-list": [["Hello you<|im_end|>", "No more.<|im_end|>"]],
    "thinking": [[f"{EMPTY_THOUGHT}Hello you<|im_end|>"], [f"{EMPTY_THOUGHT}No more.<|im_end|>"]],
    "headers": [["Hello you<|eot_id|>", "No more.<|eot_id|>"]],
    "inst": [[" Hello you<|end|>", " No more.<|end|>"]],
    "turns": [["Hello you<end_of_turn>", "No more.<end_of_turn>"]],
    "phi": [["Hello you<|end|>", "No more.<|end|>"]],
    "reasoning": [["\n</think>\n\nHello you<|endoftext|>"], ["\n</think>\n\nNo more.<|endoftext|>"]],
    "glm": [["Hello you<|user|>", "No more.<|user|>"]],
    "zephyr": [["Hello you<|end|>", "No more.<|end|>"]],
    "vicuna": [[" Hello you<|end|>", " No more.<|end|>"]],
    "trailing-space": [["Hello you<|end|>"], ["No more.<|end|>"]],
    "end-at-the-end": [["Hello you<|end|>"], ["No more.<|end|>"]],
    "endless": [[" Hello you<|endoftext|>"], [" No more.<|endoftext|>"]],
    "parts": [["Hello you<|end|>", "No more.<|end|>"]],
    "forgetful": [["Hello you<|end|>", "No more.<|end|>"]],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_answers_and_their_stop_token_are_learnt(name: str) -> None:
    trained = family(name)
    assert trained.learnt(TWO_TURNS) == LEARNT[name]
    for row in trained.rows(TWO_TURNS):
        assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.input_ids, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_goes_before_an_answer_is_what_the_engine_makes_of_the_question(name: str) -> None:
    trained = family(name)
    rows = trained.rows(TWO_TURNS)
    assert rows[-1].input_ids[: rows[-1].answer_at].tolist() == trained.asked(TWO_TURNS[:3])
    if len(rows) == 2:
        assert rows[0].input_ids[: rows[0].answer_at].tolist() == trained.asked(TWO_TURNS[:1])
    prompt = trained.renderer.prompt(TWO_TURNS[:3])
    assert trained.labeller.ids(prompt).tolist() == trained.asked(TWO_TURNS[:3])


#: Answers are rendered as they are, all in one text.
PLAIN = ("tiny", "chatml", "chatml-by-list", "zephyr", "phi", "glm", "inst", "vicuna")
#: Without half surrogates, and what no tokenizer keeps apart from its own tokens.
texts = some.text(some.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<" not in text)


@some.composite
def conversations(draw: some.DrawFn) -> Messages:
    messages: Messages = []
    for _ in range(draw(some.integers(1, 4))):
        messages.append(user(draw(texts)))
        messages.append(
            says(draw(texts.filter(lambda text: bool(text.strip()))), weight=draw(some.sampled_from([0, 1])))
        )
    if all(message.get("weight") != 1 for message in messages):
        messages[-1]["weight"] = 1
    return messages


@pytest.fixture(scope="module")
def plain() -> dict[str, Trained]:
    return {name: family(name) for name in PLAIN}


@settings(max_examples=150, deadline=None)
@given(messages=conversations(), name=some.sampled_from(PLAIN))
def test_of_any_text_exactly_the_weighed_answers_are_learnt(
    plain: dict[str, Trained], messages: Messages, name: str
) -> None:
    trained = plain[name]
    wanted = [message["content"] for message in messages if message.get("weight") == 1]
    stop = {"chatml": "<|im_end|>", "chatml-by-list": "<|im_end|>", "glm": "<|user|>"}.get(name, "<|end|>")
    before = " " if name in ("inst", "vicuna") else ""
    rows = trained.rows(messages)
    assert [span for row in rows for span in trained.spans(row)] == [before + text + stop for text in wanted]
    for row in rows:
        shown = trained.text(row.input_ids)
        unlearnt = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED]
        learnt = sum(len(span) for span in trained.spans(row))
        assert len(trained.text(unlearnt)) == len(shown) - learnt
    if len(rows) == 1 and len(wanted) > 1:
        (piece,) = trained.renderer.pieces(messages)
        assert trained.tokenizer(piece.text, add_special_tokens=False)["input_ids"] == rows[0].input_ids.tolist()
    answer = max(number for number, message in enumerate(messages) if message.get("weight") == 1)
    assert rows[-1].input_ids[: rows[-1].answer_at].tolist() == trained.asked(messages[:answer])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("turns", "forgetful")])
def test_a_system_message_is_in_every_prompt(name: str) -> None:
    trained = family(name)
    for row in trained.rows([system("Be brief."), *TWO_TURNS]):
        assert "Be brief." in trained.text(row.input_ids[: row.answer_at])
    assert trained.learnt([system("Be brief."), *TWO_TURNS])[-1][-1] == LEARNT[name][-1][-1]


def test_a_template_without_a_system_role_refuses_the_row_and_is_quoted() -> None:
    assert "System role not supported" in family("turns").refusal([system("Be brief."), *TWO_TURNS])


def test_a_template_that_forgets_the_system_message_is_found_out() -> None:
    assert "leaves out message 1, whose role is system" in family("forgetful").refusal([system("Hush."), *TWO_TURNS])


def test_a_forgotten_message_is_found_out_although_its_words_are_elsewhere() -> None:
    messages = [system("Hi"), *TWO_TURNS]
    assert "leaves out message 1, whose role is system" in family("forgetful").refusal(messages)
    assert family("chatml").learnt(messages) == LEARNT["chatml"]
    beside = [user("?"), calls("weather", {"city": "Köln"}, "Köln")]
    assert "leaves out the content of message 2" in family("headers").refusal(beside)


def test_a_template_that_wants_alternation_refuses_two_questions_in_a_row() -> None:
    assert "must alternate" in family("inst").refusal([user("One"), user("Two"), says("Three")])


def test_turns_of_weight_zero_and_empty_ones_are_context_only() -> None:
    trained = family("chatml")
    messages = [user("a"), says("wrong", weight=0), user("b"), says("  "), user("c"), says("right")]
    assert trained.learnt(messages) == [["right<|im_end|>"]]
    assert "wrong" in trained.text(trained.rows(messages)[0].input_ids)


def test_what_follows_the_last_answer_is_not_there_and_a_greeting_is_not_learnt() -> None:
    trained = family("chatml")
    messages = [says("Welcome!"), user("a"), says("right"), user("thanks")]
    assert trained.learnt(messages) == [["right<|im_end|>"]]
    assert trained.text(trained.rows(messages)[0].input_ids).endswith("right<|im_end|>\n") is False
    assert "thanks" not in trained.text(trained.rows(messages)[0].input_ids)
    assert "nothing to learn" in trained.refusal([says("Welcome!"), user("a")])


def test_thoughts_are_learnt_where_they_will_be_asked_for() -> None:
    messages = [user("1+1?"), says("<think>\neasy\n</think>\n\n2"), user("2+2?"), says("<think>\nhm\n</think>\n\n4")]
    thinking = family("thinking")
    assert thinking.learnt(messages) == [
        ["<think>\neasy\n</think>\n\n2<|im_end|>"],
        ["<think>\nhm\n</think>\n\n4<|im_end|>"],
    ]
    assert "easy" not in thinking.text(thinking.rows(messages)[1].input_ids)
    # The prompt has the opening, and the template drops the thought from every answer: it is put back.
    assert family("reasoning").learnt(messages) == [
        ["easy\n</think>\n\n2<|endoftext|>"],
        ["hm\n</think>\n\n4<|endoftext|>"],
    ]


def test_a_thought_that_the_template_drops_from_its_answer_is_put_back() -> None:
    dropping = FAMILIES["reasoning"][0].replace("<think>\\n", "")
    trained = Trained(byte_tokenizer(dropping, "<|endoftext|>"))
    assert trained.learnt([user("1+1?"), says("<think>easy</think>\n2")]) == [["<think>easy</think>\n2<|endoftext|>"]]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
WITH_TOOLS = [user("Weather in Köln?"), calls("weather", {"city": "Köln"}), answered('{"sky": "blue"}'), says("Blue.")]


def test_calls_of_tools_are_learnt_and_what_tools_say_is_not() -> None:
    call = f'{EMPTY_THOUGHT}<tool_call>\n{{"name": "weather", "arguments": {{"city": "Köln"}}}}\n</tool_call><|im_end|>'
    thinking = family("thinking")
    rows = thinking.rows(WITH_TOOLS, TOOLS)
    assert [thinking.spans(row) for row in rows] == [[call], [f"{EMPTY_THOUGHT}Blue.<|im_end|>"]]
    assert all('"name": "weather", "description": null' in thinking.text(row.input_ids) for row in rows)
    assert '{"sky": "blue"}' in thinking.text(rows[1].input_ids)
    without = [user("Weather?"), *WITH_TOOLS[1:]]
    # As JSON in JSON: not the same characters, but there.
    assert family("headers").learnt(without) == [
        ['{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>', "Blue.<|eot_id|>"]
    ]
    # The next role's token is another one after a call.
    assert family("glm").learnt(without) == [['weather\n{"city": "Köln"}<|observation|>', "Blue.<|user|>"]]
    assert family("glm").learnt(without[:2]) == [['weather\n{"city": "Köln"}<|observation|>']]


def test_arguments_may_come_as_text() -> None:
    as_text = calls("weather", {})
    as_text["tool_calls"][0]["function"]["arguments"] = '{"city": "Köln"}'
    assert family("glm").learnt([user("?"), as_text]) == [['weather\n{"city": "Köln"}<|observation|>']]


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (WITH_TOOLS[:2], None, "leaves out the tool calls of message 2, which are to be learnt"),
        ([*WITH_TOOLS[:1], calls("weather", {}, "Let me see."), user("?"), says("Blue.")], None, "the tool calls of"),
        ([user("?"), says("Yes."), user("Sure?"), answered("sunny"), says("Blue.")], None, "whose role is tool"),
        (TWO_TURNS, TOOLS, "leaves out the tools"),
        ([user("weather?"), says("Blue.")], TOOLS, "leaves out the tools"),
        ([user("weather?"), calls("weather", {}, "weather {}")], None, "leaves out the tool calls of message 2"),
        (TWO_TURNS, [{"name": "weather"}], "tool 1 is not"),
    ],
)
def test_what_a_template_forgets_is_found_out(messages: Messages, tools: list[Any] | None, reason: str) -> None:
    assert reason in family("forgetful").refusal(messages, tools)


def test_content_beside_calls_that_the_template_drops_is_found_out() -> None:
    assert "leaves out the content of message 2" in family("headers").refusal(
        [user("?"), calls("weather", {"city": "Köln"}, "Let me see.")]
    )


def test_an_answer_with_a_stop_token_in_it_is_refused() -> None:
    assert "has a stop token in it" in family("chatml").refusal([user("a"), says("one<|im_end|>two")])


def test_an_end_of_turn_at_which_nothing_stops_is_followed_by_one_that_does() -> None:
    tokenizer = byte_tokenizer(VICUNA.replace("eos_token", "'</s>'"))
    assert Trained(tokenizer).learnt([user("a"), says("b")]) == [[" b</s><|end|>"]]


def test_the_time_of_day_that_a_template_asks_for_is_the_trainings() -> None:
    tokenizer = byte_tokenizer(HEADERS, "<|eot_id|>")
    renderer = Renderer(tokenizer, (), NOW)
    assert renderer.is_dated
    assert "Today: 14 Jul 2026 12:30:00.000000" in renderer.prompt([user("a")])
    assert not family("chatml").renderer.is_dated


def test_a_model_without_a_template_gets_a_default_one() -> None:
    plain = Trained(byte_tokenizer(None))
    assert plain.renderer.template_source == "default"
    assert plain.learnt([system("Be brief."), *TWO_TURNS]) == [[" Hello you<|end|>", " No more.<|end|>"]]
    assert plain.renderer.prompt(TWO_TURNS[:1]) == "user: Hi there\nassistant:"
    assert "leaves out the tools" in plain.refusal(TWO_TURNS, TOOLS)
    assert family("chatml").renderer.template_source == "model"


def test_a_default_template_may_be_chatml() -> None:
    default = "{{ bos_token }}" + CHATML_TEMPLATE.replace("{BOS}", "")
    chatml = Trained(byte_tokenizer(None, "<|im_end|>"), default=lambda: default)
    assert chatml.learnt(TWO_TURNS) == LEARNT["chatml"]
    assert chatml.renderer.template == default
    assert chatml.renderer.prompt(TWO_TURNS[:1]).startswith("<|begin|><|im_start|>user\nHi there<|im_end|>\n")


def test_a_space_that_belongs_to_the_next_word_is_learnt_with_it_or_asked_for_before_it() -> None:
    trained = Trained(word_tokenizer(VICUNA))
    assert trained.learnt(TWO_TURNS) == [["Hello you</s>", "No more.</s>"]]  # its decoder drops the first space
    (row,) = trained.rows(TWO_TURNS)
    assert row.input_ids[: row.answer_at].tolist() == trained.asked(TWO_TURNS[:3])
    cut = Trained(word_tokenizer(TRAILING_SPACE))
    rows = cut.rows(TWO_TURNS)
    assert [cut.text(row.input_ids) for row in rows] == [
        "USER: Hi there ASSISTANT: Hello you</s>",
        "USER: Hi there ASSISTANT: Hello you</s>USER: More? ASSISTANT: No more.</s>",
    ]
    assert rows[1].input_ids[: rows[1].answer_at].tolist() == cut.asked(TWO_TURNS[:3])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{% for message in messages %}{{ message.update({'content': ''}) }}{% endfor %}",
    ],
)
def test_a_template_reaches_neither_the_machine_nor_its_input(template: str) -> None:
    messages = [user("a"), says("b")]
    assert "does not take it" in Trained(byte_tokenizer(template)).refusal(messages)
    assert messages == [user("a"), says("b")]


@pytest.mark.parametrize("template", ["{% if %}", "{{ 1 / 0 }}", "{{ messages[99].content }}", "{{ missing.thing }}"])
def test_a_broken_template_refuses_with_its_own_words(template: str) -> None:
    assert "the chat template does not take it: " in Trained(byte_tokenizer(template)).refusal(TWO_TURNS)


def test_a_template_that_says_nothing_of_the_question_is_found_out() -> None:
    deaf = (
        """{% for message in messages if message.role == 'assistant' %}{{ message.content + eos_token }}{% endfor %}"""
    )
    assert "leaves out message 1, whose role is user" in Trained(byte_tokenizer(deaf)).refusal(TWO_TURNS)


def test_named_templates_are_chosen_as_the_engine_does() -> None:
    tokenizer = byte_tokenizer(None, "<|im_end|>")
    tokenizer.chat_template = {"default": FAMILIES["chatml"][0], "tool_use": FAMILIES["thinking"][0]}
    trained = Trained(tokenizer)
    assert trained.learnt(TWO_TURNS) == LEARNT["chatml"]
    assert "<tools>" in trained.renderer.prompt(TWO_TURNS[:1], TOOLS)
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(JobFailure) as caught:
        Renderer(tokenizer)
    assert caught.value.code == "bad_chat_template"


def test_a_model_that_names_no_end_is_refused() -> None:
    tokenizer = byte_tokenizer(FAMILIES["tiny"][0])
    tokenizer.eos_token = None
    with pytest.raises(JobFailure) as caught:
        Renderer(tokenizer)
    assert caught.value.code == "no_stop_token"
    assert Renderer(tokenizer, [2]).stop_ids == {2}


def test_special_tokens_are_one_token_each() -> None:
    tokenizer = byte_tokenizer(None)
    assert all(len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1 for token in SPECIAL)
