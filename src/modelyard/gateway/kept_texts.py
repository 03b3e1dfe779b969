"""Kept texts through an outage of the database: raw prompts are answered meanwhile, and nothing continues wrongly.

Texts are written by one task, all that wait in one transaction. A request waits for its own to be written, as long as
the database answers; while it is away they wait in memory, are found there by whoever continues them, and are written
when it is back. Of too many the oldest are given up: counted in the metrics, said in the log, and forgotten in the
database too, so that nobody continues an older state of the text.

The keys of all entries are known here, so that a new request id is told from one whose text cannot be read now.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy.exc import SQLAlchemyError

from modelyard import outages, tasks
from modelyard.db import Sessions, utcnow
from modelyard.errors import DatabaseUnavailable
from modelyard.gateway import continuations
from modelyard.gateway.continuations import Kept, key_of
from modelyard.gateway.metrics import Metrics
from modelyard.settings import Settings

log = logging.getLogger(__name__)

#: A request waits so long for its text to be written, and a new request id for the word that nothing is kept under it.
PATIENCE_S = 1.0
#: An entry that is known to be there may be a large one.
READ_PATIENCE_S = 10.0
#: A server that stops tries so long to write what is left.
LAST_WRITE_S = 2.0
#: What waits in memory at most: entries with a text, and their tokens.
UNWRITTEN_ENTRIES = 1024
UNWRITTEN_TOKENS = 2_000_000

Key = tuple[str, str]


@dataclass(eq=False)
class _Unwritten:
    """An entry that is to be written; without `kept` it is to be forgotten."""

    caller: str
    ids: Sequence[str]
    kept: Kept | None
    written: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tokens(self) -> int:
        return sum(len(text.prompt_ids) + len(text.ids) for text in self.kept.texts) if self.kept else 0


class KeptTexts:
    """The entries of all callers. `is_away` says whether the database is known not to answer."""

    def __init__(self, sessions: Sessions, settings: Settings, metrics: Metrics, is_away: Callable[[], bool]) -> None:
        self._sessions = sessions
        self._settings = settings
        self._metrics = metrics
        self._is_away = is_away
        #: None until they have been read once.
        self._keys: dict[Key, None] | None = None
        self._unwritten: dict[Key, _Unwritten] = {}
        self._writer: asyncio.Task[None] | None = None

    async def learn(self) -> None:
        """Read the keys of what is kept. For the start of a server.

        Raises:
            SQLAlchemyError: from the database.
        """
        async with self._sessions.read() as session:
            self._keys = dict.fromkeys(await continuations.keys(session))

    async def find(self, caller: str, ids: Sequence[str]) -> Kept | None:
        """Return the caller's entry for these ids, if there is one.

        Raises:
            DatabaseUnavailable: there may be one, and it cannot be read now.
        """
        key = (caller, key_of(ids))
        if (unwritten := self._unwritten.get(key)) is not None:
            return copy.deepcopy(unwritten.kept)  # whoever continues it changes it, and may be broken off
        is_new = self._keys is not None and key not in self._keys
        if not self._is_away():
            try:
                return await outages.within(PATIENCE_S if is_new else READ_PATIENCE_S, self._read(caller, ids))
            except DatabaseUnavailable:
                pass
            except SQLAlchemyError as error:
                if not outages.is_passing(error):
                    raise
        if is_new:
            return None
        raise DatabaseUnavailable(
            "A text may be kept under this request_id, and it cannot be read while the database is away: GET /ready "
            "tells when it is back. A new request_id is answered at once."
        )

    async def keep(self, caller: str, ids: Sequence[str], kept: Kept | None) -> None:
        """Keep texts under these ids in the place of what was there, or nothing; wait for that if it can be done."""
        key = (caller, key_of(ids))
        entry = _Unwritten(caller, ids, kept)
        self._unwritten.pop(key, None)
        self._unwritten[key] = entry
        self._note_key(key, is_there=kept is not None)
        self._give_up_too_many()
        self._tell()
        if self._writer is None or self._writer.done():
            self._writer = tasks.spawn("writer of kept texts", self._write_all())
        if not self._is_away():
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await entry.written.wait()
            except TimeoutError:
                log.warning("a kept text waits in memory: the database is slow or away")

    async def close(self) -> None:
        """Write what is left, if that can be done in a moment; what cannot is lost, and said. Safe to repeat."""
        if self._unwritten and self._writer is not None:
            await asyncio.wait({self._writer}, timeout=LAST_WRITE_S)
        if self._writer is not None:
            await tasks.end(self._writer)
        self._lose(sum(entry.kept is not None for entry in self._unwritten.values()), "the server stops")
        self._unwritten.clear()

    async def _read(self, caller: str, ids: Sequence[str]) -> Kept | None:
        if self._keys is None:
            await self.learn()
        async with self._sessions.read() as session:
            return await continuations.find(session, caller, ids, utcnow())

    async def _write_all(self) -> None:
        while self._unwritten:
            entries = list(self._unwritten.values())
            try:
                await self._write_patiently(entries)
            except SQLAlchemyError:
                # One of them cannot be written, which must not keep the others.
                for entry in entries:
                    await self._write_or_lose(entry)
            for entry in entries:
                entry.written.set()
                key = (entry.caller, key_of(entry.ids))
                if self._unwritten.get(key) is entry:
                    del self._unwritten[key]
            self._tell()

    async def _write_or_lose(self, entry: _Unwritten) -> None:
        try:
            await self._write_patiently([entry])
        except SQLAlchemyError:
            log.exception("a kept text could not be written")
            self._lose(1, "the database refuses it")

    async def _write_patiently(self, entries: Sequence[_Unwritten]) -> None:
        await outages.wait_out("the writer of kept texts", lambda: self._write(entries))

    async def _write(self, entries: Sequence[_Unwritten]) -> None:
        ttl_s, limit = self._settings.continuation_ttl_s, self._settings.continuation_entries
        async with self._sessions.begin() as session:
            for entry in entries:
                if entry.kept is None:
                    await continuations.forget(session, entry.caller, entry.ids)
                else:
                    await continuations.keep(session, entry.caller, entry.ids, entry.kept, utcnow(), ttl_s, limit)

    def _note_key(self, key: Key, *, is_there: bool) -> None:
        if self._keys is None:
            return
        self._keys.pop(key, None)
        if is_there:
            self._keys[key] = None
            while len(self._keys) > self._settings.continuation_entries:
                del self._keys[next(iter(self._keys))]

    def _give_up_too_many(self) -> None:
        waiting = [entry for entry in self._unwritten.values() if entry.kept is not None]
        tokens, lost = sum(entry.tokens for entry in waiting), 0
        while waiting and (len(waiting) > UNWRITTEN_ENTRIES or tokens > UNWRITTEN_TOKENS):
            oldest = waiting.pop(0)
            tokens -= oldest.tokens
            oldest.kept = None  # it is forgotten in the database, too: nobody may continue an older state
            lost += 1
        self._lose(lost, "more wait for the database than are held in memory")

    def _lose(self, count: int, why: str) -> None:
        if count:
            self._metrics.continuations_lost.inc(count)
            log.error("%d kept texts are lost, and cannot be continued: %s", count, why)

    def _tell(self) -> None:
        self._metrics.continuations_unwritten.set(len(self._unwritten))
