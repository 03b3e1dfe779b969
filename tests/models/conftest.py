"""A hub of its own for each test, and a storage behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.hub import Hub, XetStore


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with nothing in it."""
    with Hub() as running:
        yield running


@pytest.fixture
def xet(tmp_path: Path) -> XetStore:
    """An empty xet storage."""
    pytest.importorskip("hf_xet")
    return XetStore(tmp_path / "xet")
