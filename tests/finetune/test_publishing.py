"""An adapter into the store: its folder, its card, and what is refused; with adapters as a trainer leaves them."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from modelyard.datasets.tables import Dataset
from modelyard.errors import JobFailure
from modelyard.finetune import publishing
from modelyard.finetune.schemas import HyperparametersIn
from modelyard.finetune.tables import Finetune
from modelyard.models import adapter_facts
from modelyard.models.schemas import TrainingOut
from tests.finetune.rows import model
from tests.models.test_adapter_checks import pair, write_tensors

HIDDEN = 16
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100,
}  # fmt: skip
SCORES = {"loss": 1.5, "exact_match": 0.25, "rouge_l": 0.5, "rows": 4}


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "acme--tiny" / "c0ffee"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "models"


def adapter(folder: Path, **config: Any) -> Path:
    """Write an adapter that PEFT could have written."""
    folder.mkdir(parents=True)
    given = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(given | config))
    write_tensors(folder / "adapter_model.safetensors", pair("model.layers.0.self_attn.q_proj", 8))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "probes.json").write_text("{}")
    return folder


def trained(name: str = "My Adapter", **result: Any) -> publishing.Trained:
    """Return a training that has ended well."""
    row = Finetune(
        id=uuid.UUID(int=1),
        name=name,
        adapter_id="ft:my-adapter",
        model_id="acme/tiny",
        hyperparameters=HyperparametersIn().filled().__dict__,
    )
    dataset = Dataset(id=uuid.UUID(int=2), name="train `set`.jsonl", sha256="ab" * 32)
    given = {
        "figures": {"steps": 6, "seconds": {"training": 1.5}, "last_loss": 0.123456789, "best_step": None},
        "evaluation": {"base": SCORES, "adapter": SCORES, "better": True, "why": "a | b", "answers": [{"line": 1}]},
        "versions": {"torch": "2.0"},
        "learnt_from": {"rows_sha256": "cd" * 32},
    }
    return publishing.Trained(row, model(), dataset, given | result)


async def test_an_adapter_is_in_the_store_with_all_that_the_trainer_wrote_and_a_card(
    models_dir: Path, tmp_path: Path
) -> None:
    source = adapter(tmp_path / "adapter")
    about = await publishing.publish(trained(), source, models_dir)
    folder = models_dir / about["path"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "probes.json",
    ]  # fmt: skip
    assert about["path"] == f"ft@my-adapter/{about['commit']}"
    assert (about["adapter"], about["base_model_id"], about["task"]) == (True, "acme/tiny", "generate")
    assert about["size_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert source.is_dir()
    assert list((models_dir / ".partial").iterdir()) == []
    shown = TrainingOut.model_validate(about["training"])
    assert (shown.name, shown.dataset_sha256, shown.seed) == ("My Adapter", "ab" * 32, 0)
    assert shown.learnt_from == {"rows_sha256": "cd" * 32}
    assert shown.evaluation is not None
    assert "answers" not in shown.evaluation
    facts = adapter_facts.from_json(about["adapter_facts"])
    assert facts == adapter_facts.read(folder)
    assert facts.rank == 8


async def test_publishing_again_changes_nothing(models_dir: Path, tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter")
    first = await publishing.publish(trained(), source, models_dir)
    written = (models_dir / first["path"] / "README.md").stat().st_mtime_ns
    # As a crash in the middle leaves it.
    (models_dir / ".partial" / "ft@my-adapter").mkdir()
    (models_dir / ".partial" / "ft@my-adapter" / "adapter_model.safetensors").write_bytes(b"half")
    assert await publishing.publish(trained(), source, models_dir) == first
    assert (models_dir / first["path"] / "README.md").stat().st_mtime_ns == written
    assert [path.name for path in (models_dir / "ft@my-adapter").iterdir()] == [first["commit"]]


@pytest.mark.parametrize("config", [{"use_dora": True}, {"r": 4}, {"peft_type": "IA3"}])
async def test_what_no_engine_could_serve_does_not_reach_the_store(
    models_dir: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    with pytest.raises(JobFailure) as refused:
        await publishing.publish(trained(), adapter(tmp_path / "adapter", **config), models_dir)
    assert refused.value.code == "unservable_adapter"
    assert not (models_dir / "ft@my-adapter").exists()
    assert list((models_dir / ".partial").iterdir()) == []


async def test_a_base_that_was_lost_is_said_to_be(models_dir: Path, tmp_path: Path) -> None:
    (models_dir / "acme--tiny" / "c0ffee" / "config.json").unlink()
    with pytest.raises(JobFailure) as refused:
        await publishing.publish(trained(), adapter(tmp_path / "adapter"), models_dir)
    assert refused.value.code == "base_lost"


@pytest.mark.parametrize(
    "name", ["My Adapter", 'A "quoted": <name> | with - all', "- item: {a: [1]} # no", "Ünïcödé 训练"]
)
def test_the_cards_front_matter_is_yaml_whatever_the_name_is(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    _, matter, text = publishing.card(trained(name)).split("---\n", 2)
    front = yaml.safe_load(matter)
    assert (front["base_model"], front["library_name"], front["tags"][0]) == ("acme/tiny", "peft", "lora")
    assert front["modelyard"]["name"] == name
    assert front["modelyard"]["hyperparameters"]["rank"] == 16
    assert "| exact_match | 0.25 | 0.25 |" in text
    assert "| last_loss | 0.123457 |" in text
    assert "None" not in text
    assert "a \\| b" in text


def test_a_card_without_scores_says_that_nothing_was_held_back() -> None:
    assert "No rows were held back" in publishing.card(trained(evaluation=None))
