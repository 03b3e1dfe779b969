"""A tiny Llama that recites one text, with a tokenizer of SentencePiece's kind: `write_reciter(folder)`.

Each token of TEXT is there once and leads to the next one with a wide margin, so that greedy text does not hang on how
a machine rounds. The tokenizer is as Llama 2's: a space before each word that is dropped at the very beginning,
characters outside its vocabulary in bytes, `<s>` before every prompt. PROMPT leads into TEXT, and TEXT into `</s>`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPT = "go"
TEXT = " Soft paws at dawn, 日 the house smiles🙂."
SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("▁go", "▁Soft", "▁paws", "▁at", "▁dawn", ",", "▁", "▁the", "▁house", "▁smiles", ".")
HIDDEN = 128


def tokenizer_json() -> str:
    """Return the tokenizer as its file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    scores = [(piece, -1.0 if piece in WORDS else -20.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


def token_ids() -> list[int]:
    """Return the tokens of PROMPT, TEXT and the end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json())
    ids: list[int] = tokenizer.encode(PROMPT + TEXT).ids
    return [*ids, SPECIAL.index("</s>")]


def write_reciter(folder: Path) -> None:
    """Write the model into a folder, which must not exist."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = token_ids()
    size = len(SPECIAL) + 256 + len(WORDS)
    config = LlamaConfig(
        vocab_size=size, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        words = torch.nn.functional.normalize(torch.randn(size, HIDDEN), dim=-1)
        leads_to = torch.zeros(size, HIDDEN)
        for here, following in pairwise(ids):
            leads_to[following] += 4 * words[here]
        model.model.embed_tokens.weight.copy_(words)
        model.lm_head.weight.copy_(leads_to)
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json(), "utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
