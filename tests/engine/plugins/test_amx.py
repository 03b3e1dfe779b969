"""The plugin that keeps short requests from killing an engine on a processor with AMX."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

from tests.servers.programs import Programs

ENABLE = "from modelyard.engine.plugins.amx import enable_amx; enable_amx()"
GROUP = "vllm.general_plugins"
#: Put before the code under test: a torch on which each call for the tiles is written down.
RECORDING = """
import json, sys, torch
calls = []
torch.cpu._is_amx_tile_supported = lambda: {supported}
torch.cpu._init_amx = lambda: calls.append("asked") or {granted}
"""


def run_python(code: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False)


def run_with_torch(
    programs: Programs, code: str, *, supported: bool = True, granted: bool = True
) -> tuple[list[str], str]:
    done = programs.run(RECORDING.format(supported=supported, granted=granted) + code + "\nprint(json.dumps(calls))")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_vllm_finds_the_plugin_among_the_installed_entry_points() -> None:
    found = importlib.metadata.entry_points(group=GROUP)["modelyard_amx"]
    assert found.value == "modelyard.engine.plugins.amx:enable_amx"
    assert callable(found.load())


def test_importing_the_plugin_does_not_import_torch() -> None:
    done = run_python("import sys, modelyard.engine.plugins.amx; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_without_torch_it_warns_and_does_not_raise() -> None:
    hide = "import sys; sys.modules['torch'] = None\n"
    done = run_python(hide + "from modelyard.engine.plugins.amx import enable_amx; enable_amx(); print('alive')")
    assert done.stdout == "alive\n"
    assert "The cure modelyard_amx does not take effect" in done.stderr


@pytest.mark.engine
def test_vllm_calls_it_once_when_it_loads_its_plugins(vllm_programs: Programs) -> None:
    calls, _ = run_with_torch(vllm_programs, "from vllm.plugins import load_general_plugins; load_general_plugins()")
    assert calls == ["asked"]


@pytest.mark.engine
def test_on_a_processor_without_amx_nothing_is_asked(vllm_programs: Programs) -> None:
    calls, _ = run_with_torch(vllm_programs, ENABLE, supported=False)
    assert calls == []


@pytest.mark.engine
def test_a_refusal_is_logged_and_is_not_an_error(vllm_programs: Programs) -> None:
    calls, log = run_with_torch(vllm_programs, ENABLE, granted=False)
    assert calls == ["asked"]
    assert "refused the AMX tiles" in log


@pytest.mark.engine
def test_this_machine_can_run_it_twice(vllm_programs: Programs) -> None:
    done = vllm_programs.run(
        "from modelyard.engine.plugins.amx import enable_amx; enable_amx(); enable_amx(); print('alive')"
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
