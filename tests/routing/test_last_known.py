"""The last known value: fresh while the database answers, at hand without a wait while it does not."""

from __future__ import annotations

import asyncio
import sqlite3
import time

import pytest
from sqlalchemy.exc import OperationalError

from modelyard.routing.last_known import LastKnown
from tests.eventually import eventually


class Source:
    """What is read: a number that counts, an error, or silence."""

    def __init__(self) -> None:
        self.reads = 0
        self.error: Exception | None = None
        self.answers = asyncio.Event()
        self.answers.set()

    async def read(self) -> int:
        self.reads += 1
        read = self.reads
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        return read


async def test_a_change_is_seen_by_the_next_question() -> None:
    source = Source()
    known = LastKnown("it", 0, source.read)
    assert await known.look() == 1
    assert await known.look() == 1
    known.changed()
    assert await known.look() == 2


async def test_an_outage_leaves_the_last_value_without_a_wait_until_it_is_over() -> None:
    source = Source()
    known = LastKnown("it", 0, source.read)
    await known.look()
    source.error = OperationalError("SELECT", {}, sqlite3.OperationalError("unable to open database file"))
    known.changed()
    assert await known.look() == 1
    assert known.is_away
    source.error = None

    async def fresh() -> bool:
        return await known.look() > 1

    await eventually(fresh, "it is read again")
    assert not known.is_away


async def test_a_read_that_hangs_is_waited_for_once_and_by_nobody_else() -> None:
    source = Source()
    known = LastKnown("it", 0, source.read, patience_s=0.2)
    await known.look()
    source.answers.clear()
    known.changed()
    assert await asyncio.gather(*(known.look() for _ in range(50))) == [1] * 50
    began = time.monotonic()
    for _ in range(1000):
        assert await known.look() == 1
    assert time.monotonic() - began < 1000 * 0.2 / 10, "the read that hangs was waited for again"
    assert source.reads == 2
    source.answers.set()
    await eventually(lambda: not known.is_away, "it answers again")
    assert await known.look() == 2
    await known.close()


async def test_a_fault_that_is_no_outage_is_raised() -> None:
    source = Source()
    known = LastKnown("it", 0, source.read)
    wrong = sqlite3.OperationalError("no such table: deployments")
    wrong.sqlite_errorcode = sqlite3.SQLITE_ERROR
    source.error = OperationalError("SELECT", {}, wrong)
    with pytest.raises(OperationalError, match="no such table"):
        await known.look()
    assert not known.is_away
