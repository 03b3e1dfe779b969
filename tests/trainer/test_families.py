"""Each family of models trains, resumes after a kill, is read by PEFT and by the engine, as docs/families.md says."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures import missing
from tests.trainer.families import FAMILIES, OTHERS, SERVED, UNTRIED
from tests.trainer.family_table import HEAD, TABLE, Forks, forking
from tests.trainer.runs import needs_training

#: Layers that get gradients of zero alone, as transformers makes the weights: Gemma 3n scales its side streams by zero.
INERT = {"gemma3n_text": 9}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    import importlib.util

    needs_training()
    if importlib.util.find_spec("vllm") is None:
        missing("engine", "vllm is not installed: make test installs it")
    with forking(tmp_path_factory.mktemp("families")) as there:
        yield there


def test_the_table_has_a_row_for_each_family_and_says_what_it_is() -> None:
    text = TABLE.read_text("utf-8")
    assert text.startswith(HEAD)
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == sorted(FAMILIES, key=lambda family: (family not in SERVED, family))


@pytest.mark.slow
def test_no_family_of_both_packages_is_forgotten(forks: Forks, tmp_path: Path) -> None:
    found = forks.do("list", "", tmp_path)["result"]
    assert {family for family, said in found.items() if said["lora"]} - UNTRIED.keys() == SERVED.keys()
    assert {family for family, said in found.items() if not said["lora"]} - UNTRIED.keys() == OTHERS.keys()
    assert found.keys() >= UNTRIED.keys()
    from modelyard.trainer.layer_names import EXPERTS_SERVED, UNSERVED

    assert {family for family, said in found.items() if said["experts"]} - UNTRIED.keys() == EXPERTS_SERVED
    assert UNSERVED.keys() <= SERVED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_as_the_table_says(family: str, forks: Forks, tmp_path: Path) -> None:
    tried = forks.try_family(family, tmp_path / family)
    assert tried.train == {"signal": signal.SIGKILL}, tried
    facts = tried.facts
    assert facts, tried
    assert facts["steps"] == 4
    assert facts["resumed_from"] == [2]
    assert facts["untrained_layers"] == []
    # Every layer has learnt something, and a merge finds all of them.
    assert facts["layers_without_effect"] == INERT.get(family, 0)
    assert facts["merges"], tried
    assert tried.served, tried
    assert tried.row() in TABLE.read_text("utf-8").splitlines(), tried
