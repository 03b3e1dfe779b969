"""Detects the form in which a chat template takes the content of messages: as text, or as a list of parts.

The engine looks at the template's syntax tree (vLLM 0.32, `renderers/hf.py`): it hands content over as parts where the
template loops over the content of a message that it got from a loop over the messages, also by way of filters, slices
and macros. The same rules here, since parts for a template that wants text, or the reverse, is another prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from jinja2 import Environment, TemplateError, nodes

# transformers' own tag, which marks what an assistant says; it changes no rendering.
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


@lru_cache(maxsize=32)
def loops_over_content(template: str) -> bool:
    """Return True if the engine hands content over as a list of parts."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except (TemplateError, RecursionError):
        return False
    try:
        return _loops_over_content(tree)
    except ValueError:
        return False  # the engine gives up there as well, and hands over text


def _loops_over_content(tree: nodes.Template) -> bool:
    loops = list(tree.find_all(nodes.For))
    names = _aliases(tree, "messages")
    speakers = {_target(loop) for loop in loops if any(_leads_to(loop.iter, name) for name in names)}
    in_macros: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        given = set(_content_parameters(tree, macro, speakers))
        for loop in macro.find_all(nodes.For):
            in_macros[id(loop)] = in_macros.get(id(loop), set()) | given
    for loop in loops:
        if any(_leads_to(loop.iter, name, "content") for name in speakers):
            return True
        if isinstance(loop.iter, nodes.Name):
            known = in_macros.get(id(loop))
            if loop.iter.name in known if known is not None else loop.iter.name == "content":
                return True
    return False


def _aliases(tree: nodes.Template, name: str) -> set[str]:
    """Return the variables that are set to another, to a part of it, or to one that is."""
    known, fresh = {name}, [name]
    assigned = list(tree.find_all(nodes.Assign))
    while fresh:
        source = fresh.pop()
        for one in assigned:
            if not _leads_to(one.node, source):
                continue
            if not isinstance(one.target, nodes.Name):
                raise ValueError(one.target)
            if one.target.name not in known:
                known.add(one.target.name)
                fresh.append(one.target.name)
    return known


def _content_parameters(tree: nodes.Template, macro: nodes.Macro, speakers: set[str]) -> Iterator[str]:
    """Yield the parameters of a macro that are given a message's content anywhere."""
    for call in tree.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        named = [*zip((one.name for one in macro.args), call.args, strict=False)]
        named += [(one.key, one.value) for one in call.kwargs if isinstance(one, nodes.Keyword)]
        for name, value in named:
            if any(_leads_to(value, speaker, "content") for speaker in speakers):
                yield name


def _target(loop: nodes.For) -> str:
    if not isinstance(loop.target, nodes.Name):
        raise ValueError(loop.target)
    return str(loop.target.name)


def _leads_to(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Return True for a variable, or its attribute `key`, and for what filters, tests and slices make of it."""
    while isinstance(node, nodes.Filter | nodes.Test | nodes.Getitem):
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice):
            break
        node = node.node
    if key is not None:
        if isinstance(node, nodes.Getitem):
            if not (isinstance(node.arg, nodes.Const) and node.arg.value == key):
                return False
        elif not (isinstance(node, nodes.Getattr) and node.attr == key):
            return False
        node = node.node
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
