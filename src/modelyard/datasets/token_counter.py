"""The child that counts a dataset in tokens: rows on its standard input, figures as JSON on its standard output.

`tokens` starts it with limits (`models.tokenizer_child`). It alone imports the tokenizer's library, and nothing of the
server may import this module.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modelyard.datasets.canonical import Row, texts_of
from modelyard.datasets.lines import Rows
from modelyard.datasets.row_forms import Form
from modelyard.datasets.validation import LISTED_LINES
from modelyard.evidence import in_words

#: Texts that are handed to the tokenizer at once.
BATCH = 512
READ_BYTES = 1024 * 1024


def count(folder: str, max_length: int | None, max_line_bytes: int) -> None:
    """Count what comes on the standard input with the tokenizer of a folder, and print figures or a refusal."""
    try:
        counter = _Counter(Path(folder), max_length)
        reader = Rows(max_line_bytes)
        while block := os.read(0, READ_BYTES):
            counter.take(reader.feed(block))
        counter.take(reader.finish())
        answer: dict[str, Any] = {"figures": counter.figures()}
    except BaseException as error:  # noqa: BLE001  # the library's panic is no Exception
        answer = {"refusal": in_words(error)}
    print(json.dumps(answer))  # noqa: T201  # that is its answer


class _Counter:
    def __init__(self, folder: Path, max_length: int | None) -> None:
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._max_length = max_length
        self._rows = self._total = self._longest = self._truncated = 0
        self._truncated_lines: list[int] = []
        self._sizes: Counter[int] = Counter()

    def take(self, rows: Iterator[tuple[int, Form, Row]]) -> None:
        """Count the tokens of some rows."""
        contents: list[tuple[int, list[str]]] = []
        for line, _, row in rows:
            contents.append((line, list(texts_of(row))))
            if len(contents) == BATCH:
                self._count(contents)
                contents = []
        if contents:
            self._count(contents)

    def _count(self, contents: list[tuple[int, list[str]]]) -> None:
        everything = list(chain.from_iterable(texts for _, texts in contents))
        encoded = iter(self._tokenizer.encode_batch_fast(everything, add_special_tokens=False))
        for line, texts in contents:
            length = sum(len(next(encoded).ids) for _ in texts)
            self._rows += 1
            self._total += length
            self._sizes[length.bit_length()] += 1
            self._longest = max(self._longest, length)
            if self._max_length is not None and length > self._max_length:
                self._truncated += 1
                if len(self._truncated_lines) < LISTED_LINES:
                    self._truncated_lines.append(line)

    def figures(self) -> dict[str, Any]:
        """Return what was counted."""
        return {
            "max_length": self._max_length,
            "counted_rows": self._rows,
            "total": self._total,
            "longest": self._longest,
            "truncated_rows": self._truncated,
            "truncated_lines": self._truncated_lines,
            "histogram": [{"below": 1 << bits, "rows": self._sizes[bits]} for bits in sorted(self._sizes)],
        }
