"""Texts that can go on: the tokens of what was asked and of what was generated so far, by caller and request ids.

They are in the database, so that another process, or this one after a restart, continues them. Tokens are kept and not
words, because a text that is tokenized anew need not have the tokens with which it was generated. An entry lives for a
time from its last use; of too many entries those that were not used for longest go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import exclusively
from modelyard.gateway.tables import Continuation


@dataclass
class Text:
    """A prompt's tokens, and what was generated after them so far.

    `given` counts the characters of it that the client has. It is less than all of them where the last tokens hold a
    part of a character only.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    given: int = 0
    is_finished: bool = False

    @property
    def all_ids(self) -> list[int]:
        """The tokens from which the text goes on."""
        return [*self.prompt_ids, *self.ids]


@dataclass
class Kept:
    """An entry: the texts of one request, the model that it named (None: the current one), and how it generated."""

    asked_model: str | None
    model_id: str
    config: dict[str, Any]
    texts: list[Text]


_texts = msgspec.json.Decoder(list[Text])


def key_of(request_ids: Sequence[str]) -> str:
    """Return the key of a request's ids. Their order counts, as does where one id ends and the next begins."""
    return sha256(msgspec.json.encode(list(request_ids))).hexdigest()


async def keys(session: AsyncSession) -> list[tuple[str, str]]:
    """Return caller and key of every entry, those first that were not used for longest."""
    query = select(Continuation.caller, Continuation.key).order_by(Continuation.used_at)
    return [(caller, key) for caller, key in (await session.execute(query)).all()]


async def find(session: AsyncSession, caller: str, request_ids: Sequence[str], now: datetime) -> Kept | None:
    """Return the caller's entry for these ids, if there is one that has not expired."""
    row = await session.get(Continuation, (caller, key_of(request_ids)))
    if row is None or row.expires_at <= now:
        return None
    return Kept(row.asked_model, row.model_id, row.config, _texts.decode(row.texts))


async def keep(
    session: AsyncSession, caller: str, request_ids: Sequence[str], kept: Kept, now: datetime, ttl_s: float, limit: int
) -> None:
    """Write an entry in place of the one that is there, and drop what has expired or is more than `limit` entries."""
    await exclusively(session, "continuations")
    row = Continuation(
        caller=caller, key=key_of(request_ids), asked_model=kept.asked_model, model_id=kept.model_id,
        config=kept.config, texts=msgspec.json.encode(kept.texts), used_at=now,
        expires_at=now + timedelta(seconds=ttl_s),
    )  # fmt: skip
    await session.merge(row)
    await session.flush()
    await session.execute(delete(Continuation).where(Continuation.expires_at <= now))
    oldest = select(Continuation.used_at).order_by(Continuation.used_at.desc()).offset(limit - 1).limit(1)
    if (used_at := await session.scalar(oldest)) is not None:
        await session.execute(delete(Continuation).where(Continuation.used_at < used_at))


async def forget(session: AsyncSession, caller: str, request_ids: Sequence[str]) -> None:
    """Remove the caller's entry for these ids. Safe to repeat."""
    key = key_of(request_ids)
    await session.execute(delete(Continuation).where(Continuation.caller == caller, Continuation.key == key))
