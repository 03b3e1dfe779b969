"""Which adapters are refused before an engine sees them: some that PEFT made, and some that nobody should."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import Unprocessable
from modelyard.models import scan
from modelyard.models.adapter_checks import check_adapter, smallest_max_rank
from modelyard.models.adapter_facts import MAX_RANKS
from tests.fixtures import missing

HIDDEN, RANK, LAYERS = 16, 4, 2
CONFIG = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
ADAPTER = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
Q_PROJ = "model.layers.{}.self_attn.q_proj"
Shapes = dict[str, list[int]]


def pair(module: str, rank: int = RANK, size: tuple[int, int] = (HIDDEN, HIDDEN)) -> Shapes:
    """Return the shapes of an adapted layer's two matrices, by PEFT's names for them."""
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": [rank, size[0]], f"{prefix}.lora_B.weight": [size[1], rank]}


QUERIES: Shapes = {**pair(Q_PROJ.format(0)), **pair(Q_PROJ.format(1))}
CODES = {"F32": "f", "F16": "e", "F64": "d"}


def write_tensors(path: Path, shapes: Mapping[str, list[int]], dtype: str = "F32", fill: float = 0.5) -> None:
    """Write a file of safetensors whose last number is `fill`, the others being small."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, shape in shapes.items():
        numbers = [0.25] * math.prod(shape)
        numbers[-1] = fill
        if dtype == "BF16":  # the upper half of an F32
            piece = b"".join(struct.pack("<f", number)[2:] for number in numbers)
        else:
            piece = struct.pack(f"<{len(numbers)}{CODES[dtype]}", *numbers)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def adapter(folder: Path, shapes: Mapping[str, list[int]] = QUERIES, dtype: str = "F32", **config: Any) -> Path:
    """Write an adapter that can be served, but for what is given."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **config}), "utf-8")
    write_tensors(folder / "adapter_model.safetensors", shapes, dtype)
    return folder


def refusal(folder: Path, base: Mapping[str, Any] = CONFIG, base_folder: Path | None = None) -> Unprocessable:
    with pytest.raises(Unprocessable) as caught:
        check_adapter(folder, base, adapter_id="org/mine", base_folder=base_folder)
    assert caught.value.param == "adapter_ids"
    assert caught.value.message.startswith("The adapter 'org/mine' ")
    assert len(caught.value.message) < 700
    return caught.value


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("tokenizers") is None:
        missing("train", "tokenizers is not installed: make test installs it")
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    subprocess.run([sys.executable, "-m", "modelyard.demo.tiny_llama", str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def by_peft(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with an adapter of each kind that PEFT makes for the tiny Llama."""
    if importlib.util.find_spec("peft") is None:
        missing("train", "PEFT is not installed: make test installs it")
    folder = tmp_path_factory.mktemp("peft")
    command = [sys.executable, "-W", "ignore", "-m", "tests.peft_adapters", str(tiny_llama), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
LINEAR = ("down_proj", "gate_proj", *ATTENTION[:3], "up_proj", "v_proj")
SERVED = {
    "plain": (8, LINEAR),
    "rslora": (8, LINEAR),
    "patterns": (16, LINEAR),
    "one_layer": (8, LINEAR),
    "by_regex": (8, ("q_proj",)),
    "gaussian": (8, LINEAR),
    "embeddings": (8, ("embed_tokens", *ATTENTION[:1], "lm_head", *ATTENTION[1:])),
    "parameter": (8, ("q_proj",)),
}
REFUSED = {
    "dora": "is a DoRA",
    "lora_bias": "lora_bias",
    "biases": "bias is 'lora_only'",
    "saved_norm": "modules_to_save",
    "saved_head": "modules_to_save",
    "tokens": "trainable_token_indices",
    "pissa": "init_lora_weights is 'pissa_niter_4'",
    "olora": "init_lora_weights is 'olora'",
    "activated": "alora_invocation_tokens",
    "replicated": "layer_replication",
    "headless": "a model without its head ('layers.0.",
    "resized": "that are no LoRA's: 'base_model.model.lm_head.weight'",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("with_weights", [True, False])
def test_what_peft_makes_and_vllm_serves_is_let_through(
    by_peft: Path, tiny_llama: Path, kind: str, with_weights: bool
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text("utf-8"))
    facts = check_adapter(by_peft / kind, config, base_folder=tiny_llama if with_weights else None)
    rank, modules = SERVED[kind]
    size = (by_peft / kind / "adapter_model.safetensors").stat().st_size
    assert (facts.rank, facts.target_modules, facts.size_bytes) == (rank, tuple(modules), size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_makes_and_vllm_does_not_serve_is_refused_with_the_reason(
    by_peft: Path, tiny_llama: Path, kind: str
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text("utf-8"))
    assert REFUSED[kind] in refusal(by_peft / kind, config, tiny_llama).message


@pytest.mark.slow
def test_an_adapter_for_a_larger_model_does_not_fit_a_smaller_one(by_peft: Path, tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text("utf-8"))
    config |= {"hidden_size": 64}
    message = refusal(by_peft / "plain", config).message
    assert "leads from" in message
    assert "made for another base" in message


def test_where_the_base_comes_from_by_the_adapters_own_account_does_not_matter(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", base_model_name_or_path="/home/somebody/models/base")
    assert check_adapter(folder, CONFIG).rank == RANK


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_weights_of_every_float_are_taken_and_numbers_that_are_none_are_not(tmp_path: Path, dtype: str) -> None:
    folder = adapter(tmp_path / "a", dtype=dtype)
    assert check_adapter(folder, CONFIG).target_modules == ("q_proj",)
    largest = 60000.0 if dtype == "F16" else 3e38
    write_tensors(folder / "adapter_model.safetensors", QUERIES, dtype, fill=-largest)
    check_adapter(folder, CONFIG)
    for fill in (math.nan, math.inf, -math.inf):
        write_tensors(folder / "adapter_model.safetensors", QUERIES, dtype, fill=fill)
        error = refusal(folder)
        assert error.code == "bad_weights"
        assert "NaN or infinite" in error.message


def test_names_without_pefts_prefix_are_taken_as_vllm_takes_them(tmp_path: Path) -> None:
    shapes = {name.removeprefix("base_model.model."): shape for name, shape in QUERIES.items()}
    assert check_adapter(adapter(tmp_path / "a", shapes), CONFIG).target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"peft_type": None}, "only LORA"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "something new"}, "init_lora_weights is 'something new'"),
        ({"r": 0}, "rank of '0'"),
        ({"r": "8"}, "rank of '8'"),
        ({"r": True}, "rank of 'True'"),
        ({"r": 1024}, "ranks up to 512"),
        ({"rank_pattern": {"q_proj": -1}}, "rank of '-1'"),
        ({"rank_pattern": [4]}, "no object"),
        ({"alpha_pattern": {"q_proj": "8"}}, "lora_alpha of '8'"),
        ({"lora_alpha": None}, "lora_alpha of 'None'"),
        ({"lora_alpha": math.nan}, "lora_alpha of 'nan'"),
        ({"r": 8}, "but adapter_config.json says 8: its scale would be wrong"),
    ],
)
def test_a_configuration_that_vllm_would_not_follow_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    assert said in refusal(adapter(tmp_path / "a", **config)).message


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules"])
def test_a_configuration_without_what_the_scale_is_made_of_is_refused(tmp_path: Path, key: str) -> None:
    folder = adapter(tmp_path / "a")
    config = {name: value for name, value in ADAPTER.items() if name != key}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    assert f"says nothing of {key}" in refusal(folder).message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[" * 100_000, b"\xff\xfe", b" " * 2_000_000])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(content)
    assert "adapter_config.json" in refusal(folder).message


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    assert "has no adapter_config.json" in refusal(folder).message


def test_weights_that_can_run_code_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    message = refusal(folder).message
    assert "adapter_model.bin, which can run code" in message
    assert "safetensors" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole + b"\0",
        lambda whole: whole[:5],
        lambda whole: b"",
        lambda whole: struct.pack("<Q", 1 << 60) + whole[8:],
        lambda whole: whole.replace(b'"F32"', b'"F99"', 1),
        lambda whole: whole.replace(b"[4, 16]", b"[4, 61]", 1),
        lambda whole: whole[:8] + b"x" + whole[9:],
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, damage: Any) -> None:
    folder = adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    error = refusal(folder)
    assert error.code == "bad_weights"
    assert "is damaged" in error.message


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({}, "no LoRA weights"),
        ({**QUERIES, "base_model.model.lm_head.weight": [8, 16]}, "no LoRA's: 'base_model.model.lm_head.weight'"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": [4, 16]}, "lora_A.default"),
        ({**QUERIES, f"base_model.model.{Q_PROJ.format(0)}.lora_magnitude_vector": [16]}, "magnitude"),
        (dict(list(QUERIES.items())[:3]), "lacks lora_B of 'model.layers.1."),
        (dict(list(QUERIES.items())[1:]), "lacks lora_A of 'model.layers.0."),
        ({name: [*shape, 1] for name, shape in QUERIES.items()}, "must be matrices"),
        ({**pair(Q_PROJ.format(0)), f"base_model.model.{Q_PROJ.format(0)}.lora_B.weight": [16, 8]}, "ranks 4 and 8"),
        (pair(Q_PROJ.format(0), rank=8), "has rank 8 at"),
        (pair(Q_PROJ.format(2)), "layers.2.self_attn.q_proj', a layer that its base does not have"),
        (pair(Q_PROJ.format(0), size=(8, 16)), "leads from 8 to 16 numbers"),
        (pair("model.layers.0.mlp.down_proj", size=(64, 32)), "leads from 64 to 32 numbers"),
        (pair("layers.0.self_attn.q_proj"), "without its head"),
    ],
)
def test_weights_that_vllm_would_refuse_or_serve_wrongly_are_refused(tmp_path: Path, shapes: Shapes, said: str) -> None:
    assert said in refusal(adapter(tmp_path / "a", shapes)).message


def test_weights_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    assert "unknown form" in refusal(folder).message


def base_weights(folder: Path, shapes: Mapping[str, list[int]], dtype: str = "F32") -> Path:
    """Write a base's weights in two files, as large models have them."""
    folder.mkdir()
    for number, name in enumerate(shapes):
        write_tensors(folder / f"model-{number}.safetensors", {name: shapes[name]}, dtype)
    return folder


def test_a_base_that_shares_no_shape_with_its_configuration_is_believed_by_its_weights(tmp_path: Path) -> None:
    # Attention with a gate has a query layer of twice the size that the configuration suggests.
    base = base_weights(tmp_path / "base", {f"{Q_PROJ.format(n)}.weight": [2 * HIDDEN, HIDDEN] for n in range(2)})
    gated = {**pair(Q_PROJ.format(0), size=(HIDDEN, 2 * HIDDEN)), **pair(Q_PROJ.format(1), size=(HIDDEN, 2 * HIDDEN))}
    assert check_adapter(adapter(tmp_path / "a", gated), CONFIG, base_folder=base).rank == RANK
    message = refusal(adapter(tmp_path / "b"), base_folder=base).message
    assert "leads from 16 to 16 numbers at" in message
    assert "and its base from 16 to 32" in message


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("model.layers.0.self_attn.query", "its base has no 'query'"),
        ("model.layers.5.self_attn.q_proj", "a layer that its base does not have"),
    ],
)
def test_a_layer_that_the_base_lacks_is_found_by_the_bases_weights(tmp_path: Path, module: str, said: str) -> None:
    base = base_weights(tmp_path / "base", {f"{Q_PROJ.format(0)}.weight": [HIDDEN, HIDDEN]})
    assert said in refusal(adapter(tmp_path / "a", pair(module)), {}, base).message


def test_a_base_inside_a_larger_model_is_recognised_by_the_part_that_is_numbered(tmp_path: Path) -> None:
    base = base_weights(
        tmp_path / "base",
        {
            "vision_tower.layers.0.self_attn.q_proj.weight": [8, 8],
            "language_model.model.layers.0.self_attn.q_proj.weight": [HIDDEN, HIDDEN],
        },
    )
    folder = adapter(tmp_path / "a", pair("model.language_model.layers.0.self_attn.q_proj"))
    assert check_adapter(folder, {"text_config": CONFIG}, base_folder=base).rank == RANK
    other = adapter(tmp_path / "b", pair("model.language_model.layers.0.self_attn.q_proj", size=(32, 32)))
    assert "leads from 32 to 32" in refusal(other, {"text_config": CONFIG}, base).message


ODD_PREFIXES = {
    "inside a model that sees, before": "language_model.model.layers.{}.",
    "inside a model that sees": "model.language_model.layers.{}.",
    "of another family": "transformer.layers.{}.",
    "wrapped by a compiler": "_orig_mod.model.layers.{}.",
    "wrapped in part": "model._orig_mod.layers.{}.",
    "wrapped for several GPUs": "model.module.layers.{}.",
    "with a part more": "model.layers.{}.block.",
}


@pytest.mark.parametrize("prefix", ODD_PREFIXES.values(), ids=ODD_PREFIXES.keys())
@pytest.mark.parametrize("half", [False, True], ids=["all", "half"])
def test_layers_under_names_that_the_base_does_not_have_are_refused_with_those_that_it_has(
    tmp_path: Path, prefix: str, half: bool
) -> None:
    base = base_weights(tmp_path / "base", {f"{Q_PROJ.format(n)}.weight": [HIDDEN, HIDDEN] for n in range(2)})
    names = [Q_PROJ.format(0) if half else f"{prefix.format(0)}self_attn.q_proj", f"{prefix.format(1)}self_attn.q_proj"]
    folder = adapter(tmp_path / "a", {**pair(names[0]), **pair(names[1])})
    message = refusal(folder, CONFIG, base).message
    assert f"adapts '{names[half]}', a name that its base does not have" in message
    assert f"the base has '{Q_PROJ.format(int(half))}'" in message


def test_a_base_that_was_saved_without_its_head_has_the_layers_of_the_whole(tmp_path: Path) -> None:
    base = base_weights(tmp_path / "base", {f"layers.{n}.self_attn.q_proj.weight": [HIDDEN, HIDDEN] for n in range(2)})
    assert check_adapter(adapter(tmp_path / "a"), CONFIG, base_folder=base).rank == RANK


def test_a_header_of_many_mebibytes_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 1024**2 < scan.MAX_ADAPTER_HEADER_BYTES < 64 * 1024**2
    monkeypatch.setattr("modelyard.models.scan.MAX_ADAPTER_HEADER_BYTES", 300)
    folder = adapter(tmp_path / "a")
    error = refusal(folder)
    assert error.code == "bad_weights"
    assert "declares a header of" in error.message


def test_a_quantised_base_is_not_measured_by_its_packed_weights(tmp_path: Path) -> None:
    path = tmp_path / "base"
    path.mkdir()
    write_tensors(path / "model.safetensors", {f"{Q_PROJ.format(0)}.qweight": [2, HIDDEN]})
    assert check_adapter(adapter(tmp_path / "a", pair(Q_PROJ.format(0))), CONFIG, base_folder=path).rank == RANK


def test_a_base_whose_weights_are_stored_the_other_way_round_is_recognised(tmp_path: Path) -> None:
    module = "transformer.h.0.attn.c_attn"
    base = base_weights(tmp_path / "base", {"h.0.attn.c_attn.weight": [HIDDEN, 3 * HIDDEN]})
    folder = adapter(tmp_path / "a", pair(module, size=(HIDDEN, 3 * HIDDEN)))
    assert check_adapter(folder, {"model_type": "gpt2"}, base_folder=base).rank == RANK
    assert "leads from" in refusal(folder, {"model_type": "llama"}, base).message


def test_the_layers_of_a_base_are_read_once_and_again_when_its_files_have_changed(tmp_path: Path) -> None:
    base = base_weights(tmp_path / "base", {f"{Q_PROJ.format(n)}.weight": [HIDDEN, HIDDEN] for n in range(2)})
    folder = adapter(tmp_path / "a")
    check_adapter(folder, CONFIG, base_folder=base)
    weights = base / "model-1.safetensors"
    before = weights.stat()
    weights.write_bytes(weights.read_bytes().replace(b"layers.1.", b"layers.7."))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    # Nothing tells that it is another: who reads it would refuse the adapter.
    check_adapter(folder, CONFIG, base_folder=base)
    os.utime(weights)
    assert "a layer that its base does not have" in refusal(folder, base_folder=base).message


def test_all_experts_of_a_layer_in_one_matrix_are_left_to_the_engine(tmp_path: Path) -> None:
    shapes = {**QUERIES, **pair("model.layers.0.mlp.experts", rank=8 * RANK, size=(48, 16))}
    assert check_adapter(adapter(tmp_path / "a", shapes), CONFIG).target_modules == ("experts", "q_proj")


def test_the_smallest_rank_that_vllm_can_be_given_is_found() -> None:
    assert smallest_max_rank([]) == 1
    assert smallest_max_rank([1]) == 1
    assert smallest_max_rank([2, 1]) == 8
    assert smallest_max_rank([8, 9]) == 16
    assert smallest_max_rank([300]) == 320
    assert all(smallest_max_rank([rank]) == rank for rank in MAX_RANKS)
    with pytest.raises(ValueError, match="up to 512"):
        smallest_max_rank([513])


def test_the_ranks_are_those_of_the_installed_vllm() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        missing("engine", "vLLM is not installed: make test installs it")
    source = Path(found.origin).with_name("config").joinpath("lora.py").read_text("utf-8")
    assert f"MaxLoRARanks = Literal[{', '.join(map(str, MAX_RANKS))}]" in source
