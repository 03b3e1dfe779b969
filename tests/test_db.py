"""Transactions keep their promises on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from random import Random

import pytest
from sqlalchemy import ForeignKey, MetaData, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from modelyard.db import Base, Number, Sessions, UtcDateTime, database_url, exclusively, utcnow

DATA = Path("/data")


class Tables(DeclarativeBase):
    """Tables of these tests alone, with the names that the real ones would get."""

    metadata = MetaData(naming_convention=Base.metadata.naming_convention)


class Counter(Tables):
    __tablename__ = "counters"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(default=0)


class Step(Tables):
    __tablename__ = "steps"

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    counter_id: Mapped[int] = mapped_column(ForeignKey("counters.id", ondelete="RESTRICT"))
    at: Mapped[datetime | None] = mapped_column(UtcDateTime())


@asynccontextmanager
async def opened(configured: str) -> AsyncIterator[Sessions]:
    sessions = Sessions(database_url(configured, DATA))
    try:
        async with sessions.begin() as session:
            await session.run_sync(lambda sync: Tables.metadata.create_all(sync.connection()))
            if await session.get(Counter, 1) is None:
                session.add(Counter(id=1))
        yield sessions
    finally:
        await sessions.close()


async def value(sessions: Sessions) -> int | None:
    async with sessions.read() as session:
        return await session.scalar(select(Counter.value).where(Counter.id == 1))


@pytest.mark.parametrize("lock", ["row", "exclusively"])
async def test_no_update_is_lost_between_tasks_that_read_modify_and_write(database_url: str, lock: str) -> None:
    async with opened(database_url) as sessions, opened(database_url) as neighbour:

        async def count_up(sessions: Sessions) -> None:
            for _ in range(50):
                async with sessions.begin() as session:
                    query = select(Counter).where(Counter.id == 1)
                    if lock == "exclusively":
                        await exclusively(session, "counter 1")
                    else:
                        query = query.with_for_update()
                    counter = (await session.scalars(query)).one()
                    await asyncio.sleep(0)
                    counter.value += 1

        # A second program on the same database shares none of our connections, and none of our queues.
        await asyncio.gather(*(count_up(either) for either in (sessions, neighbour) for _ in range(4)))
        assert await value(sessions) == 400


async def test_an_exception_rolls_the_whole_transaction_back(database_url: str) -> None:
    async with opened(database_url) as sessions:

        async def fail_halfway() -> None:
            async with sessions.begin() as session:
                (await session.get_one(Counter, 1)).value = 7
                await session.flush()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail_halfway()
        assert await value(sessions) == 0


async def test_a_cancelled_transaction_changes_nothing_and_blocks_nobody(database_url: str) -> None:
    async with opened(database_url) as sessions:
        for _ in range(10):
            flushed = asyncio.Event()

            async def half(flushed: asyncio.Event = flushed) -> None:
                async with sessions.begin() as session:
                    (await session.get_one(Counter, 1, with_for_update=True)).value += 100
                    await session.flush()
                    flushed.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(half())
            await asyncio.wait_for(flushed.wait(), 30)
            task.cancel()
            await asyncio.wait([task])
            async with asyncio.timeout(30), sessions.begin() as session:
                (await session.get_one(Counter, 1, with_for_update=True)).value += 1
        assert await value(sessions) == 10


async def test_objects_stay_usable_after_their_transaction(database_url: str) -> None:
    async with opened(database_url) as sessions:
        async with sessions.begin() as session:
            counter = await session.get_one(Counter, 1)
            counter.value = 3
        assert counter.value == 3


async def test_a_moment_comes_back_as_the_same_moment_in_utc(database_url: str) -> None:
    elsewhere = datetime(2026, 3, 29, 2, 30, 0, 123456, timezone(timedelta(hours=5, minutes=45)))
    async with opened(database_url) as sessions:
        async with sessions.begin() as session:
            session.add_all([Step(counter_id=1, at=elsewhere), Step(counter_id=1, at=None)])
        async with sessions.read() as session:
            first, second = (await session.scalars(select(Step.at).order_by(Step.number))).all()
            later = await session.scalar(select(func.count()).where(Step.at > elsewhere - timedelta(microseconds=1)))
            never = await session.scalar(select(func.count()).where(Step.at > elsewhere))
    assert first is not None
    assert first == elsewhere
    assert (first.tzinfo, first.hour, first.minute, first.microsecond) == (UTC, 20, 45, 123456)
    assert second is None
    assert (later, never) == (1, 0)
    assert utcnow().tzinfo is UTC


async def test_a_moment_without_a_zone_is_refused(database_url: str) -> None:
    async with opened(database_url) as sessions:
        with pytest.raises(StatementError, match="needs a zone"):
            async with sessions.begin() as session:
                session.add(Step(counter_id=1, at=datetime(2026, 1, 1)))


async def test_a_row_cannot_point_to_one_that_is_not_there(database_url: str) -> None:
    async with opened(database_url) as sessions:
        with pytest.raises(IntegrityError):
            async with sessions.begin() as session:
                session.add(Step(counter_id=99))
        async with sessions.begin() as session:
            session.add(Step(counter_id=1))
        with pytest.raises(IntegrityError):
            async with sessions.begin() as session:
                await session.delete(await session.get_one(Counter, 1))
        assert await value(sessions) == 0


async def test_rows_are_numbered_by_the_database(database_url: str) -> None:
    async with opened(database_url) as sessions:
        async with sessions.begin() as session:
            session.add_all([Step(counter_id=1) for _ in range(3)])
        async with sessions.read() as session:
            assert list(await session.scalars(select(Step.number).order_by(Step.number))) == [1, 2, 3]


async def test_an_open_read_neither_blocks_a_writer_nor_sees_what_it_does(database_url: str) -> None:
    async with opened(database_url) as sessions, asyncio.timeout(30):
        async with sessions.read() as reading:
            before = await reading.scalar(select(Counter.value))
            async with sessions.begin() as session:
                (await session.get_one(Counter, 1)).value = 5
            reading.expire_all()
            assert await reading.scalar(select(Counter.value)) == before == 0
        assert await value(sessions) == 5


async def test_an_open_write_does_not_block_a_reader(database_url: str) -> None:
    async with opened(database_url) as sessions, asyncio.timeout(30):
        async with sessions.begin() as session:
            (await session.get_one(Counter, 1)).value = 5
            await session.flush()
            assert await value(sessions) == 0
        assert await value(sessions) == 5


async def test_writing_in_a_read_is_an_error_and_not_lost_in_silence(database_url: str) -> None:
    async with opened(database_url) as sessions:
        with pytest.raises(DBAPIError, match=r"(?i)read-?only"):
            async with sessions.read() as session:
                await session.execute(insert(Counter).values(id=2))
        # The connection goes back to where writers take theirs from.
        async with sessions.begin() as session:
            await session.execute(insert(Counter).values(id=2))


async def test_more_tasks_than_connections_wait_their_turn(database_url: str) -> None:
    async with opened(database_url) as sessions:
        assert await asyncio.gather(*(value(sessions) for _ in range(60))) == [0] * 60


async def test_tasks_cancelled_at_any_point_of_a_transaction_leave_no_lock_behind(database_url: str) -> None:
    async with opened(database_url) as sessions:

        async def work() -> None:
            while True:
                async with sessions.begin() as session:
                    await session.execute(insert(Step).values(counter_id=1))
                    await session.scalar(select(func.count()).select_from(Step))

        random = Random(20)
        for _ in range(60):
            tasks = [asyncio.create_task(work()) for _ in range(3)]
            await asyncio.sleep(random.random() * 0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            async with asyncio.timeout(10):
                async with sessions.begin() as session:
                    await session.execute(insert(Step).values(counter_id=1))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_every_connection_to_sqlite_has_its_log_and_its_foreign_keys(database_url: str) -> None:
    async with opened(database_url) as sessions:
        for context in (sessions.begin, sessions.read):
            async with context() as session:
                assert await session.scalar(text("PRAGMA journal_mode")) == "wal"
                assert await session.scalar(text("PRAGMA foreign_keys")) == 1


@pytest.mark.parametrize(("configured", "expected"), [
    ("", "sqlite+aiosqlite:////data/modelyard.db"),
    ("sqlite:////var/x.db", "sqlite+aiosqlite:////var/x.db"),
    ("postgres://u:p%40w@h/n", "postgresql+psycopg://u:p%40w@h/n"),
    ("postgresql://u@/n?host=/run", "postgresql+psycopg://u@/n?host=%2Frun"),
    ("postgresql+psycopg://h/n", "postgresql+psycopg://h/n"),
])  # fmt: skip
def test_the_url_of_the_database_gets_the_driver_that_we_use(configured: str, expected: str) -> None:
    assert database_url(configured, DATA).render_as_string(hide_password=False) == expected
