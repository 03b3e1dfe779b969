"""The layers of a base model, read from the headers of its weights: names and shapes.

An adapter's layers are held against these by their full names, as vLLM looks them up, and by their shapes. Blocks.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from modelyard.models.scan import FLOATS, header_of

_NUMBERED = re.compile(r"(?:^|\.)([A-Za-z_]\w*\.\d+\..+)$")


@dataclass
class BaseLayers:
    """The layers of a base, as far as known; all of it is empty where there are no weights to read.

    `shapes` are by their names from the numbered part on, `kinds` are their last names, `numbered` are the parts up to
    the number, and `names` are whole.
    """

    shapes: dict[str, list[list[int]]] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    numbered: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    def has(self, module: str) -> bool:
        """Return True if the base has a layer of this whole name, or may have.

        Weights may have been saved without the model around them: 'h.0.mlp' then stands for 'transformer.h.0.mlp'. The
        head may be the embedding, which is stored once.
        """
        if not self.names or module in self.names or module == "lm_head":
            return True
        first, _, rest = module.partition(".")
        is_bare = rest in self.names and tail_of(rest) == rest
        return is_bare and not any(name.startswith(f"{first}.") for name in self.names)

    def like(self, module: str) -> list[str]:
        """Return the names of layers that this one may be meant to be, the likeliest first."""
        tail, kind, number = tail_of(module), module.rpartition(".")[2], re.search(r"\.\d+\.", module)
        same = sorted(name for name in self.names if name.rpartition(".")[2] == kind)
        of_layer = [name for name in same if number and number[0] in name]
        return [name for name in same if tail_of(name) == tail] or of_layer or same


#: More than any server has bases of adapters in turn.
_MOST_KEPT = 16
_Signature = tuple[tuple[str, int, int], ...]
_kept: OrderedDict[Path, tuple[_Signature, BaseLayers]] = OrderedDict()
_lock = threading.Lock()


def base_layers(folder: Path | None) -> BaseLayers:
    """Return what the weights in a model's folder tell, which have been scanned when they came. Do not change it.

    Kept for as long as the server runs, until the files change: a large base has tens of MiB of headers, and deploys
    and plans ask often. Not kept in its row: they are as large there, and only bases with adapters are asked about.
    """
    if folder is None:
        return BaseLayers()
    paths = sorted(folder.glob("*.safetensors"))
    found = [os.stat(path) for path in paths]
    signature = tuple((path.name, one.st_size, one.st_mtime_ns) for path, one in zip(paths, found, strict=True))
    with _lock:
        if folder in _kept and _kept[folder][0] == signature:
            _kept.move_to_end(folder)
            return _kept[folder][1]
    known = _read(paths)
    with _lock:
        _kept[folder] = (signature, known)
        _kept.move_to_end(folder)
        while len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    return known


def _read(paths: Iterable[Path]) -> BaseLayers:
    known = BaseLayers()
    for path in paths:
        for name, entry in header_of(path).items():
            module, _, last = name.rpartition(".")
            tail = tail_of(module)
            known.names.add(module)
            known.kinds.add(module.rpartition(".")[2])
            if number := re.match(r"^\w+\.\d+\.", tail):
                known.numbered.add(number[0])
            # A quantised weight's shape says nothing of the layer's.
            plain = entry["dtype"] in FLOATS or str(entry["dtype"]).startswith("F8")
            if last == "weight" and plain and len(entry["shape"]) == 2:
                known.shapes.setdefault(tail, []).append(entry["shape"])
    return known


def tail_of(module: str) -> str:
    """Return a layer's name from its numbered part on, which is the same under whatever the model is part of."""
    match = _NUMBERED.search(module)
    return match[1] if match else module.rpartition(".")[2]
