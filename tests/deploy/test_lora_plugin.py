"""The plugin that keeps adapters off the requests that name none."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

PLUGIN = "from modelyard.deploy.lora_plugin import keep_adapters_off_the_base\n"
#: Two slots, both taken; a row for the first, one for the base and one for the second, of one number each.
OPERATIONS = """
import json, torch
from vllm.lora.punica_wrapper import punica_cpu
weights, slots = torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([0, -1, 1])
rows, lengths = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([1, 1, 1])
found = []
for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice", "sgmv_shrink", "sgmv_expand", "sgmv_expand_slice"):
    output = torch.tensor([[10.0], [10.0], [10.0]])
    given = [None, lengths, slots, 3, 1, 3] if name.startswith("s") else [slots]
    after = {"shrink": [1.0], "expand": [True], "slice": [0, 1, True]}[name.rpartition("_")[2]]
    getattr(punica_cpu, name)(rows, weights, output, *given, *after)
    found.append([row[0] for row in output.tolist()])
print(json.dumps(found))
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_vllm_finds_the_plugin_among_the_installed_entry_points() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins")["modelyard_lora"]
    assert found.value == "modelyard.deploy.lora_plugin:keep_adapters_off_the_base"
    assert callable(found.load())


def test_without_vllm_it_warns_and_does_not_raise() -> None:
    hide = "import sys; sys.modules['vllm'] = None\n"
    done = run_python(hide + PLUGIN + "keep_adapters_off_the_base(); print('alive')")
    assert done.stdout == "alive\n", done.stderr
    assert "Could not keep adapters off" in done.stderr


@pytest.mark.engine
@pytest.mark.parametrize("when", ["before", "after"])
def test_where_there_is_no_adapter_nothing_is_added(when: str) -> None:
    """Without the plugin the middle row, which is the base's, gets the weights of the last slot."""
    early = "from vllm.lora.punica_wrapper import punica_cpu\n" if when == "after" else ""
    done = run_python(early + PLUGIN + "keep_adapters_off_the_base(); keep_adapters_off_the_base()\n" + OPERATIONS)
    assert done.returncode == 0, done.stderr
    shrunk, expanded = [2.0, 0.0, 3.0], [12.0, 10.0, 13.0]
    assert json.loads(done.stdout.splitlines()[-1]) == [shrunk, expanded, expanded] * 2


@pytest.mark.engine
def test_vllm_still_needs_it() -> None:
    done = run_python(OPERATIONS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])[1] == [12.0, 13.0, 13.0], "vLLM is cured: the plugin can go"
