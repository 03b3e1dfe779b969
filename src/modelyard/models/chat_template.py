"""The source of a model's chat template: its own files, Mistral's tokenizer, or a guess of ours.

A guess is a default (`trainer.default_template`): chats work, but are rendered otherwise than the model was trained on,
which is said wherever the model is shown. Imports nothing heavy.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from modelyard.models.kinds import reader

_PLACES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_KEY = "chat_template"

GUESSED_WARNING = (
    "{model_id} brings no chat template: chats are rendered with a default one that is guessed from its tokenizer, and "
    "its answers to them may be poor. Raw prompts (/v1/completions) are not concerned."
)
GUESSED_HINT = (
    "Choose an instruct model that has one, or add chat_template.jinja to a copy in the import directory and add that."
)


class TemplateSource(StrEnum):
    """The source of a model's chat template."""

    #: The model's files have one.
    OWN = "own"
    #: Mistral's own tokenizer renders chats, as vLLM has it do for such repositories.
    MISTRAL = "mistral"
    #: The model has none: a default is guessed from its tokenizer.
    GUESSED = "guessed"


def has_chat_template(folder: Path) -> bool:
    """True if the model in a folder brings a chat template. Blocks."""
    if any((folder / name).exists() for name in _PLACES):
        return True
    settings = reader(folder)("tokenizer_config.json")
    return isinstance(settings, dict) and bool(settings.get(_KEY))


def source_of(folder: Path, *, has_mistral_tokenizer: bool) -> TemplateSource:
    """Return what renders the chats of a generative model in a folder. Blocks."""
    if has_mistral_tokenizer:
        return TemplateSource.MISTRAL
    return TemplateSource.OWN if has_chat_template(folder) else TemplateSource.GUESSED
