"""What is shown of a log: little, and nothing that should stay where it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import modelyard
from modelyard.evidence import BYTES, LINES, clipped, in_words, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("with token hf_AbCdEfGhIjKlMnOpQrSt used", "with token [secret] used"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [secret]"),
        ("'X-API-Key': 'my-own-key'", "'X-API-Key': '[secret]'"),
        ("HF_TOKEN=something password: hunter22, x", "HF_TOKEN=something password: [secret], x"),
        ("postgresql://me:secret@db/x", "postgresql://[secret]@db/x"),
        (
            "GET https://cdn.example.org/a/b?X-Amz-Signature=123&e=4 failed",
            "GET https://cdn.example.org/a/b?[...] failed",
        ),
        ('File "/srv/x/.venv/lib/python3.11/site-packages/vllm/a.py", line 3', 'File "vllm/a.py", line 3'),
        ('File "/usr/lib/python3.11/json/decoder.py"', 'File "python3.11/json/decoder.py"'),
        ("/home/ann/models/x and /home/bob/y", "~/models/x and ~/y"),
        (str(Path("/root", "y")), "~/y"),
        ("max_num_batched_tokens (2048) and tokens: 17", "max_num_batched_tokens (2048) and tokens: 17"),
        ("/srv/models/org--name/model.safetensors", "/srv/models/org--name/model.safetensors"),
    ],
)
def test_secrets_and_this_machines_paths_are_not_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_few_lines_are_shown_as_they_are() -> None:
    assert clipped(["a", "b"]) == ("a", "b")


def test_of_many_lines_the_beginning_and_the_end_are_shown() -> None:
    shown = clipped(f"line {number}" for number in range(100))
    assert len(shown) == LINES
    assert (shown[0], shown[10], shown[-1]) == ("line 0", "...", "line 99")


def test_long_lines_are_cut_so_that_all_stays_small() -> None:
    shown = clipped(f"{number} " + "ä" * 1000 for number in range(100))
    assert sum(len(line.encode()) + 1 for line in shown) <= BYTES
    assert shown[0].startswith("0 ")
    assert shown[-1].startswith("99 ")
    assert "..." in shown


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("model_type"), "'model_type' is missing from what was read"),
        (KeyError("There is no such tokenizer."), "There is no such tokenizer"),
        (KeyError(), "something is missing from what was read"),
        (MemoryError(), "memory did not suffice"),
        (RuntimeError(), "no reason was given"),
        (ConnectionResetError(), "the connection broke off"),
        (ValueError("two\n lines."), "two lines"),
        (ValueError("<class 'psycopg.errors.DataError'>: too long"), "too long"),
        (RuntimeError("ValueError: not this one"), "not this one"),
        (OSError("token=abcdefgh was sent"), "token=[secret] was sent"),
        (ValueError("x" * 1000), "x" * 300),
    ],
)
def test_an_exception_is_told_in_words_without_its_class(error: Exception, said: str) -> None:
    assert in_words(error) == said


def _parts(tree: ast.AST) -> list[ast.AST]:
    """Return what is put into texts, or stands in where a text is empty."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FormattedValue | ast.BoolOp | ast.IfExp)]


def test_no_message_is_made_of_an_exceptions_class() -> None:
    errors, found = {"error", "caught", "failure", "exc", "cause", "refused"}, []
    for path in Path(modelyard.__file__).parent.rglob("*.py"):
        for part in _parts(ast.parse(path.read_text("utf-8"))):
            shown = isinstance(part, ast.FormattedValue)
            is_repr = shown and part.conversion == ord("r") and getattr(part.value, "id", "") in errors  # type: ignore[attr-defined]
            names = [
                node for node in ast.walk(part)
                if isinstance(node, ast.Attribute) and node.attr == "__name__" and isinstance(node.value, ast.Call)
            ]  # fmt: skip
            compared = {id(name) for node in ast.walk(part) if isinstance(node, ast.Compare) for name in ast.walk(node)}
            if is_repr or any(id(name) not in compared for name in names):
                found.append(f"{path.name}:{part.lineno}")  # type: ignore[attr-defined]
    assert found == []
