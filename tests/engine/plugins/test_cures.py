"""Plugins of ours in an engine: each says whether it took effect, and what did not is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelyard.engine.command import plugins
from modelyard.engine.plugins import cures
from modelyard.hardware import Machine

WANTED = ["modelyard_amx", "modelyard_lora"]


def complain(folder: Path) -> tuple[str, dict[str, str]]:
    return cures.complaint(f"unix:{folder / 'engine.sock'}", WANTED, "/opt/engine/python")


def test_a_plugin_that_fails_costs_no_engine_and_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(cures.VARIABLE, str(tmp_path / cures.FILE))

    @cures.cure("modelyard_lora")
    def fails() -> None:
        raise AttributeError("vLLM has no such thing")

    @cures.cure("modelyard_amx")
    def works() -> None:
        pass

    for plugin in (works, fails, works):
        plugin()
    assert "The cure modelyard_lora does not take effect" in caplog.text
    said, lacking = complain(tmp_path)
    assert lacking == {"modelyard_lora": "vLLM has no such thing"}
    assert "requests to the base may be answered with an adapter" in said


def test_one_process_in_which_it_failed_is_enough(tmp_path: Path) -> None:
    lines = [{"cure": "modelyard_amx", "error": "OSError: no"}, *({"cure": one, "error": None} for one in WANTED)]
    (tmp_path / cures.FILE).write_text("\n".join(json.dumps(one) for one in lines))
    assert complain(tmp_path)[1] == {"modelyard_amx": "OSError: no"}


def test_plugins_that_no_process_found_are_told_with_the_python_that_lacks_them(tmp_path: Path) -> None:
    said, lacking = complain(tmp_path)
    assert lacking == dict.fromkeys(WANTED, "it is not installed there")
    assert "Install Modelyard in /opt/engine/python (MODELYARD_ENGINE_PYTHON)" in said


@pytest.mark.parametrize("text", ["nonsense", "[1]", "{}", "\x00" * 40, '{"cure": "modelyard_amx", "error": 5'])
def test_what_cannot_be_read_is_told_and_no_fault(tmp_path: Path, text: str) -> None:
    (tmp_path / cures.FILE).write_text(text)
    assert set(complain(tmp_path)[1]) == set(WANTED)


def test_of_an_engine_with_all_its_cures_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / cures.FILE).write_text("".join(json.dumps({"cure": one, "error": None}) + "\n" for one in WANTED))
    assert complain(tmp_path) == ("", {})


@pytest.mark.parametrize("has_gpu", [True, False])
def test_what_is_missing_without_each_plugin_is_in_the_table(has_gpu: bool) -> None:
    machine = Machine(memory_available_bytes=1, cpus=(0,), has_gpu=has_gpu)
    assert set(plugins(machine)) <= set(cures.WITHOUT)


def test_an_engine_that_died_meanwhile_is_not_said_to_lack_anything(tmp_path: Path) -> None:
    assert complain(tmp_path / "gone") == ("", {})
