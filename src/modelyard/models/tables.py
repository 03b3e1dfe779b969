"""The table of models in the store. Only `models.actions` writes here."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import JSON, BigInteger, Dialect, String, TypeDecorator, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from modelyard.db import Base, UtcDateTime, utcnow
from modelyard.models import adapter_facts
from modelyard.models.adapter_facts import AdapterFacts


class AdapterFactsJson(TypeDecorator[AdapterFacts]):
    """Facts of an adapter as JSON; None for those of another version of the rules, as if nobody had read them."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: AdapterFacts | None, dialect: Dialect) -> Any:
        """Return what the database stores."""
        return None if value is None else adapter_facts.as_json(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> AdapterFacts | None:
        """Return the facts."""
        return adapter_facts.from_json(value)


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
    #: What an adapter carries otherwise than its base (`adapter_rendering`: chat_template, tokenizer); NULL of a model,
    #: and where nobody compared them.
    differs_from_base: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    #: What an adapter's files say of it; NULL for a model, and for an adapter that was added before this was kept. It
    #: may take a MiB, so that a list of models must not bring it: `actions.adapter_facts_of` asks for it.
    adapter_facts: Mapped[AdapterFacts | None] = mapped_column(
        AdapterFactsJson(), deferred=True, deferred_raiseload=True
    )
