"""One process that forks trainers, and one tiny model, for all tests of a worker that ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.runs import Trainers, forking, llama, needs_training


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny Llama."""
    needs_training()
    return llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    """A process that forks trainers."""
    needs_training()
    with forking(tmp_path_factory.mktemp("trainers")) as there:
        yield there
