"""Alembic's environment. The server hands the URL over; the command line takes it from the settings."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

import modelyard.deploy.tables
import modelyard.jobs.tables
import modelyard.models.tables
import modelyard.states  # noqa: F401  # all tables, on one metadata
from modelyard.db import Base, UtcDateTime, database_url, sync_engine
from modelyard.settings import load_settings

MIGRATION_LOCK = 0x6D6967726174


def configured_url():  # type: ignore[no-untyped-def]
    handed_over = context.config.attributes.get("url")
    if handed_over is not None:
        return handed_over
    settings = load_settings()
    return database_url(settings.database_url, settings.data_dir)


def render_item(kind, item, _context):  # type: ignore[no-untyped-def]
    """Write our own column type as what it is in the database: a migration must not change when our code does."""
    return "sa.DateTime()" if kind == "type" and isinstance(item, UtcDateTime) else False


def run() -> None:
    engine = sync_engine(configured_url())
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # Two that migrate at the same moment take turns; SQLite's one writing transaction sees to that by itself.
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
    engine.dispose()


run()
