"""The training itself: which rows a step has, its schedule, its curve, and validation that ends it early."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import missing
from tests.trainer.runs import DEFAULTS, Trainers, make_run, needs_training, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

if importlib.util.find_spec("numpy") is None:  # pragma: no cover
    pytest.skip("no numpy", allow_module_level=True)


def of_lengths(lengths: list[int]) -> Any:
    needs_training()
    from modelyard.trainer.batches import Rows
    from modelyard.trainer.examples import Example

    return Rows([Example(at + 1, [7] * length, [-100, *[7] * (length - 1)]) for at, length in enumerate(lengths)])


def test_each_epoch_has_every_row_once_in_an_order_of_its_own_that_the_seed_decides() -> None:
    data = of_lengths([5 + (at * 37) % 90 for at in range(203)])
    from modelyard.trainer.batches import Course, Steps

    settings = dataclasses.replace(DEFAULTS, epochs=2.5, max_steps=None, batch_size=4, gradient_accumulation=2)
    course = Course.of(settings, len(data))
    assert course == Course(8, 26, 65)
    steps = list(Steps(data, course, 1))
    assert [step.number for step in steps] == list(range(65))
    for epoch in (0, 1):
        seen = Counter(row for step in steps[26 * epoch : 26 * (epoch + 1)] for row in step.rows)
        assert seen == Counter(range(203))
    assert [step.rows for step in steps[:26]] != [step.rows for step in steps[26:52]]
    assert [step.rows for step in Steps(data, course, 2)] != [step.rows for step in steps]
    # One that goes on in the midst of an epoch takes the same steps.
    assert list(Steps(data, course, 1, 31)) == steps[31:]


def test_rows_of_like_length_share_a_step_so_that_little_is_padded() -> None:
    data = of_lengths([5 + (at * 7919) % 500 for at in range(2000)])
    from modelyard.trainer.batches import Course, Steps, padded_tokens

    course = Course(8, 250, 250)
    steps = list(Steps(data, course, 0))
    padded = sum(padded_tokens(data, step.rows, 8) for step in steps)
    assert 1 - sum(step.tokens for step in steps) / padded < 0.08


def test_a_step_is_cut_into_forward_passes_where_that_costs_less_than_its_padding() -> None:
    data = of_lengths([1000, 990, 60, 50, 40, 30, 20, 10])
    from modelyard.trainer.batches import COMPARED, padded_tokens, passes

    chosen = tuple(range(8))
    lines = [(row,) for row in chosen]
    assert passes(data, lines, 8) == [lines[:2], lines[2:]]
    assert padded_tokens(data, chosen, 8) < 2500
    # As many rows as memory takes, and no more.
    assert max(map(len, passes(data, lines, 3))) == 3
    assert [line for part in passes(data, lines, 3) for line in part] == lines
    alike = [(row,) for row in range(64)]
    assert passes(of_lengths([40] * 64), alike, 64) == [alike]
    # Too many to compare: all of one size.
    many = [(row,) for row in range(1000)]
    assert COMPARED < 1000 * 100
    assert {len(part) for part in passes(of_lengths([20] * 1000), many, 100)} == {100}


def test_logits_are_made_where_something_is_learnt_and_targets_are_the_tokens_after() -> None:
    needs_training()
    from modelyard.trainer.batches import Rows, collate
    from modelyard.trainer.examples import Example

    data = Rows([Example(1, [1, 2, 3, 4], [-100, -100, 3, 4]), Example(2, [5, 6, 7], [-100, 6, -100])])
    micro = collate(data, [(0,), (1,)], 0)
    assert micro.input_ids.tolist() == [[1, 2, 3, 4, 0, 0, 0, 0], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert micro.kept.tolist() == [0, 1, 2]
    # Positions 1 and 2 of the first row, 0 of the second, among rows of three.
    assert micro.chosen.tolist() == [1, 2, 3]
    assert micro.targets.tolist() == [3, 4, 6]
    assert micro.positions is None


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_the_learning_rate_rises_first_and_then_follows_its_schedule(schedule: str, shares: list[float]) -> None:
    needs_training()
    from modelyard.trainer.stepping import rate_share

    assert [rate_share(schedule, step, 6, 2) for step in range(6)] == pytest.approx(shares)


def test_the_loss_is_that_of_all_learnt_tokens_however_many_passes_a_step_has(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    losses = []
    for name, batch, accumulation in (("one", 8, 1), ("four", 2, 4)):
        run = make_run(
            tmp_path / name, tiny_llama, batch_size=batch, gradient_accumulation=accumulation, dropout=0.0, max_steps=6
        )
        assert trainers.run(run) == 0
        losses.append([point["loss"] for point in run.told("point") if "loss" in point])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_points_validation_and_figures_tell_the_same_story(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    run = make_run(
        tmp_path / "run", tiny_llama, 44, epochs=3.0, max_steps=None, checkpoint_steps=None, validation_split=0.1,
        dropout=0.0, learning_rate=1e-2,
    )  # fmt: skip
    assert trainers.run(run) == 0
    figures, points = run.done()["figures"], run.told("point")
    (prepared,) = run.told("prepared")
    assert prepared["steps"] == figures["steps"] == 30
    assert prepared["steps_per_epoch"] == 10
    assert figures["epochs"] == 3.0
    losses = [point for point in points if "loss" in point]
    assert figures["first_loss"] == losses[0]["loss"]
    assert figures["last_loss"] == losses[-1]["loss"]
    assert figures["last_loss"] < figures["first_loss"]
    assert losses[-1]["tokens"] == figures["tokens"] == 3 * prepared["tokens"]
    assert losses[-1]["epoch"] == 3.0
    assert all(point["grad_norm"] > 0 and point["learning_rate"] > 0 for point in losses)
    assert all(point["tokens_per_s"] > 0 and point["memory_bytes"] > 10**8 for point in losses)
    validated = [point["step"] for point in points if "validation_loss" in point]
    assert validated == list(range(3, 31, 3))
    assert figures["peak_memory_bytes"] >= max(point["memory_bytes"] for point in losses)
    assert {"loading", "tokenizing", "training", "saving", "evaluating"} == set(figures["seconds"])
    assert 0 <= figures["padding_share"] < 0.5
    assert figures["checkpoints"] >= 1


def test_tensorboard_gets_the_curve_once_also_when_the_training_was_killed(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    if importlib.util.find_spec("tensorboardX") is None:
        missing("engine", "tensorboardX is not installed")
    import signal

    from tensorboardX.proto.event_pb2 import Event

    board = tmp_path / "board"
    run = make_run(tmp_path / "run", tiny_llama, tensorboard_dir=str(board), checkpoint_steps=4)
    trainers.start(run)
    assert trainers.signal_when(lambda: max(run.steps(), default=0) >= 10, signal.SIGKILL)
    trainers.wait()
    assert trainers.run(run) == 0
    run.done()
    values: dict[int, float] = {}
    for path in sorted(board.iterdir(), key=lambda each: each.stat().st_mtime_ns):
        content = path.read_bytes()
        while len(content) >= 12:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            # TensorBoard drops what came before a start of the session from that step on.
            if event.HasField("session_log") and event.session_log.status == 1:
                values = {step: value for step, value in values.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "train/loss":
                    assert event.step not in values, "the curve is doubled"
                    values[event.step] = value.simple_value
    told = {point["step"]: point["loss"] for point in run.told("point") if "loss" in point}
    assert values == pytest.approx(told, rel=1e-6)
    assert sorted(values) == list(range(1, 25))


def test_validation_that_gets_no_better_ends_a_training_and_the_best_adapter_is_kept(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    changes: dict[str, Any] = {"learning_rate": 0.05, "max_steps": 120, "validation_split": 0.2, "checkpoint_steps": 2}
    run = make_run(tmp_path / "run", tiny_llama, early_stopping=3, **changes)
    assert trainers.run(run) == 0
    figures = run.done()["figures"]
    assert figures["steps"] == figures["best_step"] + 6 < 120
    assert any("ends early" in note["message"] for note in run.told("note"))
    # The adapter is the one of the best step: a training that ends there, at the same rates, has it too.
    assert run.done()["evaluation"]["adapter"]["loss"] == pytest.approx(figures["best_validation_loss"], rel=0.02)


def test_the_time_between_checkpoints_is_found_when_nobody_says_it(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, checkpoint_steps=None, max_steps=60, lines=rows(40, longest=20))
    assert trainers.run(run) == 0
    steps = [each["step"] for each in run.told("checkpoint")]
    assert steps[-1] == 60
    # At tenths of the training, and at none of them where writing would take too much of the time.
    assert all(step % 6 == 0 for step in steps)
    figures = run.done()["figures"]
    assert figures["checkpoint_seconds"] < 0.5 * figures["training_seconds"]
