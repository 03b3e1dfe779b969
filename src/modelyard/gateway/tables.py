"""Tables of the gateway: what must be remembered between two requests, so that any process can answer the second."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Index, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from modelyard.db import Base, UtcDateTime


class Continuation(Base):
    """Texts that stopped before their end and can go on. Written by `continuations` alone."""

    __tablename__ = "continuations"
    __table_args__ = (Index("ix_continuations_used_at", "used_at"), Index("ix_continuations_expires_at", "expires_at"))

    #: Whose it is: nobody else finds it.
    caller: Mapped[str] = mapped_column(String(64), primary_key=True)
    #: SHA-256 of the request's ids in their order.
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    #: The name that was asked for; none where the current deployment was meant.
    asked_model: Mapped[str | None] = mapped_column(String(200))
    #: The model whose tokens these are.
    model_id: Mapped[str] = mapped_column(String(200))
    config: Mapped[dict[str, Any]] = mapped_column(JSON())
    #: JSON, one object per prompt: {"prompt_ids", "ids", "given", "is_finished"}. As bytes, since a batch may have
    #: millions of tokens, and what writes a JSON column would hold the server up for a second.
    texts: Mapped[bytes] = mapped_column(LargeBinary())
    used_at: Mapped[datetime] = mapped_column(UtcDateTime())
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime())
