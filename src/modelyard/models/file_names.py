"""Names of files in a repository: which may become a path of ours, and which of them a loader reads.

The names of configuration are those that transformers, vLLM, sentence-transformers or the trainer open by name (a test
compares them with the tokenizers of the transformers that is installed). Any other JSON file at the top of a repository
is somebody's notes: it is not fetched, so that it cannot refuse the model either.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

MAX_PATH_BYTES = 255
MAX_FOLDERS = 3

#: A module of sentence-transformers: a folder with a number.
MODULE_FOLDER = re.compile(r"^[0-9]+_[A-Za-z]+/[^/]+\.(?:json|safetensors)")

_READ = frozenset(
    {
        # The model, and how it generates.
        "config.json", "generation_config.json",
        # The tokenizer, fast or slow, and the chat template.
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
        "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json",
        "entity_vocab.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json", "vocab-src.json",
        "vocab-tgt.json", "target_vocab.json", "prophetnet.tokenizer", "tekken.json",
        # What turns pictures and sound into input.
        "processor_config.json", "preprocessor_config.json", "image_processor_config.json",
        "video_preprocessor_config.json", "audio_tokenizer_config.json",
        # How the weights are quantised, or read sparsely.
        "quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json",
        "torchao_config.json", "sparse_attention_config.json",
        # Models for embeddings.
        "modules.json", "config_sentence_transformers.json",
    }
)  # fmt: skip
_READ_BY_PATTERN = (
    "*.jinja", "*.model", "tokenizer.model.v[0-9]*", "*.tiktoken", "*.spm", "sentence_*_config.json",
    # Versions of a file for a library's version, which the main one names.
    "tokenizer.[0-9]*.json", "config.[0-9]*.json",
)  # fmt: skip


def is_safe_path(path: str) -> bool:
    """True if a name from a repository may become a path below a folder of ours.

    Printable letters of any script, spaces and brackets are well; what could leave the folder, hide in it or deceive
    who reads the name is not: '..', a leading dot or '-', a backslash, control characters, more than three folders.
    """
    if not path.isprintable() or "\\" in path or len(path.encode()) > MAX_PATH_BYTES:
        return False
    parts = path.split("/")
    return len(parts) <= MAX_FOLDERS + 1 and all(_is_safe_name(part) for part in parts)


def is_configuration(path: str) -> bool:
    """True if a loader reads this file, which is no weights."""
    if MODULE_FOLDER.fullmatch(path):
        return path.endswith(".json")
    folder, _, name = path.rpartition("/")
    if folder:
        return folder == "additional_chat_templates" and name.endswith(".jinja")
    return name in _READ or any(fnmatchcase(name, pattern) for pattern in _READ_BY_PATTERN)


def _is_safe_name(name: str) -> bool:
    return bool(name) and name[0] not in ".-~ " and name[-1] not in ". " and ".." not in name
