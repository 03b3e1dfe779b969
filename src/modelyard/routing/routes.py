"""REST for aliases: list, get, create or move, take a move back, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Query, Request

from modelyard.deploy.tables import DeploymentState
from modelyard.http import Sessions, documented, router, services_of
from modelyard.routing import aliases
from modelyard.routing.router import Routing
from modelyard.routing.schemas import AliasIn, AliasMoveOut, AliasOut, ResolvedOut
from modelyard.routing.tables import Alias

api = router("/api/v1/aliases", "Aliases")


async def _routing(request: Request) -> Routing:
    return services_of(request.scope).routing


CurrentRouting = Annotated[Routing, Depends(_routing)]
AliasName = Annotated[str, Path(description="The alias, which may hold slashes.", examples=["support/production"])]


@api.get("/", summary="List aliases", responses=documented())
async def list_aliases(sessions: Sessions, routing: CurrentRouting) -> list[AliasOut]:
    """Return the built-in aliases and the users', with what each leads to right now."""
    async with sessions.read() as session:
        rows = {row.name: row for row in await aliases.all_aliases(session)}
    return [await _out(name, rows.get(name), routing) for name in dict.fromkeys([*aliases.BUILT_IN, *rows])]


@api.get("/{name:path}/history", summary="List the moves of an alias", responses=documented(404, 422))
async def list_moves_of_alias(
    name: AliasName,
    sessions: Sessions,
    limit: Annotated[int, Query(ge=1, le=1000, description="The most moves to return.")] = 100,
) -> list[AliasMoveOut]:
    """Return where an alias led, the newest move first; of one that was deleted, too."""
    async with sessions.read() as session:
        return [AliasMoveOut.of(move) for move in await aliases.history(session, name, limit=limit)]


@api.post("/{name:path}/rollback", summary="Take back an alias's last move", responses=documented(404, 409, 422))
async def roll_back_alias(name: AliasName, sessions: Sessions, routing: CurrentRouting) -> AliasOut:
    """Have an alias lead where it led before its last move; once more, where it led before that.

    An alias that was not there before that move is deleted; a built-in one follows the current deployment again. Where
    nothing is left to take back the answer is 409 `nothing_to_roll_back`, and where what it led to has been deleted
    from the store 404 `model_not_found`; nothing is changed then.
    """
    async with sessions.begin() as session:
        row, _ = await aliases.rollback(session, name)
    return await _out(name, row, routing)


@api.get("/{name:path}", summary="Get an alias", responses=documented(404, 422))
async def get_alias(name: AliasName, sessions: Sessions, routing: CurrentRouting) -> AliasOut:
    """Return an alias, with what it leads to right now."""
    name = name.removesuffix("/")
    async with sessions.read() as session:
        row = await aliases.find(session, name)
    return await _out(name, row, routing)


@api.put("/{name:path}", summary="Create or move an alias", responses=documented(400, 404, 409, 413, 422))
async def put_alias(name: AliasName, wanted: AliasIn, sessions: Sessions, routing: CurrentRouting) -> AliasOut:
    """Have a name lead to a model or an adapter. Safe to repeat; a request finds the old target or the new one.

    The target must be in the store but need not be in service: until it is, requests get a 404 that says so. If it is
    deleted, the alias stays and leads nowhere. A name that is a model's or an adapter's answers 409 `alias_taken`; a
    model that is added under an alias's name later wins as soon as it is in service. The built-in aliases can be
    pinned to a target, too: they then no longer follow the current deployment. Requests that name no model still do.
    """
    name = name.removesuffix("/")
    async with sessions.begin() as session:
        row = await aliases.put(session, name, wanted.target)
    return await _out(name, row, routing)


@api.delete("/{name:path}", summary="Delete an alias", responses=documented(404, 422))
async def delete_alias(name: AliasName, sessions: Sessions, routing: CurrentRouting) -> AliasOut:
    """Delete an alias and return what it was. A built-in one that was pinned follows again, and is returned so."""
    name = name.removesuffix("/")
    async with sessions.begin() as session:
        row = await aliases.remove(session, name)
    if name in aliases.BUILT_IN:
        return await _out(name, None, routing)
    return AliasOut.of(name, None, row, None)


async def _out(name: str, row: Alias | None, routing: Routing) -> AliasOut:
    # A name that is no alias any more may be something else's.
    way = await routing.where(name) if row is not None or name in aliases.BUILT_IN else None
    resolved = None
    if way is not None:
        one = way.deployment
        resolved = ResolvedOut(
            model_id=one.model_id,
            adapter_id=way.adapter_id,
            deployment_id=one.id,
            state=DeploymentState(one.state),
        )
    return AliasOut.of(name, aliases.BUILT_IN.get(name), row, resolved)
