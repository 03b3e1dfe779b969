"""Evidence of a failure from a log: few lines, without secrets and without this machine's paths.

For lines that go into the database and to clients, and for what an exception says (`in_words`). The log itself stays as
it was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LINES = 20
BYTES = 4096
LINE_CHARACTERS = 400
CUT = "..."
#: Characters of what an exception says.
SAID_CHARACTERS = 300
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
#: What SQLAlchemy and others put before an exception's own text.
_CLASS = re.compile(r"\A(?:<class '[\w.]+'>|[A-Za-z_][\w.]*(?:Error|Exception)): (?=\S)")
#: What is said of exceptions that often come without a text, the narrower before the wider.
_SILENT: tuple[tuple[type[BaseException], str], ...] = (
    (MemoryError, "memory did not suffice"),
    (RecursionError, "it is nested too deeply"),
    (TimeoutError, "it took too long"),
    (ConnectionError, "the connection broke off"),
    (EOFError, "it ends too early"),
    (NotImplementedError, "it is not supported"),
    (AssertionError, "it contradicts itself"),
    (LookupError, "something is missing from what was read"),
)
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


def in_words(error: BaseException, most: int = SAID_CHARACTERS) -> str:
    """Return what an error says for users: one line without its class, secrets, paths or a full stop at its end.

    A class's name is Python's, and tells nothing to who reads the message; an error that says nothing is described.
    """
    if isinstance(error, KeyError) and error.args:
        # Its text is the bare key, unless a library has put a sentence there.
        key = str(error.args[0])
        said = key if " " in key.strip() else f"'{key}' is missing from what was read"
    else:
        said = _CLASS.sub("", str(error))
    said = " ".join(redacted(said).split())[:most].rstrip(" .")
    return said or next((words for kind, words in _SILENT if isinstance(error, kind)), "no reason was given")


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
