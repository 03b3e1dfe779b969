"""Check of `target_modules` against the names in a base's files, without the model: the trainer has the last word.

A name is refused where the trainer would surely refuse it. The files' names are not all: transformers calls some layers
otherwise than the files do, and those are known by the kind of model (`trainer.layer_names`). Blocks on the disk.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from modelyard.models.base_layers import BaseLayers, base_layers, tail_of
from modelyard.models.config_file import Config, text_part
from modelyard.trainer.layer_names import (
    ALL_KNOWN,
    EXPERTS,
    EXPERTS_SERVED,
    KNOWN,
    ROUTED,
    ROUTERS,
    is_named,
    is_unserved,
)
from modelyard.trainer.refusals import unknown_target_modules


def check(model_id: str, folder: Path, config: Config, wanted: Collection[str], *, is_own_python: bool = False) -> None:
    """Refuse names that stand for no layer of the base in a folder.

    `is_own_python`: another transformers than the one that was looked at trains, and may call layers otherwise.

    Raises:
        JobFailure: `unknown_target_modules`, in the trainer's words.
    """
    kinds = {str(part.get("model_type")) for part in (config, text_part(config))}
    layers = _layers(base_layers(folder), kinds)
    if not layers:
        return  # of files that tell nothing, nothing is refused
    of_kind = frozenset[str]().union(*(KNOWN[kind] for kind in kinds & KNOWN.keys()))
    known = ALL_KNOWN if is_own_python or not of_kind else of_kind
    has_experts = bool(kinds & EXPERTS_SERVED)
    unknown = [
        name for name in set(wanted)
        if name.rpartition(".")[2] not in known
        and not (has_experts and name.rpartition(".")[2] == EXPERTS)
        and not any(is_named(layer, name) for layer in layers)
    ]  # fmt: skip
    if unknown:
        there = {layer.rpartition(".")[2] for layer in layers} | of_kind
        raise unknown_target_modules(
            model_id, unknown, there, has_unserved_experts=EXPERTS in unknown and not has_experts
        )


def _layers(base: BaseLayers, kinds: Collection[str]) -> set[str]:
    """Return the layers of the files that may be linear ones an adapter is put on, by their full names."""
    return {
        name for name in base.names
        if tail_of(name) in base.shapes
        and tail_of(name) != name.rpartition(".")[2]
        and name.rpartition(".")[2] not in ROUTERS
        and not ROUTED.search(name)
        and not any(is_unserved(kind, name) for kind in kinds)
    }  # fmt: skip
