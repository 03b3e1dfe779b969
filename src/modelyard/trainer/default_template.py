"""The chat template of a model that has none: the same one in training and in service, by the model's files alone.

ChatML where the tokenizer has its two tokens and the model stops at its end of turn; else the role, a colon and the
text, line by line, with the end-of-text after each answer. It begins with the tokenizer's first token where the
tokenizer puts one before each text. Neither knows of tools. Both are one line, as an engine takes them in its command.
Read by the server as well: imports nothing heavy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML_TEMPLATE = (
    "{BOS}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{BOS}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_PLACES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_KEY = "chat_template"


def has_chat_template(folder: Path) -> bool:
    """Whether the model in a folder brings a chat template. Blocks."""
    return any((folder / name).exists() for name in _PLACES) or bool(_read(folder, "tokenizer_config").get(_KEY))


def default_template(folder: Path) -> str:
    """Return the template for a model in a folder that has none. Blocks; of a large tokenizer for a second."""
    from tokenizers import Tokenizer

    config = _read(folder, "tokenizer_config")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # noqa: BLE001  # the package raises nothing narrower; without the file nothing is known of it
        return PLAIN_TEMPLATE.replace("{BOS}", "")
    begin, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    stops = {*stop_ids_of(folder), tokenizer.token_to_id(_token(config.get("eos_token")))}
    template = CHATML_TEMPLATE if begin is not None and end is not None and end in stops else PLAIN_TEMPLATE
    first = tokenizer.token_to_id(_token(config.get("bos_token")))
    begins = first is not None and tokenizer.encode("x").ids[:1] == [first]
    return template.replace("{BOS}", "{{ bos_token }}" if begins else "")


def stop_ids_of(folder: Path) -> list[int]:
    """Return the tokens that the engine stops at because the files of the model say so. Blocks."""
    for name in ("generation_config", "config"):
        if not (config := _read(folder, name)):
            continue
        found = config.get("eos_token_id")
        if found is None and isinstance(config.get("text_config"), dict):
            found = config["text_config"].get("eos_token_id")
        return [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)]
    return []


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / f"{name}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _token(named: Any) -> str:
    """Return a special token of tokenizer_config.json, which has it as text or as an object."""
    text = named.get("content") if isinstance(named, dict) else named
    return text if isinstance(text, str) else ""
