"""The curve of a training: what it measured, a row for each step, written as it comes and read thinned.

A step that is measured twice, by its loss and by the validation at its end, or again after a restart, is one row: what
is said last of a figure counts, and what is not said stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import utcnow
from modelyard.finetune.tables import FinetunePoint

#: What a report of the trainer may have, beside the step.
FIGURES = ("epoch", "loss", "validation_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "memory_bytes")
_WHOLE = ("tokens", "memory_bytes")


def point_of(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a report says of its step, without what is no number; None if it names no step."""
    step = report.get("step")
    if type(step) is not int or step < 0:
        return None
    point: dict[str, Any] = {"step": step}
    for name in FIGURES:
        value = report.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            point[name] = int(value) if name in _WHOLE else float(value)
    return point


def merged(points: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one point for each step, in the order of the steps: of each figure what was said last."""
    by_step: dict[int, dict[str, Any]] = {}
    for point in points:
        by_step.setdefault(point["step"], {}).update(point)
    return [by_step[step] for step in sorted(by_step)]


async def write(session: AsyncSession, finetune_id: UUID, points: Iterable[Mapping[str, Any]]) -> None:
    """Write points. Safe to repeat."""
    now = utcnow()
    rows = [
        {"finetune_id": finetune_id, "at": now, "step": point["step"], **{name: point.get(name) for name in FIGURES}}
        for point in merged(points)
    ]
    if not rows:
        return
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    statement = insert(FinetunePoint)
    kept = {name: func.coalesce(statement.excluded[name], getattr(FinetunePoint, name)) for name in FIGURES}
    await session.execute(
        statement.on_conflict_do_update(
            index_elements=["finetune_id", "step"], set_={**kept, "at": statement.excluded.at}
        ),
        rows,
    )


async def read(session: AsyncSession, finetune_id: UUID, most: int) -> tuple[list[FinetunePoint], int]:
    """Return a training's points by step, evenly thinned to `most` (at least 2), and how many there are.

    The first and the last are always among them.
    """
    mine = FinetunePoint.finetune_id == finetune_id
    total = await session.scalar(select(func.count()).where(mine)) or 0
    query = select(FinetunePoint).where(mine).order_by(FinetunePoint.step)
    if total > most:
        place = func.row_number().over(order_by=FinetunePoint.step).label("place")
        numbered = select(FinetunePoint.number, place).where(mine).subquery()
        wanted = [1 + index * (total - 1) // (most - 1) for index in range(most)]
        query = query.join(numbered, numbered.c.number == FinetunePoint.number).where(numbered.c.place.in_(wanted))
    return list((await session.scalars(query)).all()), total
