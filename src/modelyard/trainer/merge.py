"""An adapter inside its base: one model that needs no PEFT, in the base's own number format.

The sum is made in float32 and rounded once. What is not weights (configuration, tokenizer, chat template, licence) is
the base's own, file by file, so that whoever could read the base can read the result; a chat template that came with
the adapter takes the place of the base's. The folder is written by this child alone and is whole when it returns.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from modelyard.models.references import is_class_name
from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Spec

SHARD_SIZE = "5GB"
WEIGHTS = (".safetensors", ".safetensors.index.json")
#: What the adapter brings of what it was trained with, for every prompt to be rendered as it was then.
FROM_ADAPTER = ("chat_template.jinja",)
LONGEST_LIST = 3


def merge(spec: Spec, report: Reports) -> dict[str, Any]:
    """Write the merged model to `spec.merged_dir` and return the result, `{"model_dir"}`. May be repeated.

    Raises:
        JobFailure: `quantized_base`, `adapter_mismatch` or `adapter_not_finite`. Others as `failures` names them.
    """
    import torch

    target = Path(spec.merged_dir)
    base_dir, adapter_dir = Path(spec.model_dir), Path(spec.adapter_dir)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True, mode=0o700)
    report.phase("loading")
    with torch.inference_mode():
        model = _with_adapter(_base(spec, base_dir), spec, adapter_dir)
        merged = model.merge_and_unload()
        _check_finite(merged, spec)
    report.phase("saving")
    merged.save_pretrained(str(target), max_shard_size=SHARD_SIZE)
    for path in sorted(base_dir.rglob("*")):
        if path.is_file() and not path.name.endswith(WEIGHTS):
            _copy(path, target / path.relative_to(base_dir))
    for name in FROM_ADAPTER:
        if (adapter_dir / name).is_file():
            _copy(adapter_dir / name, target / name)
    dtype = str(merged.dtype).removeprefix("torch.")
    (target / "README.md").write_text(_card(spec, dtype), "utf-8")
    return {"model_dir": str(target)}


def _base(spec: Spec, folder: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise JobFailure(
            "quantized_base",
            f"{spec.model_id} is quantized: an adapter cannot be put into its weights without changing them otherwise.",
            "Export the adapter alone, and use it beside the base.",
        )
    return class_of(config).from_pretrained(
        str(folder), dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
    )


def class_of(config: Any) -> Any:
    """Return the class of transformers that `architectures` names; the one for text generation where it names none.

    The names are the repository's word: only a class of a model, defined inside transformers, is taken.
    """
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None) if is_class_name(name) else None
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and found.__module__.startswith("transformers.models."):
            return found
    return transformers.AutoModelForCausalLM


def _with_adapter(base: Any, spec: Spec, folder: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from modelyard.trainer.layers import names_as_they_are

    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        wanted = set(file.keys())
    layers = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in wanted}
    # One that was made of a mixture of experts by transformers 4 has other names, which PEFT has to rewrite.
    is_of_these = layers <= {name for name, _ in base.named_modules()}
    # In float32 whatever its file has: PEFT's own default, on which the single rounding rests.
    try:
        with names_as_they_are() if is_of_these else nullcontext():
            model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=True)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise _mismatch(spec, "its weights have other shapes than the base's layers") from error
    # PEFT only warns of weights that it finds no place for, and the sum would be the base itself.
    taken = set(get_peft_model_state_dict(model))
    if lost := sorted(wanted - taken) or sorted(taken - wanted):
        named = ", ".join(lost[:LONGEST_LIST]) + (", ..." if len(lost) > LONGEST_LIST else "")
        raise _mismatch(spec, f"{len(lost)} of its weights are for layers that are not the base's ({named})")
    return model


def _mismatch(spec: Spec, what: str) -> JobFailure:
    return JobFailure(
        "adapter_mismatch",
        f"{spec.adapter_id} does not fit {spec.model_id}: {what}.",
        "Check that the adapter was trained for this very model.",
    )


def _check_finite(model: Any, spec: Spec) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise JobFailure(
                "adapter_not_finite",
                f"{spec.adapter_id} in {spec.model_id} gives weights that are no numbers ({name}).",
                "The adapter's training has failed: train it again with a lower learning_rate.",
            )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _card(spec: Spec, dtype: str) -> str:
    tags = json.dumps(["merged"])
    return f"""---
base_model: {json.dumps(spec.model_id)}
base_model_relation: merge
library_name: transformers
tags: {tags}
---

# {spec.adapter_id}, merged

The model `{spec.model_id}` with the LoRA adapter `{spec.adapter_id}` inside its weights ({dtype}).
Licence and terms are the base's.
"""
