"""The table of models in the store. Only `models.actions` writes here."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import JSON, BigInteger, String, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from modelyard.db import Base, UtcDateTime, utcnow


class Model(Base):
    """A model or an adapter that is whole, verified and on disk. Other rooms refer to `models.model_id`."""

    __tablename__ = "models"

    id: Mapped[UUID] = mapped_column(Uuid(), primary_key=True, default=uuid4)
    model_id: Mapped[str] = mapped_column(String(200), unique=True)
    adapter: Mapped[bool]
    # Not a foreign key: an adapter may arrive before its base. `actions.delete` keeps a base that is needed.
    base_model_id: Mapped[str | None] = mapped_column(String(200), index=True)
    task: Mapped[str] = mapped_column(String(16))
    #: Where a generative model's chat template comes from (`chat_template.TemplateSource`); NULL where nobody looked.
    chat_template: Mapped[str | None] = mapped_column(String(16))
    revision: Mapped[str] = mapped_column(String(200))
    commit: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger())
    added_at: Mapped[datetime] = mapped_column(UtcDateTime(), default=utcnow)
    path: Mapped[str] = mapped_column(String(400))
    source: Mapped[str] = mapped_column(String(16))
    #: How an adapter that was trained here came to be (`schemas.TrainingOut`); NULL for all else.
    training: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
