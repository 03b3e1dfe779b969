"""What an upload takes, a training takes: parts, thoughts, texts, and everything else that no model decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelyard.datasets.lines import rows_of
from modelyard.datasets.validation import Validation
from modelyard.trainer.engine_messages import Refused
from modelyard.trainer.labels import IGNORED
from modelyard.trainer.messages import messages_of
from modelyard.trainer.rendering import Renderer
from modelyard.trainer.texts import pieces
from tests.datasets import test_forms
from tests.trainer.templates import FAMILIES, PARTS, byte_tokenizer, need_transformers
from tests.trainer.test_rows import Desk, chat, numbered

pytestmark = [pytest.mark.slow]

#: Leaves nothing out, and takes everything.
FAITHFUL = """{{- tools | tojson if tools }}{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{{- message.tool_calls | tojson if message.tool_calls }}{{ '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
BETWEEN = PARTS.replace("{{ part.text }}", "{{ ' / ' if not loop.first }}{{ part.text }}")
TRIMMED = PARTS.replace("{{ part.text }}", "{{ part.text | trim }}")
FIRST_ONLY = PARTS.replace("{{ part.text }}", "{{ part.text if loop.first }}")
BY_NUMBER = PARTS.replace("{{ part.text }}", "{{ part.text }}{{ loop.length }}")


@pytest.fixture(autouse=True, scope="module")
def _transformers() -> None:
    need_transformers()


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def rendered(template: str, row: dict[str, Any]) -> str:
    line = json.dumps(row).encode()
    ((_, _, found),) = rows_of([line], 1 << 20)
    renderer = Renderer(byte_tokenizer(template, "<|im_end|>"))
    return "".join(piece.text for piece in renderer.pieces(messages_of(found), found.tools))


@pytest.mark.parametrize(
    ("template", "between"), [(PARTS, ""), (BETWEEN, " / "), (FAMILIES["chatml"][0], "\n"), (TRIMMED, "")]
)
def test_parts_are_joined_as_the_models_template_joins_them(template: str, between: str) -> None:
    row = {"messages": [
        {"role": "system", "content": parts("one", "two")}, {"role": "user", "content": parts("three", "four", "five")},
        {"role": "assistant", "content": parts("six", "seven")},
    ]}  # fmt: skip
    text = rendered(template, row)
    for expected in (["one", "two"], ["three", "four", "five"], ["six", "seven"]):
        assert between.join(expected) in text


def test_a_template_that_trims_parts_is_followed_and_one_that_drops_or_counts_them_is_refused() -> None:
    row = {"messages": [{"role": "user", "content": parts(" a ", " b ")}, {"role": "assistant", "content": "c"}]}
    assert "<|user|>ab<|im_end|>" in rendered(TRIMMED, row)
    assert "<|user|> a  b <|im_end|>" in rendered(PARTS, row)
    with pytest.raises(Refused, match="leaves out parts of messages whose role is user"):
        rendered(FIRST_ONLY, row)
    with pytest.raises(Refused, match="does not join the text parts"):
        rendered(BY_NUMBER, row)


def test_what_a_tool_said_in_parts_is_joined_by_newlines_as_the_engine_does_it() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "sky", "arguments": {}}]}
    template = PARTS.replace("{%- for part in message.content %}", (
        "{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
        "{%- if message.role == 'tool' %}{{ message.content }}{% else %}{%- for part in message.content %}"
    )).replace("{%- endfor %}{{ eos_token }}", "{%- endfor %}{% endif %}{{ eos_token }}")  # fmt: skip
    row = {"messages": [{"role": "user", "content": "Sky?"}, call, {"role": "tool", "content": parts("blue", "grey")},
                        {"role": "assistant", "content": "Both."}]}  # fmt: skip
    assert "<|tool|>blue\ngrey<|im_end|>" in rendered(template, row)


def test_a_row_held_back_is_asked_in_parts_as_it_was_written(tmp_path: Path) -> None:
    desk = Desk(tmp_path, byte_tokenizer(BETWEEN, "<|im_end|>"))
    asked = parts("one", "two")
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{n}"}]} for n in (1, 2)
    ]
    (held,) = desk.prepare(*rows, validation_split=0.5).held_out
    assert held.messages == [{"role": "user", "content": asked}]
    assert "one / two" in desk.tokenizer.decode(list(held.prompt_ids))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
@pytest.mark.parametrize("family", ["thinking", "chatml", "reasoning"])
def test_a_thought_is_learnt_before_its_answer(tmp_path: Path, key: str, family: str) -> None:
    template, end, _ = FAMILIES[family]
    desk = Desk(tmp_path, byte_tokenizer(template, end))
    row = {"messages": [{"role": "user", "content": "17 times 3?"},
                        {"role": "assistant", "content": "51", key: "Seventeen thrice."}]}  # fmt: skip
    (learnt,) = desk.learnt(desk.prepare(row))
    thought, _, answer = learnt.partition("</think>")
    assert "Seventeen thrice." in thought
    assert answer.strip().startswith("51")


def test_every_token_of_a_text_is_learnt_once_and_then_its_end(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    text = "The mill at Hald was built of grey stone. " * 20
    prepared = desk.prepare({"text": text}, chat("a", "b"), max_seq_len=50)
    pieces_of_it = [one for one in prepared.train if one.line == 1]
    assert all(len(one.input_ids) <= 50 for one in pieces_of_it)
    learnt = [label for one in pieces_of_it for label in one.labels if label != IGNORED]
    whole = [*desk.tokenizer(text)["input_ids"], desk.tokenizer.eos_token_id]
    assert learnt == whole[1:]
    assert (prepared.facts["text_rows"], prepared.facts["rows"], prepared.facts["truncated_rows"]) == (1, 2, 0)


def test_texts_can_be_held_back_for_the_loss_and_are_no_questions(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    prepared = desk.prepare(*({"text": f"Number {number} is a number."} for number in range(10)), validation_split=0.2)
    assert len(prepared.held_out) == 2
    for held in prepared.held_out:
        assert (held.messages, list(held.prompt_ids), held.answer) == ([], [], "")
        assert any(label != IGNORED for label in held.example.labels)
    assert len(prepared.probes) == 2, "the fixed ones"
    mixed = desk.prepare({"text": "x y z"}, *numbered(3), {"text": "y"})
    assert [one.line for one in mixed.train] == sorted(one.line for one in mixed.train)


def test_pieces_of_a_text_overlap_by_one_token() -> None:
    from array import array

    found = [(list(ids), list(labels)) for ids, labels in pieces(array("i", range(7)), 4)]
    assert found == [([0, 1, 2, 3], [IGNORED, 1, 2, 3]), ([3, 4, 5, 6], [IGNORED, 4, 5, 6])]
    assert [list(ids) for ids, _ in pieces(array("i", range(8)), 4)] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert list(pieces(array("i", [1]), 4)) == []


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50, deadline=None)
@given(st.lists(test_forms.rows, min_size=1, max_size=8))
def test_a_training_takes_exactly_what_the_upload_takes(several: list[Any]) -> None:
    """With a template that takes everything, which leaves what no model decides."""
    data = b"".join(json.dumps(row).encode() + b"\n" for row in several)
    validation = Validation(1 << 20, is_recognised=True)
    validation.feed(data)
    report = validation.finish()
    validation.close()
    renderer = _faithful()
    read = []
    for line, _, row in rows_of([data], 1 << 20):
        read.append(line)
        if row.text is None:
            renderer.pieces(messages_of(row), row.tools)  # refuses nothing
    refused = {problem["line"] for problem in report["problems"]["listed"]}
    assert read == [line for line in range(1, len(several) + 1) if line not in refused]


_renderers: list[Renderer] = []


def _faithful() -> Renderer:
    if not _renderers:
        _renderers.append(Renderer(byte_tokenizer(FAITHFUL, "<|im_end|>")))
    return _renderers[0]
