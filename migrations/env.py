"""Alembic's environment. The server hands the URL over; the command line takes it from the settings."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from sqlalchemy import URL, text

import modelyard.datasets.tables
import modelyard.deploy.tables
import modelyard.finetune.tables
import modelyard.gateway.tables
import modelyard.jobs.tables
import modelyard.models.tables
import modelyard.routing.tables
import modelyard.states  # noqa: F401  # all tables, on one metadata
from modelyard.db import Base, UtcDateTime, sync_engine
from modelyard.foundation import configured_database
from modelyard.settings import load_settings

MIGRATION_LOCK = 0x6D6967726174


def configured_url() -> URL:
    handed_over: URL | None = context.config.attributes.get("url")
    return configured_database(load_settings()) if handed_over is None else handed_over


def render_item(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """Write our own column type as what it is in the database: a migration must not change when our code does."""
    return "sa.DateTime()" if kind == "type" and isinstance(item, UtcDateTime) else False


def run() -> None:
    engine = sync_engine(configured_url())
    try:
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                # Two that migrate at the same moment take turns. On SQLite its one writing transaction sees to that.
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                render_as_batch=True,  # SQLite changes a table by copying it
                render_item=render_item,
                transactional_ddl=True,
            )
            with context.begin_transaction():
                context.run_migrations()
    finally:
        engine.dispose()


run()
