"""The base model in memory and the adapter on it: what vLLM can serve, in the precision that is quick here.

The base is frozen, in bfloat16 where the processor multiplies that well or on a GPU, else in float32; the adapter's
weights are always float32. Only plain LoRA on linear layers is made. Nothing is downloaded, and no code of the
model's folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from modelyard.evidence import in_words
from modelyard.models import config_file
from modelyard.trainer.failures import is_out_of_memory
from modelyard.trainer.layers import adapted, layers_to_adapt
from modelyard.trainer.refusals import NO_BITSANDBYTES, NO_GPU, quantization_needs_gpu
from modelyard.trainer.reports import Reports
from modelyard.trainer.spec import Base, Spec

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def load_tokenizer(spec: Base) -> Any:
    """Return the model's tokenizer.

    Raises:
        JobFailure: `bad_tokenizer`: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec.model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise JobFailure(
            "bad_tokenizer",
            f"The tokenizer of {spec.model_id} cannot be read: {in_words(error)}.",
            "Download or import the model again, with its tokenizer's files (tokenizer.json, tokenizer_config.json).",
        ) from error


def load_base(spec: Spec, report: Reports) -> Any:
    """Return the base on the device of the training, frozen.

    Raises:
        JobFailure: `unsupported_architecture`, `unsupported_quantization`, `quantization_needs_gpu`,
            `bad_configuration`, `bad_weights`.
    """
    import torch

    config = read_config(spec)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu or bf16_is_quick() else torch.float32
    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if spec.hyperparameters.quantization == "4bit":
        options["quantization_config"] = _four_bits(on_gpu)
    if on_gpu:
        options["device_map"] = {"": torch.cuda.current_device()}
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            spec.model_dir, local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
        )
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ImportError):
            raise
        raise JobFailure(
            "bad_weights",
            f"The weights of {spec.model_id} cannot be loaded: {in_words(error)}.",
            "Download or import the model again.",
        ) from error
    model.requires_grad_(False)
    # A cache of keys and values is of no use where nothing is generated, and takes memory.
    model.config.use_cache = False
    report.note(
        f"The base is loaded in {str(dtype).removeprefix('torch.')} on {device_name(model.device)}.",
        dtype=str(dtype).removeprefix("torch."),
    )
    return model


def with_adapter(model: Any, spec: Spec) -> Any:
    """Return the base with a fresh adapter on it (a PeftModel), the same one for the same seed.

    Raises:
        JobFailure: `unknown_target_modules`, naming what there is; `unsupported_architecture` where nothing fits;
            `adapter_not_as_asked` where PEFT makes another one.
    """
    import torch
    from peft import LoraConfig

    settings = spec.hyperparameters
    layers = layers_to_adapt(model, settings.target_modules, spec.model_id)
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, task_type="CAUSAL_LM"
    )
    made = adapted(model, config, layers)
    # PEFT writes the folder that the base was loaded from, which means nothing on another machine.
    made.peft_config["default"].base_model_name_or_path = spec.model_id
    return made


def bf16_is_quick() -> bool:
    """Return whether this processor multiplies bfloat16 faster than float32."""
    import torch

    # By matrix units (AMX) or by the instructions of AVX-512; elsewhere it is imitated, and slower than float32.
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(is_there() for is_there in asked if is_there is not None)


def device_name(device: Any) -> str:
    """Return what the training runs on, in words."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    return f"the processor ({torch.get_num_threads()} threads)"


def read_config(spec: Base) -> Any:
    """Return the base's configuration, after refusing what cannot be trained.

    Raises:
        JobFailure: `unsupported_architecture`, `unsupported_quantization` or `bad_configuration`.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        raw = config_file.read(Path(spec.model_dir))
    except JobFailure as failure:
        raise JobFailure(failure.code, f"{spec.model_id}: {failure.message}", failure.hint) from None
    kind, named = config_file.names_of(raw)
    fitting = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    classes = (fitting,) if isinstance(fitting, str) else tuple(fitting or ())
    if not classes or (named and not set(named) & set(classes)) or raw.get("is_encoder_decoder"):
        raise JobFailure(
            "unsupported_architecture",
            f"{spec.model_id} is of the architecture {', '.join(named) or 'unknown'} (model_type "
            f"{kind[:60] or 'unknown'}), which is not a causal language model that can be trained here.",
            "Train a decoder model such as Llama, Qwen, Mistral, Gemma or Phi.",
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise JobFailure(
            "unsupported_quantization",
            f"The weights of {spec.model_id} are quantised ({str(method)[:40]}): only whole ones can be trained on.",
            "Train the model that it was made from; the adapter can be served on either.",
        )
    try:
        return AutoConfig.from_pretrained(spec.model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise JobFailure(
            "bad_configuration",
            f"The config.json of {spec.model_id} is not valid: {in_words(error)}.",
            "Download or import the model again.",
        ) from error


def max_length(config: Any) -> int | None:
    """Return how many tokens the model takes, if its configuration says so."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(length := getattr(text, name, None), int) and length > 0:
            return length
    return None


def _four_bits(on_gpu: bool) -> Any:
    import importlib.util

    if not on_gpu or importlib.util.find_spec("bitsandbytes") is None:
        raise quantization_needs_gpu(NO_BITSANDBYTES if on_gpu else NO_GPU)
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def adapter_weights(model: Any) -> dict[str, Any]:
    """Return the adapter's weights on the CPU, under the names that PEFT's files have."""
    return {
        name.replace(".default.", "."): each.detach().cpu().contiguous()
        for name, each in model.named_parameters()
        if each.requires_grad
    }


def set_adapter_weights(model: Any, weights: Mapping[str, Any]) -> None:
    """Put weights that `adapter_weights` returned into the adapter. Raises KeyError where one is missing."""
    import torch

    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.requires_grad:
                each.copy_(weights[name.replace(".default.", ".")])


def adapter_config(model: Any) -> str:
    """Return the text of PEFT's adapter_config.json, the same for the same settings."""
    values = model.peft_config["default"].to_dict() | {"inference_mode": True}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"
