"""The keys of configuration files by which a library would run code, or load from elsewhere than the model's folder.

Read in vLLM 0.32, transformers 5.19, PEFT 0.21 and sentence-transformers' files; beside each key stands where. A key
is looked for at any depth, in every configuration file, since libraries merge them (`text_config` and others). Not
here: `_name_or_path` (honest models carry the path of whoever saved them; libraries overwrite it, and engines run
with the hub offline), and paths in `tokenizer_config.json` that end in `_file` (transformers lets the own files
of the folder take their place). `scan` calls `check`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from modelyard.errors import JobFailure
from modelyard.models.config_file import MAX_DEPTH

#: They make a library import code, from the folder or from the hub.
CODE = {
    "auto_map": "transformers/dynamic_module_utils.py",
    "custom_pipelines": "transformers/pipelines/__init__.py",
    "custom_pipeline": "diffusers",
    "custom_generate": "transformers/generation/utils.py",
    "model_file": "sentence-transformers' Transformer module",
    "code_revision": "transformers/dynamic_module_utils.py",
    "trust_remote_code": "transformers/dynamic_module_utils.py",
    "kernel_config": "transformers/modeling_utils.py",
    "use_kernels": "transformers/modeling_utils.py",
}
#: They make a library load another repository, or another file, than the one that was scanned.
ELSEWHERE = {
    # The verifier's `name_or_path` takes the model's place.
    "speculators_config": "vllm/transformers_utils/config.py",
    "audio_tokenizer_name_or_path": "transformers/processing_utils.py",
    # Weights of a second repository.
    "audio_model_id": "vllm/model_executor/models/ultravox.py",
    "text_model_id": "vllm/model_executor/models/ultravox.py",
    # A weights file other than those that were chosen.
    "transformers_weights": "transformers/modeling_utils.py",
}
_IMPORTABLE = ("transformers", "peft", "torch", "sentence_transformers", "megatron")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_ACTIVATION = re.compile(r"torch\.nn\.modules\.(?:activation|linear)\.[A-Za-z0-9]{1,60}")
#: A file of the folder itself, in the names that transformers chooses among by its version.
_VERSIONED = re.compile(r"^[A-Za-z_]+(?:\.[0-9A-Za-z.-]+)?\.json")
_MODULE_PATH = re.compile(r"(?:[0-9]+_[A-Za-z0-9]+)?/?")
#: timm would load a model's configuration from there, whatever the key is called.
_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:", "local_dir:")


def check(name: str, value: Any) -> None:
    """Refuse a configuration file, already parsed, that would make a library run code or load from elsewhere.

    Raises:
        JobFailure: `remote_code`, `loads_from_elsewhere`, or `bad_configuration` where it is nested too deep.
    """
    if name == "modules.json":
        _check_modules(value)
    _check_value(name, value, "", 0)


def is_class_name(value: Any) -> bool:
    """True if this is a plain name of a class: no module's path, no file."""
    return isinstance(value, str) and _IDENTIFIER.fullmatch(value) is not None


def _check_value(name: str, value: Any, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise JobFailure(
            "bad_configuration",
            f"{name} is nested more than {MAX_DEPTH} deep.",
            "Tell the model's authors, or try another revision.",
        )
    if isinstance(value, list):
        for number, item in enumerate(value):
            _check_value(name, item, f"{where}[{number}]", depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            path = f"{where}.{key}" if where else str(key)
            _check_key(name, key, item, path)
            _check_value(name, item, path, depth + 1)
    elif isinstance(value, str) and value.startswith(_SCHEMES):
        raise _elsewhere(name, where, value)


def _check_key(name: str, key: str, value: Any, path: str) -> None:
    if value in (None, False, "", [], {}):
        return
    if key in CODE:
        raise _code(name, path, value)
    if key in ELSEWHERE:
        raise _elsewhere(name, path, value)
    if "_implementation" in key and _names_repository(value):
        raise _code(name, path, value)
    is_right = _RULES.get(key)
    if is_right is not None and not is_right(value):
        raise _code(name, path, value)
    if key in ("configuration_files", "fast_tokenizer_files") and not _are_versioned(value):
        raise _elsewhere(name, path, value)


def _names_repository(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_names_repository(item) for item in value.values())
    if isinstance(value, list):
        return any(_names_repository(item) for item in value)
    # A repository is named org/name, perhaps behind 'paged|' and before '@revision' and ':function'.
    return isinstance(value, str) and any(mark in value for mark in "/\\:")


def _is_importable(value: Any) -> bool:
    return isinstance(value, str) and value.split(".", 1)[0] in _IMPORTABLE


def _is_activation(value: Any) -> bool:
    """True if a function's name is one of vLLM's own, or of torch's activations: vLLM imports what has dots."""
    return isinstance(value, str) and ("." not in value or _ACTIVATION.fullmatch(value) is not None)


def _are_class_names(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(name is None or is_class_name(name) for name in names)


def _are_versioned(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and _VERSIONED.fullmatch(one) for one in value)


def _check_modules(value: Any) -> None:
    entries = value if isinstance(value, list) else [None]
    for number, entry in enumerate(entries):
        kind = entry.get("type") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise _code("modules.json", f"[{number}].type", kind)
        folder = entry.get("path")
        if folder is not None and not (isinstance(folder, str) and _MODULE_PATH.fullmatch(folder)):
            raise _elsewhere("modules.json", f"[{number}].path", folder)


#: Keys that honest models have, with what their values must be.
_RULES: dict[str, Callable[[Any], bool]] = {
    # PEFT imports it (peft/auto.py); Megatron's layers come from it (peft/tuners/lora/tp_layer.py).
    "parent_library": _is_importable,
    "megatron_core": _is_importable,
    # vLLM resolves a qualified name (model_executor/layers/pooler/activations.py, models/adapters.py).
    "activation_fn": _is_activation,
    "activation_function": _is_activation,
    "sbert_ce_default_activation_function": _is_activation,
    # An attribute of transformers (vllm/model_executor/models/registry.py, transformers/models/auto).
    "architectures": _are_class_names,
    "tokenizer_class": _are_class_names,
    "processor_class": _are_class_names,
    "image_processor_type": _are_class_names,
    "video_processor_type": _are_class_names,
    "feature_extractor_type": _are_class_names,
    "base_model_class": _are_class_names,
}


def _code(name: str, path: str, value: Any) -> JobFailure:
    return JobFailure(
        "remote_code",
        f"{name} would fetch or import code: {path} is {_shown(value)}.",
        "Modelyard runs no code that comes with a model. Choose a model whose architecture the engine knows by itself, "
        "or remove the key from a copy in the import directory if the engine does not need it.",
    )


def _elsewhere(name: str, path: str, value: Any) -> JobFailure:
    return JobFailure(
        "loads_from_elsewhere",
        f"{name} would load from elsewhere than this model: {path} is {_shown(value)}.",
        "Only what was scanned is loaded. Choose a model that is whole by itself, or remove the key from a copy in the "
        "import directory if the engine does not need it.",
    )


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)[:80]
