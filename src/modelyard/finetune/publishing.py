"""A trained adapter into the store: checked, with a model card, whole or not there, and its row last.

Everything may be done again after a crash at any point. The folder's name is a digest of its files, as for an import,
so that the same adapter has the same place. Whether an engine can serve it is checked before it is moved there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.datasets.tables import Dataset
from modelyard.errors import JobFailure, Unprocessable
from modelyard.finetune.schemas import HyperparametersOut
from modelyard.finetune.tables import Finetune
from modelyard.models import adapter_facts, config_file, store
from modelyard.models.adapter_checks import check_adapter
from modelyard.models.ids import folder_name
from modelyard.models.kinds import Task
from modelyard.models.tables import Model

CARD = "README.md"
REVISION = "trained"


@dataclass(frozen=True)
class Trained:
    """An adapter that a trainer has made, with all that its card and its row tell."""

    finetune: Finetune
    base: Model
    dataset: Dataset
    #: The trainer's result of mode train.
    result: Mapping[str, Any]

    def training(self) -> dict[str, Any]:
        """Return how the adapter came to be, as its row keeps it (`models.schemas.TrainingOut`)."""
        row, result = self.finetune, self.result
        evaluation = dict(result["evaluation"]) if result.get("evaluation") else None
        if evaluation is not None:
            # Answers to each row are the training's to show.
            evaluation.pop("answers", None)
        chosen = result.get("chosen") or {}
        return {
            "finetune_id": str(row.id),
            "name": row.name,
            "base_commit": self.base.commit,
            "dataset_id": str(self.dataset.id),
            "dataset_name": self.dataset.name,
            "dataset_sha256": self.dataset.sha256,
            "learnt_from": result.get("learnt_from"),
            "hyperparameters": {
                **HyperparametersOut.of(row.hyperparameters).model_dump(mode="json"),
                # What was left open is said as it was chosen, so that the like can be asked for again: of epochs, as
                # many as it took.
                **{name: one["value"] for name, one in chosen.items()},
                **({"epochs": result["figures"]["epochs"]} if "epochs" in chosen else {}),
            },
            "seed": row.hyperparameters["seed"],
            "figures": result.get("figures"),
            "evaluation": evaluation,
            "checks": None,
            "versions": result.get("versions"),
        }


async def publish(trained: Trained, adapter_dir: Path, models_dir: Path) -> dict[str, Any]:
    """Put an adapter's folder into the store, and return what its row is to say (`models.actions.add`).

    The folder is copied: what the trainer wrote stays. Safe to repeat.

    Raises:
        JobFailure: `unservable_adapter`: an engine could not serve it.
    """
    return await asyncio.to_thread(_publish, trained, adapter_dir, models_dir)


def _publish(trained: Trained, adapter_dir: Path, models_dir: Path) -> dict[str, Any]:
    adapter_id, base = trained.finetune.adapter_id, trained.base
    beside = store.partial_dir(models_dir, adapter_id)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True, mode=0o700)
    try:
        for path in sorted(adapter_dir.iterdir()):
            if path.is_file():
                shutil.copyfile(path, beside / path.name)
        (beside / CARD).write_text(card(trained), "utf-8")
        base_folder = store.folder_of(models_dir, base.path)
        try:
            facts = check_adapter(beside, config_file.read(base_folder), adapter_id=adapter_id, base_folder=base_folder)
        except JobFailure as failure:
            raise JobFailure(
                "base_lost", f"The files of {base.model_id} cannot be read: {failure.message}", "Add the base again."
            ) from None
        except OSError as error:
            raise JobFailure("base_lost", f"The files of {base.model_id} cannot be read: {error}.") from None
        except Unprocessable as error:
            raise JobFailure(
                "unservable_adapter",
                f"The trained adapter cannot be served: {error.message}",
                "Train it again with other settings, such as target_modules left out or a lower learning rate.",
            ) from None
        commit = _digest(beside)
        place = f"{folder_name(adapter_id)}/{commit}"
        target = store.folder_of(models_dir, place)
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _flush(beside)
            os.rename(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {
        "adapter": True,
        "base_model_id": base.model_id,
        "task": Task.GENERATE,
        "commit": commit,
        "size_bytes": store.bytes_below(target),
        "path": place,
        "training": trained.training(),
        "adapter_facts": adapter_facts.as_json(facts),
    }


def card(trained: Trained) -> str:
    """Return the model card: what it was made from and how, for people and, in its front matter, for programs."""
    row, training = trained.finetune, trained.training()
    front = {
        "base_model": trained.base.model_id,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "text-generation"],
        "modelyard": {"adapter_id": row.adapter_id, **training},
    }
    # JSON's values are YAML's, too, and need no second set of rules for quoting.
    matter = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items())
    name = row.name.replace("<", "&lt;")
    parts = [
        f"---\n{matter}---\n\n# {name}\n",
        f"A LoRA adapter of `{trained.base.model_id}` (commit `{trained.base.commit}`), trained on the dataset "
        f"`{trained.dataset.name.replace('`', '')}` (SHA-256 `{trained.dataset.sha256}`).\n",
        _table("Settings", training["hyperparameters"]),
        _table("Figures", training["figures"]),
        _scores(training["evaluation"]),
        _table("Libraries", training["versions"]),
        "## Use\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({trained.base.model_id!r})\n"
        'model = PeftModel.from_pretrained(base, "FOLDER")\n```\n',
    ]
    return "\n".join(part for part in parts if part)


def _table(title: str, values: Mapping[str, Any] | None) -> str:
    rows = [
        f"| {key} | {_shown(value)} |\n"
        for key, value in (values or {}).items()
        if value is not None and not isinstance(value, dict)
    ]
    return f"## {title}\n\n| what | value |\n|---|---|\n{''.join(rows)}" if rows else ""


def _scores(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation or not isinstance(evaluation.get("base"), Mapping):
        return "## Evaluation\n\nNo rows were held back to measure by.\n"
    base, adapter = evaluation["base"], evaluation["adapter"]
    rows = "".join(
        f"| {key} | {_shown(base.get(key))} | {_shown(adapter.get(key))} |\n"
        for key in ("loss", "exact_match", "rouge_l", "rows")
        if key in base
    )
    why = f"\n{_shown(evaluation.get('why'))}\n" if evaluation.get("why") else ""
    return f"## Evaluation\n\nOn rows that were held back:\n\n| what | base | adapter |\n|---|---|---|\n{rows}{why}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _digest(folder: Path) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
