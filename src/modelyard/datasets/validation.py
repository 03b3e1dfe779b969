"""One pass over the bytes of a dataset, in blocks as they come, that ends in its report.

Memory is bounded by the longest line that is allowed and by the table of duplicates, however long the file is. Nothing
is kept of a line but what the report says of it. Everything here is computation: it blocks, and knows no storage and
no loop. Rows that are exactly the same bytes are found by a 64-bit hash, which is seeded anew for each process, in a
table that takes the first 3 million different rows; rows behind them are compared with those.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from modelyard.datasets.conversations import examine, lengths_if_plain
from modelyard.datasets.faults import Fault, Faults, Kind, diagnose
from modelyard.datasets.forms import PlainRow, RowReader
from modelyard.datasets.ignored_keys import IgnoredKeys
from modelyard.datasets.lines import Lines, is_utf8
from modelyard.datasets.raw_values import UNREADABLE
from modelyard.datasets.recognition import BYTE_ORDER_MARK, HEAD_BYTES, recognise
from modelyard.datasets.row_forms import Form
from modelyard.errors import InvalidDataset
from modelyard.plurals import counted

LISTED_PROBLEMS = 1000
LISTED_LINES = 20
#: A file with more problems, or more in bad lines, is no dataset: the rest of it is not looked at.
MOST_PROBLEMS = 10_000
MOST_BAD_BYTES = 64 * 1024 * 1024
#: Different orders of roles that are counted one by one, and their roles together.
MOST_SHAPES = 4096
MOST_SHAPE_ROLES = 1_000_000
#: How many runs of lines are read one by one, at most, before the short way is tried again.
MOST_DOUBT = 64
#: So much of a file lies between two entries of the index, at least.
INDEX_STEP_BYTES = 4 * 1024 * 1024
_SLOTS = 1 << 22
_LAST_SLOT = _SLOTS - 1
_MOST_KEPT = _SLOTS * 3 // 4


class Duplicates:
    """The rows that were there before. Exact for the first 3 million different ones, in 32 MiB at most."""

    def __init__(self) -> None:
        # Memory that nobody has touched yet costs nothing: a small dataset pays for its own rows only.
        self._memory = mmap.mmap(-1, _SLOTS * 8)
        self._slots = memoryview(self._memory).cast("q")
        self._kept = 0
        self.rows = 0
        self.lines: list[int] = []

    @property
    def is_full(self) -> bool:
        """True if rows came that nothing could be compared with later."""
        return self._kept >= _MOST_KEPT

    def see(self, lines: Iterable[bytes], numbers: Iterable[int]) -> None:
        """Count the rows whose bytes were seen before; each has its number in the file."""
        slots, kept = self._slots, self._kept
        for number, value in zip(numbers, map(hash, lines), strict=True):
            at = value & _LAST_SLOT
            while (found := slots[at]) != 0:
                if found == value:
                    self.rows += 1
                    if len(self.lines) < LISTED_LINES:
                        self.lines.append(number)
                    break
                at = (at + 1) & _LAST_SLOT
            else:
                if kept < _MOST_KEPT and value:  # one hash in 2 ** 64 is what an empty slot has
                    slots[at] = value
                    kept += 1
        self._kept = kept

    def close(self) -> None:
        """Give the memory back."""
        self._slots.release()
        self._memory.close()


class Validation:
    """The state of one pass: `feed` it the file's bytes in order, then ask it to `finish`."""

    def __init__(
        self,
        max_line_bytes: int,
        *,
        most_problems: int = MOST_PROBLEMS,
        most_bad_bytes: int = MOST_BAD_BYTES,
        is_recognised: bool = False,
    ) -> None:
        """`is_recognised`: the file's kind is known already, and its first bytes say nothing more."""
        self.is_over_budget = False
        self._max_line_bytes = max_line_bytes
        self._most_problems = most_problems
        self._most_bad_bytes = most_bad_bytes
        self._bad_bytes = self._shape_roles = 0
        self._reader = Lines(max_line_bytes)
        self._head: list[bytes] = []
        self._is_begun = is_recognised
        self._rows_of = RowReader()
        self._ignored = IgnoredKeys()
        self._doubt = self._doubted = 0
        self._lines = self._blank = self._rows = self._crlf = 0
        self._has_mark = False
        self._forms: Counter[Form] = Counter()
        self._shapes: Counter[tuple[str, ...]] = Counter()
        self._sizes: Counter[int] = Counter()
        self._characters = self._longest = 0
        self._shortest: int | None = None
        self._warnings: dict[str, list[int]] = {}
        self._warned: Counter[str] = Counter()
        self._problems: list[dict[str, Any]] = []
        self._kinds: Counter[Kind] = Counter()
        self._bad_lines = 0
        self._duplicates = Duplicates()
        #: Byte, lines and rows before it, for places in the file that are not far apart: where a reader may begin.
        self.index: list[tuple[int, int, int]] = []

    def feed(self, block: bytes) -> None:
        """Take the next bytes of the file, of any length (128 KiB is a good one).

        Raises:
            InvalidDataset: the file is of another kind altogether, which its first bytes show; or too much is wrong
                with it to go on (`is_over_budget`), with the report so far.
        """
        if not self._is_begun:
            self._head.append(block)
            if sum(map(len, self._head)) < HEAD_BYTES:
                return
            block = self._begin()
        for run in self._reader.feed(block):
            self._take(run)
            if self.is_over_budget:
                self._give_up()

    def feed_rows(self, block: bytes, places: Sequence[int]) -> None:
        """Take whole lines that were made of another file, and where each begins in that (0: nobody knows).

        Raises:
            InvalidDataset: as `feed`.
        """
        known, before = len(self._problems), self._lines
        self.feed(block)
        for problem in self._problems[known:]:
            problem["file_line"] = places[problem["line"] - before - 1] or None

    def refuse_row(self, fault: Fault, place: int) -> None:
        """Count a row of another file that cannot be made a line: a blank one stands for it in the JSONL.

        Raises:
            InvalidDataset: too much is wrong.
        """
        self._reader.pass_over(1)
        self._lines += 1
        known = len(self._problems)
        self._refuse(self._lines, [fault], 0)
        for problem in self._problems[known:]:
            problem["file_line"] = place or None
        if self.is_over_budget:
            self._give_up()

    def finish(self) -> dict[str, Any]:
        """Return the report, once all bytes were fed.

        Raises:
            InvalidDataset: the file is of another kind altogether, or there is nothing in it, or too much is wrong.
        """
        if not self._is_begun:
            head = self._begin()
            if head in (b"", BYTE_ORDER_MARK):
                raise InvalidDataset("The file is empty.", code="dataset_empty")
            for run in self._reader.feed(head):
                self._take(run)
        for run in self._reader.finish():
            self._take(run)
        if self.is_over_budget:
            self._give_up()
        if not self._lines:
            raise InvalidDataset("The file is empty.", code="dataset_empty")
        if not self._rows and not self._bad_lines:
            raise InvalidDataset(
                f"The file has nothing but {counted(self._lines, 'blank line')}.", code="dataset_empty"
            )
        return self._report()

    def close(self) -> None:
        """Give back what is held. Safe to repeat."""
        self._duplicates.close()

    def _begin(self) -> bytes:
        head = b"".join(self._head)
        self._head, self._is_begun = [], True
        if (what := recognise(head[:HEAD_BYTES])) is not None:
            raise InvalidDataset(what, code="not_jsonl")
        self._has_mark = head.startswith(BYTE_ORDER_MARK)
        return head

    def _too_long(self) -> Fault:
        mib = self._max_line_bytes / (1024 * 1024)
        return Fault(
            Kind.LINE_TOO_LONG, "$", f"is longer than the {mib:g} MiB that a line may have (MODELYARD_DATASET_LINE_MIB)"
        )

    def _take(self, run: bytes | None) -> None:
        """Take some lines, each with its end, or one that was too long to keep."""
        if run is None:
            self._lines += 1
            self._refuse(self._lines, [self._too_long()], 0)
            return
        offset = self._reader.offset
        if not self.index or offset - self.index[-1][0] >= INDEX_STEP_BYTES:
            self.index.append((offset, self._lines, self._rows))
        if run.isspace():
            self._lines += run.count(b"\n")
            self._blank += run.count(b"\n")
            self._crlf += run.count(b"\r\n")
            return
        is_text = is_utf8(run)
        lines = run.split(b"\n")
        lines.pop()
        if not (is_text and self._take_at_once(run, lines)):
            self._take_one_by_one(lines, is_text)
        if len(self._shapes) > MOST_SHAPES or self._shape_roles > MOST_SHAPE_ROLES:
            self._merge_shapes()

    def _take_at_once(self, run: bytes, lines: list[bytes]) -> bool:
        """Take lines that are all plain, which costs half as much, or say that they are not."""
        if self._doubted < self._doubt or len(run) > self._max_line_bytes:
            self._doubted += 1
            return False
        rows: Iterable[PlainRow] = self._rows_of.plain_rows(lines)
        try:
            if self._rows_of.knows_keys:
                rows = list(rows)
            found = lengths_if_plain(rows) if b"\r" not in run else None
        except UNREADABLE:
            found = None
        if found is None:
            self._doubt, self._doubted = min(2 * self._doubt + 1, MOST_DOUBT), 0
            return False
        self._doubt = 0
        lengths, orders = found
        self._duplicates.see(lines, range(self._lines + 1, self._lines + 1 + len(lines)))
        if self._rows_of.knows_keys:
            for key, there in self._rows_of.ignored_in(list(rows)):
                self._ignored.see_all(key, [self._lines + 1 + at for at in there])
        self._lines += len(lines)
        self._rows += len(lines)
        self._forms[Form.MESSAGES] += len(lines)
        self._shape_roles += sum(map(len, orders))
        self._shapes.update(orders)
        self._measure(lengths)
        return True

    def _measure(self, lengths: list[int]) -> None:
        self._sizes.update(map(int.bit_length, lengths))
        self._characters += sum(lengths)
        self._longest = max(self._longest, max(lengths))
        shortest = min(lengths)
        if self._shortest is None or shortest < self._shortest:
            self._shortest = shortest

    def _take_one_by_one(self, lines: list[bytes], is_text: bool) -> None:
        if self._lines == 0:
            lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
        number = self._lines
        self._lines += len(lines)
        forms, shapes = self._forms, self._shapes
        rows, numbers, lengths = [], [], []
        for line in lines:
            if self.is_over_budget:
                self._lines = number
                break
            number += 1
            if line.endswith(b"\r"):
                self._crlf += 1
                line = line[:-1]
            if not line or line.isspace():
                self._blank += 1
                continue
            if len(line) > self._max_line_bytes:
                self._refuse(number, [self._too_long()], 0)
                continue
            try:
                if not is_text and not is_utf8(line):
                    raise Faults([diagnose(line)])
                form, row = self._rows_of.read(line)
                shape, characters, warnings = examine(row, form)
            except Faults as wrong:
                self._refuse(number, wrong.faults, len(line))
                continue
            rows.append(line)
            numbers.append(number)
            forms[form] += 1
            if row.ignored:
                self._ignored.see(row.ignored, number)
            shapes[shape.roles] += 1
            self._shape_roles += len(shape.roles)
            lengths.append(characters)
            for warning in warnings:
                self._warned[warning] += 1
                if len(self._warnings.setdefault(warning, [])) < LISTED_LINES:
                    self._warnings[warning].append(number)
        self._rows += len(rows)
        self._duplicates.see(rows, numbers)
        if lengths:
            self._measure(lengths)

    def _merge_shapes(self) -> None:
        """Keep the counts of many different shapes by role only: conversations may all be different."""
        merged: Counter[tuple[str, ...]] = Counter()
        for roles, count in self._shapes.items():
            for role in roles:
                merged[(role,)] += count
        self._shapes = merged
        self._shape_roles = 0

    def _refuse(self, number: int, faults: Iterable[Fault], line_bytes: int) -> None:
        self._bad_lines += 1
        self._bad_bytes += line_bytes
        for fault in faults:
            self._kinds[fault.kind] += 1
            if len(self._problems) < LISTED_PROBLEMS:
                self._problems.append(
                    {"line": number, "path": fault.path, "reason": fault.reason, "kind": str(fault.kind)}
                )
        self.is_over_budget = sum(self._kinds.values()) > self._most_problems or self._bad_bytes > self._most_bad_bytes

    def _give_up(self) -> None:
        number = self._lines
        first = self._problems[0]
        raise InvalidDataset(
            f"Too much is wrong with it: {counted(sum(self._kinds.values()), 'problem')} up to line {number:,}. The "
            f"rest was not looked at. The first: line {first['line']}: {first['path']}: {first['reason']}.",
            report=self._report() | {"stopped_at_line": number},
        )

    def _report(self) -> dict[str, Any]:
        roles: Counter[str] = Counter()
        for shape, count in self._shapes.items():
            for role in shape:
                roles[role] += count
        forms = {str(form): self._forms[form] for form in Form if self._forms[form]}
        total = sum(self._kinds.values())
        return {
            "format": next(iter(forms)) if len(forms) == 1 else "mixed" if forms else None,
            "formats": forms,
            "rows": self._rows,
            "lines": self._lines,
            "blank_lines": self._blank,
            "bad_lines": self._bad_lines,
            "turns": sum(roles.values()),
            "roles": dict(sorted(roles.items())),
            "characters": {
                "total": self._characters,
                "shortest": self._shortest or 0,
                "longest": self._longest,
                "histogram": [{"below": 1 << bits, "rows": self._sizes[bits]} for bits in sorted(self._sizes)],
            },
            "duplicates": {
                "rows": self._duplicates.rows,
                "lines": self._duplicates.lines,
                "is_exact": not self._duplicates.is_full,
            },
            "nothing_to_learn": self._kinds[Kind.NOTHING_TO_LEARN],
            "warnings": [
                {"kind": kind, "rows": self._warned[kind], "lines": lines}
                for kind, lines in sorted(self._warnings.items())
            ],
            "ignored_keys": self._ignored.report(),
            "problems": {
                "total": total,
                "kinds": {str(kind): self._kinds[kind] for kind in Kind if self._kinds[kind]},
                "listed": self._problems,
                "unlisted": total - len(self._problems),
            },
            "byte_order_mark": self._has_mark,
            "crlf_lines": self._crlf,
            "stopped_at_line": None,
        }
