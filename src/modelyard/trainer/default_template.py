"""The chat template of a model that has none: the same one in training and in service, by the model's files alone.

ChatML where the tokenizer has its two tokens and the model stops at its end of turn; else the role, a colon and the
text, line by line, with the end-of-text after each answer. It begins with the tokenizer's first token where the
tokenizer puts one before each text. Neither knows of tools. Both are one line, as an engine takes them in its command.
It reads the tokenizer with its library: a trainer imports this module, and `tokenizer_trial` for the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modelyard.trainer.model_files import BOS, PLAIN_TEMPLATE, read_settings, stop_ids_of

CHATML_TEMPLATE = (
    "{BOS}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def processors_template(folder: Path) -> str | None:
    """Return the template of a model that has it in its processor's file alone, where transformers' tokenizer does not
    look for it and the engine does; None where there is none. Blocks."""
    found = read_settings(folder, "chat_template").get("chat_template")
    return found if isinstance(found, str) and found.strip() else None


def default_template(folder: Path) -> str:
    """Return the template for a model in a folder that has none. Blocks; of a large tokenizer for a second."""
    config = read_settings(folder, "tokenizer_config")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = tokenizer.encode("x").ids[:1]
    except Exception:  # noqa: BLE001  # the package raises nothing narrower; without the file nothing is known of it
        return PLAIN_TEMPLATE.replace(BOS, "")
    begin, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    stops = {*stop_ids_of(folder), tokenizer.token_to_id(_token(config.get("eos_token")))}
    template = CHATML_TEMPLATE if begin is not None and end is not None and end in stops else PLAIN_TEMPLATE
    first = tokenizer.token_to_id(_token(config.get("bos_token")))
    begins = first is not None and ids == [first]
    return template.replace(BOS, "{{ bos_token }}" if begins else "")


def _token(named: Any) -> str:
    """Return a special token of tokenizer_config.json, which has it as text or as an object."""
    text = named.get("content") if isinstance(named, dict) else named
    return text if isinstance(text, str) else ""
