"""Adapters are read once, and again only when their files have changed."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from modelyard.deploy.checked_adapters import checked
from modelyard.errors import Unprocessable
from tests.deploy.test_adapters import CONFIG, HIDDEN, Q_PROJ, QUERIES, RANK, adapter, base_weights, write_tensors


def look(folder: Path, base: Path) -> int:
    return checked(folder, CONFIG, adapter_id="org/mine", base_folder=base).rank


def test_an_adapter_is_read_once_for_each_base_and_again_when_it_has_changed(tmp_path: Path) -> None:
    layers = {f"{Q_PROJ.format(n)}.weight": [HIDDEN, HIDDEN] for n in range(2)}
    base, other = base_weights(tmp_path / "base", layers), base_weights(tmp_path / "other", layers)
    folder = adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    assert look(folder, base) == RANK
    before = weights.stat()
    write_tensors(weights, QUERIES, fill=math.nan)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    # Nothing tells that it is another: who reads it would refuse it.
    assert look(folder, base) == RANK
    with pytest.raises(Unprocessable, match="NaN"):
        look(folder, other)
    os.utime(weights)
    for _ in range(2):
        with pytest.raises(Unprocessable, match="NaN"):
            look(folder, base)
    weights.unlink()
    with pytest.raises(Unprocessable, match="has no adapter_model"):
        look(folder, base)
