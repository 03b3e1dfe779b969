"""Mistral's formats on real vLLM: a repository in both forms keeps its tokenizer, one in its own form is served.

On the same server, since a start is dear: a model that computes NaN.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import missing
from tests.server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

WIDTH, VOCABULARY, START_S = 64, 131072, 240.0
PARAMS = {
    "dim": WIDTH, "n_layers": 1, "head_dim": 32, "hidden_dim": WIDTH, "n_heads": 2, "n_kv_heads": 2, "norm_eps": 1e-5,
    "vocab_size": VOCABULARY, "rope_theta": 10000.0, "max_position_embeddings": 1024,
}  # fmt: skip
CONFIG = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": WIDTH, "head_dim": 32,
          "intermediate_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1,
          "max_position_embeddings": 1024, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "sliding_window": None,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": 1, "eos_token_id": 2,
          "tie_word_embeddings": False, "dtype": "float32"}  # fmt: skip
#: Each weight under its name in Mistral's form and in that of transformers.
NAMES = {
    "tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm",
    "layers.0.attention_norm": "model.layers.0.input_layernorm",
    "layers.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    **{f"layers.0.attention.w{one}": f"model.layers.0.self_attn.{one}_proj" for one in "qkvo"},
    "layers.0.feed_forward.w1": "model.layers.0.mlp.gate_proj",
    "layers.0.feed_forward.w2": "model.layers.0.mlp.down_proj",
    "layers.0.feed_forward.w3": "model.layers.0.mlp.up_proj",
}  # fmt: skip


def weights() -> dict[str, Any]:
    import numpy

    random = numpy.random.default_rng(7)

    def of(name: str) -> Any:
        if name.endswith("norm"):
            return numpy.ones(WIDTH, numpy.float32)
        rows = VOCABULARY if name in ("tok_embeddings", "output") else WIDTH
        return random.standard_normal((rows, WIDTH), numpy.float32) * 0.05

    return {name: of(name) for name in NAMES}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    packages = [importlib.util.find_spec(name) for name in ("vllm", "mistral_common", "numpy", "safetensors")]
    if None in packages:
        missing("engine", "vLLM or mistral_common is not installed: make test installs them")
    from safetensors.numpy import save_file

    assert packages[1] is not None
    assert packages[1].origin is not None
    folder = tmp_path_factory.mktemp("imports")
    tensors = weights()
    for name in ("both", "alone"):
        (folder / name).mkdir()
        (folder / name / "params.json").write_text(json.dumps(PARAMS), "utf-8")
        tekken = Path(packages[1].origin).parent / "data" / "tekken_240911.json"
        shutil.copy(tekken, folder / name / "tekken.json")
        save_file(
            {f"{one}.weight": tensor for one, tensor in tensors.items()}, folder / name / "consolidated.safetensors"
        )
    (folder / "both" / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    renamed = {f"{NAMES[one]}.weight": tensor for one, tensor in tensors.items()}
    save_file(renamed, folder / "both" / "model.safetensors", {"format": "pt"})
    shutil.copytree(folder / "both", folder / "broken")
    (folder / "broken" / "consolidated.safetensors").unlink()
    renamed["model.norm.weight"] = renamed["model.norm.weight"] * float("nan")
    save_file(renamed, folder / "broken" / "model.safetensors", {"format": "pt"})
    settings = {"MODELYARD_IMPORT_DIR": str(folder), "MODELYARD_ENGINE_CPU_KV_CACHE_GIB": "0.2"}
    with serving(tmp_path_factory.mktemp("yard") / "data", **settings) as found:
        for name in ("both", "alone", "broken"):
            assert found.post(f"/api/v1/models/add/?model_id=local:{name}").status == 200
        until(lambda: len(found.get("/api/v1/models/").json()) == 3, found)
        yield found


def until(condition: Any, server: Server, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, server.log[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["both", "alone"])
def test_chats_are_rendered_as_vllm_renders_them_from_the_whole_repository(server: Server, name: str) -> None:
    model_id = f"local:{name}"
    assert server.get(f"/api/v1/models/{model_id}").json()["chat_template"] == "mistral"
    answer = server.post("/api/v1/deploy/", {"model_id": model_id, "options": {"max_model_len": 512}})
    assert answer.status == 200, answer.text
    assert answer.json()["warnings"] == []

    def state() -> str:
        status: str = server.get("/api/v1/deploy/").json().get("state", "FAILED")
        return status

    until(lambda: state() in ("READY", "FAILED"), server, START_S)
    assert state() == "READY", server.get(f"/api/v1/jobs/{answer.json()['id']}/status/").text
    messages = [{"role": "user", "content": "hi"}]
    tokens = server.post("/v1/tokenize", {"model": model_id, "messages": messages}).json()["tokens"]
    shown = server.post("/v1/detokenize", {"model": model_id, "tokens": tokens}).json()["prompt"]
    assert shown == "<s>[INST]hi[/INST]"
    chat = server.post("/v1/chat/completions", {"model": model_id, "messages": messages, "max_tokens": 4})
    assert chat.status == 200, chat.text
    folders = list(server.data_dir.glob(f"models/local@{name}/*"))
    assert [len(list(folder.glob("*.safetensors"))) for folder in folders] == [1], "the weights are there once"


def test_a_model_that_computes_nan_fails_with_that_cause(server: Server) -> None:
    """vLLM itself is well and would answer 200, with token 0 each time."""
    answer = server.post("/api/v1/deploy/", {"model_id": "local:broken", "options": {"max_model_len": 512}})
    assert answer.status == 200, answer.text
    path = f"/api/v1/jobs/{answer.json()['id']}/status/"
    until(lambda: server.get(path).json()["status"] == "FAILED", server, START_S)
    assert server.get(path).json()["failure"]["code"] == "model_gives_nan"


def test_nothing_is_trained_on_what_the_trainer_would_render_otherwise(server: Server) -> None:
    listed = {one["model_id"] for one in server.get("/api/v1/finetune/models/").json()}
    assert not listed & {"local:both", "local:alone"}
