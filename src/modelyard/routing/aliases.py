"""Aliases: names that clients may use in place of a model's or an adapter's id, as functions that never commit.

Users' aliases are rows and name a target in the store, which need not be in service, and which may be deleted: the
alias then stays and leads nowhere until a model of that id is there again. The built-in ones have no row and follow the
current deployment; a row of the same name pins one to a target until it is deleted.
A model or adapter that is added later under an alias's name wins as soon as it is in service.
Every move is kept, so that `rollback` can take back the newest, and then the one before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import exclusively, utcnow
from modelyard.errors import SHOWN_NAMES, AliasNotFound, AliasTaken, ModelNotFound, NothingToRollBack, Unprocessable
from modelyard.models import actions as models
from modelyard.routing.tables import Alias, AliasMove

#: The built-in aliases, and the task whose current deployment each follows. `DEFAULT` does so where nothing else is
#: asked for: a request for embeddings means the embedding one by it.
BUILT_IN: Mapping[str, str] = {"default": "generate", "Compressa-LLM": "generate", "Compressa-Embedding": "embed"}
DEFAULT = "default"
#: How the addresses of what can be asked of an alias end: no alias may end so.
ACTIONS = ("/rollback", "/history")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:/-]{0,126}[A-Za-z0-9_:-])?")
#: Parts that do not reach the server as they were sent: clients and proxies take `.` and `..` for steps, join slashes,
#: and some lose the dots at an end.
_LOST = re.compile(r"//|\.(?:/|$)")


async def all_aliases(session: AsyncSession) -> Sequence[Alias]:
    """Return the rows: users' aliases and pinned built-in ones, by name."""
    return (await session.scalars(select(Alias).order_by(Alias.name))).all()


async def find(session: AsyncSession, name: str) -> Alias | None:
    """Return the row of a user's alias or of a pinned built-in one; None for a built-in one that follows.

    Raises:
        AliasNotFound: there is no such alias; the error names those that there are.
    """
    row = await session.get(Alias, name)
    if row is None and name not in BUILT_IN:
        known = {
            *BUILT_IN,
            *(await session.scalars(select(Alias.name).order_by(Alias.name).limit(SHOWN_NAMES + 1))).all(),
        }
        raise AliasNotFound(name[:200], known=sorted(known))
    return row


async def put(session: AsyncSession, name: str, target: str, reason: str = "") -> Alias:
    """Create an alias, or move it; one UPDATE, so that a request finds the old or the new target. Safe to repeat.

    Raises:
        Unprocessable: no alias can have this name.
        AliasTaken: a model or an adapter in the store has it.
        ModelNotFound: the target is not in the store.
    """
    check_name(name)
    await exclusively(session, "ALIASES")
    await _check_target(session, name, target, "target")
    row = await session.get(Alias, name)
    if row is None or row.target != target:
        before = row.target if row is not None else None
        session.add(AliasMove(name=name, before=before, after=target, reason=reason))
    return await _lead(session, name, target)


async def remove(session: AsyncSession, name: str) -> Alias | None:
    """Delete an alias and return what it was; a built-in one follows again, and None is one that did so already.

    Raises:
        AliasNotFound: there is no such alias.
    """
    await exclusively(session, "ALIASES")
    row = await find(session, name)
    if row is not None:
        session.add(AliasMove(name=name, before=row.target, after=None, reason="deleted"))
        await session.execute(delete(Alias).where(Alias.name == name))
    return row


async def rollback(session: AsyncSession, name: str) -> tuple[Alias | None, AliasMove]:
    """Take back the newest move that has not been taken back; return what the alias is then, and that move.

    None is an alias that is not there, as before that move: a built-in one follows the current deployment again.

    Raises:
        AliasNotFound: there is no such alias, and there never was one.
        NothingToRollBack: every move that is known has been taken back.
        AliasTaken: a model or an adapter has its name meanwhile.
        ModelNotFound: what it led to before is not in the store any more; nothing is changed.
    """
    await exclusively(session, "ALIASES")
    moves = await history(session, name, limit=None)
    last = next((move for move in moves if move.undone_at is None), None)
    if last is None:
        raise NothingToRollBack(name)
    if last.before is None:
        await session.execute(delete(Alias).where(Alias.name == name))
        row = None
    else:
        await _check_target(session, name, last.before, "name")
        row = await _lead(session, name, last.before)
    last.undone_at = utcnow()
    return row, last


async def history(session: AsyncSession, name: str, *, limit: int | None) -> Sequence[AliasMove]:
    """Return the moves of an alias, the newest first; those of one that was deleted, too.

    Raises:
        AliasNotFound: there is no such alias, and there never was one.
    """
    query = select(AliasMove).where(AliasMove.name == name).order_by(AliasMove.number.desc()).limit(limit)
    moves = (await session.scalars(query)).all()
    if not moves:
        await find(session, name)
    return moves


async def _check_target(session: AsyncSession, name: str, target: str, param: str) -> None:
    if await models.find(session, name) is not None:
        raise AliasTaken(name)
    if await models.find(session, target) is None:
        known = await models.known_ids(session)
        hint = "" if param == "target" else "It is what the alias led to before: have the alias lead somewhere else."
        raise ModelNotFound(target[:200], known=known, what="model or adapter", param=param, hint=hint)


async def _lead(session: AsyncSession, name: str, target: str) -> Alias:
    now = utcnow()
    values = {"target": target, "updated_at": now}
    move = update(Alias).where(Alias.name == name).values(values).returning(Alias)
    moved = (await session.scalars(move, execution_options={"populate_existing": True})).first()
    if moved is None:
        moved = Alias(name=name, target=target, created_at=now, updated_at=now)
        session.add(moved)
        await session.flush()
    return moved


def check_name(name: str, *, param: str = "name") -> None:
    """Refuse what cannot be an alias's name; `param` is where the request has it.

    Raises:
        Unprocessable: it says what a name is made of.
    """
    if name.endswith(ACTIONS):
        raise Unprocessable(f"'{name[:200]}' cannot be an alias: {name.rpartition('/')[2]} is what is asked of one.",
                            param=param)  # fmt: skip
    if not _NAME.fullmatch(name) or _LOST.search(name):
        raise Unprocessable(
            f"'{name[:200]}' cannot be an alias: use 1 to 128 of A-Z, a-z, 0-9, '.', '_', ':', '/' and '-', with a "
            "letter or digit first, no '/' last, and between slashes neither nothing nor a '.' at the end.",
            param=param,
        )
