"""Texts that can go on are kept for their callers, for a time and up to a number, on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import func, select

from modelyard import db
from modelyard.db import Sessions
from modelyard.foundation import migrate
from modelyard.gateway import continuations
from modelyard.gateway.continuations import Kept, Text, key_of
from modelyard.gateway.tables import Continuation

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
CONFIG = {"top_k": 7, "do_sample": False}


def kept(*ids: int) -> Kept:
    return Kept("poet", "acme/tiny", CONFIG, [Text([256, 1], list(ids), 3), Text([256, 2], [5, 257], 2, True)])


@asynccontextmanager
async def opened(database_url: str, folder: Path) -> AsyncIterator[Sessions]:
    url = db.database_url(database_url, folder)
    migrate(url)
    sessions = Sessions(url)
    try:
        yield sessions
    finally:
        await sessions.close()


async def keep(
    sessions: Sessions, name: str, value: Kept, *, at: datetime = NOW, caller: str = "local", limit: int = 100
) -> None:
    async with sessions.begin() as session:
        await continuations.keep(session, caller, [name], value, at, 60.0, limit)


async def find(sessions: Sessions, name: str, *, at: datetime = NOW, caller: str = "local") -> Kept | None:
    async with sessions.read() as session:
        return await continuations.find(session, caller, [name], at)


async def count(sessions: Sessions) -> int:
    async with sessions.read() as session:
        return await session.scalar(select(func.count()).select_from(Continuation)) or 0


async def test_what_is_kept_is_found_as_it_was_and_the_last_word_counts(database_url: str, tmp_path: Path) -> None:
    async with opened(database_url, tmp_path) as sessions:
        assert await find(sessions, "a") is None
        await keep(sessions, "a", kept(1))
        assert await find(sessions, "a") == kept(1)
        await keep(sessions, "a", kept(1, 2, 3))
        assert await find(sessions, "a") == kept(1, 2, 3)
        assert await count(sessions) == 1
        for _ in range(2):
            async with sessions.begin() as session:
                await continuations.forget(session, "local", ["a"])
        assert await find(sessions, "a") is None


async def test_an_entry_is_its_callers_alone(database_url: str, tmp_path: Path) -> None:
    async with opened(database_url, tmp_path) as sessions:
        await keep(sessions, "a", kept(1), caller="one")
        await keep(sessions, "a", kept(2), caller="other")
        assert await find(sessions, "a", caller="one") == kept(1)
        assert await find(sessions, "a", caller="other") == kept(2)
        assert await find(sessions, "a") is None
        async with sessions.begin() as session:
            await continuations.forget(session, "one", ["a"])
        assert await find(sessions, "a", caller="other") == kept(2)


async def test_an_entry_lives_for_its_time_from_its_last_use_and_is_dropped_then(
    database_url: str, tmp_path: Path
) -> None:
    async with opened(database_url, tmp_path) as sessions:
        await keep(sessions, "a", kept(1))
        await keep(sessions, "b", kept(2), at=NOW + timedelta(seconds=30))
        assert await find(sessions, "a", at=NOW + timedelta(seconds=59)) == kept(1)
        assert await find(sessions, "a", at=NOW + timedelta(seconds=60)) is None
        await keep(sessions, "b", kept(3), at=NOW + timedelta(seconds=70))
        assert await count(sessions) == 1, "the first is gone from the table too"
        assert await find(sessions, "b", at=NOW + timedelta(seconds=129)) == kept(3)


async def test_of_too_many_entries_those_that_were_not_used_for_longest_go(database_url: str, tmp_path: Path) -> None:
    async with opened(database_url, tmp_path) as sessions:
        for number in range(4):
            await keep(sessions, f"n{number}", kept(number), at=NOW + timedelta(seconds=number), limit=3)
        await keep(sessions, "n1", kept(9), at=NOW + timedelta(seconds=5), limit=3)
        await keep(sessions, "n5", kept(5), at=NOW + timedelta(seconds=6), limit=3)
        there = [number for number in range(6) if await find(sessions, f"n{number}", at=NOW) is not None]
        assert there == [1, 3, 5]
        await keep(sessions, "n6", kept(6), at=NOW + timedelta(seconds=7), limit=1)
        assert await count(sessions) == 1, "a smaller limit drops more than one"


def test_a_key_is_made_of_the_ids_and_their_order_and_no_two_requests_share_one() -> None:
    assert key_of(["a", "b"]) == key_of(["a", "b"])
    others = {key_of(["a", "b"]), key_of(["b", "a"]), key_of(["a-b"]), key_of(["a"]), key_of(["a", "b", ""])}
    assert len(others) == 5
    assert len(key_of(["x" * 100_000, "\0"])) == 64
