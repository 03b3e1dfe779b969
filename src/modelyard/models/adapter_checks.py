"""Check of an adapter against its base, decided before an engine sees it.

vLLM 0.32 refuses much of what PEFT can train, often as an HTTP 500; and some of what it does load it serves wrongly
without a word: weights too small for their base are padded, names that its model lacks are passed over, an adapter
without weights answers as the base does. So the facts of an adapter (`models.adapter_facts`) are held against the
configuration and the headers of its base's weights, and what does not fit is refused with what is wrong and what to do.
What only the engine knows (whether this architecture takes adapters on its embeddings) it is asked by loading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from modelyard.errors import Unprocessable
from modelyard.models import adapter_facts
from modelyard.models.adapter_facts import MAX_RANKS, AdapterFacts, Layer
from modelyard.models.base_layers import BaseLayers, base_layers, tail_of

#: Of a configuration: the language model is one part of several.
PARTS = ("text_config", "vision_config", "audio_config", "thinker_config")
#: Kinds of model whose files have layers under other names than transformers and vLLM: a part of a name, and the other.
OTHER_NAMES = {"nemotron_h": ("model.layers.", "backbone.layers."), "hy_v4": (".gate_proj", ".linear_gate")}
_OTHER_BASE = "It was made for another base: deploy it on that."


def smallest_max_rank(ranks: Iterable[int]) -> int:
    """Return the smallest --max-lora-rank that takes adapters of all these ranks.

    Raises:
        ValueError: there is none.
    """
    highest = max(ranks, default=1)
    found = next((rank for rank in MAX_RANKS if rank >= highest), None)
    if found is None:
        raise ValueError(f"vLLM takes ranks up to {MAX_RANKS[-1]}, not {highest}")
    return found


def check_adapter(
    folder: Path, base_config: Mapping[str, Any], *, adapter_id: str = "", base_folder: Path | None = None
) -> AdapterFacts:
    """Return the facts of the adapter in a folder after `check_facts`. Blocks: it reads all of its weights.

    Raises:
        Unprocessable: as `check_facts`.
    """
    facts = adapter_facts.read(folder)
    check_facts(facts, base_config, adapter_id=adapter_id or folder.name, base_folder=base_folder)
    return facts


def check_facts(
    facts: AdapterFacts, base_config: Mapping[str, Any], *, adapter_id: str, base_folder: Path | None = None
) -> None:
    """Refuse what vLLM cannot serve on its base. Blocks: it may read the headers of the base's weights.

    With `base_folder` the adapter's layers are held against the base's own weights, else only against `base_config`.

    Raises:
        Unprocessable: param `adapter_ids`, code `unsupported_adapter` or, if the files are broken, `bad_weights`.
    """
    if facts.refusal is not None:
        raise _refusal(adapter_id, facts.refusal.what, facts.refusal.to_do, facts.refusal.code)
    _Check(base_config, adapter_id, base_folder).run(facts.layers)


def _refusal(adapter_id: str, what: str, to_do: str, code: str = "unsupported_adapter") -> Unprocessable:
    return Unprocessable(f"The adapter '{adapter_id}' {what}. {to_do}", param="adapter_ids", code=code)


class _Check:
    """One adapter being held against its base."""

    def __init__(self, base: Mapping[str, Any], adapter_id: str, base_folder: Path | None) -> None:
        text = base.get("text_config")
        self.base = {**base, **text} if isinstance(text, dict) else dict(base)
        self.has_parts = any(isinstance(base.get(part), dict) for part in PARTS)
        self.adapter_id = adapter_id
        self.base_folder = base_folder

    def _refuse(self, what: str, to_do: str) -> NoReturn:
        raise _refusal(self.adapter_id, what, to_do)

    def run(self, layers: Iterable[Layer]) -> None:
        known = base_layers(self.base_folder)
        for layer in layers:
            module = self._in_files(layer.name, known)
            if module.split(".", 1)[0] in ("layers", "h", "blocks"):
                self._refuse(
                    f"was trained on a model without its head ({module[:120]!r}), and vLLM would pass its weights over",
                    "Train it on the whole model (AutoModelForCausalLM), or put 'model.' before these names.",
                )
            self._check_place(module, known)
            self._check_name(module, known)
            given = [layer.inputs, layer.outputs]
            fitting = known.shapes.get(tail_of(module)) or self._shapes_by_config(module, given)
            if layer.is_embedding:
                fitting = [shape[::-1] for shape in fitting]
            # A layer of GPT-2's kind stores its weight the other way round.
            if fitting and given[::-1] not in fitting and not (given in fitting and self._is_turned()):
                shown = " or ".join(f"{shape[1]} to {shape[0]}" for shape in fitting)
                self._refuse(
                    f"leads from {given[0]} to {given[1]} numbers at {module[:120]!r}, and its base from {shown}",
                    _OTHER_BASE,
                )

    def _check_place(self, module: str, known: BaseLayers) -> None:
        kind, tail = module.rpartition(".")[2], tail_of(module)
        number = re.match(r"^\w+\.(\d+)\.", tail)
        if known.kinds:
            if kind not in known.kinds and kind != "lm_head":
                self._refuse(f"adapts {module[:120]!r}, and its base has no {kind[:40]!r}", _OTHER_BASE)
            absent = number is not None and number[0] not in known.numbered
        else:
            layers = self.base.get("num_hidden_layers")
            is_text = "vis" not in module
            absent = number is not None and is_text and isinstance(layers, int) and int(number[1]) >= layers
        if absent:
            self._refuse(f"adapts {module[:120]!r}, a layer that its base does not have", _OTHER_BASE)

    def _check_name(self, module: str, known: BaseLayers) -> None:
        # How vLLM renames the layers of a model that also sees only the engine knows, which is asked by loading.
        if self.has_parts or known.has(module):
            return
        instead = ", ".join(repr(name[:120]) for name in known.like(module)[:2])
        self._refuse(
            f"adapts {module[:120]!r}, a name that its base does not have, so that vLLM would pass it over; the base "
            f"has {instead or 'no such layer'}",
            "It was made inside another model (one that also sees, or one wrapped by a compiler or for several GPUs): "
            "save it with the base's own names.",
        )

    def _in_files(self, module: str, known: BaseLayers) -> str:
        """Return a layer's name as its base's files have it, where that is another than the model's own."""
        named, in_files = OTHER_NAMES.get(str(self.base.get("model_type")), ("", ""))
        other = module.replace(named, in_files, 1) if named else module
        return other if known.has(other) else module

    def _shapes_by_config(self, module: str, given: list[int]) -> list[list[int]]:
        """Return what a usual layer's shape must be, as far as the configuration tells, in the form of a weight's."""
        kind, hidden = module.rpartition(".")[2], self.base.get("hidden_size")
        if not isinstance(hidden, int) or "vis" in module:
            return []
        if kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            return [[given[1], hidden]]
        return [[hidden, given[0]]] if kind in ("o_proj", "down_proj") else []

    def _is_turned(self) -> bool:
        return str(self.base.get("model_type")) in ("gpt2", "openai-gpt")
