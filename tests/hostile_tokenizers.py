"""Files `tokenizer.json` that harm the process that reads them: one stalls it, one aborts it, one panics."""

from __future__ import annotations

import base64
import json
from typing import Any


def tokenizer(**changes: Any) -> bytes:
    """Return a tokenizer of a few words."""
    vocabulary = {"[UNK]": 0, "a": 1, "river": 2, "x": 3}
    value: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }  # fmt: skip
    return json.dumps(value | changes).encode()


def doubling(times: int, letter: str = "a", *, when_loaded: bool = False) -> bytes:
    """Return one that makes 2 ** times of each letter, in a text or already when it is loaded."""
    one = {"type": "Replace", "pattern": {"String": letter}, "content": 2 * letter}
    added = {"id": 9, "content": letter, "normalized": True, "special": False}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return tokenizer(
        normalizer={"type": "Sequence", "normalizers": [one] * times}, added_tokens=[added] if when_loaded else []
    )


def greedy() -> bytes:
    """Return one whose table of characters declares 4 GiB, for which the library asks for twice as much and aborts."""
    table = base64.b64encode((0xFFFFFFFC).to_bytes(4, "little") + bytes(16)).decode()
    return tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": table})


def panicking() -> bytes:
    """Return one at which the library panics: Python sees an exception that is no `Exception`."""
    return tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AQ=="})
