"""The frame of our vLLM plugins: each is a cure that never costs an engine, and says whether it took effect.

vLLM calls a plugin in each of its processes, passes over one that its Python does not have without a word, and ends
when one raises. So every cure of ours writes a line to the file that the environment names, `{"cure", "error"}`, and
the supervisor reads it when the engine is ready: a cure that is missing there was not installed in
MODELYARD_ENGINE_PYTHON, one with an error met a vLLM that works in another way. Both are said, not guessed.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from modelyard import evidence

log = logging.getLogger(__name__)

#: Names the file, in an engine's environment.
VARIABLE = "MODELYARD_ENGINE_CURES"
FILE = "cures.jsonl"
#: More than all processes of an engine write.
MOST_BYTES = 1024**2

#: What happens without each, by the name of its entry point.
WITHOUT = {
    "modelyard_amx": "on a processor with AMX, a short first request in bfloat16 may kill the engine",
    "modelyard_sleep": "the engine's waiting processes take the processors from those that work",
    "modelyard_lora": (
        "requests to the base may be answered with an adapter, requests for a prompt's log probabilities may end the "
        "engine, and an adapter's layers that the model does not have are passed over without a word"
    ),
    "modelyard_vision": "models that also see or hear do not start without torchvision, even for text alone",
    "modelyard_alone": "logits processors of other installed packages run in every engine, unasked",
}


def cure(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a plugin of a function that changes vLLM: it never raises, and what came of it is written down."""

    def wrap(change: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(change)
        def apply() -> None:
            error = None
            try:
                change()
            except Exception as caught:  # vLLM would end the engine over a plugin that raises
                error = evidence.in_words(caught)
                log.warning("The cure %s does not take effect.", name, exc_info=True)
            _note(name, error)

        return apply

    return wrap


def _note(name: str, error: str | None) -> None:
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"cure": name, "error": error}) + "\n")
    except OSError:
        log.warning("Could not note that the cure %s was applied.", name, exc_info=True)


def complaint(engine_url: str | None, wanted: Iterable[str], python: str) -> tuple[str, dict[str, str]]:
    """Return what to tell of an engine's cures that have not taken effect, and each with its reason. Blocks.

    Empty if all have; `engine_url` is that of its socket, in the engine's private folder.
    """
    lacking = _missing(Path((engine_url or "").removeprefix("unix:")).with_name(FILE), wanted)
    if not lacking:
        return "", {}
    each = "; ".join(f"{name} ({why}): {WITHOUT.get(name, 'unknown')}" for name, why in lacking.items())
    said = (
        f"The engine stands without {len(lacking)} of Modelyard's cures for vLLM. {each}. Install Modelyard in "
        f"{python} (MODELYARD_ENGINE_PYTHON), with the vLLM that it pins, and deploy again."
    )
    log.warning("%s", said)
    return said, lacking


def _missing(file: Path, wanted: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            said = [json.loads(line) for line in lines.read(MOST_BYTES).splitlines()]
        # Of several processes, one that failed counts.
        found = {one["cure"]: one["error"] or "" for one in sorted(said, key=lambda one: one["error"] or "")}
    except FileNotFoundError:
        if not file.parent.is_dir():
            return {}  # the engine has died meanwhile, and its folder is gone: that says nothing of the cures
    except (OSError, ValueError, TypeError, KeyError) as error:
        return dict.fromkeys(wanted, f"what the engine wrote of it cannot be read: {error}")
    return {name: found.get(name, "it is not installed there") for name in wanted if found.get(name) != ""}
