"""The plugin that keeps what else is installed from running in an engine."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from tests.servers.programs import Programs

#: What an engine's worker does when it starts, and its API server when it looks at a request.
LOADING = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.sample import logits_processor
from vllm.v1.worker.gpu.sample.logits_processor import loader
assert logits_processor._load_custom_logitsprocs([]) == []
print(loader._load_v2_logitsprocs_plugins())
"""


def test_vllm_finds_the_plugin_among_the_installed_entry_points() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins")["modelyard_alone"]
    assert found.value == "modelyard.engine.plugins.alone:keep_others_out"
    assert callable(found.load())


@pytest.mark.engine
@pytest.mark.parametrize("plugins", ["modelyard_alone", "others"])
def test_a_logits_processor_of_another_package_does_not_run_unasked(
    vllm_programs: Programs, tmp_path: Path, plugins: str
) -> None:
    """With the plugins of others alone, which is as vLLM would have it, it is imported and its class taken."""
    (tmp_path / "guest.py").write_text("open('was-here', 'w').close()\nclass Guest: pass\n")
    info = tmp_path / "guest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.logits_processors]\nguest = guest:Guest\n")
    done = vllm_programs.run(LOADING, folder=tmp_path, environment={"VLLM_PLUGINS": plugins}, path=[tmp_path])
    is_ours = plugins == "modelyard_alone"
    assert (done.returncode == 0, (tmp_path / "was-here").exists()) == (is_ours, not is_ours), done.stderr
