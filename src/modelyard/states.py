"""State machines on rows: one table of legal moves, one function that moves, one row of history per move.

A machine is a `StrEnum` of states with its `MOVES`. `move` does a single conditional UPDATE, so that two
writers cannot both win, and records the move in `state_changes` in the same transaction. Only a runner or a
supervisor moves; a request writes a wish into a column of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import String, Uuid, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.sql import ColumnElement

from modelyard.db import Base, Number, UtcDateTime, utcnow
from modelyard.errors import IllegalMove
from modelyard.signals import ROW_ID

Moves = Mapping[Any, frozenset[Any]]


class StateChange(Base):
    """One move of one row: the history that explains how it came to be where it is."""

    __tablename__ = "state_changes"

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    table: Mapped[str] = mapped_column(String(32))
    row_id: Mapped[Any] = mapped_column(Uuid(), index=True)
    to: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(default="")
    at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)


def sources(moves: Moves, to: StrEnum) -> frozenset[Any]:
    """Return the states from which `to` may be reached in one move."""
    return frozenset(state for state, targets in moves.items() if to in targets)


async def move(
    session: AsyncSession,
    row: type[Any],
    row_id: object,
    column: str,
    moves: Moves,
    to: StrEnum,
    reason: str = "",
    **values: object,
) -> None:
    """Move the row with `id == row_id` to the state `to`, setting other columns with it.

    Raises:
        IllegalMove: the row is gone, or in a state from which `moves` has no way to `to`.
    """
    legal: ColumnElement[bool] = getattr(row, column).in_(sources(moves, to))
    result = await session.execute(
        update(row).where(row.id == row_id, legal).values({column: to, **values}).returning(row.id),
        execution_options={ROW_ID: row_id},
    )
    if result.first() is None:
        raise IllegalMove(f"{row.__tablename__} {row_id} cannot become {to} now.")
    session.add(StateChange(table=row.__tablename__, row_id=row_id, to=to, reason=reason))


def drawn_moves(docstring: str) -> dict[str, set[str]]:
    """Read the graph that a state class draws in its docstring: lines of `A -> B | C`."""
    graph: dict[str, set[str]] = {}
    for line in docstring.splitlines():
        if "->" in line:
            source, targets = line.split("->", 1)
            graph[source.strip()] = {name.strip() for name in targets.split("|")}
    return graph
