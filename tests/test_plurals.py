"""Counts in messages have their noun in the right number."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

import modelyard
from modelyard.plurals import counted

#: Nouns of which there may be one.
NOUNS = (
    "row", "line", "file", "layer", "element", "upload", "prompt", "request", "problem", "cell", "tensor", "GPU", "job",
    "connection", "other",
)  # fmt: skip
AFTER = re.compile(rf" (?:whole |blank |adapted )?(?:{'|'.join(NOUNS)})s\b")
#: Modules whose counts are never one, and of what.
SEVERAL = {
    "choices.py": "sets of rows, and their steps",
    "evaluation.py": "more rows than are scored",
    "selection.py": "more files than the most",
    "listing.py": "more files than the most",
    "adapter_facts.py": "more layers than the most",
    "vocabulary.py": "the rows of an embedding",
}


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [(0, ("row",), "0 rows"), (1, ("row",), "1 row"), (2, ("row",), "2 rows"), (10_001, ("row",), "10,001 rows"),
     (1, ("entry", "entries"), "1 entry"), (3, ("entry", "entries"), "3 entries")],
)  # fmt: skip
def test_a_count_has_its_noun(number: int, noun: tuple[str, ...], said: str) -> None:
    assert counted(number, *noun) == said


def test_no_message_has_a_count_before_a_plural_that_one_would_not_have() -> None:
    found = set()
    for path in Path(modelyard.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            values = node.values if isinstance(node, ast.JoinedStr) else []
            for before, after in pairwise(values):
                is_text = isinstance(after, ast.Constant) and AFTER.match(str(after.value))
                if isinstance(before, ast.FormattedValue) and is_text:
                    found.add((path.name, ast.unparse(before)))
    assert {one for one in found if one[0] not in SEVERAL} == set()
    assert {name for name, _ in found} == SEVERAL.keys()
