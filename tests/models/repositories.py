"""Repositories for the tests: tiny, but with real safetensors and the files that real ones have."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "vocab_size": 64}


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def noise(size: int, seed: str = "noise") -> bytes:
    """Return bytes that look random and are the same in each run."""
    blocks = (hashlib.sha256(f"{seed}{number}".encode()).digest() for number in range(size // 32 + 1))
    return b"".join(blocks)[:size]


def safetensors(data: bytes, header: dict[str, Any] | None = None, *, tensor: str = "weight") -> bytes:
    """Return a safetensors file of one tensor of bytes, or with the header given."""
    entry = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    raw = as_json(header if header is not None else {tensor: entry})
    return struct.pack("<Q", len(raw)) + raw + data


def llama(size: int = 4096, *, seed: str = "weights") -> dict[str, bytes]:
    """Return a whole model, together with files that nobody needs."""
    return {
        "config.json": as_json(CONFIG),
        "generation_config.json": as_json({"eos_token_id": 2}),
        "tokenizer.json": as_json({"version": "1.0", "model": {"vocab": {"auto_map": 1}}}),
        "tokenizer_config.json": as_json({"tokenizer_class": "LlamaTokenizer", "auto_map": None}),
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors": safetensors(noise(size, seed)),
        "pytorch_model.bin": b"\x80\x04pickled",
        "README.md": b"# hello",
        ".gitattributes": b"*.safetensors filter=lfs",
        "original/consolidated.00.pth": b"\x80\x04pickled",
        "modeling_evil.py": b"raise SystemExit",
    }


def sharded(shards: int = 3, size: int = 100_000) -> dict[str, bytes]:
    """Return a model in shards, with the same weights whole and consolidated beside them."""
    files = {name: content for name, content in llama().items() if name != "model.safetensors"}
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for number, name in enumerate(names):
        files[name] = safetensors(noise(size, name), tensor=f"w{number}")
    files["model.safetensors.index.json"] = as_json({"weight_map": {f"w{i}": name for i, name in enumerate(names)}})
    files["consolidated.safetensors"] = safetensors(noise(size))
    files["params.json"] = as_json({"dim": 16})
    return files


def adapter(base: object = "acme/tiny", **config: object) -> dict[str, bytes]:
    """Return a LoRA adapter."""
    entry = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 8, "auto_mapping": None, **config}
    return {
        "adapter_config.json": as_json(entry),
        "adapter_model.safetensors": safetensors(noise(2048, "adapter")),
        "tokenizer_config.json": as_json({}),
        "README.md": b"# adapter",
    }


def embedder() -> dict[str, bytes]:
    """Return a model for embeddings in the layout of sentence-transformers."""
    return {
        "config.json": as_json({"architectures": ["BertModel"]}),
        "modules.json": as_json(
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
            ]
        ),
        "1_Pooling/config.json": as_json({"pooling_mode_mean_tokens": True}),
        "2_Dense/config.json": as_json({"in_features": 8}),
        "2_Dense/model.safetensors": safetensors(noise(512, "dense")),
        "2_Dense/pytorch_model.bin": b"\x80\x04pickled",
        "vocab.txt": b"[PAD]\n[UNK]\n",
        "model.safetensors": safetensors(noise(1024, "bert")),
        "onnx/model.onnx": b"onnx",
    }
