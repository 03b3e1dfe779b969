"""The child that validates a large file: bytes on its standard input, what was found as JSON on its standard output.

`inspection` starts it, as a filter. It imports what reads rows, and nothing of the server.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
from msgspec import Struct

from modelyard.datasets.validation import Validation
from modelyard.errors import InvalidDataset

#: All that a pipe may hold: whoever feeds it is woken once for each, not for every few pages that are free again.
READ_BYTES = 1024 * 1024


class Found(Struct):
    """The end of a validation: a report and an index, or a refusal (code, words) and its report."""

    report: dict[str, Any] | None = None
    index: list[tuple[int, int, int]] = []
    refusal: tuple[str, str] | None = None


def found_by(validation: Validation) -> Found:
    """Return what a validation has found that was fed everything, and close it."""
    try:
        return Found(validation.finish(), validation.index)
    except InvalidDataset as error:
        return refused(error)
    finally:
        validation.close()


def refused(error: InvalidDataset) -> Found:
    """Return a refusal as what was found."""
    report = dict(error.report) if error.report is not None else None
    return Found(report, refusal=(error.code, error.message))


def validate(max_line_bytes: int) -> None:
    """Read a dataset from standard input to its end, or until it is no dataset, and say what was found."""
    validation = Validation(max_line_bytes)
    try:
        while block := os.read(0, READ_BYTES):
            validation.feed(block)
        found = found_by(validation)
    except InvalidDataset as error:
        found = refused(error)
    # Whoever feeds us must not wait for room in this pipe while we wait for room in the other one.
    os.close(0)
    answer = memoryview(msgspec.json.encode(found))
    while answer:
        answer = answer[os.write(1, answer) :]
