"""Make a tiny random model, complete with tokenizer and chat template: `python -m modelyard.demo.tiny_llama FOLDER`.

A Llama by default (0.7 million weights, generates), a BERT with `--tiny-bert` (embeds). The same seed makes the
same files, byte for byte. Nothing is downloaded, and of the engine's packages only `tokenizers` is imported, so
that it takes about a second; the weights are written as safetensors by hand.

The folder appears whole or not at all. The models answer nonsense: they show that the machinery works.
"""

from __future__ import annotations

import argparse
import array
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = Path(__file__).with_name("corpus.txt")
VOCABULARY = 2048
HIDDEN = 128
LAYERS = 2
#: Of 64 numbers each: the smallest size that every attention kernel of vLLM's knows.
HEADS = 2
CONTEXT = 2048
BERT_VOCABULARY = 1024
BERT_CONTEXT = 512

#: Ends each turn, so that generation stops where a chat turn would.
END = "<|end|>"
BEGIN = "<|begin|>"
LLAMA_SPECIAL = ["<|pad|>", BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Weights = dict[str, tuple[list[int], Iterator[float]]]


def make_llama(folder: Path, seed: int = 0) -> None:
    """Write a random Llama into `folder`, which must not exist.

    Raises:
        FileExistsError: something is there already.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=LLAMA_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        **{f"{name}_token_id": LLAMA_SPECIAL.index(token) for name, token in _named(LLAMA_SPECIAL).items()},
    }
    with _Folder(folder) as build:
        _train(tokenizer, trainer, VOCABULARY)
        build.tokenizer(tokenizer, CONTEXT, _named(LLAMA_SPECIAL))
        build.text("chat_template.jinja", CHAT_TEMPLATE)
        build.json("config.json", config)
        build.json("generation_config.json", {"eos_token_id": config["eos_token_id"], "do_sample": False})
        build.weights(_llama_weights(random.Random(seed)))


def make_bert(folder: Path, seed: int = 0) -> None:
    """Write a random BERT whose embedding is the mean over the tokens into `folder`, which must not exist.

    Raises:
        FileExistsError: something is there already.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=BERT_VOCABULARY, special_tokens=BERT_SPECIAL, show_progress=False)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "dtype": "float32",
        "vocab_size": BERT_VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
        "max_position_embeddings": BERT_CONTEXT,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    with _Folder(folder) as build:
        _train(tokenizer, trainer, BERT_VOCABULARY)
        ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        build.tokenizer(tokenizer, BERT_CONTEXT, names)
        build.json("config.json", config)
        # How sentence-transformers says 'the mean over the tokens'; vLLM reads it as well.
        module = "sentence_transformers.models."
        build.json("modules.json", [
            {"idx": 0, "name": "0", "path": "", "type": f"{module}Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{module}Pooling"},
        ])  # fmt: skip
        build.json("1_Pooling/config.json", {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True})
        build.json("sentence_bert_config.json", {"max_seq_length": BERT_CONTEXT, "do_lower_case": True})
        build.weights(_bert_weights(random.Random(seed)), dtype="F32")


def _named(special: list[str]) -> dict[str, str]:
    return {"pad": special[0], "bos": BEGIN, "eos": END}


def _train(tokenizer: Tokenizer, trainer: Any, size: int) -> None:
    tokenizer.train_from_iterator(CORPUS.read_text("utf-8").splitlines(), trainer)
    # An id without a token would be an answer without a text.
    assert tokenizer.get_vocab_size() == size, f"{CORPUS} gives only {tokenizer.get_vocab_size()} tokens"


def _llama_weights(chance: random.Random) -> Weights:
    inner = 3 * HIDDEN
    weights: Weights = {"model.embed_tokens.weight": _random(chance, VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{prefix}self_attn.{name}.weight"] = _random(chance, HIDDEN, HIDDEN)
        weights[f"{prefix}mlp.gate_proj.weight"] = _random(chance, inner, HIDDEN)
        weights[f"{prefix}mlp.up_proj.weight"] = _random(chance, inner, HIDDEN)
        weights[f"{prefix}mlp.down_proj.weight"] = _random(chance, HIDDEN, inner)
        weights[f"{prefix}input_layernorm.weight"] = _constant(1.0, HIDDEN)
        weights[f"{prefix}post_attention_layernorm.weight"] = _constant(1.0, HIDDEN)
    weights["model.norm.weight"] = _constant(1.0, HIDDEN)
    return weights


def _bert_weights(chance: random.Random) -> Weights:
    weights: Weights = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        weights[f"{name}.weight"] = _random(chance, outputs, inputs)
        weights[f"{name}.bias"] = _constant(0.0, outputs)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = _constant(1.0, HIDDEN)
        weights[f"{name}.bias"] = _constant(0.0, HIDDEN)

    weights["embeddings.word_embeddings.weight"] = _random(chance, BERT_VOCABULARY, HIDDEN)
    weights["embeddings.position_embeddings.weight"] = _random(chance, BERT_CONTEXT, HIDDEN)
    weights["embeddings.token_type_embeddings.weight"] = _random(chance, 2, HIDDEN)
    norm("embeddings.LayerNorm")
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            linear(f"{prefix}attention.self.{name}", HIDDEN, HIDDEN)
        linear(f"{prefix}attention.output.dense", HIDDEN, HIDDEN)
        norm(f"{prefix}attention.output.LayerNorm")
        linear(f"{prefix}intermediate.dense", 2 * HIDDEN, HIDDEN)
        linear(f"{prefix}output.dense", HIDDEN, 2 * HIDDEN)
        norm(f"{prefix}output.LayerNorm")
    linear("pooler.dense", HIDDEN, HIDDEN)
    return weights


def _random(chance: random.Random, *shape: int) -> tuple[list[int], Iterator[float]]:
    return list(shape), (chance.gauss(0.0, 0.1) for _ in range(math.prod(shape)))


def _constant(value: float, *shape: int) -> tuple[list[int], Iterator[float]]:
    return list(shape), (value for _ in range(math.prod(shape)))


class _Folder:
    """The folder being made, under another name until it is whole."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path = target.with_name(f".{target.name}.{os.getpid()}.partial")

    def __enter__(self) -> _Folder:
        if self._target.exists():
            raise FileExistsError(f"{self._target} is there already: name a folder that isn't")
        self._path.mkdir(parents=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.rename(self._path, self._target)
        else:
            shutil.rmtree(self._path)

    def text(self, name: str, text: str) -> None:
        path = self._path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")

    def json(self, name: str, value: object) -> None:
        self.text(name, json.dumps(value, indent=2) + "\n")

    def tokenizer(self, tokenizer: Tokenizer, context: int, names: dict[str, str]) -> None:
        self.text("tokenizer.json", tokenizer.to_str(pretty=True))
        special = {f"{name}_token": token for name, token in names.items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
        self.json("tokenizer_config.json", {**settings, **special, "clean_up_tokenization_spaces": False})

    def weights(self, weights: Weights, dtype: str = "BF16") -> None:
        """Write the weights in the safetensors format: the header's length, the header as JSON, then the numbers."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        body = bytearray()
        for name, (shape, values) in weights.items():
            start = len(body)
            body += _little_endian(array.array("f", values), dtype)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(body)]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        (self._path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


def _little_endian(numbers: array.array[float], dtype: str) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    data = numbers.tobytes()
    if dtype == "F32":
        return data
    # A bfloat16 is the upper half of a float.
    halves = bytearray(len(data) // 2)
    halves[0::2], halves[1::2] = data[2::4], data[3::4]
    return bytes(halves)


def main() -> None:
    """Make the model that the command line asks for."""
    parser = argparse.ArgumentParser(prog="modelyard.demo.tiny_llama", description="Make a tiny random model.")
    parser.add_argument("folder", type=Path, help="where to put it; must not exist")
    parser.add_argument("--tiny-bert", action="store_true", help="an embedding model instead of a Llama")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other weights")
    arguments = parser.parse_args()
    make = make_bert if arguments.tiny_bert else make_llama
    try:
        make(arguments.folder.absolute(), arguments.seed)
    except OSError as error:
        raise SystemExit(f"tiny_llama: {error}") from None


if __name__ == "__main__":
    main()
