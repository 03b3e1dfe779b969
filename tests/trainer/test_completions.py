"""What follows on a prompt: openings that answers lack, ends of turns, and answers that hold a template's own tags."""

from __future__ import annotations

from typing import Any

import pytest

from modelyard.trainer.content_format import loops_over_content
from modelyard.trainer.engine_messages import Refused
from modelyard.trainer.messages import as_sent
from tests.trainer.templates import FAMILIES, GLM, PARTS, THINKING, byte_tokenizer, ids_of, need_transformers
from tests.trainer.test_rendering import TWO_TURNS, Trained, answered, calls, family, says, user

pytestmark = [pytest.mark.slow]

#: Turns between tokens, as in CHATML, with a place for what else a template does.
TURNS = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
{%- for call in message.tool_calls or [] %}{{ call.function.name + '(' + call.function.arguments | tojson + ')' }}
{%- endfor %}{% if message.tool_calls %}{{ '<|im_end|>' }}{% endif %}{%- endfor %}AFTER
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\nOPENING' }}{%- endif %}"""
CLOSED, SENTENCE = "<|channel>thought\\n<channel|>", "Here are my reasoning steps:\\n"
THOUGHT = [user("1+1?"), says("<think>\neasy\n</think>\n\n2")]
#: Their templates look for the tags of thoughts within answers.
SPLITTING = ("thinking", "reasoning")
TALKING = (
    "Use </think> to close it, always.",
    "Write <think> first and </think> last.",
    "A <|channel>thought<channel|> is one, too.",
    "<think>\nAll right.\n</think>\n\nClose it with </think>.",
    "<think>\nWhat is <think>?\n</think>\n\nA tag.",
)


@pytest.fixture(autouse=True, scope="module")
def _transformers() -> None:
    need_transformers()


def turns(opening: str = "", after: str = "", ends: tuple[str, ...] = ("<|im_end|>",)) -> Trained:
    template = TURNS.replace("OPENING", opening).replace("AFTER", after)
    tokenizer = byte_tokenizer(template, ends[0])
    return Trained(tokenizer, ids_of(tokenizer, ends))


@pytest.mark.parametrize("opening", [CLOSED, SENTENCE, "<think>\\n\\n</think>\\n\\n", "Sure: "])
def test_after_a_fixed_opening_that_answers_lack_comes_the_answer(opening: str) -> None:
    trained = turns(opening)
    assert trained.learnt(TWO_TURNS) == [["Hello you<|im_end|>"], ["No more.<|im_end|>"]]
    for row, at in zip(trained.rows(TWO_TURNS), (1, 3), strict=True):
        assert row.input_ids[: row.answer_at].tolist() == trained.asked(TWO_TURNS[:at])
        shown = trained.text(row.input_ids)
        assert shown.endswith(opening.replace("\\n", "\n") + str(TWO_TURNS[at]["content"]) + "<|im_end|>")


@pytest.mark.parametrize("opening", [CLOSED, SENTENCE])
def test_an_answer_that_begins_like_the_opening_is_learnt_whole(opening: str) -> None:
    for text in ("<|channel is no tag", "Here are three", "H", "<", "Here are my reasoning steps: none"):
        assert turns(opening).learnt([user("?"), says(text)]) == [[f"{text}<|im_end|>"]]
    as_opened = "Here are my reasoning steps:\nFirst"
    wanted = "First" if opening == SENTENCE else as_opened
    assert turns(opening).learnt([user("?"), says(as_opened)]) == [[f"{wanted}<|im_end|>"]]


def test_a_call_after_a_fixed_opening_is_learnt() -> None:
    row = [user("Weather?"), calls("weather", {"city": "Köln"})]
    assert turns(SENTENCE).refusal(row) == "its answer has a stop token in it, after which nothing would be said"
    template = (
        TURNS.replace("OPENING", SENTENCE).replace("AFTER", "").replace("message.content + '<|im_end|>'", "''", 1)
    )
    tokenizer = byte_tokenizer(template.replace("'\\n' + ''", "'\\n' + message.content"), "<|im_end|>")
    assert Trained(tokenizer).learnt(row) == [['weather({"city": "Köln"})<|im_end|>']]


@pytest.mark.parametrize(
    ("opening", "learnt"),
    [
        ("<think>\\n", "\n</think>\n\n2<|im_end|>"),
        ("<seed:think>", "\n</seed:think>\n\n2<|im_end|>"),
        ("[THINK]", "\n[/THINK]\n\n2<|im_end|>"),
    ],
)
def test_an_open_thought_is_closed_before_an_answer_without_one(opening: str, learnt: str) -> None:
    assert turns(opening).learnt([user("1+1?"), says("2")]) == [[learnt]]


def test_a_thought_after_a_prompt_that_closes_it_is_refused_with_the_reason() -> None:
    asks = "'<|im_start|>assistant\\n' }}{%- endif %}"
    assert THINKING.endswith(asks)
    closing = THINKING.removesuffix(asks) + "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    trained = Trained(byte_tokenizer(closing, "<|im_end|>"))
    assert trained.learnt(TWO_TURNS[:2]) == [["Hello you<|im_end|>"]]
    assert "prompt closes the thought before an answer" in trained.refusal(THOUGHT)
    assert "prompt closes the thought before an answer" in turns(CLOSED).refusal(THOUGHT)


@pytest.mark.parametrize(
    "after", ["<|im_start|>assistant", "<|im_start|>", "\\n\\nNow: ", "<|im_end|>", "<|endoftext|>"]
)
def test_what_a_template_writes_after_the_last_stop_is_never_learnt(after: str) -> None:
    trained = turns("", after, ("<|im_end|>", "<|endoftext|>"))
    assert [span for row in trained.learnt(TWO_TURNS) for span in row] == ["Hello you<|im_end|>", "No more.<|im_end|>"]
    for row in trained.rows(TWO_TURNS):
        assert trained.text(row.input_ids).endswith("<|im_end|>")


def test_a_template_that_opens_the_next_turn_asks_with_the_rest_of_it() -> None:
    template = """{% for message in messages %}
{{- '<|im_start|>' + message.role + '|' + message.content + '<|im_end|>' }}
{%- endfor %}{{ '<|im_start|>assistant' }}{% if add_generation_prompt %}{{ '|' }}{% endif %}"""
    trained = Trained(byte_tokenizer(template, "<|im_end|>"))
    assert trained.learnt(TWO_TURNS) == [["Hello you<|im_end|>", "No more.<|im_end|>"]]
    (row,) = trained.rows(TWO_TURNS)
    assert row.input_ids[: row.answer_at].tolist() == trained.asked(TWO_TURNS[:3])


@pytest.mark.parametrize("text", TALKING)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_speaks_of_tags_is_learnt_whole_or_refused(name: str, text: str) -> None:
    trained = family(name)
    pieces = text.replace("<think>\n", "").split("\n</think>\n\n")
    for messages in ([user("Which tag?"), says(text)], [user("Which tag?"), says(text), user("And?"), says("Fine.")]):
        try:
            learnt = trained.learnt(messages)
        except Refused:
            assert name in SPLITTING
            continue
        assert all(piece in learnt[0][0] for piece in pieces), learnt


@pytest.mark.parametrize("name", SPLITTING)
def test_an_answer_that_a_template_takes_apart_says_why_it_is_refused(name: str) -> None:
    for text in TALKING[:2]:
        reason = family(name).refusal([user("Which tag?"), says(text)])
        assert "does not render the content of message 2, which is to be learnt, as it is" in reason


#: Like GLM's of 4.5: no end of turn, and a thought only after the last question.
LATE_THOUGHTS = """{%- set found = namespace(query=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set found.query = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in message.content %}
{{- '<|assistant|>\\n<think>' + (thought if thought and loop.index0 > found.query else '') + '</think>' }}
{{- '\\n' + message.content.split('</think>')[-1].strip() }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' + call.function.name + call.function.arguments | tojson }}{% endfor %}
{%- elif message.role == 'tool' %}{{ '<|observation|>\\n' + message.content }}
{%- else %}{{ '<|' + message.role + '|>\\n' + message.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def test_one_end_is_taught_where_thoughts_are_dropped_from_earlier_turns() -> None:
    tokenizer = byte_tokenizer(LATE_THOUGHTS, "<|endoftext|>")
    trained = Trained(tokenizer, ids_of(tokenizer, ("<|user|>", "<|observation|>")))
    for messages in (
        TWO_TURNS,
        THOUGHT,
        [*THOUGHT, user("2+2?"), says("<think>hm</think>4")],
        [user("x"), says("ends in x")],
    ):
        spans = [span for row in trained.learnt(messages) for span in row]
        assert all(span.endswith("<|user|>") for span in spans), spans
    called = [
        user("Weather?"),
        {**calls("weather", {"city": "Köln"}), "content": "<think>ask</think>"},
        answered("blue"),
        says("Blue."),
    ]
    spans = [span for row in trained.learnt(called) for span in row]
    assert [span.rpartition("<|")[2] for span in spans] == ["observation|>", "user|>"]
    assert "<think>ask</think>" in spans[0]


#: Like Qwen's of 3.8: thoughts come beside the content alone, and the prompt opens one.
BESIDE = """{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- message.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""


def test_thoughts_go_beside_the_content_where_the_template_takes_them_there() -> None:
    trained = Trained(byte_tokenizer(BESIDE, "<|im_end|>"))
    assert trained.learnt(THOUGHT) == [["easy\n</think>\n\n2<|im_end|>"]]
    assert trained.learnt(TWO_TURNS) == [["\n</think>\n\nHello you<|im_end|>", "\n</think>\n\nNo more.<|im_end|>"]]
    assert trained.renderer.takes_thoughts(False)
    # A client sends the same, so that the engine renders the same.
    sent = as_sent(THOUGHT, takes_thoughts=True)
    assert sent[1] == {"role": "assistant", "content": "2", "reasoning": "easy"}
    longer = [*THOUGHT, user("More?")]
    assert "easy" in trained.renderer.prompt(longer)
    assert trained.renderer.prompt(as_sent(longer, takes_thoughts=True)) == trained.renderer.prompt(longer)
    assert as_sent(THOUGHT)[1]["content"] == THOUGHT[1]["content"]
    assert as_sent([says(None)], takes_thoughts=True) == [{"role": "assistant", "content": None}]


def test_a_thought_that_the_template_drops_beside_the_content_is_kept_in_front_of_it() -> None:
    dropping = """{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.tool_calls %}{{ message.reasoning_content }}{% endif %}{{ message.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
    trained = Trained(byte_tokenizer(dropping, "<|im_end|>"))
    assert trained.learnt(THOUGHT) == [["<think>\neasy\n</think>\n\n2<|im_end|>"]]


def test_a_thought_beside_one_that_the_template_writes_itself_is_refused() -> None:
    writing = """{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- message.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
    trained = Trained(byte_tokenizer(writing, "<|im_end|>"))
    assert trained.learnt([user("1+1?"), says("2")]) == [["<think>\n\n</think>\n\n2<|im_end|>"]]
    assert "leave the thoughts out" in trained.refusal(THOUGHT)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (PARTS, True),
        (GLM, False),
        ("{% for m in messages %}{% for c in m.content if c %}{{ c }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for c in m['content'] | list %}{{ c }}{% endfor %}{% endfor %}", True),
        ("{% set some = messages[1:] %}{% for m in some %}{% for c in m.content %}{% endfor %}{% endfor %}", True),
        ("{% macro show(it) %}{% for c in it %}{{ c }}{% endfor %}{% endmacro %}"
         "{% for m in messages %}{{ show(m.content) }}{% endfor %}", True),
        ("{% macro show(it) %}{% for c in it %}{{ c }}{% endfor %}{% endmacro %}"
         "{% for m in messages %}{{ show(it=m.content) }}{% endfor %}", True),
        ("{% macro show(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}"
         "{% for m in messages %}{{ show(m.name) }}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% set content = m.content %}{% for c in content %}{% endfor %}{% endfor %}", True),
        ("{% for page in documents %}{% for c in page.content %}{{ c }}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% generation %}{% for c in m.content %}{% endfor %}"
         "{% endgeneration %}{% endfor %}", True),
        ("{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content ", False),
    ],
)  # fmt: skip
def test_content_is_handed_over_as_the_engine_does(template: Any, wanted: bool) -> None:
    assert loops_over_content(template) is wanted
