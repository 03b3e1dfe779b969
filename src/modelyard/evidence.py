"""Evidence of a failure from a log: few lines, without secrets and without this machine's paths.

For lines that go into the database and to clients. The log itself stays as it was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LINES = 20
BYTES = 4096
LINE_CHARACTERS = 400
CUT = "..."
#: The most of a line that any pattern looks at. A longer one is a file's content or a hostile name.
LINE_BOUND = 4096

_SECRETS = (
    # Tokens of the hub, of OpenAI and of signed addresses, wherever they stand.
    (re.compile(r"\b(?:hf_|api_org_|sk-)[A-Za-z0-9_-]{8,}"), "[secret]"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), r"\1 [secret]"),
    (
        re.compile(r"(?i)\b((?:x-)?api[_-]?key|token|password|passwd|secret)(['\"]?\s*[=:]\s*['\"]?)[^\s'\",;)]+"),
        r"\1\2[secret]",
    ),
    (re.compile(r"(://)[^\s/@]+@"), r"\1[secret]@"),
    (re.compile(r"(https?://[^\s?'\"]{1,2000})\?[^\s'\")]+"), r"\1?[...]"),
)  # fmt: skip
#: Where Python's packages and its own library lie tells nothing but how this machine is set up; nor do users' homes.
#: Each begins where a path does: from every slash of a long path anew, the search would take quadratic time.
_PACKAGES = re.compile(r"(?<![\w.@+/-])(?:/[\w.@+-]+)+/(?:site|dist)-packages/")
_LIBRARY = re.compile(r"(?<![\w.@+/-])(?:/[\w.@+-]+)+/lib/(?=python3)")
_HOME = re.compile(r"(?<![\w/])/(?:home/[\w.-]+|root)(?=/)")


def cut(text: str, most: int = LINE_BOUND) -> str:
    """Return a text with each of its lines cut: what is looked for in it is never the work of hours."""
    if len(text) <= most:
        return text
    return "\n".join(line if len(line) <= most else line[:most] for line in text.splitlines())


def redacted(text: str) -> str:
    """Return a text without what looks like a secret, and with paths shortened; of a long line the beginning."""
    text = cut(text)
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return _HOME.sub("~", _LIBRARY.sub("", _PACKAGES.sub("", text)))


def clipped(lines: Iterable[str]) -> tuple[str, ...]:
    """Return lines as evidence: redacted, at most 20 and 4 KiB; of more the beginning and the end."""
    told = list(lines)
    if len(told) > LINES:
        told = [*told[: LINES // 2], CUT, *told[-(LINES - LINES // 2 - 1) :]]
    kept = [line if len(line) <= LINE_CHARACTERS else line[:LINE_CHARACTERS] + CUT for line in map(redacted, told)]
    while sum(len(line.encode()) + 1 for line in kept) > BYTES:
        middle = len(kept) // 2
        kept[middle - 1 : middle + 1] = [CUT] if CUT not in kept else []
    return tuple(kept)
