"""Tokens that the model has no row for: a tokenizer to which some were added, beside weights that were not resized."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from modelyard.errors import JobFailure

#: Tokens that are named.
NAMED = 5


def check(model_id: str, config: Any, tokenizer: Any, texts: Iterable[Sequence[int]]) -> None:
    """Refuse rows with tokens that the embedding does not have, before the weights are loaded.

    Args:
        model_id: The base.
        config: Its configuration, as transformers reads it.
        tokenizer: Its tokenizer.
        texts: The rows, as tokens.

    Raises:
        JobFailure: `tokens_beyond_embedding`, naming them.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int) or rows < 1:
        return
    beyond: set[int] = set()
    for ids in texts:
        if len(ids) and max(ids) >= rows:
            beyond.update(one for one in ids if one >= rows)
    if not beyond:
        return
    named = [f"{tokenizer.convert_ids_to_tokens(one)!r} (id {one})" for one in sorted(beyond)[:NAMED]]
    more = f" and {len(beyond) - NAMED} more" if len(beyond) > NAMED else ""
    raise JobFailure(
        "tokens_beyond_embedding",
        f"The rows have tokens that {model_id} does not: {', '.join(named)}{more}. Its embedding has {rows} rows, with "
        f"ids from 0 to {rows - 1}.",
        "The tokenizer was given tokens that the weights were not resized for. Take the model with its own tokenizer "
        "and chat template, or one whose weights have the tokens.",
    )
