"""A model that also sees, on real vLLM without torchvision: it answers text, and says that it is for text alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import missing
from tests.server import serving

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

MAKE = """
import sys
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
text = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
                   num_key_value_heads=2, vocab_size=int(sys.argv[2]), max_position_embeddings=1024)
vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                          image_size=28, patch_size=14, projection_dim=32)
config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=int(sys.argv[2]) - 1, image_seq_length=4)
LlavaForConditionalGeneration(config).save_pretrained(sys.argv[1])
"""
PROCESSOR = {"processor_class": "LlavaProcessor", "patch_size": 14, "vision_feature_select_strategy": "default",
             "num_additional_image_tokens": 1}  # fmt: skip
PICTURES = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28}}  # fmt: skip


def make(folder: Path) -> None:
    plain = folder.with_name("plain")
    subprocess.run([sys.executable, "-m", "modelyard.demo.tiny_llama", str(plain)], check=True)
    size = json.loads((plain / "config.json").read_text("utf-8"))["vocab_size"]
    argv = [sys.executable, "-W", "ignore", "-c", MAKE, str(folder), str(size)]
    made = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    for file in plain.iterdir():
        if file.name.startswith(("tokenizer", "special", "chat")):
            shutil.copy(file, folder)
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR), "utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES), "utf-8")
    shutil.rmtree(plain)


def test_a_model_that_sees_answers_text_where_torchvision_is_not_installed(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("torchvision") is not None:
        missing("engine", "vLLM is not installed, or torchvision is")
    make(tmp_path / "imports" / "sees")
    settings = {"MODELYARD_IMPORT_DIR": str(tmp_path / "imports"), "MODELYARD_ENGINE_CPU_KV_CACHE_GIB": "0.2"}
    with serving(tmp_path / "data", **settings) as server:

        def until(condition: Any, within_s: float) -> None:
            deadline = time.monotonic() + within_s
            while not condition():
                assert time.monotonic() < deadline, server.log[-3000:]
                time.sleep(0.1)

        assert server.post("/api/v1/models/add/?model_id=local:sees").status == 200
        until(lambda: len(server.get("/api/v1/models/").json()) == 1, 60)
        wanted = {"model_id": "local:sees", "options": {"max_model_len": 256}}
        job_id = server.post("/api/v1/deploy/", wanted).json()["id"]
        until(lambda: server.get("/api/v1/deploy/").json().get("state", "FAILED") in ("READY", "FAILED"), 240)
        status = server.get(f"/api/v1/jobs/{job_id}/status/")
        assert status.json()["status"] == "RUNNING", status.text
        messages = [{"role": "user", "content": "hi"}]
        chat = server.post("/v1/chat/completions", {"model": "local:sees", "messages": messages, "max_tokens": 4})
        assert chat.status == 200, chat.text
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        asked = {"model": "local:sees", "messages": [{"role": "user", "content": [picture]}], "max_tokens": 4}
        refused = server.post("/v1/chat/completions", asked)
        assert refused.status == 400, refused.text
