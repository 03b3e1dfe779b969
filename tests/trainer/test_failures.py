"""What goes wrong in a real training, and what its user is told; and what is known of errors by their words."""

from __future__ import annotations

import errno
import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelyard.demo.tiny_llama import make_bert
from modelyard.errors import JobFailure
from modelyard.trainer.failures import as_failure, is_out_of_memory
from tests.trainer.runs import MODEL, Trainers, make_run, rows

slow = pytest.mark.slow
MIB = 1024**2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JobFailure("nothing_to_learn", "Nothing.", "Look."), "nothing_to_learn"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"), "out_of_memory"),
        (RuntimeError("std::bad_alloc"), "out_of_memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "trainer_failed"),
        (OSError(errno.ENOENT, "No such file"), "trainer_failed"),
        (KeyError("x"), "trainer_failed"),
    ],
)
def test_what_libraries_raise_is_told_by_its_code(error: Exception, code: str) -> None:
    failure = as_failure(error)
    assert failure.code == code
    assert failure.message
    assert failure.hint
    assert is_out_of_memory(error) == (code == "out_of_memory")


def test_an_error_that_nobody_foresaw_shows_where_it_was_and_no_secret() -> None:
    try:
        raise ValueError("token=hf_abcdefghijklmnop in /home/someone/x")
    except ValueError as error:
        failure = as_failure(error)
    shown = failure.message + "".join(failure.evidence)
    assert "test_failures.py" in shown
    assert "hf_abc" not in shown
    assert "/home/someone" not in shown


def change_config(folder: Path, model: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Return a copy of a model with another config.json."""
    shutil.copytree(model, folder)
    values = json.loads((folder / "config.json").read_text("utf-8"))
    change(values)
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return folder


@slow
def test_a_model_that_only_embeds_is_an_unsupported_architecture(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    make_bert(tmp_path / "bert")
    run = make_run(tmp_path / "run", tmp_path / "bert")
    assert trainers.run(run) == 1
    failure = run.failure()
    assert failure["code"] == "unsupported_architecture"
    assert "BertModel" in failure["message"]
    assert "Llama" in failure["hint"]


@slow
@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"model_type": "nobody_knows", "architectures": ["NobodyForCausalLM"]}, "unsupported_architecture", "nobody"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "unsupported_architecture", "Classification"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "unsupported_quantization", "gptq"),
        ({"hidden_size": "many"}, "bad_configuration", MODEL),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_its_weights_are_loaded(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers, change: dict[str, Any], code: str, word: str
) -> None:
    model = change_config(tmp_path / "model", tiny_llama, lambda values: values.update(change))
    (model / "model.safetensors").unlink()
    run = make_run(tmp_path / "run", model)
    assert trainers.run(run) == 1
    failure = run.failure()
    assert failure["code"] == code
    assert word in failure["message"]


@slow
def test_damaged_weights_and_tokenizers_are_named(tmp_path: Path, tiny_llama: Path, trainers: Trainers) -> None:
    for name, code in (("model.safetensors", "bad_weights"), ("tokenizer.json", "bad_tokenizer")):
        model = tmp_path / code
        shutil.copytree(tiny_llama, model)
        (model / name).write_bytes((model / name).read_bytes()[:1000])
        run = make_run(tmp_path / f"run-{code}", model)
        assert trainers.run(run) == 1
        failure = run.failure()
        assert failure["code"] == code
        assert MODEL in failure["message"]


@slow
def test_layers_that_the_model_does_not_have_are_named_with_those_that_it_has(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, target_modules=["q_proj", "query", "lm_head"])
    assert trainers.run(run) == 1
    failure = run.failure()
    assert failure["code"] == "unknown_target_modules"
    assert "'lm_head', 'query'" in failure["message"]
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in failure["message"]


@slow
def test_what_needs_a_gpu_says_so(tmp_path: Path, tiny_llama: Path, trainers: Trainers) -> None:
    run = make_run(tmp_path / "run", tiny_llama, quantization="4bit")
    assert trainers.run(run) == 1
    assert run.failure()["code"] == "quantization_needs_gpu"


@slow
def test_a_loss_that_is_no_number_stops_the_training_and_names_the_rows(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    run = make_run(
        tmp_path / "run", tiny_llama, learning_rate=1e30, lr_schedule="constant", warmup_steps=0, checkpoint_steps=1
    )
    assert trainers.run(run) == 1
    failure = run.failure()
    assert failure["code"] == "loss_not_finite"
    found = re.search(
        r"at step (\d+), at a learning rate of 1e\+30, on the rows of lines ([\d, ]+)\.", failure["message"]
    )
    assert found, failure
    lines = [int(number) for number in found[2].split(", ")]
    assert len(lines) == 4
    assert set(lines) <= set(range(1, 31))
    assert "learning_rate" in failure["hint"]
    # No checkpoint has what came of it.
    assert max(run.steps(), default=0) == int(found[1]) - 1
    assert all(each["step"] < int(found[1]) for each in run.told("checkpoint"))


@slow
def test_a_fixed_batch_that_does_not_fit_says_the_numbers_and_what_would_fit(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    run = make_run(
        tmp_path / "run", tiny_llama, lines=rows(40, longest=700), batch_size=32, memory_bytes=650 * MIB, max_steps=4
    )
    assert trainers.run(run) == 1
    failure = run.failure()
    assert failure["code"] == "out_of_memory"
    assert "32 rows" in failure["message"]
    assert re.search(r"[\d.]+ (GiB|MiB)", failure["message"])
    assert re.search(r"batch_size \d+ or max_seq_len \d+", failure["hint"]), failure


@slow
def test_a_batch_size_that_is_left_to_the_trainer_shrinks_until_it_fits_its_memory(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    # All of one length, so that memory alone says how many of them a forward pass takes.
    long = [{"messages": [{"role": "user", "content": f"{index:02}: {'river ' * 200}"},
                          {"role": "assistant", "content": "stone " * 200}]} for index in range(375)]  # fmt: skip
    changes: dict[str, Any] = {
        "lines": long, "batch_size": None, "gradient_accumulation": 1, "max_steps": 3, "dropout": 0.0,
        "validation_split": 0.0,
    }  # fmt: skip
    large = make_run(tmp_path / "large", tiny_llama, **changes)
    assert trainers.run(large) == 0, large.result()
    wanted = large.done()["figures"]
    small = make_run(tmp_path / "small", tiny_llama, memory_bytes=800 * MIB, **changes)
    assert trainers.run(small) == 0, small.result()
    found = small.done()["figures"]
    assert found["rows_per_step"] == wanted["rows_per_step"] == wanted["batch_size"] == 15
    assert found["batch_size"] < 15
    assert found["peak_memory_bytes"] <= 800 * MIB < wanted["peak_memory_bytes"]
    # A step is the same step, in more passes: what it learns differs by rounding alone.
    assert found["tokens"] == wanted["tokens"]
    assert found["last_loss"] == pytest.approx(wanted["last_loss"], rel=0.02)
    assert any("rows" in note["message"] and note["data"].get("batch_size") for note in small.told("note"))


@slow
def test_a_disk_without_room_for_a_checkpoint_ends_the_training_with_the_numbers(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    free = shutil.disk_usage(tmp_path).free
    run = make_run(tmp_path / "run", tiny_llama, disk_reserve_bytes=2 * free)
    assert trainers.run(run) == 1
    failure = run.failure()
    assert failure["code"] == "disk_full"
    assert re.search(
        r"needs [\d.]+ MiB, and the disk has [\d.]+ GiB free, of which [\d.]+ GiB stay in reserve", failure["message"]
    )
    assert "goes on" in failure["hint"]


@slow
def test_a_file_that_cannot_grow_ends_the_training_and_leaves_the_checkpoint_before(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    """The limit on files' sizes stands for a full disk: the write fails in the midst of a checkpoint."""
    settings: dict[str, Any] = {"checkpoint_steps": 4, "max_steps": 12}
    alone, run = (make_run(tmp_path / name, tiny_llama, **settings) for name in ("alone", "run"))
    assert trainers.run(alone) == 0
    # The optimizer's moments are twice the adapter's weights: those fit, these do not.
    weights = (alone.work / "adapter" / "adapter_model.safetensors").stat().st_size
    assert trainers.run(run, {"RLIMIT_FSIZE": weights + weights // 2}) == 1
    assert run.failure()["code"] == "disk_full"
    assert list((run.work / "checkpoints").iterdir()) == []
    run.forget_result()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert trainers.run(run) == 0
    assert run.weights() == alone.weights()


@slow
def test_a_dataset_with_nothing_to_learn_is_refused_with_the_lines(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, lines=[{"messages": [{"role": "user", "content": "Only a question"}]}])
    assert trainers.run(run) == 1
    assert run.failure()["code"] == "nothing_to_learn"
