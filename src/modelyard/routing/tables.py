"""Tables of the routing room: users' aliases, and each move of one."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from modelyard.db import Base, Number, UtcDateTime, utcnow
from modelyard.signals import Topic


class Alias(Base):
    """A name that clients may use for a model or adapter in service, whichever deployment serves it."""

    TOPICS = ((Topic.ALIASES, None),)
    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    target: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)


class AliasMove(Base):
    """One move of an alias, so that it can be taken back. None: no row, so that a built-in one follows."""

    __tablename__ = "alias_moves"

    number: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(128), index=True)
    before: Mapped[str | None] = mapped_column(String(200))
    after: Mapped[str | None] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(String(200), default="")
    at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    #: When it was taken back.
    undone_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
