"""Writes and reads reservations, as functions that never commit."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.capacity.ledger import Allocation, Held, Ledger
from modelyard.capacity.tables import LOCAL, ONE_SHOT, Kind, Reservation
from modelyard.hardware import GIB
from modelyard.jobs.tables import ACTIVE, Job
from modelyard.signals import NOTIFIES

#: What a run takes of its own leaves others as much as before.
_LEFT_AS_BEFORE = {NOTIFIES: ()}


async def ledger(session: AsyncSession, budget_gib: float | None, node: str = LOCAL) -> Ledger:
    """Return all that is held of a node, oldest first.

    Args:
        session: A transaction.
        budget_gib: The most that all runs together may take of each device (MODELYARD_ENGINE_MEMORY_GIB).
        node: The node.
    """
    query = (
        select(Reservation)
        .outerjoin(Job, Job.id == Reservation.job_id)
        .where(Reservation.node == node, or_(Reservation.job_id.is_(None), Job.status.in_(ACTIVE)))
        .order_by(Reservation.number)
    )
    held = [
        Held(one.run_id, Kind(one.kind), one.job_id, one.holder, one.device, one.memory_bytes, one.taken_bytes)
        for one in (await session.scalars(query)).all()
    ]
    return Ledger(held, int(budget_gib * GIB) if budget_gib else None)


async def reserve(
    session: AsyncSession, run_id: UUID, kind: Kind, holder: str, allocation: Allocation, job_id: UUID | None = None
) -> None:
    """Reserve memory for a run, which has taken none yet; it replaces what was reserved for it before."""
    await release(session, run_id)
    session.add_all(
        Reservation(
            run_id=run_id, kind=kind, job_id=job_id, holder=holder[:300], node=allocation.node, device=device,
            memory_bytes=memory_bytes, taken_bytes=0,
        )
        for device, memory_bytes in allocation.devices.items()
    )  # fmt: skip
    await session.flush()


async def note_taken(session: AsyncSession, run_id: UUID, taken_bytes: int) -> None:
    """Note how much memory a run has taken of each of its devices by now."""
    await session.execute(
        update(Reservation).where(Reservation.run_id == run_id).values(taken_bytes=max(0, taken_bytes)),
        execution_options=_LEFT_AS_BEFORE,
    )


async def note_all_taken(session: AsyncSession, run_id: UUID) -> None:
    """Note that a run has taken all that it was given."""
    await session.execute(
        update(Reservation).where(Reservation.run_id == run_id).values(taken_bytes=Reservation.memory_bytes),
        execution_options=_LEFT_AS_BEFORE,
    )


async def release(session: AsyncSession, run_id: UUID) -> None:
    """Give back what a run holds. Safe to repeat."""
    await session.execute(delete(Reservation).where(Reservation.run_id == run_id))


async def release_one_shot_runs(session: AsyncSession) -> None:
    """Give back what one-shot runs of an earlier server held. For the start of a server."""
    await session.execute(delete(Reservation).where(Reservation.kind.in_(ONE_SHOT)))
