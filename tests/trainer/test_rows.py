"""A dataset's file as what is learnt, what is held back and what is left out."""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.trainer import held_back
from modelyard.trainer.examples import Prepared
from modelyard.trainer.labels import IGNORED
from modelyard.trainer.reports import Reports
from modelyard.trainer.rows import prepare
from modelyard.trainer.spec import Hyperparameters, Mode, Spec
from modelyard.trainer.stall_watch import StallWatch
from tests.trainer.templates import FAMILIES, FORGETFUL, HEADERS, byte_tokenizer, need_transformers

pytestmark = [pytest.mark.slow]

WATCH = StallWatch("local:tiny", lambda failure: pytest.fail(failure.message))
SETTINGS = Hyperparameters(
    epochs=1,
    max_steps=None,
    learning_rate=1e-3,
    lr_schedule="linear",
    warmup_steps=None,
    batch_size=None,
    gradient_accumulation=1,
    rank=8,
    alpha=16,
    dropout=0,
    target_modules=None,
    max_seq_len=None,
    seed=0,
    packing=False,
    quantization=None,
    validation_split=None,
    early_stopping=None,
    checkpoint_steps=None,
)


@pytest.fixture(autouse=True, scope="module")
def _transformers() -> None:
    need_transformers()


class Desk:
    """A folder with a dataset, and the preparation of it."""

    def __init__(self, folder: Path, tokenizer: Any = None) -> None:
        self.folder = folder
        self.tokenizer = tokenizer or byte_tokenizer(*FAMILIES["tiny"][:2])

    def prepare(
        self, *rows: Any, max_model_len: int | None = 2048, now: float | None = None, **settings: Any
    ) -> Prepared:
        data = self.folder / "data.jsonl"
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        data.write_bytes(b"".join(line + b"\n" for line in lines))
        spec = self.spec(data, now, **settings)
        return prepare(spec, self.tokenizer, max_model_len, Reports(Path(spec.progress)), WATCH)

    def spec(self, data: Path, now: float | None = None, **settings: Any) -> Spec:
        return Spec(
            mode=Mode.TRAIN,
            name="x",
            model_id="local:tiny",
            model_dir=str(self.folder),
            adapter_id="ft:x",
            data=str(data),
            max_line_bytes=1 << 20,
            hyperparameters=dataclasses.replace(SETTINGS, **settings),
            work_dir=str(self.folder),
            progress=str(self.folder / "progress.jsonl"),
            result=str(self.folder / "result.json"),
            now=now,
        )

    def failure(self, *rows: Any, **settings: Any) -> JobFailure:
        with pytest.raises(JobFailure) as caught:
            self.prepare(*rows, **settings)
        return caught.value

    def reports(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "progress.jsonl").read_text("utf-8").splitlines()
        return [report for report in map(json.loads, lines) if report["kind"] == kind]

    def learnt(self, prepared: Prepared) -> list[str]:
        return [self.tokenizer.decode([label for label in one.labels if label != IGNORED]) for one in prepared.train]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def numbered(count: int) -> list[dict[str, Any]]:
    return [chat(f"Number {number}?", f"It is {number * 7}.") for number in range(count)]


def lines(prepared: Prepared) -> tuple[list[int], list[int]]:
    return [one.line for one in prepared.train], [one.line for one in prepared.held_out]


def test_every_form_is_learnt_and_each_row_has_its_line(desk: Desk) -> None:
    prepared = desk.prepare(
        chat("a", "one"),
        b"",
        {"conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "two"}], "system": "Hush."},
        {"prompt": "c", "completion": "three"},
        b"not JSON",
        {"instruction": "d", "input": "e", "output": "four"},
    )
    assert desk.learnt(prepared) == ["one<|end|>", "two<|end|>", "three<|end|>", "four<|end|>"]
    assert lines(prepared) == ([1, 3, 4, 6], [])
    texts = [desk.tokenizer.decode(list(one.input_ids)) for one in prepared.train]
    assert texts[1] == "<|begin|><|system|>Hush.<|end|><|user|>b<|end|><|assistant|>two<|end|>"


def test_facts_count_what_there_is(desk: Desk) -> None:
    prepared = desk.prepare(*numbered(40), {"messages": [{"role": "user", "content": "?"}]})
    facts = prepared.facts
    sizes = [len(one.input_ids) for one in prepared.train]
    assert (facts["rows"], facts["held_out_rows"], facts["examples"]) == (38, 2, 38)
    assert (facts["tokens"], facts["longest"]) == (sum(sizes), max(sizes))
    assert facts["learnt_tokens"] == sum(label != IGNORED for one in prepared.train for label in one.labels)
    assert facts["template_source"] == "model"
    assert (facts["left_out_rows"], facts["truncated_rows"], facts["duplicate_rows"]) == (0, 0, 0)
    assert json.loads(json.dumps(facts)) == facts
    assert [report["phase"] for report in desk.reports("phase")] == ["tokenizing"]
    final = desk.reports("progress")[-1]
    assert final["done"] == final["total"] == (desk.folder / "data.jsonl").stat().st_size


def test_ids_and_labels_are_compact_and_of_one_length(desk: Desk) -> None:
    rows = desk.prepare(*numbered(3)).train
    assert len(rows) == 3
    for one in rows:
        assert isinstance(one.input_ids, array)
        assert isinstance(one.labels, array)
        assert one.input_ids.itemsize == one.labels.itemsize == 4
        assert len(one.input_ids) == len(one.labels)


def test_a_row_that_is_too_long_is_cut_at_its_end(desk: Desk) -> None:
    long = chat("short", "word " * 100)
    (whole,) = desk.prepare(long).train
    prepared = desk.prepare(long, max_seq_len=20)
    (cut,) = prepared.train
    assert list(cut.input_ids) == list(whole.input_ids[:20])
    assert list(cut.labels) == list(whole.labels[:20])
    assert prepared.facts["truncated_rows"] == 1
    assert prepared.facts["max_seq_len"] == 20


def test_a_row_of_which_nothing_learnt_is_left_is_left_out_and_said(desk: Desk) -> None:
    prepared = desk.prepare(chat("short", "a"), chat("word " * 100, "b"), max_seq_len=50)
    assert desk.learnt(prepared) == ["a<|end|>"]
    (left_out,) = prepared.facts["left_out"]["first"]
    assert left_out["line"] == 2
    assert "first 50 tokens" in left_out["reason"]
    assert prepared.facts["truncated_rows"] == 0


def test_the_length_is_the_models_own_or_4096(desk: Desk) -> None:
    assert desk.prepare(chat("a", "b"), max_model_len=512).facts["max_seq_len"] == 512
    assert desk.prepare(chat("a", "b"), max_model_len=131072).facts["max_seq_len"] == 4096
    assert desk.prepare(chat("a", "b"), max_model_len=None).facts["max_seq_len"] == 4096
    assert desk.prepare(chat("a", "b"), max_model_len=131072, max_seq_len=8192).facts["max_seq_len"] == 8192


def test_a_length_above_the_models_is_refused_with_both_numbers(desk: Desk) -> None:
    failure = desk.failure(chat("a", "b"), max_seq_len=4096, max_model_len=2048)
    assert failure.code == "max_seq_len_too_long"
    assert "4096" in failure.message
    assert "2048" in failure.message
    assert "2048" in failure.hint


def test_rows_that_the_template_refuses_are_left_out_with_line_and_reason(tmp_path: Path) -> None:
    desk = Desk(tmp_path, byte_tokenizer(FORGETFUL))
    bad = {"messages": [{"role": "system", "content": "Hush."}, *chat("a", "b")["messages"]]}
    prepared = desk.prepare(*([bad] * 30), chat("a", "b"))
    assert prepared.facts["left_out"]["count"] == prepared.facts["left_out_rows"] == 30
    listed = prepared.facts["left_out"]["first"]
    assert [one["line"] for one in listed] == list(range(1, 21))
    assert listed[0]["reason"] == "the chat template leaves out message 1, whose role is system"
    assert lines(prepared) == ([31], [])


def test_a_dataset_of_which_nothing_can_be_learnt_fails_with_the_first_reasons(tmp_path: Path) -> None:
    desk = Desk(tmp_path, byte_tokenizer(FORGETFUL))
    bad = {"messages": [{"role": "system", "content": "Hush."}, *chat("a", "b")["messages"]]}
    failure = desk.failure(bad, bad)
    assert failure.code == "nothing_to_learn"
    assert "2 rows" in failure.message
    assert failure.evidence[0] == "line 1: the chat template leaves out message 1, whose role is system"
    assert desk.failure(b"").code == "nothing_to_learn"


def test_a_dataset_that_is_gone_fails(desk: Desk) -> None:
    spec = desk.spec(desk.folder / "gone")
    with pytest.raises(JobFailure) as caught:
        prepare(spec, desk.tokenizer, 2048, Reports(Path(spec.progress)), WATCH)
    assert caught.value.code == "dataset_missing"


@pytest.mark.parametrize(
    ("rows", "split", "count"),
    [
        (0, None, 0),
        (19, None, 0),
        (20, None, 1),
        (30, None, 2),
        (1000, None, 50),
        (1000, 0.0, 0),
        (10, 0.2, 2),
        (3, 0.01, 1),
        (3, 0.99, 2),
        (1, 0.5, 0),
    ],
)
def test_so_many_rows_are_held_back(rows: int, split: float | None, count: int) -> None:
    assert held_back.count(rows, split) == count


def test_what_is_held_back_depends_on_the_seed_alone(desk: Desk) -> None:
    rows = numbered(60)
    train, held_out = lines(desk.prepare(*rows, seed=1))
    assert lines(desk.prepare(*rows, seed=1)) == (train, held_out)
    assert lines(desk.prepare(*rows, seed=2)) != (train, held_out)
    assert sorted(train + held_out) == list(range(1, 61))
    assert train == sorted(train)
    assert len(held_out) == 3


def test_the_hash_is_of_what_is_learnt(desk: Desk) -> None:
    def sha(rows: Sequence[Any], **settings: Any) -> str:
        return str(desk.prepare(*rows, **settings).facts["sha256"])

    rows = numbered(30)
    assert sha(rows) == sha(rows)
    assert sha(rows, seed=1) != sha(rows)
    changed = [{**row, "id": number} for number, row in enumerate(rows)]
    assert sha(changed) == sha(rows)  # what is not learnt from makes no difference
    weightless = {"messages": [*chat("a", "b")["messages"], {"role": "user", "content": "c"}]}
    assert sha([weightless], validation_split=0) == sha([chat("a", "b")], validation_split=0)
    unlearnt = {"messages": [*chat("a", "b")["messages"], *chat("c", "d")["messages"]]}
    other = json.loads(json.dumps(unlearnt))
    other["messages"][1]["weight"] = 0
    assert sha([unlearnt]) != sha([other])


def test_copies_of_a_row_are_all_learnt_and_none_is_held_back(desk: Desk) -> None:
    rows = [*numbered(10), *numbered(8), chat("only", "once"), chat("only", "twice")]
    for seed in range(8):
        prepared = desk.prepare(*rows, seed=seed, validation_split=0.9)
        train, held_out = lines(prepared)
        assert set(held_out) == {9, 10, 19, 20}
        assert prepared.facts["duplicate_rows"] == 16
        assert len(train) == 16
    assert lines(desk.prepare(*([chat("a", "b")] * 30)))[1] == []


def test_asking_for_a_measurement_that_no_row_can_give_is_refused_with_the_reasons(desk: Desk) -> None:
    copies = [*numbered(6), *numbered(6)]
    for asked, named in (
        ({"validation_split": 0.2}, "validation_split 0.2"),
        ({"validation_split": 0.2, "early_stopping": 1}, "validation_split 0.2 and early_stopping 1"),
    ):
        failure = desk.failure(*copies, **asked)
        assert failure.code == "nothing_to_measure_by"
        assert "Of 12 rows none can be held back to measure by: 12 have a copy among the others." in failure.message
        assert f"The request has {named}." in failure.message
    long = [chat(f"q{number}", "word " * 100) for number in range(3)]
    assert "2 have a copy among the others and 3 are truncated." in desk.failure(
        *numbered(1), *numbered(1), *long, max_seq_len=40, validation_split=0.2
    ).message  # fmt: skip
    # Of so few rows none is held back by itself, and nothing would ever stop it.
    assert desk.failure(*numbered(6), early_stopping=3).code == "nothing_to_measure_by"


def test_where_no_row_can_be_held_back_and_nobody_asked_it_is_told(desk: Desk) -> None:
    (note,) = desk.prepare(*numbered(15), *numbered(15)).facts["notes"]
    assert note == "Of 30 rows none can be held back to measure by: 30 have a copy among the others."
    assert note in desk.reports("note")[-1]["message"]
    assert desk.reports("note")[-1]["level"] == "WARNING"
    assert desk.prepare(*numbered(6)).facts["notes"] == desk.prepare(*numbered(30)).facts["notes"] == []


def test_a_row_that_was_cut_is_not_held_back(desk: Desk) -> None:
    rows = [*numbered(2), *(chat(f"q{number}", "word " * 100) for number in range(30))]
    train, held_out = lines(desk.prepare(*rows, max_seq_len=40, validation_split=0.5))
    assert set(held_out) == {1, 2}
    assert len(train) == 30


def test_a_row_held_back_is_a_question_as_the_engine_asks_it(desk: Desk) -> None:
    first = {"role": "assistant", "content": "first", "weight": 0}
    rows = [
        {"messages": [{"role": "user", "content": f"a{n}"}, first, {"role": "user", "content": "b"}, *_said(n)]}
        for n in range(4)
    ]
    prepared = desk.prepare(*rows, validation_split=0.5)
    assert len(prepared.held_out) == 2
    for held in prepared.held_out:
        number = held.line - 1
        assert held.messages == [
            {"role": "user", "content": f"a{number}"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "b"},
        ]
        asked = desk.tokenizer.apply_chat_template(held.messages, add_generation_prompt=True, return_dict=False)
        assert list(held.prompt_ids) == asked
        assert held.answer == f"  answer {number}\n"
        assert list(held.example.input_ids[: len(asked)]) == asked
        assert held.line not in [one.line for one in prepared.train]


def _said(number: int) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": f"  answer {number}\n"}, {"role": "user", "content": "thanks"}]


def test_the_answer_of_a_row_held_back_has_what_the_template_puts_before_it(tmp_path: Path) -> None:
    desk = Desk(tmp_path, byte_tokenizer(*FAMILIES["thinking"][:2]))
    prepared = desk.prepare(*numbered(2), validation_split=0.5)
    (held,) = prepared.held_out
    number = held.line - 1
    assert held.answer == f"<think>\n\n</think>\n\nIt is {number * 7}."


def test_probes_are_prompts_of_the_data_and_two_fixed_ones(desk: Desk) -> None:
    prepared = desk.prepare(*numbered(30))
    assert len(prepared.probes) == 6
    for probe in prepared.probes:
        asked = desk.tokenizer.apply_chat_template(probe.messages, add_generation_prompt=True, return_dict=False)
        assert probe.token_ids == asked
    assert any(not probe.messages[0]["content"].isascii() for probe in prepared.probes)
    again = desk.prepare(*numbered(30))
    assert again.probes == prepared.probes
    assert len(desk.prepare(chat("a", "b")).probes) == 3


def test_probes_and_questions_with_tools_are_as_a_client_sends_them(tmp_path: Path) -> None:
    desk = Desk(tmp_path, byte_tokenizer(*FAMILIES["thinking"][:2]))
    call = {"id": "call_1", "function": {"name": "sky", "arguments": {"city": "Köln"}}}
    sent = {"id": "call_1", "type": "function", "function": {"name": "sky", "arguments": '{"city":"Köln"}'}}
    tools = [{"type": "function", "function": {"name": "sky", "parameters": {}}}]
    row = {
        "messages": [
            {"role": "user", "content": "Sky?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "blue", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "Blue."},
        ],
        "tools": tools,
    }
    (probe, *_) = desk.prepare(row).probes
    assert probe.tools == tools
    assert probe.messages[1] == {"role": "assistant", "content": None, "tool_calls": [sent]}
    assert "blue" in desk.tokenizer.decode(probe.token_ids)
    # Nobody can send a call without an id: such a row is no probe.
    del call["id"]
    assert [probe.tools for probe in desk.prepare(row).probes] == [None, None]


def test_a_template_that_asks_for_the_date_gets_the_trainings(tmp_path: Path) -> None:
    desk = Desk(tmp_path, byte_tokenizer(HEADERS, "<|eot_id|>"))
    first = desk.prepare(chat("a", "b"), now=1_790_000_000.0)
    assert "Today: 21 Sep 2026" in desk.tokenizer.decode(list(first.train[0].input_ids))
    assert first.facts["template_is_dated"] is True
    assert desk.prepare(chat("a", "b"), now=1_790_000_000.0).facts["sha256"] == first.facts["sha256"]
    assert desk.prepare(chat("a", "b"), now=1_790_000_001.0).facts["sha256"] != first.facts["sha256"]


def test_the_engines_own_stop_tokens_are_read_from_the_models_folder(tmp_path: Path) -> None:
    template, end, _ = FAMILIES["turns"]
    desk = Desk(tmp_path, byte_tokenizer(template, end))
    # Nothing says that the template's end of turn ends anything: the tokenizer's own end is learnt after it.
    assert desk.learnt(desk.prepare(chat("a", "b"))) == ["b<end_of_turn><|endoftext|>"]
    stop = desk.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": stop}}))
    assert desk.learnt(desk.prepare(chat("a", "b"))) == ["b<end_of_turn>"]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    prepared = desk.prepare(chat("a", "b"))
    assert desk.learnt(prepared) == ["b<end_of_turn>"]
    assert prepared.facts["stop_tokens"] == sorted({1, stop, desk.tokenizer.eos_token_id})
    (tmp_path / "generation_config.json").write_text("[]")
    assert desk.learnt(desk.prepare(chat("a", "b"))) == ["b<end_of_turn>"]


def test_the_default_template_is_recorded(tmp_path: Path) -> None:
    desk = Desk(tmp_path, byte_tokenizer(None))
    prepared = desk.prepare(chat("a", "b"))
    assert prepared.facts["template_source"] == "default"
    assert "assistant:" in prepared.template
    assert desk.learnt(prepared) == [" b<|end|>"]


def test_a_template_in_the_processors_file_is_learnt_by_as_the_engine_renders_by_it(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.role + '>' + message.content + eos_token }}{% endfor %}"
    asks = "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template + asks}))
    prepared = Desk(tmp_path, byte_tokenizer(None)).prepare(chat("a", "b"))
    assert (prepared.facts["template_source"], prepared.template) == ("model", template + asks)


def conversation(turns: int, words: int = 6, **more: Any) -> dict[str, Any]:
    said = [
        {"role": role, "content": f"{number} {role} " + "word " * words}
        for number in range(turns) for role in ("user", "assistant")
    ]  # fmt: skip
    return {"messages": said, **more}


@pytest.mark.parametrize("family", ["tiny", "thinking", "turns", "phi"])
@pytest.mark.parametrize("limit", [64, 300])
def test_a_long_conversation_is_learnt_as_if_it_had_been_cut_after_it_was_tokenised(
    family: str, limit: int, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, byte_tokenizer(*FAMILIES[family][:2]))
    row = conversation(40)
    whole = [one for one in desk.prepare(row, max_model_len=1 << 20, max_seq_len=1 << 20).train]
    cut = desk.prepare(row, max_seq_len=limit)
    learnt = [(list(one.input_ids[:limit]), list(one.labels[:limit])) for one in whole]
    expected = [(ids, labels) for ids, labels in learnt if any(label != IGNORED for label in labels)]
    found = [(list(one.input_ids), list(one.labels)) for one in cut.train]
    assert len(found) == len(expected)
    for (ids, labels), (all_ids, all_labels) in zip(found, expected, strict=True):
        # What is not learnt at the end need not be there.
        assert ids == all_ids[: len(ids)]
        assert labels == all_labels[: len(labels)]
        assert not any(label != IGNORED for label in all_labels[len(labels) :])
    assert cut.facts["truncated_rows"] == 1


def test_turns_beyond_the_length_are_not_even_rendered(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    bad = conversation(40)
    # The template takes no such role, and says so of a row in which it is reached.
    bad["messages"][60]["content"] = "<|refused|>"
    desk.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == '<|refused|>' %}{{ raise_exception('reached') }}{% endif %}"
        "{% endfor %}" + desk.tokenizer.chat_template
    )
    assert desk.prepare(bad, max_seq_len=200).facts["truncated_rows"] == 1
    assert "reached" in desk.failure(bad, max_seq_len=2000).evidence[0]


def test_a_row_whose_answer_is_too_far_on_is_left_out_without_being_rendered(desk: Desk) -> None:
    failure = desk.failure(chat("word " * 5000, "b"), max_seq_len=50)
    assert failure.evidence == ("line 1: its first 50 tokens have nothing to learn in them (max_seq_len)",)


def test_long_rows_that_differ_beyond_the_length_are_no_copies(desk: Desk) -> None:
    one, other = conversation(40), conversation(40)
    other["messages"][79]["content"] += "!"
    assert desk.prepare(one, other, max_seq_len=64).facts["duplicate_rows"] == 0
    assert desk.prepare(one, one, max_seq_len=64).facts["duplicate_rows"] == 2
