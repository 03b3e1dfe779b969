"""Compares the chat template and the tokenizer that an adapter carries with those of its base.

vLLM serves an adapter with its base's, whatever lies beside its weights (0.32, `v1/engine/input_processor.py`). An
adapter that was trained with others is then asked in another way than it learnt, which is said wherever it is added,
shown and deployed. Templates are compared as text, tokenizers by their tokens and by what they make of a sample, in a
child. Files with other bytes that mean the same are no difference.
"""

from __future__ import annotations

import asyncio
import filecmp
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelyard.db import Sessions
from modelyard.errors import JobFailure
from modelyard.models import actions, store
from modelyard.models.ids import is_trained
from modelyard.models.kinds import reader
from modelyard.models.tables import Model
from modelyard.models.tokenizer_child import TokenizerChildren

TEMPLATE = "chat_template"
TOKENIZER = "tokenizer"
_WORDS = {TEMPLATE: "chat template", TOKENIZER: "tokenizer"}
_MAX_TEMPLATE_BYTES = 1024**2
_TOKENIZER_FILE = "tokenizer.json"

#: The code of the events that say so.
EVENT = "adapter_renders_otherwise"
HINT = (
    "Merge it into its base with PEFT, put its tokenizer's files and chat template beside the result in the import "
    "directory, and add that as a model, to have it served with them."
)


def warning(adapter_id: str, base_model_id: str, differences: Sequence[str]) -> str:
    """Return what is said of an adapter with differences."""
    what = " and ".join(f"a {_WORDS[one]}" for one in differences)
    return (
        f"{adapter_id} carries {what} of its own, other than its base's. The engine serves it with those of its base, "
        f"{base_model_id}: if it was trained with its own, its answers may be poor. {HINT}"
    )


async def compare(
    sessions: Sessions, models_dir: Path, tokenizers: TokenizerChildren, base: Model, adapters: Sequence[Model]
) -> dict[str, str]:
    """Compare adapters with their base, keep in their rows what was found, and return the warnings by adapter.

    Nothing is said of what has no files in the store just now.
    """
    warnings: dict[str, str] = {}
    base_folder = store.folder_of(models_dir, base.path)
    for adapter in adapters:
        folder = store.folder_of(models_dir, adapter.path)
        if not await asyncio.to_thread(lambda both: all(one.is_dir() for one in both), (folder, base_folder)):
            continue
        found = await differences(tokenizers, adapter.model_id, folder, base_folder)
        async with sessions.begin() as session:
            await actions.note_differences(session, adapter, found)
        if found:
            warnings[adapter.model_id] = warning(adapter.model_id, base.model_id, found)
    return warnings


async def differences(tokenizers: TokenizerChildren, adapter_id: str, adapter: Path, base: Path) -> tuple[str, ...]:
    """Return which of `chat_template` and `tokenizer` an adapter's folder has otherwise than its base's."""
    found = []
    if await asyncio.to_thread(_has_another_template, adapter_id, adapter, base):
        found.append(TEMPLATE)
    if await asyncio.to_thread(_has_other_bytes, adapter / _TOKENIZER_FILE, base / _TOKENIZER_FILE):
        program = f"from modelyard.trainer.tokenizer_trial import compare; compare({str(adapter)!r}, {str(base)!r})"
        try:
            is_same = (await tokenizers.ask(adapter_id, program)).get("same") is True
        except JobFailure:
            is_same = False  # nothing else reads it: one that cannot be read is none of its base's
        found += [] if is_same else [TOKENIZER]
    return tuple(found)


def template_of(folder: Path) -> str | None:
    """Return the chat template in a folder, the one for conversations without tools; None where there is none. Blocks.

    The files are looked at in the order of transformers.
    """
    try:
        with open(folder / "chat_template.jinja", "rb") as file:
            return file.read(_MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
    except OSError:
        pass
    read = reader(folder)
    for name in ("tokenizer_config.json", "chat_template.json"):
        settings = read(name)
        found = _named(settings.get(TEMPLATE)) if isinstance(settings, dict) else None
        if found is not None:
            return found
    return None


def _named(found: Any) -> str | None:
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found.strip() else None


def _has_another_template(adapter_id: str, adapter: Path, base: Path) -> bool:
    own, bases = template_of(adapter), template_of(base)
    if own is None or (bases is None and is_trained(adapter_id)):
        # One that is trained here, on a base without a template, carries the default that it is served with.
        return False
    return bases is None or _as_read(own) != _as_read(bases)


def _as_read(template: str) -> str:
    # transformers leaves out the last line's end, and whoever saves it again may put one there.
    return template.replace("\r\n", "\n").strip()


def _has_other_bytes(own: Path, bases: Path) -> bool:
    try:
        # A base without the file has its tokens in another form, with which nothing here can compare them.
        return own.is_file() and bases.is_file() and not filecmp.cmp(own, bases, shallow=False)
    except OSError:
        return False
