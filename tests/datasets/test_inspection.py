"""Small files are validated here, large ones by a child; nobody can tell from what is found."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from modelyard.datasets import inspection
from modelyard.datasets.inspection import SMALL_BYTES, Inspection
from modelyard.datasets.validator import Found
from modelyard.errors import InvalidDataset, Unavailable
from modelyard.filters import Filter
from tests.datasets.forms import bad_at, questions

MIB = 1024 * 1024


@asynccontextmanager
async def inspecting() -> AsyncIterator[Inspection]:
    found = Inspection(MIB)
    try:
        yield found
    finally:
        await found.close()


async def found_in(data: bytes, size: int = 300_000) -> Found:
    async with inspecting() as inspected:
        for start in range(0, len(data), size):
            await inspected.feed(data[start : start + size])
        return await inspected.finish()


def children() -> list[int]:
    """Return the processes whose parent is this one."""
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text("ascii").split()]


@pytest.mark.parametrize("data", [questions(70_000), b"\xef\xbb\xbf" + bad_at([1, 3000, 69_000], 70_000)[:-1]])
async def test_a_child_finds_what_the_server_itself_finds(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(data) > SMALL_BYTES
    by_child = await found_in(data)
    monkeypatch.setattr(inspection, "SMALL_BYTES", len(data))
    before = children()
    here = await found_in(data)
    assert children() == before
    assert here.report == by_child.report
    assert here.report is not None
    assert here.report["lines"] == 70_000
    assert [entry[1:] for entry in by_child.index][:1] == [(0, 0)]
    assert len(by_child.index) == len(here.index) == 2


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "dataset_empty"),
        (b"\n" * 100, "dataset_empty"),
        (b"\n" * (SMALL_BYTES + MIB), "dataset_empty"),
        (b"%PDF-1.7\n", "not_jsonl"),
        (b"%PDF-1.7\n" + bytes(2 * SMALL_BYTES), "not_jsonl"),
    ],
)
async def test_what_is_no_dataset_is_refused_here_and_by_a_child(data: bytes, code: str) -> None:
    before = children()
    with pytest.raises(InvalidDataset) as caught:
        await found_in(data)
    assert caught.value.code == code
    assert children() == before


@pytest.mark.parametrize("rest", [0, 100 * MIB])
async def test_a_child_that_is_killed_is_said_whenever_it_happens(rest: int) -> None:
    before = set(children())
    async with inspecting() as inspected:
        await inspected.feed(questions(70_000))
        (child,) = set(children()) - before
        os.kill(child, signal.SIGKILL)

        async def go_on() -> None:
            await inspected.feed(bytes(rest))
            await inspected.finish()

        with pytest.raises(Unavailable, match="its process ended early: killed by SIGKILL") as caught:
            await go_on()
    assert caught.value.code == "validation_failed"
    assert set(children()) == before


async def test_no_process_to_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(Unavailable, match=r"no process for it can be started \(No such file or directory\)"):
        await found_in(questions(70_000))


@pytest.mark.parametrize(
    "data",
    [b"x\n" * 1000, b'{"messages":[' + b"1," * 200_000 + b"1]}\n", questions(1) + b"\n" * 200_000],
    ids=["bad lines", "a long line", "many lines"],
)
async def test_a_small_file_that_is_much_work_goes_to_a_child_all_the_same(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(data) < SMALL_BYTES
    started: list[str] = []

    class Counted(Filter):
        def __init__(self, program: str) -> None:
            started.append(program)
            super().__init__(program)

    monkeypatch.setattr(inspection, "Filter", Counted)
    found = await found_in(data)
    assert found.report is not None
    assert found.report["stopped_at_line"] is None
    assert len(started) == 1


async def test_a_file_with_too_many_problems_is_refused_by_the_child_with_its_report() -> None:
    for data in (b"x\n" * 100_000, b"x\n" * (SMALL_BYTES + 1)):
        with pytest.raises(InvalidDataset, match="Too much is wrong") as refused:
            await found_in(data)
        assert refused.value.report is not None
        assert refused.value.report["stopped_at_line"] == 10_001
