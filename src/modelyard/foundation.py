"""The ground of a server before it serves: data folder, the locks that make it the only one, storage, database.

Everything here is synchronous and happens before the event loop runs, so that a refusal is one clear line and an exit
status instead of a traceback from a half-started application.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from modelyard.db import database_url, sync_engine
from modelyard.errors import StartRefused
from modelyard.outages import first_line
from modelyard.private_files import NotOurs, close_database, close_to_others
from modelyard.server_lock import ServerLock
from modelyard.settings import Settings
from modelyard.storage import Storage, open_storage

log = logging.getLogger(__name__)

#: A server that was just killed may take a moment to give its lock back.
LOCK_PATIENCE_S = 3.0
LOCK_CHECK_S = 5.0
DATABASE_LOCK = 0x6D6F64656C79617264 & 0x7FFFFFFFFFFFFFFF


class Foundation:
    """A data folder and a database of which this process is the one server, until `close`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = configured_database(settings)
        self.failure: str | None = None
        self._storage: Storage | None = None
        self._folder_lock: ServerLock | None = None
        self._database_lock: DatabaseLock | ServerLock | None = None

    @property
    def owner_lock(self) -> Path:
        """The lock whose holder the children belong to."""
        return self.settings.data_dir / "server.lock"

    @property
    def storage(self) -> Storage:
        """Where objects are kept, once the foundation is laid. Whoever uses it closes it."""
        assert self._storage is not None
        return self._storage

    def lay(self) -> None:
        """Make the folder, take the locks, open the storage, migrate the database.

        Raises:
            StartRefused: with the one line that the user reads; nothing is held then.
        """
        data_dir = self.settings.data_dir
        try:
            data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            close_to_others(data_dir)
            for name in ("models", "jobs", "cache", "run"):
                (data_dir / name).mkdir(exist_ok=True, mode=0o700)
            folder_lock = ServerLock(self.owner_lock)
            taken = _patiently(folder_lock.take)
        except NotOurs as foreign:
            raise StartRefused(
                f"{foreign.path} belongs to another user, who could read what is kept there. Give it to the user that "
                "runs the server (chown), or set MODELYARD_DATA_DIR to a folder of its own."
            ) from None
        except OSError as error:
            raise StartRefused(
                f"The data folder {data_dir} cannot be used: {error.strerror}. Set MODELYARD_DATA_DIR to a folder that "
                "this user may write to."
            ) from error
        if not taken:
            raise StartRefused(
                f"Another server (process {folder_lock.holder()}) uses the data folder {data_dir}. "
                "Stop it, or give this one a folder of its own with MODELYARD_DATA_DIR."
            )
        self._folder_lock = folder_lock
        try:
            self._storage = open_storage(self.settings)
            self._database_lock = _lock_database(self.url, self._on_database_lost)
            migrate(self.url)
        except BaseException:
            self.close()
            raise

    def fail(self, reason: str) -> None:
        """End the server, in good order, for a reason that forbids it to go on. May be called from any thread."""
        if self.failure is None:
            self.failure = reason
            log.critical("%s The server stops.", reason)
            signal.raise_signal(signal.SIGTERM)

    def _on_database_lost(self) -> None:
        self.fail(f"Another server has taken the database {shown(self.url)} while this one had no connection to it.")

    def complaints(self) -> list[str]:
        """Return what is wrong with the locks, for readiness; empty if nothing is."""
        if isinstance(self._database_lock, DatabaseLock) and not self._database_lock.is_held:
            return ["The lock on the database was lost; it is being taken again."]
        return []

    def close(self) -> None:
        """Give the locks back. Safe to repeat."""
        if self._database_lock is not None:
            self._database_lock.release()
            self._database_lock = None
        if self._folder_lock is not None:
            self._folder_lock.release()
            self._folder_lock = None


class DatabaseLock:
    """PostgreSQL's advisory lock that makes this the one server of a database, held by a connection of its own.

    A connection may break while the server lives. A thread looks after it and takes the lock again; if another server
    was quicker, `on_lost` is called once.
    """

    def __init__(self, url: URL, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self.is_held = False
        self._engine = sync_engine(url)
        self._connection: Connection | None = None
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._look_after, name="database lock", daemon=True)

    def take(self) -> bool:
        """Take the lock; return False if another server holds it.

        Raises:
            SQLAlchemyError: the database does not answer.
        """
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            held = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": DATABASE_LOCK}))
        except SQLAlchemyError:
            connection.close()
            raise
        if not held:
            connection.close()
            return False
        self._connection, self.is_held = connection, True
        if not self._watch.is_alive():
            self._watch.start()
        return True

    def release(self) -> None:
        """Give the lock back. Safe to repeat."""
        self._closing.set()
        if self._watch.is_alive():
            self._watch.join(timeout=10)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._engine.dispose()
        self.is_held = False

    def _look_after(self) -> None:
        while not self._closing.wait(LOCK_CHECK_S):
            assert self._connection is not None
            try:
                self._connection.scalar(text("SELECT 1"))
            except SQLAlchemyError:
                self.is_held = False
                self._connection.close()
                log.warning("the connection that holds the lock on the database broke; taking it again")
                self._take_again()

    def _take_again(self) -> None:
        while not self._closing.is_set():
            with suppress(SQLAlchemyError):
                self._engine.dispose()
                if self.take():
                    return
                self._on_lost()
                return
            self._closing.wait(1.0)


def _lock_database(url: URL, on_lost: Callable[[], None]) -> DatabaseLock | ServerLock:
    """Take the lock of the database: for SQLite a file beside it, since it may lie outside of the data folder."""
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            close_database(path)
            file_lock = ServerLock(path.with_name(path.name + ".lock"))
            if _patiently(file_lock.take):
                return file_lock
        except NotOurs as foreign:
            raise StartRefused(
                f"{foreign.path} belongs to another user, who could read the database. Give it to the user that runs "
                "the server (chown), or set MODELYARD_DATABASE_URL to another file."
            ) from None
        except OSError as error:
            raise StartRefused(f"The database {path} cannot be used: {error.strerror}.") from error
        raise StartRefused(
            f"Another server (process {file_lock.holder()}) uses the database {path}. "
            "Stop it, or give this one a database of its own with MODELYARD_DATABASE_URL."
        )
    lock = DatabaseLock(url, on_lost)
    try:
        if _patiently(lock.take):
            return lock
    except SQLAlchemyError as error:
        lock.release()
        raise StartRefused(f"The database {shown(url)} cannot be reached: {first_line(error)}.") from error
    lock.release()
    raise StartRefused(
        f"Another server uses the database {shown(url)}. "
        "Stop it, or give this one a database of its own with MODELYARD_DATABASE_URL."
    )


def _patiently(take: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while not take():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def configured_database(settings: Settings) -> URL:
    """Return the address of the database.

    Raises:
        StartRefused: the setting is not an address.
    """
    try:
        return database_url(settings.database_url, settings.data_dir)
    except (ValueError, ArgumentError):
        # Neither the setting nor what SQLAlchemy says of it: both may hold the password.
        raise StartRefused(
            "MODELYARD_DATABASE_URL is not an address: write postgresql://USER:PASSWORD@HOST:PORT/NAME, "
            "with %-escapes for special characters in the password."
        ) from None


def shown(url: URL) -> str:
    """Return the address as a user would write it, without the password."""
    plain = url.difference_update_query(("password", "sslpassword")).set(drivername=url.get_backend_name())
    return plain.render_as_string(hide_password=True)


def migrations_dir() -> Path:
    """Return where the migrations lie: beside the sources in a checkout, inside the package once installed."""
    installed = Path(__file__).with_name("_migrations")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "migrations"


def newest_revision(folder: Path) -> str:
    """Return the newest migration's revision, by its file's name (`NNNN_what.py`), without loading Alembic."""
    return max(path.name for path in (folder / "versions").glob("[0-9]*_*.py")).split("_")[0]


def migrate(url: URL, folder: Path | None = None) -> bool:
    """Bring the database's tables up to date; return whether there was anything to do. May be repeated.

    Two that migrate at the same moment (`modelyard migrate` beside a starting server) take turns. `folder` has the
    migrations, by default those of this program.

    Raises:
        StartRefused: the database cannot be opened or is newer than this program, or a migration failed (all of this
            call were rolled back).
    """
    folder = folder or migrations_dir()
    newest = newest_revision(folder)
    engine = sync_engine(url)
    try:
        if url.get_backend_name() == "sqlite":
            Path(url.database or "").parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = _revision(engine)
    except OSError as error:
        raise StartRefused(f"The database {shown(url)} cannot be used: {error.strerror}.") from error
    except SQLAlchemyError as error:
        raise StartRefused(f"The database {shown(url)} cannot be used: {first_line(error)}.") from error
    finally:
        engine.dispose()
    if found == newest:
        return False
    if found is not None and found > newest:
        raise StartRefused(
            f"The database {shown(url)} is at revision {found}, newer than this program's {newest}. Update Modelyard."
        )
    # Alembic takes some 150 ms to load: only a start that has something to migrate pays for it.
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"url": url})
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    try:
        command.upgrade(config, "head")
    except SQLAlchemyError as error:
        raise StartRefused(f"The database {shown(url)} could not be migrated: {first_line(error)}.") from error
    return True


def _revision(engine: Engine) -> str | None:
    with engine.connect() as connection:
        if not engine.dialect.has_table(connection, "alembic_version"):
            return None
        version = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return str(version) if version is not None else None
