"""Adapted layers that no gradient reaches are named after the first steps, and a training goes on without them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from modelyard.trainer.reports import Reports
from tests.trainer.families import model_of
from tests.trainer.runs import Run, make_run, needs_training

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn of themselves


class AfterSteps:
    """Asks a training to end once its progress tells of so many steps."""

    def __init__(self, run: Run, steps: int) -> None:
        self._run = run
        self._steps = steps

    @property
    def asked(self) -> bool:
        return len(self._run.steps()) >= self._steps


def train(run: Run, steps: int, target: str = "q_proj") -> tuple[Any, Any]:
    """Train a model whose tower has adapters that text never reaches; return the outcome and the weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    from modelyard.trainer.batches import Rows
    from modelyard.trainer.checkpoints import Checkpoints
    from modelyard.trainer.examples import Example
    from modelyard.trainer.loop import Training
    from modelyard.trainer.model import adapter_weights

    chance = random.Random(1)
    drawn = [[chance.randrange(3, 2000) for _ in range(12)] for _ in range(12)]
    rows = Rows([Example(at + 1, ids, [-100, *ids[1:]]) for at, ids in enumerate(drawn)])
    model = model_of("gemma3")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM"))
    report = Reports(Path(run.spec.progress))
    checkpoints = Checkpoints(run.work, "mine", 0, report)
    training = Training(run.spec, adapted, rows, Rows([]), 0, report, checkpoints, AfterSteps(run, steps))
    return training.run(), adapter_weights(adapted)


def test_layers_without_a_gradient_are_named_and_the_training_goes_on_where_it_was(tmp_path: Path) -> None:
    needs_training()
    import torch

    settings: dict[str, Any] = {
        "max_steps": 6,
        "checkpoint_steps": 1,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "dropout": 0.0,
    }
    alone, run = (make_run(tmp_path / name, tmp_path, 1, **settings) for name in ("alone", "run"))
    outcome, expected = train(alone, 99)
    untrained = outcome.figures["untrained_layers"]
    assert len(untrained) == 2
    assert all("vision" in name and name.endswith("q_proj") and "lora" not in name for name in untrained)
    notes = [note for note in alone.told("note") if "untrained_layers" in note["data"]]
    assert len(notes) == 1
    assert notes[0]["level"] == "WARNING"
    assert notes[0]["message"].startswith("2 of the adapted layers had no gradient in the first 3 steps")
    assert untrained[0] in notes[0]["message"]

    for steps in (1, 4):
        stopped, _ = train(run, steps)
        assert (stopped.stopped, stopped.step) == (True, steps)
    done, weights = train(run, 99)
    assert done.step == 6
    assert done.figures["untrained_layers"] == untrained
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len([note for note in run.told("note") if "untrained_layers" in note["data"]]) == 1


def test_a_checkpoint_of_an_adapter_on_other_layers_is_not_used(tmp_path: Path) -> None:
    needs_training()
    run = make_run(tmp_path / "run", tmp_path, 1, max_steps=3, checkpoint_steps=1, batch_size=2)
    stopped, _ = train(run, 1)
    assert stopped.step == 1
    done, _ = train(run, 99, target="o_proj")
    assert done.step == 3
    assert run.steps() == [1, 1, 2, 3]
    said = [note["message"] for note in run.told("note") if note["level"] == "WARNING"]
    assert any(text.startswith("The checkpoint of step 1 is of an adapter on other layers") for text in said)
