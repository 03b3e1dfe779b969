"""Finds every failure code in the sources, without running them: whatever is given as a `code` somewhere.

A code is a class attribute `code`, an argument for a parameter `code` (by name, or by place where a function or class
of ours has it), the value of a key "code", or a constant that is used in one of these ways.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

_SLUG = re.compile(r"[a-z]+(?:_[a-z0-9]+)*")
#: Have a `code` that is no failure's: a note on a connection, a child's exit.
_OTHERS = frozenset({"note"})


def failure_codes(sources: Path) -> set[str]:
    """Return the codes that the modules below a folder can give."""
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted(sources.rglob("*.py"))]
    places = _places(trees)
    constants = {
        target.id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            for value in _values(node, places):
                found.update(_slugs(value, constants))
    return found


def _places(trees: Iterable[ast.Module]) -> dict[str, set[int]]:
    """Return where each function and class of ours takes a `code`, subclasses included."""
    places: dict[str, set[int]] = defaultdict(set)
    bases: dict[str, set[str]] = defaultdict(set)
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] |= {_last_name(base) for base in node.bases}
                fields = [part.target.id for part in node.body
                          if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]  # fmt: skip
                if "code" in fields:
                    places[node.name].add(fields.index("code"))
                for part in node.body:
                    if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                        places[node.name] |= _place(part)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__":
                places[node.name] |= _place(node)
    while grown := {(name, place) for name, parents in bases.items() for parent in parents
                    for place in places.get(parent, set()) - places.get(name, set())}:  # fmt: skip
        for name, place in grown:
            places[name].add(place)
    return {name: found for name, found in places.items() if found and name not in _OTHERS}


def _place(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[int]:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    return {names.index("code")} if "code" in names else set()


def _values(node: ast.AST, places: dict[str, set[int]]) -> Iterator[ast.expr]:
    """Yield what is a code here."""
    if isinstance(node, ast.Call):
        name = _last_name(node.func)
        yield from (node.args[place] for place in places.get(name, ()) if place < len(node.args))
        yield from (keyword.value for keyword in node.keywords if keyword.arg == "code")
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if _last_name(target) == "code":
                yield node.value
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "code":
                yield value
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        names = [argument.arg for argument in node.args.args]
        for name, value in zip(reversed(names), reversed(node.args.defaults), strict=False):
            if name == "code":
                yield value


def _slugs(value: ast.expr, constants: dict[str, str]) -> Iterator[str]:
    if isinstance(value, ast.IfExp):
        yield from (*_slugs(value.body, constants), *_slugs(value.orelse, constants))
    elif isinstance(value, ast.Constant) and isinstance(value.value, str) and _SLUG.fullmatch(value.value):
        yield value.value
    elif (name := _last_name(value)).isupper() and name in constants:
        yield constants[name]


def _last_name(node: ast.expr) -> str:
    """Return the end of a dotted name, such as `code` of `self.code`; of anything else an empty text."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
