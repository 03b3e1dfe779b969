"""What holds an adapter to its base on ordinary texts: the divergence, and a training with and without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelyard.trainer.rows import ORDINARY
from tests.trainer.runs import Run, Trainers, make_run, needs_training


def test_the_ordinary_texts_are_a_dataset_of_different_texts_long_enough_to_be_read() -> None:
    rows = [json.loads(line) for line in ORDINARY.read_text("utf-8").splitlines()]
    texts = [row.get("text") or row["messages"][-1]["content"] for row in rows]
    assert len(set(texts)) == len(texts) >= 16
    texts = [row["text"] for row in rows if "text" in row]
    assert 5 < len(texts) < len(rows) - 5
    assert all(len(text.encode()) > 200 for text in texts)
    assert any(not text.isascii() for text in texts)


@pytest.mark.parametrize("likeliest", [3, 11])
def test_the_divergence_is_that_of_kullback_and_leibler_with_the_unlikely_tokens_as_one(
    likeliest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_training()
    import torch

    from modelyard.trainer import retention

    monkeypatch.setattr(retention, "LIKELIEST", likeliest)
    chance = torch.Generator().manual_seed(3)
    base, adapter = (torch.randn(5, 12, generator=chance) * 3 for _ in range(2))
    known = retention.known_of(base)
    assert float(retention.divergence(known, base)) == pytest.approx(0.0, abs=1e-6)
    p, q = (torch.softmax(logits.double(), -1) for logits in (base, adapter))
    tokens = p.topk(likeliest).indices
    lumped = [
        torch.cat((each.gather(-1, tokens), 1 - each.gather(-1, tokens).sum(-1, keepdim=True)), -1) for each in (p, q)
    ]
    wanted = float((lumped[0] * (lumped[0] / lumped[1]).log()).sum(-1).mean())
    assert float(retention.divergence(known, adapter)) == pytest.approx(wanted, rel=1e-4)
    # One is left of all tokens where all others are told apart: the divergence is the whole one.
    whole = float((p * (p / q).log()).sum(-1).mean())
    assert wanted == pytest.approx(whole) if likeliest == 11 else wanted < whole


def retained(run: Run) -> float:
    """Return how far a trained adapter is from its base on the ordinary texts."""
    import torch
    from safetensors.torch import load_file

    from modelyard.trainer.batches import Rows
    from modelyard.trainer.checkpoints import Checkpoints
    from modelyard.trainer.loop import Training
    from modelyard.trainer.model import WEIGHTS, load_base, load_tokenizer, set_adapter_weights, with_adapter
    from modelyard.trainer.reports import Reports
    from modelyard.trainer.rows import prepare
    from modelyard.trainer.stall_watch import StallWatch

    spec = replace(run.spec, hyperparameters=replace(run.spec.hyperparameters, retention=1.0))
    report = Reports(run.folder / "aside.jsonl")
    model = with_adapter(load_base(spec, report), spec)
    prepared = prepare(spec, load_tokenizer(spec), None, report, StallWatch(spec.model_id, lambda _: None))
    never: Any = None
    checkpoints = Checkpoints(run.work, "aside", 0, report)
    training = Training(spec, model, Rows(prepared.train), Rows([]), 0, report, checkpoints, never, prepared.ordinary)
    training.retention.begin(training.logits, model)
    set_adapter_weights(model, load_file(run.work / "adapter" / WEIGHTS))
    with torch.inference_mode():
        each = [float(training.retention_loss(model, step)) for step in range(len(prepared.ordinary))]
    return sum(each) / len(each)


@pytest.mark.slow
def test_an_adapter_with_retention_stays_nearer_to_its_base_and_learns_as_much(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    free, held = (make_run(tmp_path / str(weight), tiny_llama, retention=weight) for weight in (0.0, 3.0))
    for run in (free, held):
        assert trainers.run(run) == 0, run.log.read_text("utf-8")[-3000:]
    assert retained(held) < retained(free) / 2
    losses = [run.done()["figures"]["last_loss"] for run in (free, held)]
    assert losses[1] < 1.2 * losses[0]
    # Its own loss is that of the rows alone: the first step, before anything was learnt, says the same.
    assert free.told("point")[0]["loss"] == held.told("point")[0]["loss"]
