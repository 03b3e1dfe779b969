"""The manual's pages as text, for the tests that hold them against the program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from modelyard.docs.guide import PAGES

ROOT = Path(__file__).resolve().parents[1]
#: Each page's text by its file's name, such as `docs/settings.md`.
TEXTS = {file: (ROOT / file).read_text("utf-8") for file in PAGES.values()}
WHOLE = "\n".join(TEXTS.values())


def section(file: str, heading: str) -> str:
    """Return what stands below a heading of the second level."""
    return TEXTS[file].split(f"\n## {heading}\n")[1].split("\n## ")[0]


def shell_lines() -> Iterator[str]:
    """Yield the shell commands of all pages, continued lines joined."""
    for block in re.findall(r"^ *```(?:bash|sh|shell|console)?\n(.*?)^ *```$", WHOLE, re.MULTILINE | re.DOTALL):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())
