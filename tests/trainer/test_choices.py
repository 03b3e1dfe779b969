"""What is chosen for settings that a request leaves open: a table, since nothing of it needs a model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from modelyard.finetune.schemas import HyperparametersIn
from modelyard.trainer import choices
from modelyard.trainer.spec import Hyperparameters


def config(width: int | None) -> Any:
    text = SimpleNamespace() if width is None else SimpleNamespace(hidden_size=width)
    return SimpleNamespace(get_text_config=lambda: text)


def values(rows: int, width: int | None = 576, **given: Any) -> dict[str, float]:
    settings = HyperparametersIn.model_validate(given).filled()
    return {name: one.value for name, one in choices.choose(settings, rows, config(width)).items()}


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs"),
    [
        (1, 1, 12),
        (3, 3, 12),
        (50, 4, 12),
        (60, 4, 10),
        (91, 4, 6),
        (200, 8, 6),
        (400, 16, 6),
        (800, 16, 3),
        (90_000, 16, 3),
    ],
)
def test_small_sets_are_taught_by_small_steps_and_more_often(rows: int, batch_size: int, epochs: int) -> None:
    found = values(rows)
    assert (found["batch_size"], found["epochs"]) == (batch_size, epochs)


def test_the_learning_rate_follows_the_rows_of_a_step_the_adapter_and_the_model() -> None:
    here = values(91)["learning_rate"]
    assert here == pytest.approx(choices.RATE)
    more = values(91, batch_size=16)["learning_rate"]
    assert here < more <= 2 * here
    assert values(91, batch_size=4, gradient_accumulation=4)["learning_rate"] == more
    assert values(91, rank=64)["learning_rate"] == pytest.approx(here / 2, rel=0.05)
    assert values(91, alpha=64)["learning_rate"] == pytest.approx(here / 2, rel=0.05)
    assert values(91, rank=64, alpha=64)["learning_rate"] == pytest.approx(here, rel=0.05)
    rates = [values(91, width)["learning_rate"] for width in (1, 576, 1024, 4096, 16_384, 10**9)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == choices.HIGHEST_RATE
    assert rates[-1] == choices.LOWEST_RATE
    # A model whose width is not known is taken for a wide one: too small a step teaches less, too large a one breaks.
    assert values(91, None)["learning_rate"] <= values(91, 2048)["learning_rate"]


def test_what_was_given_is_heeded_and_only_the_rest_is_chosen() -> None:
    given: dict[str, Any] = {"batch_size": 9, "epochs": 2.5, "learning_rate": 3e-4, "retention": 0.0}
    assert values(91, **given) == {}
    for name in given:
        assert set(values(91, **{name: given[name]})) == set(given) - {name}
        settings = HyperparametersIn.model_validate({name: given[name]}).filled()
        filled = choices.filled(settings, choices.choose(settings, 91, config(576)))
        assert getattr(filled, name) == given[name]
        # Epochs that were asked for are all taken.
        assert filled.learnt_loss == (None if name == "epochs" else choices.LEARNT_LOSS)
    assert set(values(91, max_steps=7)) == {"batch_size", "learning_rate", "retention"}
    assert choices.rows_per_step(HyperparametersIn(batch_size=9, gradient_accumulation=3).filled(), 91) == 27
    assert choices.rows_per_step(HyperparametersIn(batch_size=200).filled(), 91) == 91
    assert choices.rows_per_step(HyperparametersIn(gradient_accumulation=4).filled(), 5000) == 64


def test_the_choice_fills_the_settings_and_says_why_in_sentences() -> None:
    settings = HyperparametersIn().filled()
    assert (settings.epochs, settings.learning_rate, settings.batch_size) == (None, None, None)
    chosen = choices.choose(settings, 91, config(576))
    filled = choices.filled(settings, chosen)
    # How many rows a forward pass has is up to memory: what was chosen is a step.
    assert dataclasses.replace(filled, epochs=None, learning_rate=None, retention=None, learnt_loss=None) == settings
    assert filled.epochs == chosen["epochs"].value
    assert filled.learning_rate == chosen["learning_rate"].value
    told = choices.told(chosen)
    assert list(told) == ["batch_size", "epochs", "learning_rate", "retention"]
    assert all(one["why"].endswith(".") for one in told.values())
    assert f"below {choices.LEARNT_LOSS:g}" in told["epochs"]["why"]
    for rows in (1, 30, 91, 300, 10_000):
        for one in choices.choose(settings, rows, config(576)).values():
            assert f"{one.value:g}" in one.why or "rate" in one.why, one
    assert choices.told(choices.choose(filled_with(filled), 91, config(576))) == {}


def filled_with(settings: Hyperparameters) -> Hyperparameters:
    return dataclasses.replace(settings, batch_size=4, learnt_loss=None)
