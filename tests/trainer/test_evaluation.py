"""Base and adapter on rows that were held back: real models, in float32, so that equality can be asked for."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelyard.demo.tiny_llama import make_llama
from modelyard.trainer.reports import Reports
from modelyard.trainer.stall_watch import StallWatch
from tests.fixtures import missing

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn of themselves

WATCH = StallWatch("local:tiny", lambda failure: pytest.fail(failure.message))
QUESTIONS = [
    "Name a river.",
    "Which mountain is the highest of all that stand on this planet, and how high is it?",
    "Who are you?",
    "Count to five, slowly, in words, with a comma after each of them.",
    "Привет! Как дела?",
    "ok",
    "Where does the sun go at night?",
    "What is the difference between a lake and a sea, for somebody who has seen neither of the two?",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            missing("engine", f"{name} is not installed")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_llama(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(base))


@pytest.fixture
def model(base: Path) -> Any:
    """The tiny model with an adapter whose weights are random, and large enough to change its answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    torch.set_num_threads(1)
    found = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1),
    )
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    return found


def held_out(tokenizer: Any, answers: list[str], questions: list[str] | None = None) -> list[Any]:
    """Return rows as `rows.prepare` holds them back: a question, what was wanted, and its tokens."""
    from modelyard.trainer.examples import Example, HeldOut

    found = []
    for number, (question, answer) in enumerate(zip(questions or QUESTIONS, answers, strict=True)):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        example = Example(number + 1, [*prompt, *said], [-100] * len(prompt) + said)
        found.append(HeldOut(number + 1, messages, None, prompt, answer, example))
    return found


def greedy(model: Any, tokenizer: Any, row: Any) -> str:
    """Return what transformers and PEFT answer to one row alone, without padding."""
    import torch

    ids = torch.tensor([list(row.prompt_ids)])
    model.eval()
    with torch.no_grad():
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=160)
    text: str = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def loss_alone(model: Any, rows: list[Any]) -> float:
    """Return the loss per learnt token by transformers' own labels, row by row."""
    import torch

    total, count = 0.0, 0
    model.eval()
    for row in rows:
        ids, labels = torch.tensor([row.example.input_ids]), torch.tensor([row.example.labels])
        learnt = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * learnt
        count += learnt
    return total / count


def evaluated(model: Any, tokenizer: Any, rows: list[Any], folder: Path, **options: Any) -> dict[str, Any]:
    from modelyard.trainer.evaluation import evaluate

    found = evaluate(model, tokenizer, rows, Reports(folder / "progress.jsonl"), WATCH, **options)
    assert found is not None
    return found


def test_batches_of_any_size_give_the_loss_and_the_answers_of_each_row_alone(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    # Of long wanted answers, so that the limit on an answer's length has little to say.
    rows = held_out(tokenizer, ["river " * (3 + 3 * number) for number in range(len(QUESTIONS))])
    alone = evaluated(model, tokenizer, rows, tmp_path, batch_rows=1)
    for batch_rows in (3, 32):
        together = evaluated(model, tokenizer, rows, tmp_path, batch_rows=batch_rows)
        assert together["answers"] == alone["answers"]
        for side in ("base", "adapter"):
            assert together[side]["loss"] == pytest.approx(alone[side]["loss"], rel=1e-5)
    with model.disable_adapter():
        assert alone["base"]["loss"] == pytest.approx(loss_alone(model, rows), rel=1e-5)
    assert alone["adapter"]["loss"] == pytest.approx(loss_alone(model, rows), rel=1e-5)
    for row, said in zip(rows, alone["answers"], strict=True):
        assert said["adapter"]
        assert greedy(model, tokenizer, row).startswith(said["adapter"].removesuffix("\ufffd")), row.line
        with model.disable_adapter():
            assert greedy(model, tokenizer, row).startswith(said["base"].removesuffix("\ufffd")), row.line
        assert said["base"] != said["adapter"]


def test_a_text_that_was_held_back_has_a_loss_and_is_not_asked(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from modelyard.trainer.evaluation import expected_seconds
    from modelyard.trainer.examples import Example, HeldOut

    ids = tokenizer("The mill at Hald stands empty.")["input_ids"]
    text = HeldOut(9, [], None, (), "", Example(9, ids, [-100, *ids[1:]]))
    found = evaluated(model, tokenizer, [text], tmp_path)
    assert found["adapter"]["loss"] == pytest.approx(loss_alone(model, [text]), rel=1e-5)
    assert (found["answers"], found["adapter"]["exact_match"], found["adapter"]["rows"]) == ([], None, 1)
    assert expected_seconds(model, tokenizer, [text], Reports(tmp_path / "p"), WATCH) == 0.0
    both = evaluated(model, tokenizer, [text, *held_out(tokenizer, ["river"], QUESTIONS[:1])], tmp_path)
    assert ([one["line"] for one in both["answers"]], both["rows"]) == ([1], 2)


def test_an_adapter_that_answers_as_was_wanted_is_better_and_the_other_way_round_it_is_not(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = held_out(tokenizer, ["x" * 80] * len(QUESTIONS))
    said = evaluated(model, tokenizer, rows, tmp_path)["answers"]
    wanted = held_out(tokenizer, [one["adapter"] for one in said])
    found = evaluated(model, tokenizer, wanted, tmp_path)
    # Its answers do not end where the wanted ones are cut, but they begin with them.
    assert found["adapter"]["rouge_l"] > 0.6 > found["base"]["rouge_l"]
    assert found["adapter"]["loss"] < found["base"]["loss"]
    assert found["better"] is True
    assert found["why"].startswith("Better: loss per token ")
    worse = evaluated(model, tokenizer, held_out(tokenizer, [one["base"] for one in said]), tmp_path)
    assert worse["better"] is False
    assert "its loss is not lower" in worse["why"]


def test_an_answer_ends_at_the_stop_token_and_then_it_can_be_exact(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = held_out(tokenizer, ["x" * 60] * len(QUESTIONS))
    first = evaluated(model, tokenizer, rows, tmp_path)["answers"]
    # Whatever token the adapter says third becomes the one that ends an answer.
    ids = [tokenizer(one["adapter"], add_special_tokens=False)["input_ids"] for one in first]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, ids[0][2]]
    cut = evaluated(model, tokenizer, rows, tmp_path)["answers"][0]["adapter"]
    assert cut == tokenizer.decode(ids[0][:2])
    exact = evaluated(model, tokenizer, held_out(tokenizer, [cut], QUESTIONS[:1]), tmp_path)
    assert exact["adapter"] | {"loss": None} == {"exact_match": 1.0, "rouge_l": 1.0, "rows": 1, "loss": None}


def test_sampling_and_penalties_of_the_models_own_file_change_no_answer_and_stay_as_they_were(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = held_out(tokenizer, ["river " * 8] * len(QUESTIONS))
    plain = evaluated(model, tokenizer, rows, tmp_path)["answers"]
    config = model.get_base_model().generation_config
    config.do_sample, config.temperature, config.repetition_penalty, config.min_new_tokens = True, 5.0, 9.0, 30
    model.train()
    assert evaluated(model, tokenizer, rows, tmp_path)["answers"] == plain
    assert model.get_base_model().generation_config is config
    assert model.training


def test_of_many_rows_the_same_sample_is_scored_each_time_and_said(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from modelyard.trainer.evaluation import MOST_ROWS, SHOWN_ROWS

    count = MOST_ROWS + 50
    rows = held_out(tokenizer, ["ok"] * count, [f"Question {number}" for number in range(count)])
    first = evaluated(model, tokenizer, rows, tmp_path)
    assert (first["rows"], first["held_out_rows"], first["base"]["rows"]) == (MOST_ROWS, count, MOST_ROWS)
    lines = [one["line"] for one in first["answers"]]
    assert lines == sorted(lines)
    assert len(lines) == SHOWN_ROWS
    assert lines != list(range(1, SHOWN_ROWS + 1))
    reports = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text("utf-8").splitlines()]
    assert [one["message"] for one in reports if one["kind"] == "note"] == [
        f"Of the {count} rows that were held back, {MOST_ROWS}, drawn at random, are scored."
    ]
    progress = [one for one in reports if one["kind"] == "progress"]
    assert (progress[-1]["done"], progress[-1]["total"]) == (2 * MOST_ROWS, 2 * MOST_ROWS)
    assert evaluated(model, tokenizer, rows, tmp_path)["answers"] == first["answers"]


def test_without_rows_there_is_nothing_to_say(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from modelyard.trainer.evaluation import evaluate

    assert evaluate(model, tokenizer, [], Reports(tmp_path / "progress.jsonl"), WATCH) is None


def test_it_ends_within_a_token_when_told_to(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from modelyard.trainer.evaluation import Stopped, evaluate

    rows = held_out(tokenizer, ["x" * 200] * len(QUESTIONS))
    asked = 0
    began = time.monotonic()

    def stop_in_the_middle_of_an_answer() -> bool:
        nonlocal asked
        asked += 1
        return asked > 20

    with pytest.raises(Stopped):
        evaluate(
            model, tokenizer, rows, Reports(tmp_path / "progress.jsonl"), WATCH,
            should_stop=stop_in_the_middle_of_an_answer,
        )  # fmt: skip
    assert asked == 21
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("method", ["generate", "forward"])
def test_a_batch_that_is_too_large_for_memory_is_done_in_halves(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    rows = held_out(tokenizer, ["river " * 4] * len(QUESTIONS))
    whole = evaluated(model, tokenizer, rows, tmp_path)
    base = model.get_base_model()
    real: Callable[..., Any] = getattr(base, method)
    sizes = []

    # The allocator's own refusal, at a size that this machine would not refuse.
    def small(self: Any, *arguments: Any, input_ids: Any, **rest: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            import torch

            torch.empty(2**60, dtype=torch.int8)
        return real(*arguments, input_ids=input_ids, **rest)

    import functools

    monkeypatch.setattr(base, method, functools.wraps(real)(functools.partial(small, base)))
    found = evaluated(model, tokenizer, rows, tmp_path)
    assert max(sizes) == len(QUESTIONS)
    assert found["answers"] == whole["answers"]
    assert found["adapter"]["loss"] == pytest.approx(whole["adapter"]["loss"], rel=1e-5)
