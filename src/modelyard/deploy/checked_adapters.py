"""What was found of an adapter on a base, kept: to look is to read all of its weights, and requests ask often.

Kept for as long as the server runs, by the folders of both, which the store never changes, and by size and time of the
adapter's own files, so that one that was damaged is looked at again. A refusal is not kept. Blocks.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.deploy.adapters import CONFIG, WEIGHTS, AdapterFacts, check_adapter

#: More than any server has adapters in turn.
MOST_KEPT = 1024

_kept: OrderedDict[object, AdapterFacts] = OrderedDict()
_lock = threading.Lock()


def checked(folder: Path, base_config: Mapping[str, Any], *, adapter_id: str, base_folder: Path) -> AdapterFacts:
    """Return what an adapter needs, looked at once.

    Raises:
        Unprocessable: as `check_adapter` says.
    """
    key = (folder, base_folder, _signature(folder / CONFIG), _signature(folder / WEIGHTS))
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    facts = check_adapter(folder, base_config, adapter_id=adapter_id, base_folder=base_folder)
    with _lock:
        _kept[key] = facts
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
    return facts


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None  # the check says what is missing
    return found.st_ino, found.st_size, found.st_mtime_ns
