"""A vLLM plugin that lets models that also see or hear answer text where torchvision is not installed.

The install for CPUs leaves torchvision out: its usual build needs CUDA. transformers and vLLM import functions of it at
the head of the modules of nearly every such model, and have other ways (PIL) where it is absent; so the modules are
stood in for by empty ones, whose functions say what is missing when they are called. The engine is started with
`--language-model-only`, so that nothing calls them. Only engines of such models run this plugin.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any, NoReturn

from modelyard.engine.plugins.cures import cure

PACKAGE = "torchvision"
MODULES = (
    PACKAGE, "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional",
    "torchvision.transforms.functional", "torchvision.io", "torchvision.ops", "torchvision.ops.boxes",
)  # fmt: skip


class StandIn(ModuleType):
    """A module of a package that is not installed: anything can be imported from it, and nothing called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        what = f"{self.__name__}.{name}"

        def absent(*_: object, **__: object) -> NoReturn:
            raise ImportError(f"torchvision is not installed, and {what} was called: this engine serves text alone.")

        return absent


@cure("modelyard_vision")
def stand_in_for_torchvision() -> None:
    """Stand in for torchvision where it is not installed. Safe to repeat."""
    if PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None:
        return
    # transformers asks once, and keeps to it: it must be told the truth, to take its other ways.
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    for name in MODULES:
        module = sys.modules[name] = StandIn(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
