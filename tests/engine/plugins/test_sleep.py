"""The plugin that keeps an engine on a CPU from starving everyone who shares its cores."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from tests.servers.programs import Programs

PLUGIN = "from modelyard.engine.plugins.sleep import sleep_while_waiting\n"
#: Waits as vLLM's readers do, and prints the part of a core that the waiting took.
WAIT = """
import time
from vllm.distributed.device_communicators import shm_broadcast
began, worked = time.monotonic(), time.process_time()
while time.monotonic() - began < 1.0:
    shm_broadcast.sched_yield()
print((time.process_time() - worked) / (time.monotonic() - began))
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_vllm_finds_the_plugin_among_the_installed_entry_points() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins")["modelyard_sleep"]
    assert found.value == "modelyard.engine.plugins.sleep:sleep_while_waiting"
    assert callable(found.load())


def test_without_vllm_it_warns_and_does_not_raise() -> None:
    done = run_python("import sys; sys.modules['vllm'] = None\n" + PLUGIN + "sleep_while_waiting(); print('alive')")
    assert done.stdout == "alive\n", done.stderr
    assert "The cure modelyard_sleep does not take effect" in done.stderr


@pytest.mark.engine
def test_a_waiting_process_of_vllm_leaves_its_core_to_others(vllm_programs: Programs) -> None:
    """A yield takes the whole core when nobody else wants it, and on some kernels when somebody does."""
    done = vllm_programs.run(PLUGIN + "sleep_while_waiting(); sleep_while_waiting()\n" + WAIT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 0.6
