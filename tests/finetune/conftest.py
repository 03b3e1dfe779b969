"""What tests of trainings share: the tiny Llama, made once, and a server that has it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.finetune.yard import TRAINER_PYTHON, add_dataset, training_server
from tests.fixtures import missing
from tests.server import Server


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import directory with the tiny Llama, which needs neither torch nor any other heavy library to be made."""
    folder = tmp_path_factory.mktemp("llama")
    subprocess.run([sys.executable, "-m", "modelyard.demo.tiny_llama", str(folder / "tiny-llama")], check=True)
    return folder


@pytest.fixture(scope="session")
def imports(llama: Path) -> Path:
    """The same, where a real training is possible."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("peft") is None:
        missing("engine", "torch or PEFT is not installed: make test installs them")
    return llama


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, imports: Path) -> Iterator[Server]:
    """A server that has the tiny Llama, shared by the tests of a module."""
    with training_server(tmp_path_factory.mktemp("yard") / "data", imports) as found:
        yield found


@pytest.fixture(scope="module")
def dataset_id(server: Server) -> str:
    """The dataset of `yard.rows`."""
    return add_dataset(server)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Server]:
    """A server whose trainer is the imitation, shared by the tests of a module."""
    settings = {"MODELYARD_TRAINER_PYTHON": str(TRAINER_PYTHON)}
    with training_server(tmp_path_factory.mktemp("quick") / "data", llama, **settings) as found:
        yield found
