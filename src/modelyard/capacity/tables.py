"""Tables of the capacity room."""

from __future__ import annotations

import uuid
from enum import StrEnum

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, String, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from modelyard.db import Base, Number
from modelyard.signals import Topic

#: The node that the server itself runs on.
LOCAL = "local"
#: Devices that are no GPU with a number: a node's own memory, and GPUs of which nothing tells how many there are.
MAIN_MEMORY, UNKNOWN_GPU = -1, -2


class Kind(StrEnum):
    """The kind of run that holds memory."""

    ENGINE = "engine"
    TRAINING = "training"
    PLAN = "plan"
    MERGE = "merge"


#: Runs that a request waits for: they end with the server, and no job tells whether they still are.
ONE_SHOT = (Kind.PLAN, Kind.MERGE)


class Reservation(Base):
    """Memory of one device that a run holds: a row for each device. It counts for as long as its job has not ended."""

    TOPICS = ((Topic.MEMORY, None),)
    __tablename__ = "reservations"
    __table_args__ = (Index("ix_reservations_run_id_node_device", "run_id", "node", "device", unique=True),)

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    #: The deployment, the training's job, or the one-shot run.
    run_id: Mapped[uuid.UUID] = mapped_column(Uuid())
    kind: Mapped[str] = mapped_column(String(16))
    #: NULL for a one-shot run: it is removed when that ends, or at the next start of the server.
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    #: Whose it is, in words.
    holder: Mapped[str] = mapped_column(String(300))
    node: Mapped[str] = mapped_column(String(64), default=LOCAL)
    #: Number of the GPU in the order of the PCI bus; below 0: `MAIN_MEMORY` or `UNKNOWN_GPU`.
    device: Mapped[int] = mapped_column(Integer())
    memory_bytes: Mapped[int] = mapped_column(BigInteger())
    #: How much of it the run has taken, so that the device does not count it as free any more.
    taken_bytes: Mapped[int] = mapped_column(BigInteger(), default=0)
