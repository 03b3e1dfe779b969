"""Tables in Markdown and where they are kept: RESULTS.md, a section per subject, each with the machine it ran on."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Cells = Mapping[tuple[int, str], Sequence[Any]]


def machine() -> str:
    """Return the machine in a line: processor, cores, Python, date, and how busy it was."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    today = datetime.now(UTC).date().isoformat()
    busy = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    python = platform.python_version()
    return f"{cpu}, {os.cpu_count()} cores, Linux, Python {python}, {today}; load average at the end {busy}"


def _median(cells: Sequence[Any], value: Callable[[Any], float]) -> float:
    return statistics.median(value(cell) for cell in cells)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _places(cells: Cells) -> list[str]:
    return list(dict.fromkeys(place for _, place in cells))


def throughput(title: str, cells: Cells, levels: Sequence[int]) -> list[str]:
    """Chunks per second, beside the ratio to direct and to nginx (median of the ratios of each round)."""
    rows = []
    for place in _places(cells):
        row = [place]
        for level in levels:
            here = cells[level, place]
            text = f"{_median(here, lambda cell: cell.per_second):,.0f}"
            for other in ("direct", "nginx", "before"):
                if (level, other) in cells and other != place:
                    pairs = zip(here, cells[level, other], strict=True)
                    ratio = statistics.median(mine.per_second / theirs.per_second for mine, theirs in pairs)
                    text += f", {ratio:.2f} of {other}" if ratio >= 0.1 else f", {ratio:.4f} of {other}"
            row.append(text)
        rows.append(row)
    return table(title, ["", *(f"{level} client{'s' * (level > 1)}" for level in levels)], rows)


def cost(title: str, cells: Cells, levels: Sequence[int]) -> list[str]:
    """Processor time of a place's processes per chunk, in microseconds, and its ratio to others of the same round.

    Medians, with the least and the most of all rounds: on a machine that others use, those lie far apart.
    """
    rows = []
    for place in _places(cells):
        if place == "direct":
            continue
        row = [place]
        for level in levels:
            mine = [cell.cpu_us for cell in cells[level, place]]
            text = spread(mine, ".1f", " µs")
            for other in ("nginx", "before"):
                if other != place and (level, other) in cells:
                    pairs = zip(mine, cells[level, other], strict=True)
                    text += f", {spread([us / theirs.cpu_us for us, theirs in pairs])} of {other}"
            row.append(text)
        rows.append(row)
    return table(title, ["a chunk", *(f"{level} client{'s' * (level > 1)}" for level in levels)], rows)


def first_token(title: str, cells: Cells) -> list[str]:
    """Median time to the first token in milliseconds, and what it is above direct."""
    direct = _median(cells[1, "direct"], lambda cell: cell.first_ms)
    rows = []
    for place in _places(cells):
        mine = _median(cells[1, place], lambda cell: cell.first_ms)
        rows.append([place, f"{mine:.2f} ms", "" if place == "direct" else f"{mine - direct:+.2f} ms"])
    return table(title, ["", "median", "above direct"], rows)


def write(file: Path, subject: str, lines: Sequence[str]) -> None:
    """Replace a subject's section in the file, or add it; the other sections stay."""
    text = file.read_text("utf-8") if file.exists() else "# Results\n"
    section = f"## {subject}\n\nMeasured on: {machine()}.\n\n" + "\n".join(lines).rstrip() + "\n"
    pattern = re.compile(rf"^## {re.escape(subject)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text, replaced = pattern.subn(lambda _: section + "\n", text)
    if not replaced:
        text = text.rstrip() + "\n\n" + section
    file.write_text(text.rstrip() + "\n", "utf-8")


def spread(values: Sequence[float], form: str = ".2f", unit: str = "") -> str:
    """Return the median of values, with the lowest and the highest behind it."""
    low, middle, high = (format(one, form) for one in (min(values), statistics.median(values), max(values)))
    return f"{middle}{unit} ({low} to {high})"
