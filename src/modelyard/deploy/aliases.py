"""Aliases: names that clients may use in place of a model's or an adapter's id, as functions that never commit.

Users' aliases are rows and name a target in the store, which need not be in service, and which may be deleted: the
alias then stays and leads nowhere until a model of that id is there again. The built-in ones have no row and follow the
current deployment; a row of the same name pins one to a target until it is deleted.
A model or adapter that is added later under an alias's name wins as soon as it is in service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import exclusively, utcnow
from modelyard.deploy.tables import Alias
from modelyard.errors import AliasNotFound, AliasTaken, ModelNotFound, Unprocessable
from modelyard.models import actions as models
from modelyard.models.tables import Model

#: The built-in aliases, and the task whose current deployment each follows. `DEFAULT` does so where nothing else is
#: asked for: a request for embeddings means the embedding one by it.
BUILT_IN: Mapping[str, str] = {"default": "generate", "Compressa-LLM": "generate", "Compressa-Embedding": "embed"}
DEFAULT = "default"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:/-]{0,126}[A-Za-z0-9._:-])?")


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
        known = {*BUILT_IN, *(await session.scalars(select(Alias.name).order_by(Alias.name).limit(20))).all()}
        raise AliasNotFound(name[:200], known=sorted(known))
    return row


async def put(session: AsyncSession, name: str, target: str) -> Alias:
    """Create an alias, or move it; one UPDATE, so that a request finds the old or the new target. Safe to repeat.

    Raises:
        Unprocessable: no alias can have this name.
        AliasTaken: a model or an adapter in the store has it.
        ModelNotFound: the target is not in the store.
    """
    check_name(name)
    await exclusively(session, "ALIASES")
    if await models.find(session, name) is not None:
        raise AliasTaken(name)
    if await models.find(session, target) is None:
        known = (await session.scalars(select(Model.model_id).order_by(Model.model_id).limit(20))).all()
        raise ModelNotFound(target[:200], known=known, what="model or adapter", param="target")
    now = utcnow()
    values = {"target": target, "updated_at": now}
    moved = (await session.scalars(update(Alias).where(Alias.name == name).values(values).returning(Alias))).first()
    if moved is None:
        moved = Alias(name=name, target=target, created_at=now, updated_at=now)
        session.add(moved)
        await session.flush()
    return moved


async def remove(session: AsyncSession, name: str) -> Alias | None:
    """Delete an alias and return what it was; a built-in one follows again, and None is one that did so already.

    Raises:
        AliasNotFound: there is no such alias.
    """
    row = await find(session, name)
    await session.execute(delete(Alias).where(Alias.name == name))
    return row


def check_name(name: str) -> None:
    """Refuse what cannot be an alias's name.

    Raises:
        Unprocessable: it says what a name is made of.
    """
    if not _NAME.fullmatch(name):
        raise Unprocessable(
            f"'{name[:200]}' cannot be an alias: use 1 to 128 of A-Z, a-z, 0-9, '.', '_', ':', '/' and '-', with a "
            "letter or digit first and no '/' last.",
            param="name",
        )
