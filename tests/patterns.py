"""Every regular expression of the project: those that modules hold, and those that their text has in calls of `re`."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import modelyard

ROOT = Path(modelyard.__file__).parent
CALLS = frozenset({"compile", "match", "search", "fullmatch", "finditer", "findall", "sub", "subn", "split"})
AnyPattern = re.Pattern[str] | re.Pattern[bytes]


def modules() -> list[str]:
    """Return the names of all modules whose text has a pattern."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if any(True for _ in _calls(path)):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            found.append(".".join(parts).removesuffix(".__init__"))
    return found


def all_patterns() -> dict[str, AnyPattern]:
    """Return every pattern by where it is."""
    found: dict[str, AnyPattern] = {}
    for name in modules():
        module = importlib.import_module(name)
        for value in vars(module).values():
            for pattern in _held(value, 0):
                found.setdefault(f"{name}: {_shown(pattern)}", pattern)
        for call in _calls(Path(str(module.__file__))):
            if isinstance(literal := _literal(call), str | bytes):
                pattern = re.compile(literal)
                found.setdefault(f"{name}: {_shown(pattern)}", pattern)
    return found


def unseen() -> list[str]:
    """Return the calls of `re` whose pattern is neither a literal nor held by its module when that is imported."""
    found = []
    for name in modules():
        path = Path(str(importlib.import_module(name).__file__))
        tree = ast.parse(path.read_text("utf-8"))
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        for call in _calls_in(tree):
            if id(call) in inside and _literal(call) is None:
                found.append(f"{name}: {ast.unparse(call)[:80]}")
    return found


def _calls(path: Path) -> Iterator[ast.Call]:
    yield from _calls_in(ast.parse(path.read_text("utf-8")))


def _calls_in(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "re"
            and node.func.attr in CALLS
        ):
            yield node


def _literal(call: ast.Call) -> str | bytes | None:
    try:
        value = ast.literal_eval(call.args[0])
    except ValueError:
        return None
    return value if isinstance(value, str | bytes) else None


def _held(value: Any, depth: int) -> Iterator[AnyPattern]:
    if isinstance(value, re.Pattern):
        yield value
    elif depth < 4 and isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _held(item, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        for item in value.values():
            yield from _held(item, depth + 1)
    elif depth < 4 and is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _held(getattr(value, field.name, None), depth + 1)


def _shown(pattern: AnyPattern) -> str:
    return f"{pattern.pattern!r} {pattern.flags}"
