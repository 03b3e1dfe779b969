"""The stand-in for torchvision: importable, honest to transformers, and clear when it is called."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.fixtures import missing

PROGRAM = """
from modelyard.engine.plugins.vision import stand_in_for_torchvision as stand_in
stand_in()
stand_in()
from torchvision.io import read_image
from torchvision.transforms.v2 import functional
import torchvision.transforms.v2.functional as same
from transformers.utils import is_torchvision_available
from transformers.models.pixtral import image_processing_pixtral
assert functional is same
assert not is_torchvision_available()
try:
    functional.resize(1, 2)
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_what_models_import_of_torchvision_can_be_imported_without_it() -> None:
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torchvision") is not None:
        missing("engine", "transformers is not installed, or torchvision is")
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "torchvision.transforms.v2.functional.resize was called: this engine serves text alone" in ended.stdout
