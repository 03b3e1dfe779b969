"""A stream of bytes as lines, and as the rows that can be learnt from, in constant memory.

`Lines` regroups blocks into runs of whole lines and drops a line that is longer than allowed while it arrives.
`Rows` is what a page of the API and a trainer read: exactly the rows that the report counts, each with its line. Both
are computation, with no file and no loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from modelyard.datasets.canonical import Row
from modelyard.datasets.conversations import examine
from modelyard.datasets.faults import Faults
from modelyard.datasets.forms import RowReader
from modelyard.datasets.recognition import BYTE_ORDER_MARK
from modelyard.datasets.row_forms import Form


class Lines:
    """Feed it a stream in blocks; it yields runs of whole lines, each with its end, and None for one too long."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._overlong = False
        self._fed = 0
        #: Where in the stream the run that was yielded last begins.
        self.offset = 0

    def feed(self, block: bytes) -> Iterator[bytes | None]:
        """Take a block of any length; consume what it yields before the next one."""
        begin = self._fed
        self._fed += len(block)
        first = block.find(b"\n") + 1
        if first == 0:
            yield from self._keep(block)
            return
        start = 0
        if self._overlong:
            self._overlong, start = False, first
        elif self._rest:
            start = first
            self.offset = begin - self._rest_bytes
            if self._rest_bytes + first > self._max + 2:
                self._rest, self._rest_bytes = [], 0
                yield None
            else:
                self._rest.append(block[:first])
                line = b"".join(self._rest)
                self._rest, self._rest_bytes = [], 0
                yield line
        end = block.rfind(b"\n") + 1
        if end > start:
            self.offset = begin + start
            yield block[start:end]
        if end < len(block):
            yield from self._keep(block[end:])

    def pass_over(self, size_bytes: int) -> None:
        """Count bytes of the stream that are not fed; only between lines."""
        self._fed += size_bytes

    def finish(self) -> Iterator[bytes]:
        """Yield the last line, if the stream did not end with a newline; it is given one."""
        if self._rest:
            self.offset = self._fed - self._rest_bytes
            line = b"".join(self._rest) + b"\n"
            self._rest, self._rest_bytes = [], 0
            yield line

    def _keep(self, piece: bytes) -> Iterator[None]:
        if self._overlong:
            return
        if self._rest_bytes + len(piece) > self._max + 1:
            self._rest, self._rest_bytes, self._overlong = [], 0, True
            yield None
            return
        self._rest.append(piece)
        self._rest_bytes += len(piece)


class Rows:
    """Feed it a dataset's bytes, from the beginning of a line; it yields line, form and row of what can be learnt."""

    def __init__(self, max_line_bytes: int, lines_before: int = 0) -> None:
        self._lines = Lines(max_line_bytes)
        self._max = max_line_bytes
        self._number = lines_before
        self._reader = RowReader()

    def feed(self, block: bytes) -> Iterator[tuple[int, Form, Row]]:
        """Take a block of any length; consume what it yields before the next one."""
        for run in self._lines.feed(block):
            yield from self._read(run)

    def finish(self) -> Iterator[tuple[int, Form, Row]]:
        """Yield the last row, if the file does not end with a newline."""
        for run in self._lines.finish():
            yield from self._read(run)

    def _read(self, run: bytes | None) -> Iterator[tuple[int, Form, Row]]:
        if run is None:
            self._number += 1
            return
        is_text = is_utf8(run)
        for line in run[:-1].split(b"\n"):
            self._number += 1
            if self._number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line or line.isspace() or len(line) > self._max + 1 or not (is_text or is_utf8(line)):
                continue
            try:
                form, row = self._reader.read(line)
                examine(row, form)
            except Faults:
                continue
            yield self._number, form, row


def rows_of(blocks: Iterable[bytes], max_line_bytes: int) -> Iterator[tuple[int, Form, Row]]:
    """Yield line, form and canonical row of everything in a whole dataset that can be learnt from."""
    rows = Rows(max_line_bytes)
    for block in blocks:
        yield from rows.feed(block)
    yield from rows.finish()


def is_utf8(text: bytes) -> bool:
    """True if the bytes are text."""
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
