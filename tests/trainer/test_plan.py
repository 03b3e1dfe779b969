"""The dry run beside the truth: the real child plans a training of the tiny Llama, and then takes it."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelyard.child_environment import child_environment
from modelyard.demo.tiny_llama import make_llama
from modelyard.trainer.spec import Hyperparameters, Mode, Spec
from tests.fixtures import missing

pytestmark = pytest.mark.slow

CHILD_S = 240
SETTINGS = Hyperparameters(
    epochs=6.0, max_steps=None, learning_rate=1e-3, lr_schedule="constant", warmup_steps=None, batch_size=8,
    gradient_accumulation=1, rank=8, alpha=16.0, dropout=0.0, target_modules=None, max_seq_len=None, seed=0,
    packing=False, quantization=None, validation_split=0.05, early_stopping=None, checkpoint_steps=None,
)  # fmt: skip
#: How often the comparison with the truth is tried: others on this machine may double what a moment takes.
TRIES = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            missing("engine", f"{name} is not installed")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_llama(folder)
    return folder


def dataset(path: Path, rows: int = 160, bad: int = 0) -> Path:
    """Write conversations of very different lengths, and some of which nothing can be learnt."""
    chance = random.Random(0)
    words = ["the", "longest", "river", "of", "highest", "mountain", "runs", "into", "a", "wide", "quiet", "sea"]
    lines = []
    for _ in range(rows):
        said = [" ".join(chance.choices(words, k=chance.choice([4, 20, 60, 140]))) for _ in range(2)]
        lines.append([{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}])
    # So long a question that its answer lies beyond what the model takes.
    lines += [[{"role": "user", "content": "river " * 4000}, {"role": "assistant", "content": "Yes."}]] * bad
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in lines), "utf-8")
    return path


def run(spec: Spec, folder: Path) -> dict[str, Any]:
    """Run the trainer child to its end and return its result, with what it reported as `reports`."""
    folder.mkdir(parents=True)
    spec = replace(
        spec, work_dir=str(folder / "work"), progress=str(folder / "progress"), result=str(folder / "result")
    )
    Path(spec.work_dir).mkdir()
    spec.write(folder / "training.json")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "modelyard.trainer", str(folder / "training.json")],
        env=child_environment({"OMP_NUM_THREADS": "1"}), capture_output=True, text=True, timeout=CHILD_S, check=False,
    )  # fmt: skip
    assert (folder / "result").exists(), done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result").read_text("utf-8"))
    reports = [json.loads(line) for line in (folder / "progress").read_text("utf-8").splitlines()]
    return {**result, "reports": reports, "log": done.stderr}


def spec_for(model_dir: Path, data: Path, **changes: Any) -> Spec:
    values: dict[str, Any] = {
        "mode": Mode.PLAN, "name": "a plan", "model_id": "acme/tiny", "model_dir": str(model_dir),
        "adapter_id": "ft:a-plan", "data": str(data), "max_line_bytes": 2**20, "hyperparameters": SETTINGS,
        "work_dir": "", "progress": "", "result": "",
    }  # fmt: skip
    return Spec(**values | changes)


def planned(result: dict[str, Any]) -> dict[str, Any]:
    assert "plan" in result, (result.get("failure"), result["log"][-2000:])
    found: dict[str, Any] = result["plan"]
    return found


def test_a_plan_is_near_the_truth_and_so_is_what_the_training_says_after_a_few_steps(
    model_dir: Path, tmp_path: Path
) -> None:
    data = dataset(tmp_path / "data.jsonl")
    found: list[tuple[float, float, float]] = []
    for number in range(TRIES):
        plan = planned(run(spec_for(model_dir, data), tmp_path / f"plan-{number}"))
        done = run(spec_for(model_dir, data, mode=Mode.TRAIN), tmp_path / f"train-{number}")
        assert "figures" in done, done.get("failure")
        truth = done["figures"]
        assert done["evaluation"]["rows"] == plan["prepared"]["held_out_rows"] == 8
        assert done["evaluation"]["adapter"]["loss"] < done["evaluation"]["base"]["loss"]
        (early,) = [one for one in done["reports"] if one["kind"] == "estimate"]
        assert set(plan["estimate"]) | {"kind"} == set(early)
        assert plan["estimate"]["basis"] == early["basis"] == "measured"
        assert plan["prepared"]["steps"] == truth["steps"] == 114
        assert plan["batch_size"] == truth["batch_size"] == 8
        assert (plan["device"], plan["dtype"]) == (truth["device"], truth["dtype"])
        assert plan["fits"] is True
        assert plan["failure"] is None
        for one in (plan["estimate"], early):
            # What one says of speed and of time is the same claim.
            assert one["seconds"] * one["tokens_per_s"] == pytest.approx(truth["tokens"], rel=0.03)
        found.append(
            (
                plan["estimate"]["seconds"] / truth["training_seconds"],
                early["seconds"] / truth["training_seconds"],
                plan["estimate"]["memory_bytes"] / truth["peak_memory_bytes"],
            )
        )
        if all(0.5 < ratio < 2 for ratio in found[-1][:2]):
            break
    seconds, early_seconds, memory = found[-1]
    assert 0.5 < seconds < 2, found
    assert 0.5 < early_seconds < 2, found
    assert 0.7 < memory < 1.3, found
    parts = plan["seconds"]
    assert set(parts) == {"loading", "tokenizing", "training", "validation", "evaluation", "total"}
    assert parts["total"] == pytest.approx(sum(parts.values()) - parts["total"], abs=0.01)
    assert min(parts.values()) > 0


def test_a_plan_leaves_nothing_behind_and_says_which_rows_are_truncated_or_left_out(
    model_dir: Path, tmp_path: Path
) -> None:
    data = dataset(tmp_path / "data.jsonl", rows=40, bad=2)
    settings = replace(SETTINGS, batch_size=None, learning_rate=None, max_steps=1000, epochs=None, max_seq_len=256)
    plan = planned(run(spec_for(model_dir, data, hyperparameters=settings), tmp_path / "plan"))
    prepared = plan["prepared"]
    assert prepared["left_out_rows"] == 2
    assert prepared["left_out"]["first"][0]["line"] == 41
    assert prepared["truncated_rows"] > 0
    assert prepared["longest"] == 256
    assert prepared["steps"] == 1000
    assert prepared["rows_per_step"] == prepared["chosen"]["batch_size"]["value"] == 4
    assert set(prepared["chosen"]) == {"batch_size", "learning_rate"}
    assert plan["batch_size"] >= 1
    assert not [path for path in (tmp_path / "plan/work").rglob("*.safetensors")]
    assert not (tmp_path / "plan" / "work" / "adapter").exists()


def history(plan: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "device": plan["device"], "dtype": plan["dtype"], "rows_per_step": 8, "longest": plan["prepared"]["longest"],
        "tokens_per_s": 1000.0, "memory_bytes": 123_456_789, "batch_size": 8, "validation_share": 0.25,
        "seconds": {"loading": 7.0, "evaluating": 3.0}, "held_out_rows": plan["prepared"]["held_out_rows"],
    } | changes  # fmt: skip


def test_what_a_training_took_before_is_believed_where_it_was_the_same_and_nothing_is_measured_then(
    model_dir: Path, tmp_path: Path
) -> None:
    data = dataset(tmp_path / "data.jsonl", rows=40)
    first = planned(run(spec_for(model_dir, data, measure=False), tmp_path / "first"))
    assert (first["estimate"], first["seconds"], first["fits"]) == (None, None, None)
    known = history(first)
    result = run(spec_for(model_dir, data, history=known, measure=False), tmp_path / "second")
    plan = planned(result)
    tokens = plan["prepared"]["tokens"] * 6
    assert plan["estimate"] == {
        "seconds": pytest.approx(tokens / 1000, rel=0.01),
        "memory_bytes": 123_456_789,
        "tokens_per_s": 1000.0,
        "basis": "history",
    }
    assert plan["seconds"]["loading"] == 7.0
    assert plan["seconds"]["evaluation"] == 3.0
    assert plan["seconds"]["validation"] == pytest.approx(plan["estimate"]["seconds"] / 4, abs=0.01)
    assert [one for one in result["reports"] if one["kind"] == "estimate"] == [{"kind": "estimate"} | plan["estimate"]]


@pytest.mark.parametrize(
    "changes",
    [{"device": "a GPU"}, {"dtype": "float8"}, {"rows_per_step": 16}, {"longest": 5000}, {"longest": 10},
     {"tokens_per_s": None}],
)  # fmt: skip
def test_what_another_training_took_tells_nothing(changes: dict[str, Any]) -> None:
    if importlib.util.find_spec("numpy") is None:
        missing("engine", "numpy is not installed")
    from modelyard.trainer.forecast import holds

    here: dict[str, Any] = {"device": "this", "dtype": "float32", "rows_per_step": 8, "longest": 300}
    same = history({"device": "this", "dtype": "float32", "prepared": {"longest": 310, "held_out_rows": 1}})
    assert holds(same, **here)
    assert not holds(same | changes, **here)
    assert not holds(None, **here)


def test_a_training_that_does_not_fit_is_planned_with_the_numbers_and_what_would_fit(
    model_dir: Path, tmp_path: Path
) -> None:
    data = dataset(tmp_path / "data.jsonl", rows=200)
    settings = replace(SETTINGS, batch_size=190)
    spec = spec_for(model_dir, data, hyperparameters=settings, memory_bytes=900 * 2**20)
    plan = planned(run(spec, tmp_path / "plan"))
    assert plan["fits"] is False
    assert plan["estimate"] is None
    assert plan["failure"]["code"] == "out_of_memory"
    assert "batch_size" in plan["failure"]["hint"]
    assert plan["prepared"]["rows"] > 180
    assert plan["memory_available_bytes"] <= 900 * 2**20


def test_what_could_not_be_trained_at_all_has_no_plan_but_the_reason(model_dir: Path, tmp_path: Path) -> None:
    result = run(spec_for(model_dir, dataset(tmp_path / "data.jsonl", rows=0, bad=3)), tmp_path / "plan")
    assert result["failure"]["code"] == "nothing_to_learn"
    short = tmp_path / "short"
    shutil.copytree(model_dir, short)
    config = json.loads((short / "config.json").read_text("utf-8"))
    (short / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    result = run(spec_for(short, dataset(tmp_path / "few.jsonl", rows=3)), tmp_path / "beyond")
    # Nor were the weights looked at, which do not fit that configuration.
    assert result["failure"]["code"] == "tokens_beyond_embedding"
    settings = replace(SETTINGS, target_modules=["no_proj"])
    data = dataset(tmp_path / "more.jsonl", rows=20)
    result = run(spec_for(model_dir, data, hyperparameters=settings), tmp_path / "another")
    assert result["failure"]["code"] == "unknown_target_modules"


def test_long_conversations_learnt_turn_by_turn_fit_into_the_memory_that_a_small_model_is_given(
    model_dir: Path, tmp_path: Path
) -> None:
    thoughtful = tmp_path / "thoughtful"
    shutil.copytree(model_dir, thoughtful)
    # As Qwen3's: thoughts of earlier turns are left out, so that each turn is a text with all that was said before it.
    (thoughtful / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with (tmp_path / "data.jsonl").open("w") as file:
        for number in range(48):
            said = [
                {"role": role, "content": f"{number} {turn} " + "river stone " * 20}
                for turn in range(50) for role in ("user", "assistant")
            ]  # fmt: skip
            file.write(json.dumps({"messages": said}) + "\n")
    settings = replace(SETTINGS, validation_split=None)
    spec = spec_for(thoughtful, tmp_path / "data.jsonl", hyperparameters=settings, measure=False)
    # The tokens alone of all that was rendered before, at once, took more.
    prepared = planned(run(replace(spec, memory_bytes=700 * 2**20), tmp_path / "plan"))["prepared"]
    assert (prepared["rows"], prepared["truncated_rows"]) == (48, 48)
    assert prepared["examples"] > 48 * 10
