"""A model's files of settings and its default chat template, for trainer and server: imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelyard.models.kinds import reader

#: Where a default template has the tokenizer's first token, if it has one.
BOS = "{BOS}"
#: The default template of a model whose tokenizer tells nothing.
PLAIN_TEMPLATE = (
    "{BOS}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Return a file of settings, empty where it is absent or unreadable. Blocks."""
    found = reader(folder)(f"{name}.json")
    return found if isinstance(found, dict) else {}


def stop_ids_of(folder: Path) -> list[int]:
    """Return the tokens that the engine stops at because the files of the model say so. Blocks."""
    for name in ("generation_config", "config"):
        if not (config := read_settings(folder, name)):
            continue
        found = config.get("eos_token_id")
        if found is None and isinstance(config.get("text_config"), dict):
            found = config["text_config"].get("eos_token_id")
        return [one for one in (found if isinstance(found, list) else [found]) if type(one) is int]
    return []
