"""The trainer as the server starts it: a spec in, an adapter that can be served and one result out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelyard.models.adapter_checks import check_adapter
from modelyard.trainer.spec import Mode
from tests.trainer.runs import MODEL, Run, make_run, run_alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Run:
    run = make_run(tmp_path_factory.mktemp("main") / "run", tiny_llama, validation_split=0.1)
    assert run_alone(run) == 0, run.log.read_text("utf-8")[-3000:]
    return run


def test_the_result_says_where_the_adapter_is_and_what_it_came_to(run: Run, tiny_llama: Path) -> None:
    result = run.done()
    assert set(result) == {
        "adapter_dir", "figures", "evaluation", "probes", "versions", "learnt_from", "chosen",
    }  # fmt: skip
    assert set(result["versions"]) == {"python", "torch", "transformers", "peft", "modelyard"}
    assert result["figures"]["dtype"] in ("bfloat16", "float32")
    assert result["evaluation"]["rows"] == 3
    assert len(result["learnt_from"]["data_sha256"]) == 64
    folder = Path(result["adapter_dir"])
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "probes.json"}
    assert json.loads((folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"] == MODEL
    probes = json.loads((folder / "probes.json").read_text("utf-8"))
    assert len(probes["probes"]) == result["probes"] > 0
    assert probes["template_source"] == "model"


def test_the_adapter_is_one_that_an_engine_takes(run: Run, tiny_llama: Path) -> None:
    base = json.loads((tiny_llama / "config.json").read_text("utf-8"))
    facts = check_adapter(Path(run.done()["adapter_dir"]), base, adapter_id="ft:test", base_folder=tiny_llama)
    assert facts.rank == 8
    assert facts.target_modules == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def test_the_adapters_weights_are_float32_and_load_elsewhere_with_peft(run: Run, tiny_llama: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = Path(run.done()["adapter_dir"])
    weights = load_file(folder / "adapter_model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    loaded = {name: each for name, each in model.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(weights)
    for name, each in loaded.items():
        assert torch.equal(each, weights[name.replace(".default.", ".")])
    tokens = torch.arange(10, 30)[None]
    with torch.inference_mode(), model.disable_adapter():
        before = model(input_ids=tokens).logits
    with torch.inference_mode():
        assert not torch.allclose(model(input_ids=tokens).logits, before, atol=0.1)


def test_every_phase_is_told_in_its_order(run: Run) -> None:
    phases = [each["phase"] for each in run.told("phase")]
    assert phases == ["loading", "tokenizing", "loading", "training", "saving", "evaluating"]
    assert [each["step"] for each in run.told("checkpoint")] == list(range(3, 25, 3))


def test_a_mode_that_only_plans_writes_a_plan_and_trains_nothing(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, mode=Mode.PLAN)
    assert run_alone(run) == 0, run.log.read_text("utf-8")[-3000:]
    result = run.result()
    assert result is not None
    assert set(result) == {"plan"}
    assert not (run.work / "adapter").exists()
    assert not (run.work / "checkpoints").exists()


def test_a_failure_is_a_result_and_an_exit_code(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tmp_path / "no-such-model")
    assert run_alone(run) == 1
    assert run.failure()["code"] == "bad_configuration"
