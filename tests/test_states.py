"""A row moves along its table of legal moves only, once for each of two that want to, and leaves a trace."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path

import pytest
from sqlalchemy import MetaData, String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from modelyard.db import Sessions, database_url, utcnow
from modelyard.errors import IllegalMove
from modelyard.states import StateChange, drawn_moves, move, sources


class Door(StrEnum):
    """A door.

    OPEN   -> CLOSED
    CLOSED -> OPEN | LOCKED
    LOCKED -> CLOSED
    """

    OPEN = "OPEN"
    CLOSED = "CLOSED"
    LOCKED = "LOCKED"
    WALLED = "WALLED"


MOVES: dict[Door, frozenset[Door]] = {
    Door.OPEN: frozenset({Door.CLOSED}),
    Door.CLOSED: frozenset({Door.OPEN, Door.LOCKED}),
    Door.LOCKED: frozenset({Door.CLOSED}),
}
LEGAL = [(source, target) for source, targets in MOVES.items() for target in sorted(targets)]
ILLEGAL = [(source, target) for source in Door for target in Door if (source, target) not in LEGAL]


class Tables(DeclarativeBase):
    metadata = MetaData()


class DoorRow(Tables):
    __tablename__ = "doors"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    state: Mapped[Door] = mapped_column(String(16))
    keeper: Mapped[str] = mapped_column(default="nobody")


@asynccontextmanager
async def doors(configured: str, *states: Door) -> AsyncIterator[tuple[Sessions, list[uuid.UUID]]]:
    """A database with a door in each of the states."""
    sessions = Sessions(database_url(configured, Path("/data")))
    rows = [DoorRow(id=uuid.uuid4(), state=state) for state in states]
    try:
        async with sessions.begin() as session:
            connection = await session.connection()
            await connection.run_sync(Tables.metadata.create_all)
            await connection.run_sync(StateChange.metadata.tables["state_changes"].create)
            session.add_all(rows)
        yield sessions, [row.id for row in rows]
    finally:
        await sessions.close()


async def seen(sessions: Sessions, door: uuid.UUID) -> tuple[str, str]:
    async with sessions.read() as session:
        row = await session.get_one(DoorRow, door)
        return row.state, row.keeper


async def history(sessions: Sessions) -> list[StateChange]:
    async with sessions.read() as session:
        return list(await session.scalars(select(StateChange).order_by(StateChange.number)))


async def test_every_legal_move_is_made_and_written_down_with_its_reason(database_url: str) -> None:
    async with doors(database_url, *(source for source, _ in LEGAL)) as (sessions, ids):
        before = utcnow()
        for (_, target), door in zip(LEGAL, ids, strict=True):
            async with sessions.begin() as session:
                await move(session, DoorRow, door, "state", MOVES, target, f"to {target}", keeper="me")
        for (_, target), door in zip(LEGAL, ids, strict=True):
            assert await seen(sessions, door) == (target, "me")
        changes = await history(sessions)
        assert [(change.table, change.row_id, change.to, change.reason) for change in changes] == [
            ("doors", door, target, f"to {target}") for (_, target), door in zip(LEGAL, ids, strict=True)
        ]
        assert all(before <= change.at <= utcnow() for change in changes)


async def test_no_illegal_move_is_made_and_nothing_is_written_down(database_url: str) -> None:
    async with doors(database_url, *(source for source, _ in ILLEGAL)) as (sessions, ids):
        for (_, target), door in zip(ILLEGAL, ids, strict=True):
            with pytest.raises(IllegalMove, match=f"doors {door} cannot become {target} now"):
                async with sessions.begin() as session:
                    await move(session, DoorRow, door, "state", MOVES, target, keeper="me")
        for (source, _), door in zip(ILLEGAL, ids, strict=True):
            assert await seen(sessions, door) == (source, "nobody")
        assert await history(sessions) == []


async def test_a_row_that_is_gone_cannot_move(database_url: str) -> None:
    async with doors(database_url, Door.OPEN) as (sessions, [door]):
        with pytest.raises(IllegalMove):
            async with sessions.begin() as session:
                await move(session, DoorRow, uuid.uuid4(), "state", MOVES, Door.CLOSED)
        assert await seen(sessions, door) == (Door.OPEN, "nobody")


async def test_of_two_that_move_a_row_at_the_same_moment_one_wins(database_url: str) -> None:
    async with doors(database_url, *[Door.CLOSED] * 10) as (sessions, ids):

        async def attempt(door: uuid.UUID, target: Door, keeper: str) -> str | None:
            try:
                async with sessions.begin() as session:
                    # Both have looked before either moves: on PostgreSQL their transactions overlap.
                    await session.get_one(DoorRow, door)
                    await asyncio.sleep(0.01)
                    await move(session, DoorRow, door, "state", MOVES, target, keeper, keeper=keeper)
                    await asyncio.sleep(0.01)
            except IllegalMove:
                return None
            return keeper

        for door in ids:
            first, second = await asyncio.gather(
                attempt(door, Door.LOCKED, "locksmith"), attempt(door, Door.OPEN, "porter")
            )
            assert (first is None) != (second is None)
            winner = first or second
            assert await seen(sessions, door) == (Door.LOCKED if first else Door.OPEN, winner)
            assert [change.reason for change in await history(sessions) if change.row_id == door] == [winner]


async def test_a_move_and_its_history_are_undone_together(database_url: str) -> None:
    async with doors(database_url, Door.OPEN) as (sessions, [door]):

        async def fail_halfway() -> None:
            async with sessions.begin() as session:
                await move(session, DoorRow, door, "state", MOVES, Door.CLOSED)
                await session.flush()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail_halfway()
        assert await seen(sessions, door) == (Door.OPEN, "nobody")
        assert await history(sessions) == []


async def test_a_row_that_was_read_before_the_move_shows_its_new_state(database_url: str) -> None:
    async with doors(database_url, Door.OPEN) as (sessions, [door]):
        async with sessions.begin() as session:
            row = await session.get_one(DoorRow, door)
            await move(session, DoorRow, door, "state", MOVES, Door.CLOSED, keeper="me")
            assert (row.state, row.keeper) == (Door.CLOSED, "me")
        assert (row.state, row.keeper) == (Door.CLOSED, "me")


def test_the_sources_of_a_state_are_read_off_the_table() -> None:
    assert sources(MOVES, Door.CLOSED) == {Door.OPEN, Door.LOCKED}
    assert sources(MOVES, Door.LOCKED) == {Door.CLOSED}
    assert sources(MOVES, Door.WALLED) == frozenset()


def test_a_drawn_graph_is_read_back_as_the_table_that_it_draws() -> None:
    assert drawn_moves(Door.__doc__ or "") == {source: set(targets) for source, targets in MOVES.items()}
    assert drawn_moves((Door.__doc__ or "").replace("| LOCKED", "")) != MOVES
