"""Checks of the server's parts for /ready, each answered within its patience whatever hangs.

A check that hangs goes on beside the requests, and those that come meanwhile share it: however often somebody asks, one
check of each part is under way. Nothing here knows what a part is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sqlalchemy import select, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from modelyard import outages
from modelyard.db import Sessions, sync_engine
from modelyard.deploy import succession
from modelyard.deploy.tables import Wanted
from modelyard.errors import DatabaseUnavailable, StorageUnavailable
from modelyard.models.lost import is_lost, what_to_do
from modelyard.models.tables import Model
from modelyard.storage import Storage

T = TypeVar("T")

#: So long is waited for each part; they are asked at the same time.
PATIENCE_S = 3.0
#: A lock that is held for longer is told; others write for milliseconds.
LOCK_PATIENCE_MS = 1000


class Check:
    """One question that may hang. `ask` returns what is wrong with the part, nothing if all is well."""

    def __init__(self, part: str, ask: Callable[[], Awaitable[Sequence[str]]]) -> None:
        self._part = part
        self._ask = ask
        self._asking: asyncio.Task[Sequence[str]] | None = None

    async def reasons(self) -> Sequence[str]:
        """Return what is wrong, within `PATIENCE_S`."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._answer(), name=f"check of the {self._part}")
        await asyncio.wait({self._asking}, timeout=PATIENCE_S)
        if not self._asking.done():
            return [f"The {self._part} does not answer."]
        return self._asking.result()

    async def _answer(self) -> Sequence[str]:
        return await self._ask()


class Checks:
    """Every check. Close it before the loop ends."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = checks

    async def reasons(self) -> list[str]:
        """Return what is wrong with any part."""
        found = await asyncio.gather(*(check.reasons() for check in self._checks))
        return [reason for reasons in found for reason in reasons]

    async def close(self) -> None:
        """Wait for no check any more. Safe to repeat."""
        for check in self._checks:
            if check._asking is not None:
                check._asking.cancel()


def of_database(url: URL) -> Check:
    """Return the check that the database takes a write, on a connection of its own: the pool's may all be waiting."""
    engine = sync_engine(url)

    def write() -> list[str]:
        try:
            with engine.connect() as connection:
                if engine.dialect.name == "sqlite":
                    connection.connection.dbapi_connection.execute(f"PRAGMA busy_timeout={LOCK_PATIENCE_MS}")  # type: ignore[union-attr]
                # Changes nothing, and is written all the same: a full disk shows.
                connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
                connection.commit()
        except (SQLAlchemyError, OSError) as error:
            told = outages.explain(error)
            if told.code == DatabaseUnavailable.code:
                return [f"The database does not answer: {outages.first_line(error)}."]
            return [f"{told.code}: {told.message}"]
        finally:
            engine.dispose()
        return []

    return Check("database", lambda: _in_thread("check of the database", write))


def of_storage(storage: Storage) -> Check:
    """Return the check that the storage would answer."""

    async def ask() -> list[str]:
        try:
            await storage.check()
        except StorageUnavailable as error:
            return [error.message]
        return []

    return Check("storage", ask)


def of_models(sessions: Sessions, models_dir: Path) -> Check:
    """Return the check that the files of what is wanted in service are there."""

    async def wanted() -> Sequence[Model]:
        async with sessions.read() as session:
            up = [one for one in await succession.live(session) if one.wanted == Wanted.UP]
            ids = {name for one in up for name in (one.model_id, *one.adapter_ids)}
            return (await session.scalars(select(Model).where(Model.model_id.in_(ids)).order_by(Model.model_id))).all()

    def look(models: Sequence[Model]) -> list[str]:
        lost = [one for one in models if is_lost(models_dir, one)]
        return [f"model_lost: {one.model_id} is wanted in service and lost. {what_to_do(one)}" for one in lost]

    async def ask() -> Sequence[str]:
        try:
            models = await wanted()
        except SQLAlchemyError:
            return []  # the check of the database says so
        return await _in_thread("check of the models", lambda: look(models))

    return Check("data folder", ask)


async def _in_thread(name: str, work: Callable[[], T]) -> T:
    """Run blocking work in a thread that keeps neither a pool nor the end of the program waiting where it hangs."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def give(function: Callable[[], None]) -> None:
        def unless_cancelled() -> None:
            if not answer.done():
                function()

        if not loop.is_closed():
            loop.call_soon_threadsafe(unless_cancelled)

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  # whatever it was, whoever waits is told
            fault = error
            give(lambda: answer.set_exception(fault))
        else:
            give(lambda: answer.set_result(result))

    threading.Thread(target=run, name=name, daemon=True).start()
    return await answer
