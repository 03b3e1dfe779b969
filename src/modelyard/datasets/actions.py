"""Actions on datasets, as functions on a session that never commit."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import delete as delete_from
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.datasets.tables import Dataset, Leftover
from modelyard.errors import DatasetInUse, DatasetNotFound


async def all_datasets(session: AsyncSession) -> Sequence[Dataset]:
    """Return the datasets, oldest first."""
    return (await session.scalars(select(Dataset).order_by(Dataset.number))).all()


async def get(session: AsyncSession, dataset_id: UUID, *, param: str = "dataset_id") -> Dataset:
    """Return a dataset.

    Raises:
        DatasetNotFound: there is none; `param` is what named it.
    """
    dataset = (await session.scalars(select(Dataset).where(Dataset.id == dataset_id))).first()
    if dataset is None:
        raise DatasetNotFound(dataset_id, param=param)
    return dataset


async def note(session: AsyncSession, dataset_id: UUID) -> None:
    """Note that objects of this dataset may lie in the storage without a row of it."""
    session.add(Leftover(id=dataset_id))
    await session.flush()


async def strike(session: AsyncSession, dataset_id: UUID) -> None:
    """Strike the note: there are no such objects any more. Safe to repeat."""
    await session.execute(delete_from(Leftover).where(Leftover.id == dataset_id))


async def add(session: AsyncSession, dataset: Dataset) -> None:
    """Insert the row of a dataset whose objects are stored, in place of its note.

    Raises:
        DatasetNotFound: its parent has been deleted meanwhile.
    """
    if dataset.parent_id is not None:
        await get(session, dataset.parent_id, param="parent_id")
    session.add(dataset)
    await session.flush()
    await strike(session, dataset.id)


async def delete(session: AsyncSession, dataset_id: UUID) -> Dataset:
    """Delete a dataset's row, note that its objects are to go, and return what it said.

    Raises:
        DatasetNotFound: there is none.
        DatasetInUse: a row of a higher room refers to it.
    """
    dataset = await get(session, dataset_id)
    await session.delete(dataset)
    try:
        await session.flush()
    except IntegrityError:
        raise DatasetInUse(
            f"Dataset {dataset_id} is in use by a training: interrupt that first, then delete the dataset.",
            param="dataset_id",
        ) from None
    await note(session, dataset_id)
    return dataset


async def leftovers(session: AsyncSession) -> Sequence[UUID]:
    """Return the datasets of which objects may be left. Before the server serves, none of them is on its way."""
    return (await session.scalars(select(Leftover.id).order_by(Leftover.noted_at))).all()
