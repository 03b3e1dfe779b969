"""An adapter inside its base: the same answers as PEFT gives, weights rounded once, and all that is not weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from modelyard.demo.tiny_llama import make_llama
from modelyard.errors import JobFailure
from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Hyperparameters, Mode, Spec
from tests.fixtures import missing
from tests.peft_adapters import PROMPT, TOKENS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn of themselves

KINDS = ("plain", "rslora", "patterns", "headless")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in bfloat16 (`half`) and in float32 (`whole`), and adapters with PEFT's answers, in float32."""
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            missing("engine", f"{name} is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "half")
    shutil.copytree(folder / "half", folder / "whole")
    model = AutoModelForCausalLM.from_pretrained(str(folder / "half"), dtype=torch.float32)
    model.save_pretrained(str(folder / "whole"))
    (folder / "half" / "LICENSE.txt").write_text("Do as you like.")
    (folder / "adapters").mkdir()
    subprocess.run(
        [sys.executable, "-m", "tests.peft_adapters", str(folder / "whole"), str(folder / "adapters"), *KINDS],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def merged(models: Path, base: str, adapter: Path, target: Path) -> Path:
    """Merge, as the child does, and return the merged model's folder."""
    from modelyard.trainer.merge import merge

    none = Hyperparameters(
        epochs=None, max_steps=None, learning_rate=0.0, lr_schedule="", warmup_steps=None, batch_size=None,
        gradient_accumulation=1, rank=1, alpha=1.0, dropout=0.0, target_modules=None, max_seq_len=None, seed=0,
        packing=False, quantization=None, validation_split=None, early_stopping=None, checkpoint_steps=None,
    )  # fmt: skip
    target.mkdir(exist_ok=True)
    spec = Spec(
        mode=Mode.MERGE, name="", model_id=f"acme/{base}", model_dir=str(models / base), adapter_id="ft:mine", data="",
        max_line_bytes=0, hyperparameters=none, work_dir=str(target), progress=str(target / "progress"),
        result=str(target / "result"), adapter_dir=str(adapter), merged_dir=str(target / "merged"),
    )  # fmt: skip
    assert merge(spec, Reports(target / "progress")) == {"model_dir": str(target / "merged")}
    return target / "merged"


def greedy(folder: Path) -> list[int]:
    """Return how a model that is loaded from a folder, and knows nothing of PEFT, continues the prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(folder))
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompt = AutoTokenizer.from_pretrained(str(folder))(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        said = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)
    found: list[int] = said[0, prompt.shape[1] :].tolist()
    return found


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns"])
def test_the_merged_model_answers_as_peft_does_with_the_adapter(models: Path, tmp_path: Path, kind: str) -> None:
    known = json.loads((models / "adapters/greedy.json").read_text("utf-8"))
    assert known[kind] != known[""]
    assert greedy(merged(models, "whole", models / "adapters" / kind, tmp_path)) == known[kind]


def test_in_the_bases_own_format_each_weight_is_the_sum_rounded_once(models: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    found = load_file(merged(models, "half", models / "adapters/plain", tmp_path) / "model.safetensors")
    base = load_file(models / "half/model.safetensors")
    adapter = load_file(models / "adapters/plain/adapter_model.safetensors")
    assert found.keys() == base.keys()
    changed = 0
    for name, weight in base.items():
        assert found[name].dtype == torch.bfloat16
        part = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{part}.lora_A.weight" in adapter:
            # alpha 16 over rank 8
            delta = adapter[f"{part}.lora_B.weight"] @ adapter[f"{part}.lora_A.weight"] * 2.0
            exact = weight.float() + delta
            # But where the last bit of float32 decides, which a product may sum up in another order.
            assert (found[name] == exact.to(torch.bfloat16)).float().mean() > 0.999, name
            changed += 1
        else:
            assert torch.equal(found[name], weight), name
    assert changed == 14


def test_all_that_is_not_weights_is_the_bases_and_the_chat_template_the_adapters(models: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(models / "adapters/plain", adapter)
    (adapter / "chat_template.jinja").write_text("{{ 'as it was trained' }}")
    found = merged(models, "half", adapter, tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE.txt"):
        assert (found / name).read_bytes() == (models / "half" / name).read_bytes(), name
    assert (found / "chat_template.jinja").read_text() == "{{ 'as it was trained' }}"
    assert not list(found.glob("adapter*"))
    card = (found / "README.md").read_text("utf-8")
    assert 'base_model: "acme/half"' in card
    assert "`ft:mine`" in card
    assert "bfloat16" in card


def refused(models: Path, base: str, adapter: Path, target: Path) -> JobFailure:
    with pytest.raises(JobFailure) as caught:
        merged(models, base, adapter, target)
    return caught.value


def test_an_adapter_that_finds_no_place_in_the_base_is_refused_instead_of_forgotten(
    models: Path, tmp_path: Path
) -> None:
    # Trained on the model without its output layer: its names lack a part.
    failure = refused(models, "whole", models / "adapters/headless", tmp_path)
    assert failure.code == "adapter_mismatch"
    assert "ft:mine does not fit acme/whole" in failure.message


def test_an_adapter_of_another_size_is_refused(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    shutil.copytree(models / "adapters/plain", adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    wide = {name: one.repeat(1, 2) if "lora_A" in name else one for name, one in weights.items()}
    save_file(wide, str(adapter / "adapter_model.safetensors"))
    failure = refused(models, "whole", adapter, tmp_path)
    assert failure.code == "adapter_mismatch"
    assert "other shapes" in failure.message


def test_an_adapter_whose_training_failed_is_refused(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    shutil.copytree(models / "adapters/plain", adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, str(adapter / "adapter_model.safetensors"))
    assert refused(models, "whole", adapter, tmp_path).code == "adapter_not_finite"


def test_a_quantized_base_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "whole", tmp_path / "whole")
    config: dict[str, Any] = json.loads((tmp_path / "whole/config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    failure = refused(tmp_path, "whole", models / "adapters/plain", tmp_path)
    assert failure.code == "quantized_base"


@pytest.mark.parametrize(
    "names",
    [
        ["Trainer"], ["pipeline"], ["os.path"], ["AutoModelForCausalLM"], ["PreTrainedModel"], ["__builtins__"],
        ["dependency_versions_check"], [7], [], None,
    ],
)  # fmt: skip
def test_what_architectures_names_is_taken_only_if_it_is_a_model_of_transformers(models: Path, names: Any) -> None:
    import transformers

    from modelyard.trainer.merge import class_of

    assert class_of(types.SimpleNamespace(architectures=names)) is transformers.AutoModelForCausalLM
    llama = types.SimpleNamespace(architectures=[*(names or []), "LlamaForCausalLM"])
    assert class_of(llama) is transformers.LlamaForCausalLM


def test_a_base_without_safetensors_is_not_merged(models: Path, tmp_path: Path) -> None:
    """A folder may have been changed since it was scanned: what is pickled is not loaded even then."""
    import torch
    from safetensors.torch import load_file

    base = tmp_path / "base"
    shutil.copytree(models / "half", base)
    torch.save(load_file(str(base / "model.safetensors")), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    shutil.copytree(base, models / "pickled")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        merged(models, "pickled", models / "adapters" / "plain", tmp_path / "merged")
