"""Aliases: what may be one, how they move, what becomes of them; as functions, and over REST."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import delete

from modelyard.db import Sessions
from modelyard.errors import AliasNotFound, AliasTaken, ModelNotFound, NothingToRollBack, Unprocessable
from modelyard.foundation import Foundation
from modelyard.models.tables import Model
from modelyard.routing import aliases
from modelyard.routing.tables import Alias
from tests.deploy.live import POEMS, A, B, LiveYard
from tests.deploy.yard import make_settings

pytestmark = pytest.mark.timeout(180)


@asynccontextmanager
async def store(data_dir: Path, *model_ids: str) -> AsyncIterator[Sessions]:
    foundation = Foundation(make_settings(data_dir))
    foundation.lay()
    sessions = Sessions(foundation.url)
    try:
        async with sessions.begin() as session:
            for model_id in model_ids:
                session.add(
                    Model(model_id=model_id, adapter=False, task="generate", revision="main", commit="0" * 40,
                          size_bytes=1, path=model_id, source="hub")
                )  # fmt: skip
        yield sessions
    finally:
        await sessions.close()
        foundation.close()


async def put(sessions: Sessions, name: str, target: str) -> Alias:
    async with sessions.begin() as session:
        return await aliases.put(session, name, target)


async def targets(sessions: Sessions) -> dict[str, str]:
    async with sessions.read() as session:
        return {row.name: row.target for row in await aliases.all_aliases(session)}


@pytest.mark.usefixtures("on_each_database")
async def test_an_alias_is_created_moved_and_deleted(tmp_path: Path) -> None:
    async with store(tmp_path, "org/a", "org/b") as sessions:
        made = await put(sessions, "support/production", "org/a")
        assert (made.name, made.target, made.created_at) == ("support/production", "org/a", made.updated_at)
        moved = await put(sessions, "support/production", "org/b")
        assert (moved.target, moved.created_at) == ("org/b", made.created_at)
        assert moved.updated_at > made.updated_at
        assert await targets(sessions) == {"support/production": "org/b"}
        async with sessions.begin() as session:
            was = await aliases.remove(session, "support/production")
        assert was is not None
        assert was.target == "org/b"
        assert await targets(sessions) == {}
        for action in (aliases.remove, aliases.find):
            with pytest.raises(AliasNotFound, match=r"'support/production'; there are: Compressa-Embedding, .*default"):
                async with sessions.begin() as session:
                    await action(session, "support/production")


@pytest.mark.usefixtures("on_each_database")
async def test_two_who_create_one_alias_at_the_same_moment_make_one(tmp_path: Path) -> None:
    async with store(tmp_path, "org/a", "org/b") as sessions:
        for number in range(5):
            made = await asyncio.gather(*(put(sessions, f"it-{number}", target) for target in ("org/a", "org/b")))
            assert {row.target for row in made} == {"org/a", "org/b"}
        assert len(await targets(sessions)) == 5


@pytest.mark.usefixtures("on_each_database")
async def test_a_target_must_be_in_the_store_and_a_name_must_not(tmp_path: Path) -> None:
    async with store(tmp_path, "org/a") as sessions:
        with pytest.raises(
            ModelNotFound, match=r"no model or adapter 'org/b' in the store; there are: org/a"
        ) as missing:
            await put(sessions, "it", "org/b")
        assert missing.value.param == "target"
        with pytest.raises(AliasTaken, match="'org/a' is a model or an adapter"):
            await put(sessions, "org/a", "org/a")
        with pytest.raises(ModelNotFound):
            await put(sessions, "it", "default")  # an alias is no target
        assert await targets(sessions) == {}


@pytest.mark.usefixtures("on_each_database")
async def test_a_built_in_alias_that_was_deleted_is_still_there(tmp_path: Path) -> None:
    async with store(tmp_path, "org/a") as sessions:
        for _ in range(2):
            async with sessions.begin() as session:
                assert await aliases.remove(session, "default") is None
        await put(sessions, "default", "org/a")
        async with sessions.begin() as session:
            was = await aliases.remove(session, "default")
            assert was is not None
            assert await aliases.find(session, "default") is None


async def roll_back(sessions: Sessions, name: str) -> str | None:
    async with sessions.begin() as session:
        row, _ = await aliases.rollback(session, name)
        return row.target if row is not None else None


@pytest.mark.usefixtures("on_each_database")
async def test_moves_are_taken_back_one_after_the_other_until_none_is_left(tmp_path: Path) -> None:
    async with store(tmp_path, "org/a", "org/b", "org/c") as sessions:
        for target in ("org/a", "org/b", "org/b", "org/c"):
            await put(sessions, "best", target)
        assert await roll_back(sessions, "best") == "org/b"
        await put(sessions, "best", "org/a")
        assert [await roll_back(sessions, "best") for _ in range(3)] == ["org/b", "org/a", None]
        assert await targets(sessions) == {}
        with pytest.raises(NothingToRollBack, match="'best'"):
            await roll_back(sessions, "best")
        async with sessions.read() as session:
            moves = await aliases.history(session, "best", limit=None)
        assert [(one.before, one.after) for one in reversed(moves)] == [
            (None, "org/a"), ("org/a", "org/b"), ("org/b", "org/c"), ("org/b", "org/a"),
        ]  # fmt: skip
        assert all(one.undone_at is not None for one in moves)
        with pytest.raises(AliasNotFound):
            await roll_back(sessions, "never")


@pytest.mark.usefixtures("on_each_database")
async def test_a_built_in_alias_follows_again_and_a_deletion_is_taken_back(tmp_path: Path) -> None:
    async with store(tmp_path, "org/a") as sessions:
        with pytest.raises(NothingToRollBack):
            await roll_back(sessions, "default")
        await put(sessions, "default", "org/a")
        async with sessions.begin() as session:
            await aliases.remove(session, "default")
        assert await roll_back(sessions, "default") == "org/a"
        assert await targets(sessions) == {"default": "org/a"}
        assert await roll_back(sessions, "default") is None
        assert await targets(sessions) == {}


@pytest.mark.usefixtures("on_each_database")
async def test_two_who_roll_back_at_the_same_moment_take_back_two_moves(tmp_path: Path) -> None:
    async with store(tmp_path, "org/a", "org/b", "org/c") as sessions:
        for number in range(5):
            name = f"it-{number}"
            for target in ("org/a", "org/b", "org/c"):
                await put(sessions, name, target)
            found = await asyncio.gather(roll_back(sessions, name), roll_back(sessions, name))
            assert set(found) == {"org/b", "org/a"}
            assert (await targets(sessions))[name] == "org/a"


@pytest.mark.usefixtures("on_each_database")
async def test_nothing_moves_back_to_what_is_not_in_the_store_any_more(tmp_path: Path) -> None:
    async with store(tmp_path, "org/a", "org/b") as sessions:
        await put(sessions, "best", "org/a")
        await put(sessions, "best", "org/b")
        async with sessions.begin() as session:
            await session.execute(delete(Model).where(Model.model_id == "org/a"))
        with pytest.raises(ModelNotFound, match=r"'org/a' in the store.*led to before"):
            await roll_back(sessions, "best")
        assert await targets(sessions) == {"best": "org/b"}
        async with sessions.read() as session:
            assert [one.undone_at for one in await aliases.history(session, "best", limit=None)] == [None, None]


@pytest.mark.parametrize("name", ["a", "A1", "gpt-4o", "support/production:v1", "a.b_c", "a/.b", "rollback", "x" * 128])
def test_a_name_of_usual_characters_is_fine(name: str) -> None:
    aliases.check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "-a",
        "/a",
        ".a",
        "_a",
        ":a",
        "a/",
        "a b",
        "a\n",
        "ä",
        "a?b",
        "a@1",
        "x" * 129,
        "a\0",
        "a/rollback",
        "a/history",
        "a.",
        "a..",
        "a/.",
        "a/..",
        "a/./b",
        "a/../b",
        "a./b",
        "a//b",
        "a%2fb",
        "a%2e",
    ],
)
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(Unprocessable, match=r"letter or digit first|asked of one") as refusal:
        aliases.check_name(name)
    assert refusal.value.param == "name"


def test_the_built_in_aliases_are_there_from_the_beginning(live: LiveYard) -> None:
    found = live.server.get("/api/v1/aliases/").json()
    assert [(one["name"], one["follows"]) for one in found] == [
        ("default", "generate"), ("Compressa-LLM", "generate"), ("Compressa-Embedding", "embed"),
    ]  # fmt: skip
    assert all(one["target"] is one["resolves_to"] is one["created_at"] is one["updated_at"] is None for one in found)


def test_an_alias_over_rest_leads_where_it_says(live: LiveYard) -> None:
    made = live.alias("support/production", POEMS)
    assert (made["name"], made["follows"], made["target"]) == ("support/production", None, POEMS)
    assert made["resolves_to"] is None, "it need not be in service"
    refused = live.ask("support/production")
    assert (refused.status, refused.error_code) == (404, "model_not_found")
    assert f"an alias of '{POEMS}', which is not in service" in refused.text
    one = live.deploy(A, POEMS)
    found = live.server.get("/api/v1/aliases/support/production/").json()
    assert found["resolves_to"] == {
        "model_id": A, "adapter_id": POEMS, "deployment_id": one["id"], "state": "READY"
    }  # fmt: skip
    assert live.ask("support/production").json()["model"].startswith(POEMS)
    assert live.alias("support/production", A)["resolves_to"]["adapter_id"] is None
    assert live.ask("support/production").json()["model"] == A
    cards = {card["id"]: card["root"] for card in live.server.get("/v1/models").json()["data"]}
    assert cards["support/production"] == A
    assert live.server.get("/v1/models/support/production").json()["parent"] == A
    gone = live.server.delete("/api/v1/aliases/support/production")
    assert (gone.status, gone.json()["target"], gone.json()["resolves_to"]) == (200, A, None)
    for method in ("GET", "DELETE"):
        answer = live.server.request(method, "/api/v1/aliases/support/production")
        assert (answer.status, answer.error_code) == (404, "alias_not_found")
    assert live.ask("support/production").status == 404


def test_bad_aliases_are_refused_with_what_is_wrong(live: LiveYard) -> None:
    def refusal(name: str, body: object) -> tuple[int, str | None, str | None]:
        answer = live.server.request("PUT", f"/api/v1/aliases/{name}", json_body=body)
        return answer.status, answer.error_code, answer.json()["error"]["param"]

    assert refusal("it", {"target": "no/such"}) == (404, "model_not_found", "target")
    assert refusal(A, {"target": B}) == (409, "alias_taken", "name")
    assert refusal(quote("no good"), {"target": A}) == (422, "invalid_value", "name")
    assert refusal("it", {"target": ""})[0] == 422
    assert refusal("it", {})[0] == 422
    assert refusal("it", {"target": A, "more": 1})[0] == 422
    assert len(live.server.get("/api/v1/aliases/").json()) == 3


def test_a_built_in_alias_is_pinned_and_given_back_over_rest(live: LiveYard) -> None:
    live.deploy(A)
    pinned = live.alias("default", A)
    assert (pinned["follows"], pinned["target"]) == (None, A)
    b = live.deploy(B, keep_others=True)
    assert live.ask("default").json()["model"] == A
    assert live.ask(None).json()["model"] == B
    for _ in range(2):
        freed = live.server.delete("/api/v1/aliases/default").json()
        assert (freed["follows"], freed["target"]) == ("generate", None)
        assert freed["resolves_to"]["deployment_id"] == b["id"]
    assert live.ask("default").json()["model"] == B


def test_moves_are_taken_back_over_rest_and_requests_follow(live: LiveYard) -> None:
    live.deploy(A, POEMS)
    name = "support/rolled-back"
    live.alias(name, A)
    live.alias(name, POEMS)
    assert live.ask(name).json()["model"].startswith(POEMS)
    found = live.server.post(f"/api/v1/aliases/{name}/rollback/").json()
    assert (found["target"], found["resolves_to"]["adapter_id"]) == (A, None)
    assert live.ask(name).json()["model"] == A
    moves = live.server.get(f"/api/v1/aliases/{name}/history?limit=2").json()
    assert [(one["before"], one["after"], one["undone_at"] is None) for one in moves] == [
        (A, POEMS, False), (None, A, True),
    ]  # fmt: skip
    gone = live.server.post(f"/api/v1/aliases/{name}/rollback").json()
    assert (gone["target"], gone["resolves_to"]) == (None, None)
    assert live.server.get(f"/api/v1/aliases/{name}").status == 404
    refused = live.server.post(f"/api/v1/aliases/{name}/rollback")
    assert (refused.status, refused.error_code) == (409, "nothing_to_roll_back")
    assert live.server.post("/api/v1/aliases/no/such/rollback").error_code == "alias_not_found"
    assert live.server.get("/api/v1/aliases/no/such/history").error_code == "alias_not_found"
    assert live.server.request("PUT", "/api/v1/aliases/a/history", json_body={"target": A}).status == 422


def test_an_alias_outlives_the_model_that_it_leads_to(live: LiveYard) -> None:
    """A fine-tuned model is replaced by one of the same id: whoever moved the alias there meant that one, too."""
    live.alias("best", B)
    imports = live.server.settings["MODELYARD_IMPORT_DIR"]
    assert Path(imports, "b").is_dir()
    assert live.server.delete(f"/api/v1/models/{B}").status == 200
    found = live.server.get("/api/v1/aliases/best").json()
    assert (found["target"], found["resolves_to"]) == (B, None)
    assert live.ask("best").status == 404
    assert live.server.post(f"/api/v1/models/add/?model_id={B}").status == 200
    live.until(lambda: live.server.get(f"/api/v1/models/{B}").status == 200, "the model is back")
    live.misbehave(B)
    live.deploy(B)
    assert live.ask("best").json()["model"] == B
