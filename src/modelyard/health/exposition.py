"""Several Prometheus expositions as one: the server's own and those of its engines.

Engines of the same kind measure the same families. A family may stand in an exposition only once, so families are
gathered by name, and each engine's samples get a label that says whose they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

COMMENT = re.compile(r"# (HELP|TYPE) (\S+)")
VALUE = r"(?:[+-]?Inf|NaN|[+-]?[0-9][0-9.eE+-]*)(?: -?[0-9]+)?"
SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (" + VALUE + ")")
SUFFIXES = ("_bucket", "_count", "_sum", "_total", "_created", "_info")


def merge(own: str, engines: Iterable[tuple[str, str]]) -> str:
    """Return one exposition of the server's own and of `(deployment, text)` pairs, each in text format 0.0.4.

    What an engine says that is none of that format is left out.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    _gather(own, None, comments, samples)
    for deployment, text in engines:
        _gather(text, deployment, comments, samples)
    lines: list[str] = []
    for family, found in samples.items():
        lines += [*comments.get(family, ()), *found]
    return "\n".join(lines) + "\n" if lines else ""


def _gather(text: str, deployment: str | None, comments: dict[str, list[str]], samples: dict[str, list[str]]) -> None:
    declared: set[str] = set()
    # The first that describes a family does so for all, even if it has measured nothing of it yet.
    described = set(comments)
    # Not splitlines: a label may hold what other standards take for the end of a line.
    for line in text.split("\n"):
        if comment := COMMENT.match(line):
            family = comment[2]
            declared.add(family)
            if family not in described:
                comments.setdefault(family, []).append(line)
        elif sample := SAMPLE.fullmatch(line):
            name, labels, value = sample.groups()
            samples.setdefault(_family(name, declared), []).append(_labelled(name, labels, value, deployment))


def _family(name: str, declared: set[str]) -> str:
    if name in declared:
        return name
    for suffix in SUFFIXES:
        if name.endswith(suffix) and name.removesuffix(suffix) in declared:
            return name.removesuffix(suffix)
    return name


def _labelled(name: str, labels: str | None, value: str, deployment: str | None) -> str:
    parts = [labels.rstrip(",")] if labels else []
    if deployment is not None:
        escaped = deployment.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        parts.insert(0, f'deployment="{escaped}"')
    return f"{name}{{{','.join(parts)}}} {value}" if parts else f"{name} {value}"
