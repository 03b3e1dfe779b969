"""The database: one declarative base, one way to open a transaction, one way to migrate.

`Sessions.begin()` is a transaction that writes, whose commit notifies those who wait for what it wrote (`signals`);
`Sessions.read()` is a snapshot to read from. Both run on SQLite (WAL, one writing connection, `BEGIN IMMEDIATE`) and on
PostgreSQL (psycopg 3). SQLAlchemy's defaults for SQLite lose updates without an error: its driver opens the transaction
only at the first write, after the row was read. Hence the pragmas and the explicit BEGIN below.

Rooms declare their tables on `Base`; this module knows none of them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import BigInteger, DateTime, Dialect, Integer, MetaData, create_engine, event, make_url, text
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, ORMExecuteState, Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.expression import UpdateBase
from sqlalchemy.types import TypeDecorator

from modelyard.signals import NOTIFIES, ROW_ID, Signals, Topic, Topics

BUSY_TIMEOUT_MS = 15_000
READERS = 4
#: A machine that vanished must show as a lost connection within seconds: one of them holds the server's lock, and what
#: waits for an answer would wait for hours.
_LOST_CONNECTIONS = {
    "connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}  # fmt: skip


class Base(DeclarativeBase):
    """Base of every table; the naming convention lets Alembic name what it drops, on both databases."""

    #: What a write to a row of the table notifies; nothing: nobody waits for it.
    TOPICS: ClassVar[Topics] = ()
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite keeps no zone, so it is stored without one and handed out with one."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            # It would be taken for the machine's local time, and be wrong wherever that is not UTC.
            raise ValueError(f"a moment needs a zone: {value}")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None else None


# A row number that grows for ever. SQLite numbers rows by itself only in a column of type INTEGER.
Number = BigInteger().with_variant(Integer(), "sqlite")


def utcnow() -> datetime:
    """The present moment, with its zone."""
    return datetime.now(UTC)


def database_url(configured: str, data_dir: Path) -> URL:
    """Return the async URL of the configured database; empty means a SQLite file in the data folder."""
    if not configured:
        return URL.create("sqlite+aiosqlite", database=str(data_dir / "modelyard.db"))
    url = make_url(configured.replace("postgres://", "postgresql://", 1))
    driver = "sqlite+aiosqlite" if url.get_backend_name() == "sqlite" else "postgresql+psycopg"
    return url.set(drivername=driver)


class Sessions:
    """Opens transactions. Use as `async with sessions.begin() as session`.

    Objects stay usable after the transaction closed (`expire_on_commit=False`). `signals` has those who wait for what
    transactions write.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self.signals = Signals()
        self._writer, self._reader = _engines(url)
        self._write = async_sessionmaker(
            self._writer, expire_on_commit=False, sync_session_class=_Writing, info={_SIGNALS: self.signals}
        )
        self._read = async_sessionmaker(self._reader, expire_on_commit=False)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """One transaction that may write; commits at the end of the block, rolls back on an exception.

        Its commit notifies those who wait for what it wrote.

        On SQLite it is the only one. On PostgreSQL others run beside it: read what the new value depends on
        `with_for_update()`, or hold `exclusively`.
        """
        async with self._write.begin() as session:
            yield session

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """One consistent view to read from, taken with the first query, that waits for no writer.

        Writing in it is a bug, and an error from the database.
        """
        async with self._read() as session:
            yield session

    async def close(self) -> None:
        """Close every connection."""
        await self._writer.dispose()
        await self._reader.dispose()


#: In a session's `info`: where its commit notifies, and what it has written so far.
_SIGNALS, _WRITTEN = "signals", "written"


class _Writing(Session):
    """A session that notes the topics of all that it writes, and notifies after its commit.

    Not after the block of its transaction: others read what was written while the connection goes back to its pool.
    """


def _note(session: Session, notified: Iterable[tuple[Topic, UUID | None]]) -> None:
    session.info.setdefault(_WRITTEN, {}).update(dict.fromkeys(notified))


@event.listens_for(_Writing, "after_flush")
def _note_rows(session: Session, _context: object) -> None:
    for row in (*session.new, *session.deleted, *(one for one in session.dirty if session.is_modified(one))):
        for topic, column in row.TOPICS if isinstance(row, Base) else ():
            _note(session, [(topic, getattr(row, column) if column is not None else None)])


@event.listens_for(_Writing, "do_orm_execute")
def _note_statement(state: ORMExecuteState) -> None:
    if not isinstance(state.statement, UpdateBase):  # an INSERT, UPDATE or DELETE
        return
    declared = state.execution_options.get(NOTIFIES)
    if declared is not None:
        _note(state.session, declared)
        return
    row_id = state.execution_options.get(ROW_ID)
    for mapper in Base.registry.mappers:
        # By name: the statement has a copy of its own.
        if mapper.class_.__tablename__ == getattr(state.statement.table, "name", None):
            topics: Topics = mapper.class_.TOPICS
            # Which rows it finds only the database knows: where the statement does not say, all of them.
            _note(state.session, [(topic, row_id if column == "id" else None) for topic, column in topics])


@event.listens_for(_Writing, "after_commit")
def _notify(session: Session) -> None:
    if session.in_nested_transaction():
        return  # a savepoint: nobody else reads what it wrote
    for topic, row_id in session.info.pop(_WRITTEN, {}):
        session.info[_SIGNALS].notify(topic, row_id)


@event.listens_for(_Writing, "after_rollback")
def _forget(session: Session) -> None:
    session.info.pop(_WRITTEN, None)


async def exclusively(session: AsyncSession, what: str) -> None:
    """Keep other transactions that ask for the same thing out until this one ends.

    SQLite has one writing transaction at a time anyway; PostgreSQL takes an advisory lock.
    """
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:what))"), {"what": what})


def _engines(url: URL) -> tuple[AsyncEngine, AsyncEngine]:
    if url.get_backend_name() != "sqlite":
        # prepare_threshold=None: named prepared statements break behind pgbouncer.
        arguments = {"prepare_threshold": None, **_LOST_CONNECTIONS}
        engine = create_async_engine(url, pool_size=8, max_overflow=8, pool_pre_ping=True, connect_args=arguments)
        return engine, engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    how = {"pool_timeout": 60, "max_overflow": 0, "connect_args": {"factory": RollingBack}}
    writer = create_async_engine(url, pool_size=1, **how)
    reader = create_async_engine(url, pool_size=READERS, **how)
    for engine, begin in ((writer, "BEGIN IMMEDIATE"), (reader, "BEGIN")):
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _beginner(begin))
    event.listen(reader.sync_engine, "connect", _forbid_writing)
    return writer, reader


class RollingBack(sqlite3.Connection):
    """A connection that gives its locks back when it is closed.

    A task that is cancelled in a transaction has its connection closed. SQLite keeps a closed connection alive, with
    its transaction, for as long as some cursor is not collected, and every later write would wait for that.
    """

    def close(self) -> None:
        """Roll back what is open, then close."""
        if self.in_transaction:
            self.rollback()
        super().close()


def sync_engine(url: URL) -> Engine:
    """Return an engine for migrations and locks, which happen before the event loop runs.

    On SQLite every transaction is one that writes, its tables' changes included, and foreign keys are not looked at:
    Alembic changes a table by making another in its place.
    """
    if url.get_backend_name() != "sqlite":
        return create_engine(url.set(drivername="postgresql+psycopg"), connect_args=_LOST_CONNECTIONS)
    engine = create_engine(url.set(drivername="sqlite"))
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "connect", _ignore_foreign_keys)
    event.listen(engine, "begin", _beginner("BEGIN IMMEDIATE"))
    return engine


def _ignore_foreign_keys(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    connection.cursor().execute("PRAGMA foreign_keys=OFF")


def _prepare_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # sqlite3 then leaves BEGIN to us
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=NORMAL",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "foreign_keys=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _forbid_writing(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only=ON")
    cursor.close()


def _beginner(statement: str) -> Any:
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(statement)

    return begin


def sqlite_version_ok() -> bool:
    """True if this Python's SQLite knows RETURNING and JSON (3.35)."""
    return sqlite3.sqlite_version_info >= (3, 35)
