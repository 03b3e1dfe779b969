"""The tables of datasets. Only `datasets.actions` writes here."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import BigInteger, String, Text, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from modelyard.db import Base, Number, UtcDateTime, utcnow


class Dataset(Base):
    """A dataset that is whole and stored. Other rooms refer to `datasets.id`."""

    __tablename__ = "datasets"

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    id: Mapped[UUID] = mapped_column(Uuid(), unique=True, default=uuid4)
    name: Mapped[str] = mapped_column(String(255))
    description: Mapped[str | None] = mapped_column(Text())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    size_bytes: Mapped[int] = mapped_column(BigInteger())
    sha256: Mapped[str] = mapped_column(String(64))
    format: Mapped[str] = mapped_column(String(32))
    rows: Mapped[int] = mapped_column(BigInteger())
    skipped_lines: Mapped[int] = mapped_column(BigInteger())
    # Kinds of file (`recognition.FileKind`), outermost first, with a plus between them; null: stored as it came.
    converted_from: Mapped[str | None] = mapped_column(String(64))
    # Not a foreign key: a dataset outlives the one that it was made from.
    parent_id: Mapped[UUID | None] = mapped_column(Uuid(), index=True)

    @property
    def s3_path(self) -> str:
        """The key of the object that describes it."""
        return metadata_key(self.id)

    @property
    def file_name(self) -> str:
        """The name under which it is saved: a converted file is JSONL, whatever it was."""
        if self.converted_from is None or self.name.endswith(".jsonl"):
            return self.name
        return f"{self.name.removesuffix('.gz').removesuffix('.zst').rpartition('.')[0] or self.name}.jsonl"

    @property
    def data_key(self) -> str:
        """The key of the object that is the file."""
        return data_key(self.id)


class Leftover(Base):
    """Objects of this dataset may lie in the storage, and are to be removed: it is on its way in or out."""

    __tablename__ = "dataset_leftovers"

    id: Mapped[UUID] = mapped_column(Uuid(), primary_key=True)
    noted_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)


def prefix(dataset_id: UUID) -> str:
    """Return what the keys of all objects of a dataset begin with."""
    return f"{dataset_id}/"


def metadata_key(dataset_id: UUID) -> str:
    """Return the key of the object with what is known of a dataset."""
    return f"{prefix(dataset_id)}metadata.json"


def data_key(dataset_id: UUID) -> str:
    """Return the key of a dataset's file. The file's own name never becomes a key."""
    return f"{prefix(dataset_id)}data.jsonl"
