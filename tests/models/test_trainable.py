"""Models that an adapter can be trained for, and those that can be served with it, by their configuration."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelyard.engine import adapter_support
from modelyard.errors import NotTrainable
from modelyard.models import trainable
from modelyard.models.causal_models import CLASSES
from tests.fixtures import missing


def check(folder: Path, kind: str, *named: str, **more: Any) -> str | None:
    """Return why a model is refused; None: it is not."""
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "architectures": list(named)}))
    try:
        trainable.check("acme/it", folder, **more)
    except NotTrainable as refused:
        return refused.message
    return None


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("llama", "LlamaForCausalLM"), ("qwen3_moe", "Qwen3MoeForCausalLM"), ("llama", ""),
        ("gemma3", "Gemma3ForConditionalGeneration"), ("qwen3_5_text", "Qwen3_5ForCausalLM"),
    ],
)  # fmt: skip
def test_causal_language_models_are_taken(tmp_path: Path, kind: str, named: str) -> None:
    assert check(tmp_path, kind, *([named] if named else [])) is None


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("qwen3_5", "Qwen3_5ForConditionalGeneration"), ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ("mistral3", "Mistral3ForConditionalGeneration"), ("llava", "LlavaForConditionalGeneration"),
        ("voxtral", "VoxtralForConditionalGeneration"), ("internlm2", "InternLM2ForCausalLM"), ("", "FooForCausalLM"),
        ("llama", "LlamaModel"),
    ],
)  # fmt: skip
def test_models_that_the_trainer_does_not_take_are_refused_before_it_is_started(
    tmp_path: Path, kind: str, named: str
) -> None:
    refused = check(tmp_path, kind, named)
    assert refused is not None
    assert f"is a {named} (model_type {kind or 'unknown'}), which is not a causal language model" in refused


def test_another_python_may_know_types_that_are_unknown_here(tmp_path: Path) -> None:
    assert check(tmp_path, "brand_new", "BrandNewForCausalLM", is_own_python=True) is None
    assert check(tmp_path, "brand_new", "BrandNewForCausalLM") is not None
    assert check(tmp_path, "qwen3_5", "Qwen3_5ForConditionalGeneration", is_own_python=True) is not None


@pytest.mark.slow
def test_the_table_is_that_of_the_transformers_which_trains() -> None:
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
    except ImportError as error:
        missing("engine", str(error))
    found = {kind: (name,) if isinstance(name, str) else tuple(name) for kind, name in NAMES.items()}
    assert found == dict(CLASSES)


@pytest.mark.parametrize(
    ("kind", "named", "is_refused"),
    [
        ("deepseek_v32", "DeepseekV32ForCausalLM", True), ("deepseek_v4", "DeepseekV4ForCausalLM", True),
        ("gpt_oss", "GptOssForCausalLM", True), ("gpt_oss", "", True), ("inkling_text", "InklingForCausalLM", True),
        ("deepseek_v3", "DeepseekV3ForCausalLM", False), ("llama", "LlamaForCausalLM", False), ("", "", False),
    ],
)  # fmt: skip
def test_models_whose_chats_the_engine_renders_by_code_are_refused(kind: str, named: str, is_refused: bool) -> None:
    config = {"model_type": kind, "architectures": [named] if named else []}
    if not is_refused:
        trainable.check_rendering("acme/it", config)
        return
    with pytest.raises(NotTrainable, match=f"acme/it is a {named or kind}, whose chats the engine renders by code"):
        trainable.check_rendering("acme/it", config)


def test_they_are_those_of_the_engine_itself() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        missing("engine", "vllm is not installed")
    config = (Path(spec.origin).parent / "config/model.py").read_text("utf-8")
    chosen = config.partition('if self.tokenizer_mode == "auto":')[2].partition('if self.tokenizer_mode != "auto":')[0]
    renderer = (Path(spec.origin).parent / "renderers/online_renderer.py").read_text("utf-8")
    kinds = re.findall(r'use_harmony = model_config\.hf_config\.model_type == "(\w+)"', renderer)
    found = re.findall(r'"(\w+For\w+)"', chosen)
    assert found
    assert kinds
    assert {*found, *kinds} == trainable.RENDERED_BY_CODE


def test_an_architecture_without_adapters_is_told_by_its_name() -> None:
    fault = adapter_support.fault({"architectures": ["FalconForCausalLM"], "model_type": "falcon"})
    assert fault == "is a FalconForCausalLM, which the engine serves without adapters"
    assert adapter_support.fault({"architectures": ["LlamaForCausalLM"]}) is None
    assert adapter_support.fault({}) is None
    assert "/api/v1/models/ft:x/export?merged=true" in adapter_support.remedy("ft:x")


@pytest.mark.slow
def test_architectures_without_adapters_are_those_of_the_engine_itself() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        missing("engine", "vllm is not installed")
    classes = _Classes(Path(spec.origin).parent / "model_executor/models")
    registered = classes.registered()
    causal = {name for names in CLASSES.values() for name in names}
    assert "LlamaForCausalLM" in registered
    assert classes.takes_adapters(*registered["LlamaForCausalLM"])
    found = {name for name in causal & registered.keys() if not classes.takes_adapters(*registered[name])}
    assert found == adapter_support.ARCHITECTURES


class _Classes:
    """The engine's model classes as its source has them: an import of all of them takes minutes."""

    def __init__(self, folder: Path) -> None:
        self._trees = {path.stem: ast.parse(path.read_text("utf-8")) for path in folder.glob("*.py")}
        self._bases: dict[tuple[str, str], list[str]] = {}
        self._imports: dict[tuple[str, str], tuple[str, str]] = {}
        for module, tree in self._trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self._bases[module, node.name] = [ast.unparse(base).split("[")[0] for base in node.bases]
                elif isinstance(node, ast.ImportFrom):
                    source = (node.module or "").rpartition(".")[2]
                    for name in node.names:
                        self._imports[module, name.asname or name.name] = source, name.name

    def registered(self) -> Mapping[str, tuple[str, str]]:
        """Return the module and the class of each architecture that generates text."""
        found: dict[str, tuple[str, str]] = {}
        for node in self._trees["registry"].body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])
            named = getattr(targets[0], "id", "") in ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
            if named and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if key is not None:
                        found[ast.literal_eval(key)] = ast.literal_eval(value)
        return found

    def takes_adapters(self, module: str, name: str) -> bool:
        if name.rpartition(".")[2] == "SupportsLoRA":
            return True
        if (module, name) in self._bases:
            return any(self.takes_adapters(module, base) for base in self._bases[module, name])
        found = self._imports.get((module, name))
        return found is not None and found != (module, name) and self.takes_adapters(*found)
