"""The base model in memory and the adapter on it: what vLLM can serve, in the precision that is quick here.

The base is frozen, in bfloat16 where the processor multiplies that well or on a GPU, else in float32; the adapter's
weights are always float32. Only plain LoRA on linear layers is made. Nothing is downloaded, and no code of the
model's folder is run.
"""

from __future__ import annotations

from typing import Any

from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Spec


def load_tokenizer(spec: Spec) -> Any:
    """Return the model's tokenizer. Raises JobFailure `bad_tokenizer` where it cannot be read."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(spec.model_dir, local_files_only=True, trust_remote_code=False)


def load_base(spec: Spec, report: Reports) -> Any:
    """Return the base on the device of the training, frozen.

    Raises:
        JobFailure: `unsupported_architecture`, `quantization_needs_gpu`, `out_of_memory`, `bad_weights`.
    """
    raise NotImplementedError


def with_adapter(model: Any, spec: Spec) -> Any:
    """Return the base with a fresh adapter on it (a PeftModel), the same one for the same seed.

    Raises:
        JobFailure: `unknown_target_modules`, naming what there is.
    """
    raise NotImplementedError
