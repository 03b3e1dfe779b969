"""Which files of a repository are needed: weights as safetensors once, configuration, tokenizer, chat template.

Pure: it looks at a list of names and answers with names, or refuses with a reason (`JobFailure`). Pickled weights,
Python files, training state, and the same weights in a second format are never chosen.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from modelyard.errors import JobFailure

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_CONFIGURATION = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "additional_chat_templates/*.jinja",
)  # fmt: skip
_NOT_CONFIGURATION = (
    "*.index.json", "trainer_state.json", "all_results.json", "*_results.json", "training_args*.json", "params.json",
    "onnx_config.json", "openvino_config.json", "model_index.json",
)  # fmt: skip
_MODULE_FOLDER = re.compile(r"[0-9]+_[A-Za-z]+/[^/]+\.(?:json|safetensors)")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".npz")
_SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=, -]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+@=, -]*){0,3}")


@dataclass(frozen=True)
class Selection:
    """What to fetch: `configuration` first, to be looked at before any of `weights` is."""

    configuration: tuple[str, ...]
    weights: tuple[str, ...]
    adapter: bool


def is_safe_path(path: str) -> bool:
    """Whether a name from a repository may become a path below a folder of ours."""
    return len(path) <= 255 and _SAFE_PATH.fullmatch(path) is not None and ".." not in path


def select(paths: Collection[str]) -> Selection:
    """Choose the files to fetch from all files of a repository.

    Raises:
        JobFailure: `pickle_only`, `unsupported_format`, `no_weights` or `missing_configuration`.
    """
    usable = sorted(path for path in paths if is_safe_path(path))
    # Some adapters come with their base's config.json: what tells is whose weights are there.
    adapter = ADAPTER_CONFIG in usable and not any(_is_model_weights(path) for path in usable)
    weights = _weights(usable, adapter)
    configuration = [path for path in usable if _is_configuration(path)]
    if INDEX in usable and len(weights) > 1:
        configuration.append(INDEX)
    if weights[0].startswith("consolidated") and "params.json" in usable:
        configuration.append("params.json")
    elif not adapter and "config.json" not in configuration:
        raise JobFailure(
            "missing_configuration",
            "The repository has weights but no config.json, so that no engine can tell what they are.",
            "Choose a repository in the format of transformers, or one with adapter_config.json for an adapter.",
        )
    return Selection(tuple(configuration), tuple(weights), adapter)


def check_index(weight_map: object, weights: Iterable[str]) -> None:
    """Compare the index of a sharded model with the shards that were chosen.

    Raises:
        JobFailure: `bad_index`: it is malformed, or names files that are not there.
    """
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise JobFailure("bad_index", f"{INDEX} has no map from weights to files.", _OTHER_REVISION)
    missing = sorted(set(weight_map.values()) - set(weights))
    if missing:
        named = ", ".join(repr(name[:80]) for name in missing[:3])
        raise JobFailure(
            "bad_index", f"{INDEX} names {len(missing)} files that are not in the repository: {named}.", _OTHER_REVISION
        )


_OTHER_REVISION = "Tell its authors, or try another revision."


def _is_configuration(path: str) -> bool:
    if _MODULE_FOLDER.fullmatch(path):
        return path.endswith(".json")
    patterns = _CONFIGURATION if "/" not in path else _CONFIGURATION[-1:]
    if any(fnmatchcase(path, pattern) for pattern in _NOT_CONFIGURATION):
        return False
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _is_model_weights(path: str) -> bool:
    return "/" not in path and path.endswith(".safetensors") and not path.startswith("adapter_")


def _weights(usable: list[str], adapter: bool) -> list[str]:
    if adapter:
        found = [path for path in usable if path == ADAPTER_WEIGHTS]
        return found or _refuse(usable)
    top = [path for path in usable if _is_model_weights(path)]
    shards = [path for path in top if (match := _SHARD.fullmatch(path)) and match[1] == "model"]
    single = [path for path in top if path == "model.safetensors"]
    # The same weights may be there whole, in shards and in Mistral's format (consolidated): one of them will do.
    if INDEX in usable and shards:
        found = shards
    elif single:
        found = single
    else:
        other = [path for path in top if not path.startswith("consolidated")]
        found = other or [path for path in top if path.startswith("consolidated")]
    if not found:
        return _refuse(usable)
    return found + [path for path in usable if _MODULE_FOLDER.fullmatch(path) and path.endswith(".safetensors")]


def _refuse(usable: list[str]) -> list[str]:
    if any(path.endswith(_PICKLED) for path in usable):
        raise JobFailure(
            "pickle_only",
            "The weights are only there in a pickled format, which can run code when it is loaded; "
            "only safetensors are accepted.",
            "Choose a revision or a repository with .safetensors files, or convert it (huggingface.co/spaces/"
            "safetensors/convert).",
        )
    if any(path.endswith(".gguf") for path in usable):
        raise JobFailure(
            "unsupported_format",
            "The weights are only there as GGUF; only safetensors are accepted.",
            "Choose the repository that the GGUF files were made from.",
        )
    raise JobFailure(
        "no_weights",
        "The repository has no weights in safetensors format.",
        "Check the name: it must be a model, not a data set, a tokenizer or an empty repository.",
    )
