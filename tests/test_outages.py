"""Which errors of a database pass by themselves, what is said of them, and how work waits for it to come back."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from modelyard import outages


def sqlite(code: int, message: str = "no") -> OperationalError:
    error = sqlite3.OperationalError(message)
    error.sqlite_errorcode = code
    return OperationalError("SELECT 1", {}, error)


def postgres(kind: type[psycopg.Error]) -> DBAPIError:
    return DBAPIError.instance("SELECT 1", {}, kind("no"), psycopg.Error)  # type: ignore[return-value]


CASES: list[tuple[BaseException, bool, str]] = [
    (sqlite(sqlite3.SQLITE_BUSY), True, "database_locked"),
    (sqlite(sqlite3.SQLITE_BUSY_SNAPSHOT), True, "database_locked"),
    (sqlite(sqlite3.SQLITE_FULL), True, "database_full"),
    (sqlite(sqlite3.SQLITE_IOERR_WRITE), True, "database_full"),
    (sqlite(sqlite3.SQLITE_IOERR_SHMSIZE), True, "database_full"),
    (sqlite(sqlite3.SQLITE_IOERR_READ), True, "database_unavailable"),
    (sqlite(sqlite3.SQLITE_CANTOPEN), True, "database_unavailable"),
    (sqlite(sqlite3.SQLITE_READONLY_DBMOVED), True, "database_read_only"),
    (sqlite(sqlite3.SQLITE_ERROR, "no such table: jobs"), False, ""),
    (postgres(psycopg.errors.AdminShutdown), True, "database_unavailable"),
    (postgres(psycopg.errors.CannotConnectNow), True, "database_unavailable"),
    (postgres(psycopg.errors.TooManyConnections), True, "database_unavailable"),
    (postgres(psycopg.errors.DiskFull), True, "database_full"),
    (postgres(psycopg.errors.LockNotAvailable), True, "database_locked"),
    (postgres(psycopg.errors.ReadOnlySqlTransaction), True, "database_read_only"),
    (postgres(psycopg.errors.UndefinedTable), False, ""),
    (postgres(psycopg.errors.UniqueViolation), False, ""),
    (InterfaceError("SELECT 1", {}, psycopg.InterfaceError("the connection is closed")), True, "database_unavailable"),
    (IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE")), False, ""),
    (ProgrammingError("INSERT", {}, sqlite3.ProgrammingError("parameters")), False, ""),
    (PoolTimeout("QueuePool limit"), True, "database_unavailable"),
    (RuntimeError("a fault"), False, ""),
]


@pytest.mark.parametrize(("error", "passes", "code"), CASES, ids=[str(number) for number in range(len(CASES))])
def test_each_error_of_a_database_passes_or_does_not_and_has_its_code(
    error: BaseException, passes: bool, code: str
) -> None:
    assert outages.is_passing(error) is passes
    if passes:
        assert outages.explain(error).code == code


def failing(*errors: BaseException) -> Callable[[], object]:
    left = list(errors)

    async def work() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return work


async def test_work_is_repeated_until_the_database_takes_it_and_the_outage_is_told_once() -> None:
    told: list[outages.Outage] = []

    async def tell(outage: outages.Outage) -> None:
        told.append(outage)

    busy = sqlite(sqlite3.SQLITE_BUSY, "database is locked")
    assert await outages.wait_out("a job", failing(busy, busy), tell) == "done"  # type: ignore[arg-type]
    [outage] = told
    assert outage.seconds >= 0.3
    assert outage.reason == "database is locked"
    assert await outages.wait_out("a job", failing(), tell) == "done"  # type: ignore[arg-type]
    assert len(told) == 1


async def test_an_error_that_would_not_pass_is_raised_at_once() -> None:
    wrong = sqlite(sqlite3.SQLITE_ERROR, "no such table: jobs")
    with pytest.raises(OperationalError, match="no such table"):
        await outages.wait_out("a job", failing(wrong))  # type: ignore[arg-type]
