"""However a training is ended, the next attempt goes on, and its weights are those of one that nothing disturbed."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.runs import Run, Trainers, make_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: Dropout, accumulated gradients, validation and retention are all on.
SETTINGS: dict[str, Any] = {
    "dropout": 0.1, "gradient_accumulation": 2, "validation_split": 0.1, "checkpoint_steps": 2, "retention": 0.5,
}  # fmt: skip
STEPS = 24


@dataclass
class Undisturbed:
    """What a training comes to when it is left alone."""

    weights: str
    result: dict[str, Any]
    points: dict[int, float]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, trainers: Trainers) -> Undisturbed:
    run = make_run(tmp_path_factory.mktemp("undisturbed") / "run", tiny_llama, **SETTINGS)
    assert trainers.run(run) == 0, run.log.read_text("utf-8")[-3000:]
    points = {point["step"]: point["loss"] for point in run.told("point") if "loss" in point}
    assert sorted(points) == list(range(1, STEPS + 1))
    return Undisturbed(run.weights(), run.done(), points)


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path) -> Run:
    return make_run(tmp_path / "run", tiny_llama, **SETTINGS)


def reaches(run: Run, step: int) -> Callable[[], bool]:
    """Return the condition that a training has told of a step."""
    return lambda: max(run.steps(), default=0) >= step


def ends_as(run: Run, undisturbed: Undisturbed) -> None:
    """Hold a training that went on against one that was never ended."""
    result = run.done()
    assert run.weights() == undisturbed.weights
    for name in ("steps", "tokens", "learnt_tokens", "first_loss", "last_loss", "best_loss", "last_validation_loss"):
        assert result["figures"][name] == undisturbed.result["figures"][name], name
    for side in ("base", "adapter"):
        assert result["evaluation"][side] == undisturbed.result["evaluation"][side]
    for point in run.told("point"):
        if "loss" in point:
            assert point["loss"] == undisturbed.points[point["step"]]
    left = [path.name for path in run.work.rglob("*") if path.name.endswith(".partial")]
    assert not left


def test_two_trainings_of_the_same_settings_have_the_same_weights(
    run: Run, trainers: Trainers, undisturbed: Undisturbed
) -> None:
    assert trainers.run(run) == 0
    ends_as(run, undisturbed)


@pytest.mark.parametrize("step", [1, 2, 7, 13, 23, 24])
def test_a_training_killed_at_a_step_ends_with_the_weights_of_an_undisturbed_one(
    run: Run, trainers: Trainers, undisturbed: Undisturbed, step: int
) -> None:
    trainers.start(run)
    assert trainers.signal_when(reaches(run, step), signal.SIGKILL)
    assert trainers.wait() == -signal.SIGKILL
    assert run.result() is None
    assert trainers.run(run) == 0
    ends_as(run, undisturbed)
    # What was in a checkpoint is not done again.
    again = run.steps()[run.steps().index(step) + 1 :]
    assert again[:1] != [1] or step < 3


def test_a_training_killed_again_and_again_ends_with_the_weights_of_an_undisturbed_one(
    run: Run, trainers: Trainers, undisturbed: Undisturbed
) -> None:
    chance = random.Random(7)
    kills = 0
    for _ in range(12):
        reached = max(run.steps(), default=0)
        aim = reached + chance.randint(1, 5)
        trainers.start(run)
        killed = trainers.signal_when(reaches(run, aim), signal.SIGKILL)
        trainers.wait()
        if not killed:
            break
        kills += 1
    else:
        assert trainers.run(run) == 0
    assert kills >= 4
    ends_as(run, undisturbed)


def test_a_training_that_ends_once_its_rows_are_learnt_ends_at_the_same_step_however_often_it_was_killed(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    # Seven steps an epoch. The level is above any loss: the second epoch is the first that is looked at.
    settings = {**SETTINGS, "max_steps": None, "epochs": 9.0, "learnt_loss": 99.0}
    alone, run = (make_run(tmp_path / name, tiny_llama, **settings) for name in ("alone", "run"))
    assert trainers.run(alone) == 0
    figures = alone.done()["figures"]
    assert (figures["steps"], figures["epochs"]) == (21, 3.0)
    totals = [one["total"] for one in alone.told("progress") if one["unit"] == "steps"]
    assert (totals[0], totals[-1]) == (63, 21)
    rates = {point["step"]: point["learning_rate"] for point in alone.told("point") if "loss" in point}
    assert rates[14] > 3e-3 > 1e-3 > rates[21] > 0
    for step in (5, 14, 17):
        trainers.start(run)
        assert trainers.signal_when(reaches(run, step), signal.SIGKILL)
        trainers.wait()
    assert trainers.run(run) == 0
    assert run.weights() == alone.weights()
    assert run.done()["figures"]["steps"] == 21
    assert [each["message"] for each in run.told("note") if "last one" in each["message"]][-1:] == [
        each["message"] for each in alone.told("note") if "last one" in each["message"]
    ]


def test_a_training_killed_while_it_writes_checkpoints_takes_none_that_is_not_whole(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    """Large checkpoints after every step, and kills spread over the time that one takes to write."""
    settings = {**SETTINGS, "rank": 256, "checkpoint_steps": 1, "max_steps": 12}
    alone = make_run(tmp_path / "alone", tiny_llama, **settings)
    assert trainers.run(alone) == 0
    run = make_run(tmp_path / "run", tiny_llama, **settings)
    names = ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json")
    caught = []
    for turn in range(10):
        step = len(run.told("checkpoint")) + 1
        partial = run.work / "checkpoints" / f".step-{min(12, 1 + turn)}.partial"
        name = names[turn % len(names)]
        trainers.start(run)
        killed = trainers.signal_when((partial / name).exists, signal.SIGKILL)
        trainers.wait()
        if not killed:
            break
        caught.append((step, partial.exists()))
        whole = [path for path in (run.work / "checkpoints").iterdir() if path.name.startswith("step-")]
        assert all((path / "manifest.json").is_file() for path in whole)
    # Most kills came while the folder had its other name; a few after the move, which is as good a moment.
    assert sum(is_partial for _, is_partial in caught) >= 3, caught
    if run.result() is None:
        assert trainers.run(run) == 0
    run.done()
    assert run.weights() == alone.weights()


def test_a_training_killed_between_its_last_step_and_its_result_is_only_scored_again(
    run: Run, trainers: Trainers, undisturbed: Undisturbed
) -> None:
    trainers.start(run)
    assert trainers.signal_when((run.work / "trained.json").exists, signal.SIGKILL)
    trainers.wait()
    assert run.result() is None
    said = len(run.steps())
    assert trainers.run(run) == 0
    ends_as(run, undisturbed)
    assert len(run.steps()) == said


def test_an_adapter_that_was_not_moved_yet_is_made_from_the_last_checkpoint(
    run: Run, trainers: Trainers, undisturbed: Undisturbed
) -> None:
    trainers.start(run)
    assert trainers.signal_when((run.work / "checkpoints" / f"step-{STEPS}").exists, signal.SIGKILL)
    trainers.wait()
    # Whichever moment it was: half an adapter lies beside its place.
    shutil.rmtree(run.work / "adapter", ignore_errors=True)
    (run.work / ".adapter.partial").mkdir(exist_ok=True)
    (run.work / ".adapter.partial" / "adapter_model.safetensors").write_bytes(b"half")
    assert trainers.run(run) == 0
    ends_as(run, undisturbed)


@pytest.mark.parametrize("step", [1, 9])
def test_a_training_that_is_asked_to_end_writes_a_checkpoint_and_goes_on_from_there(
    run: Run, trainers: Trainers, undisturbed: Undisturbed, step: int
) -> None:
    trainers.start(run)
    assert trainers.signal_when(reaches(run, step), signal.SIGTERM)
    assert trainers.wait() == 0
    result = run.result()
    assert result is not None
    assert set(result) == {"stopped", "step"}
    assert result["stopped"] is True
    assert result["step"] >= step
    assert (run.work / "checkpoints" / f"step-{result['step']}" / "manifest.json").is_file()
    assert run.told("checkpoint")[-1]["step"] == result["step"]
    run.forget_result()
    before = len(run.steps())
    assert trainers.run(run) == 0
    # Not one step is done twice.
    assert run.steps()[before] == result["step"] + 1
    assert sorted(run.steps()) == list(range(1, STEPS + 1))
    ends_as(run, undisturbed)


@pytest.mark.parametrize("phase", ["loading", "tokenizing", "evaluating"])
def test_a_trainer_that_is_asked_to_end_where_nothing_needs_finishing_ends_at_once(
    run: Run, trainers: Trainers, undisturbed: Undisturbed, phase: str
) -> None:
    trainers.start(run)
    assert trainers.signal_when(lambda: any(each["phase"] == phase for each in run.told("phase")), signal.SIGTERM)
    assert trainers.wait() == 0
    assert run.result() == {"stopped": True, "step": STEPS if phase == "evaluating" else 0}
    run.forget_result()
    said = len(run.steps())
    assert trainers.run(run) == 0
    ends_as(run, undisturbed)
    if phase == "evaluating":
        assert len(run.steps()) == said, "it was trained again"


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    run: Run, trainers: Trainers, undisturbed: Undisturbed
) -> None:
    trainers.start(run)
    assert trainers.signal_when(lambda: len(run.told("checkpoint")) >= 3, signal.SIGKILL)
    trainers.wait()
    folders = sorted(run.work.glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    weights = folders[-1] / "optimizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = len(run.steps())
    assert trainers.run(run) == 0
    assert run.steps()[before] == int(folders[-2].name.removeprefix("step-")) + 1
    assert any("damaged" in note["message"] for note in run.told("note"))
    ends_as(run, undisturbed)


def test_a_checkpoint_of_other_settings_is_never_taken(run: Run, trainers: Trainers, undisturbed: Undisturbed) -> None:
    trainers.start(run)
    assert trainers.signal_when(lambda: len(run.told("checkpoint")) >= 2, signal.SIGKILL)
    trainers.wait()
    values = json.loads(run.path.read_text("utf-8"))
    values["hyperparameters"]["learning_rate"] *= 2
    run.path.write_text(json.dumps(values), "utf-8")
    before = len(run.steps())
    assert trainers.run(run) == 0
    assert run.steps()[before] == 1
    assert run.done()["figures"]["steps"] == STEPS
    assert run.weights() != undisturbed.weights
    assert any("other rows or settings" in note["message"] for note in run.told("note"))


def test_a_training_that_ends_early_is_the_same_when_it_was_killed(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    settings = {**SETTINGS, "learning_rate": 0.05, "early_stopping": 2, "max_steps": 200}
    alone, killed = (make_run(tmp_path / name, tiny_llama, **settings) for name in ("alone", "killed"))
    assert trainers.run(alone) == 0
    figures = alone.done()["figures"]
    assert figures["steps"] < 200
    assert figures["best_step"] < figures["steps"]
    assert figures["best_validation_loss"] < figures["last_validation_loss"]
    trainers.start(killed)
    best = figures["best_step"]
    assert trainers.signal_when(reaches(killed, best + 1), signal.SIGKILL)
    trainers.wait()
    assert trainers.run(killed) == 0
    assert killed.done()["figures"]["best_step"] == best
    assert killed.weights() == alone.weights()
