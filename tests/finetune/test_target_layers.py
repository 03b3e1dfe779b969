"""Names of target_modules are held against the files of the base before anything is started."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.finetune import target_layers
from modelyard.trainer.layer_names import EXPERTS_SERVED, KNOWN

FAMILIES = Path(__file__).parents[2] / "docs" / "families.md"
LLAMA = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def write(folder: Path, *layers: str) -> None:
    """Write the header of weights with these layers of one block, an embedding and a norm."""
    shapes: dict[str, list[int]] = {f"model.layers.0.{name}.weight": [8, 8] for name in layers}
    shapes |= {"model.embed_tokens.weight": [100, 8], "model.layers.0.input_layernorm.weight": [8]}
    entries = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    raw = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


def check(folder: Path, kind: str, *names: str, **more: Any) -> str | None:
    try:
        target_layers.check("acme/it", folder, {"model_type": kind}, names, **more)
    except JobFailure as failure:
        return failure.message if failure.code == "unknown_target_modules" else failure.code
    return None


@pytest.mark.parametrize(
    ("kind", "name", "is_taken"),
    [
        ("llama", "q_proj", True),
        ("llama", "self_attn.q_proj", True),
        ("llama", "model.layers.0.self_attn.q_proj", True),
        ("llama", "layers.0.mlp.down_proj", True),
        ("llama", "q_porj", False),
        ("llama", "c_attn", False),
        ("llama", "experts", False),
        ("llama", "embed_tokens", False),
        ("llama", "input_layernorm", False),
        ("llama", "proj", False),
        # As transformers calls them, not the files.
        ("llama", "gate_proj", True),
        ("brand_new", "gate_up_proj", True),
        ("brand_new", "q_porj", False),
        ("brand_new", "o_proj", True),
    ],
)
def test_a_name_is_taken_where_the_files_or_the_kind_of_model_have_it(
    tmp_path: Path, kind: str, name: str, is_taken: bool
) -> None:
    write(tmp_path, *LLAMA)
    assert (check(tmp_path, kind, "q_proj", name) is None) == is_taken


def test_a_refusal_names_what_is_wrong_and_what_there_is(tmp_path: Path) -> None:
    write(tmp_path, *LLAMA)
    said = check(tmp_path, "brand_new", "q_proj", "no_proj", "experts")
    assert said == (
        "target_modules names 'experts', 'no_proj'; the linear layers of acme/it that can be trained are: down_proj, "
        "o_proj, q_proj. Its routed experts are served without adapters."
    )


def test_experts_are_taken_of_models_whose_experts_the_engine_serves(tmp_path: Path) -> None:
    write(tmp_path, *LLAMA, "mlp.experts.gate_up_proj")
    assert all(check(tmp_path, kind, "mlp.experts") is None for kind in EXPERTS_SERVED)
    write(tmp_path, *LLAMA, "mlp.experts.0.w1", "mlp.gate")
    assert all(check(tmp_path, "mixtral", name) for name in ("experts", "w1", "gate"))


def test_layers_that_the_engine_does_not_serve_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "self_attn.kv_b_proj", "self_attn.q_proj")
    assert check(tmp_path, "deepseek_v2", "kv_b_proj")
    assert check(tmp_path, "deepseek_v2", "q_proj") is None


def test_another_python_may_call_layers_otherwise_but_not_anything(tmp_path: Path) -> None:
    write(tmp_path, *LLAMA)
    assert check(tmp_path, "llama", "query_key_value", is_own_python=True) is None
    assert check(tmp_path, "llama", "query_key_value")
    assert check(tmp_path, "llama", "q_porj", is_own_python=True)


def test_of_files_that_tell_nothing_nothing_is_refused(tmp_path: Path) -> None:
    assert check(tmp_path, "llama", "q_porj") is None


def test_the_known_names_are_those_of_the_table_of_families() -> None:
    found = re.findall(r"^\| `(\w+)` \| \w+ \| ([\w ]+) \|", FAMILIES.read_text("utf-8"), re.MULTILINE)
    assert len(found) > 80
    assert {kind: frozenset(names.split()) for kind, names in found} == dict(KNOWN)
