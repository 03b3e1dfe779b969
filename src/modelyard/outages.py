"""Database outages: which errors pass by themselves, how each kind is told, and how work waits one out.

A database may be restarted, moved to another host, locked by a backup or out of disk space. Nothing that runs may end
for that. `wait_out` repeats a transaction until the database takes it; the errors that a wrong statement or a wrong
value causes are raised at once, since they would never pass. Nothing here knows which database it is.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.exc import (
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NotSupportedError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from modelyard.errors import DatabaseUnavailable
from modelyard.evidence import in_words
from modelyard.retry import Backoff, retry

log = logging.getLogger(__name__)
T = TypeVar("T")

BACKOFF = Backoff(first_s=0.1, longest_s=2.0)

#: SQLite's primary result codes.
_WRONG_STATEMENT = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_RANGE}
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
#: A quota, and the shared memory beside the log, show as errors of their own where a full disk does not.
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}


@dataclass(frozen=True)
class Outage:
    """An outage that is over: how long it was waited for, and what the database said."""

    seconds: float
    reason: str

    def __str__(self) -> str:
        return f"The database was away for {self.seconds:.1f} s ({self.reason})"


def is_passing(error: BaseException) -> bool:
    """True if an error is the database's own trouble, so that the same transaction may succeed later."""
    if isinstance(error, PoolTimeout):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if not isinstance(error, DatabaseError | InterfaceError):
        return False
    if isinstance(error, ProgrammingError | IntegrityError | DataError | NotSupportedError):
        return False
    return (_sqlite_code(error) & 0xFF) not in _WRONG_STATEMENT


def explain(error: BaseException) -> DatabaseUnavailable:
    """Return what clients are told of an error of the database: full, locked and read-only each have a code."""
    code, state = _sqlite_code(error), _sqlstate(error)
    said = first_line(error)
    if code in _FULL or code & 0xFF == sqlite3.SQLITE_FULL or state == "53100":
        return DatabaseUnavailable(
            f"The disk of the database is full ({said}): free some space. What is in service goes on meanwhile.",
            code="database_full",
        )
    if code & 0xFF in _LOCKED or state in ("55P03", "40P01"):
        return DatabaseUnavailable(
            f"The database is locked ({said}): another program, such as a backup, holds it. The request can be "
            "repeated when that has ended.",
            code="database_locked",
        )
    if code & 0xFF == sqlite3.SQLITE_READONLY or state == "25006":
        return DatabaseUnavailable(f"The database takes no writes ({said}).", code="database_read_only")
    return DatabaseUnavailable()


def first_line(error: BaseException) -> str:
    """Return what the database itself said, without the statement and its values."""
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines()
    return in_words(Exception(lines[0]) if lines else cause)


async def wait_out(
    what: str, work: Callable[[], Awaitable[T]], ended: Callable[[Outage], Awaitable[None]] | None = None
) -> T:
    """Do work on the database, again and again while the database is away; `what` says in the log who waits.

    `work` is one transaction, or several that may each be repeated: an outage may come between a commit and its
    answer, so the work must be right also where it was done already. `ended` is awaited after an outage.
    """
    since, reason = 0.0, ""

    async def note(error: SQLAlchemyError, _pause_s: float) -> None:
        nonlocal since, reason
        reason = first_line(error)
        if not since:
            since = time.monotonic()
            log.warning("%s waits for the database: %s", what, reason)

    result = await retry(work, SQLAlchemyError, BACKOFF, passes=is_passing, before_pause=note)
    if since:
        outage = Outage(time.monotonic() - since, reason)
        log.warning("%s goes on. %s.", what, outage)
        if ended is not None:
            await ended(outage)
    return result


async def within(seconds: float, work: Coroutine[object, object, T]) -> T:
    """Return what work on the database does, or give up waiting for it; the work itself goes on to its end.

    A cancelled transaction is no bound: the driver first asks the database to give up, which it may not answer either.

    Raises:
        DatabaseUnavailable: it has not answered in time.
        SQLAlchemyError: from the work.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.add_done_callback(_note_late)
    if not task.done():
        raise DatabaseUnavailable()
    return task.result()


def _note_late(task: asyncio.Task[T]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("what was given up waiting for has failed: %s", first_line(error))


def _sqlite_code(error: BaseException) -> int:
    """Return SQLite's extended result code; 0 where there is none."""
    code = getattr(getattr(error, "orig", None) or error, "sqlite_errorcode", 0)
    return code if isinstance(code, int) else 0


def _sqlstate(error: BaseException) -> str:
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None) or ""
