"""Several rows in one line: they share it well, none is told of another, and a model that would tell is refused."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.trainer.spec import Mode
from tests.trainer.runs import Trainers, make_run, needs_training, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 32}
#: Families whose rows are kept apart by their positions, with what sets each apart.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": WINDOW, "qwen2": {}, "qwen3": {}, "gemma2": WINDOW, "gemma3_text": WINDOW, "phi3": {},
    "gpt_neox": {}, "olmo2": {}, "smollm3": {}, "mixtral": {"num_local_experts": 4},
}  # fmt: skip
#: Those that carry something from row to row (a convolution, a state), or take no positions.
CARRYING: dict[str, dict[str, Any]] = {
    "lfm2": {"full_attn_idxs": [1, 3], "block_ff_dim": 128},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 32},
    "mpt": {},
}


def of_lengths(*lengths: int) -> Any:
    """Return rows of chance tokens, of each of which all but the first is learnt."""
    needs_training()
    from modelyard.trainer.batches import Rows
    from modelyard.trainer.examples import Example

    chance = random.Random(1)
    drawn = [[chance.randrange(3, 500) for _ in range(length)] for length in lengths]
    return Rows([Example(at + 1, ids, [-100, *ids[1:]]) for at, ids in enumerate(drawn)])


def model_of(family: str, changes: dict[str, Any], dtype: str = "float32") -> Any:
    """Return a small model of a family, of random weights, with an adapter that changes nothing yet."""
    needs_training()
    import torch
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    from modelyard.trainer.layers import adapted, layers_to_adapt

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | changes)
    # Weights of the usual size leave so small a model's answers all but the same.
    config.initializer_range = 0.1
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return adapted(model, LoraConfig(r=4, task_type="CAUSAL_LM"), layers_to_adapt(model, None, family))


def test_rows_share_few_lines_and_each_is_in_one() -> None:
    chance = random.Random(3)
    for _ in range(200):
        lengths = sorted((chance.randint(1, 100) for _ in range(chance.randint(1, 40))), reverse=True)
        data = of_lengths(*lengths)
        from modelyard.trainer.batches import in_lines, line_length

        lines = in_lines(data, range(len(lengths)), 104)
        assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
        taken = [line_length(data, line) for line in lines]
        assert taken == sorted(taken, reverse=True)
        assert taken[0] <= 104
        # No two lines could be one, so that they are at least half full together.
        assert len(taken) == 1 or taken[-1] + taken[-2] > 104
    assert in_lines(data, [2, 0], 0) == [(2,), (0,)]


def test_a_packed_line_has_each_rows_own_positions_and_nobody_learns_what_follows_a_row() -> None:
    data = of_lengths(4, 3)
    from modelyard.trainer.batches import collate

    first, second = data.ids(0).tolist(), data.ids(1).tolist()
    micro = collate(data, [(0, 1)], 0)
    assert micro.input_ids.tolist() == [[*first, *second, 0]]
    assert micro.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert micro.kept.tolist() == [0, 1, 2, 4, 5]
    assert micro.targets.tolist() == [*first[1:], *second[1:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_unpacked_logits_agree(family: str, dtype: str) -> None:
    model = model_of(family, FAMILIES[family], dtype)
    import torch

    from modelyard.trainer.batches import collate
    from modelyard.trainer.packing import ALONE, capacity_of

    data = of_lengths(90, 60, 50, 40, 20)
    assert capacity_of(model, data) == 96
    assert model.training
    model.eval()
    lines = [(0,), (1, 4), (2, 3)]
    packed = collate(data, lines, 0)
    with torch.inference_mode():
        found = model(input_ids=packed.input_ids, position_ids=packed.positions, use_cache=False).logits.float()
        for at, line in enumerate(lines):
            begin = 0
            for row in line:
                alone = collate(data, [(row,)], 0)
                expected = model(input_ids=alone.input_ids, use_cache=False).logits[0].float()
                length = int(data.lengths[row])
                away = (found[at, begin : begin + length] - expected[:length]).abs().max() / expected.abs().max()
                assert float(away) < ALONE[dtype], (row, float(away))
                begin += length


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CARRYING)
def test_a_model_that_answers_otherwise_behind_another_row_is_refused(family: str, dtype: str) -> None:
    model = model_of(family, CARRYING[family], dtype)
    from modelyard.trainer.packing import capacity_of

    with pytest.raises(JobFailure) as refused:
        capacity_of(model, of_lengths(90, 60, 50, 40, 20))
    assert refused.value.code == "packing_unsupported"
    assert "Leave packing out" in refused.value.hint


def test_a_step_teaches_the_same_packed_and_unpacked_with_less_padding(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    found = []
    for packing in (False, True):
        run = make_run(
            tmp_path / str(packing), tiny_llama, lines=rows(24, longest=60), batch_size=24, gradient_accumulation=1,
            dropout=0.0, max_steps=6, validation_split=0.0, packing=packing,
        )  # fmt: skip
        assert trainers.run(run) == 0
        figures = run.done()["figures"]
        # Nothing was held back, so that nobody is told of scores.
        assert [each["phase"] for each in run.told("phase")][-1] == "saving"
        found.append(([point["loss"] for point in run.told("point") if "loss" in point], figures))
    (unpacked, before), (packed, after) = found
    assert packed == pytest.approx(unpacked, rel=0.02)
    assert before["tokens"] == after["tokens"]
    assert before["learnt_tokens"] == after["learnt_tokens"]
    assert after["padding_share"] < before["padding_share"]


def test_a_packed_training_that_is_killed_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    alone, killed = (
        make_run(tmp_path / name, tiny_llama, lines=rows(30, longest=30), packing=True) for name in ("alone", "killed")
    )
    assert trainers.run(alone) == 0
    alone.done()
    trainers.start(killed)
    assert trainers.signal_when(lambda: max(killed.steps(), default=0) >= 8, signal.SIGKILL)
    assert trainers.wait() == -signal.SIGKILL
    assert trainers.run(killed) == 0
    killed.done()
    assert killed.weights() == alone.weights()


def test_a_packed_training_is_planned(tmp_path: Path, tiny_llama: Path, trainers: Trainers) -> None:
    run = make_run(tmp_path / "plan", tiny_llama, lines=rows(60, longest=60), mode=Mode.PLAN, packing=True)
    assert trainers.run(run) == 0
    result = run.result()
    assert result is not None
    assert result["plan"]["estimate"]["basis"] == "measured"
    assert result["plan"]["prepared"]["steps"] == 24


def test_packed_lines_become_fewer_until_they_fit_the_memory(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    # All of one length, so that none can be packed: each line is as long as the memory has to take.
    long = [{"messages": [{"role": "user", "content": f"{index:02}: {'river ' * 200}"},
                          {"role": "assistant", "content": "stone " * 200}]} for index in range(375)]  # fmt: skip
    run = make_run(
        tmp_path / "run", tiny_llama, lines=long, batch_size=None, gradient_accumulation=1, max_steps=2,
        packing=True, validation_split=0.0, memory_bytes=800 * 1024**2,
    )  # fmt: skip
    assert trainers.run(run) == 0, run.result()
    figures = run.done()["figures"]
    assert figures["batch_size"] < figures["rows_per_step"] == 15
    assert figures["peak_memory_bytes"] <= 800 * 1024**2
