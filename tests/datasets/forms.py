"""Datasets and the forms that carry them, as a client would make them."""

from __future__ import annotations

import json
from collections.abc import Sequence

BOUNDARY = "----------------------------5f0b02c75b57"
FORM_HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def chat(question: str, answer: str) -> dict[str, object]:
    """Return a row in the canonical form."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def jsonl(*rows: object) -> bytes:
    """Return a file with these rows."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def part(data: bytes, name: str = "file", filename: str | None = "train.jsonl") -> bytes:
    """Return one part of a form."""
    shown = f'; filename="{filename}"' if filename is not None else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'
    return head.encode() + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    """Return a whole form."""
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def upload(data: bytes, filename: str = "train.jsonl") -> bytes:
    """Return a form with a file in it."""
    return form(part(data, filename=filename))


def questions(count: int) -> bytes:
    """Return a file of so many different rows."""
    return jsonl(*(chat(f"What is {number} plus one?", str(number + 1)) for number in range(count)))


def bad_at(lines: Sequence[int], count: int) -> bytes:
    """Return a file of so many rows of which those lines (from 1) have a role that there is not."""
    rows = questions(count).splitlines(keepends=True)
    for line in lines:
        rows[line - 1] = rows[line - 1].replace(b'"assistant"', b'"gpt"')
    return b"".join(rows)
