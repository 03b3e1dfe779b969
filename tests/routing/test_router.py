"""Names find engines by the rows alone: no engine, no supervisor, so that a test says what every row is."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event

from modelyard.db import Sessions
from modelyard.deploy.tables import Wanted
from modelyard.errors import EngineStarting, ModelNotFound
from modelyard.routing.router import Routing
from tests.eventually import PATIENCE_S, eventually
from tests.routing.rows import NOON, State, rows

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("on_each_database")]


async def test_with_nothing_deployed_every_name_is_unknown(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        for name in ("org/a", "default", None):
            with pytest.raises(ModelNotFound) as refusal:
                await table.routing.resolve(name, "generate")
            assert refusal.value.param == "model"
        assert await table.routing.listing() == []
        assert await table.routing.ready_engines() == []
        assert await table.routing.where("default") is None


async def test_an_unknown_name_is_told_what_is_in_service(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a")
        with pytest.raises(ModelNotFound, match=r"'org/b'.*Compressa-LLM, default, org/a"):
            await table.routing.resolve("org/b", "generate")


async def test_the_listing_has_models_adapters_and_aliases(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a", adapter_ids=["org/poems", "org/prose"], loaded={"org/poems": "org/poems@2"})
        await table.add("org/e", task="embed")
        await table.add("org/rests", State.IDLE, adapter_ids=["org/sleepy"], current_at=NOON)
        await table.add("org/starts", State.STARTING, current_at=NOON)
        await table.add("org/left", wanted=Wanted.DRAINED)
        for name, target in (("best", "org/a"), ("poet", "org/poems"), ("gone", "org/left"), ("soon", "org/starts")):
            await table.alias(name, target)
        listing = [(served.name, served.model_id, served.root) for served in await table.routing.listing()]
        assert sorted(listing) == sorted(
            [
                ("org/a", "org/a", None),
                ("org/e", "org/e", None),
                ("org/rests", "org/rests", None),
                ("org/poems", "org/a", "org/a"),
                ("org/sleepy", "org/rests", "org/rests"),
                ("best", "org/a", "org/a"),
                ("poet", "org/a", "org/poems"),
                ("default", "org/a", "org/a"),
                ("Compressa-LLM", "org/a", "org/a"),
                ("Compressa-Embedding", "org/e", "org/e"),
            ]
        )
        assert [name for name, _ in await table.routing.ready_engines()] == ["org/e", "org/a"]


async def test_an_adapter_can_be_asked_by_the_name_that_answers_give_it(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a", adapter_ids=["org/poems"], loaded={"org/poems": "org/poems@2"})
        await table.alias("poet", "org/poems")
        for name in ("org/poems", "org/poems@2", "poet"):
            target = await table.routing.resolve(name, "generate")
            assert (target.model_id, target.served_name) == ("org/a", "org/poems@2")
        assert "org/poems@2" not in [served.name for served in await table.routing.listing()]
        for name in ("org/poems@1", "org/poems@3", "org/a@2"):
            with pytest.raises(ModelNotFound, match="org/poems"):
                await table.routing.resolve(name, "generate")


async def test_two_ready_engines_of_one_model_have_names_of_their_own(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        older = await table.add("org/a")
        await table.add("org/a", options={"seed": 1})
        assert await table.routing.ready_engines() == [
            ("org/a", "unix:/engine-2"),
            (f"org/a#{older}", "unix:/engine-1"),
        ]


async def test_a_name_in_use_by_a_starting_engine_is_asked_to_come_back(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        for state in (State.STARTING, State.BACKOFF):
            one = await table.add("org/a", state, adapter_ids=["org/poems"])
            for name in ("org/a", "org/poems", "default", "Compressa-LLM", None):
                with pytest.raises(EngineStarting, match="org/a is starting; its job is") as refusal:
                    await table.routing.resolve(name, "generate")
                assert refusal.value.retry_after_s > 0
            assert await table.routing.listing() == []
            await table.change(one, state=State.FAILED)


async def test_an_engine_that_serves_comes_before_a_newer_one_that_does_not(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a")
        newer = await table.add("org/a", State.STARTING, options={"seed": 1})
        for name in ("org/a", "default", None):
            assert await table.url(name) == "unix:/engine-1"
        await table.change(newer, state=State.READY)
        for name in ("org/a", "default", None):
            assert await table.url(name) == "unix:/engine-2"


async def test_the_current_one_is_the_last_that_was_asked_to_be(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        first = await table.add("org/a")
        await table.add("org/b")
        await table.add("org/e", task="embed")
        assert await table.url("default") == "unix:/engine-2"
        await table.change(first, current_at=NOON + timedelta(hours=1))
        for name in ("default", "Compressa-LLM", None):
            assert await table.url(name) == "unix:/engine-1"
        assert await table.url("org/b") == "unix:/engine-2", "the other one is still there"
        for name in ("default", "Compressa-Embedding", None):
            assert await table.url(name, "embed") == "unix:/engine-3"


async def test_default_means_the_other_kind_where_there_is_nothing_else(tmp_path: Path) -> None:
    """The gateway then says that the model makes no embeddings, which tells more than that there is none."""
    async with rows(tmp_path) as table:
        await table.add("org/a")
        assert (await table.routing.resolve("default", "embed")).task == "generate"
        with pytest.raises(ModelNotFound):
            await table.routing.resolve(None, "embed")


async def test_what_leaves_gets_no_new_request(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        old = await table.add("org/a", adapter_ids=["org/poems"], loaded={"org/poems": "org/poems@1"})
        await table.add("org/b")
        assert await table.url("org/poems") == "unix:/engine-1"
        for wanted, state in (
            (Wanted.DRAINED, State.READY),
            (Wanted.DRAINED, State.DRAINING),
            (Wanted.DOWN, State.READY),
        ):
            await table.change(old, wanted=wanted, state=state)
            for name in ("org/a", "org/poems"):
                with pytest.raises(ModelNotFound):
                    await table.routing.resolve(name, "generate")


async def test_an_adapter_is_served_under_its_engines_name_for_it(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a", adapter_ids=["org/poems"], loaded={"org/poems": "org/poems@3"})
        target = await table.routing.resolve("org/poems", "generate")
        assert (target.model_id, target.served_name, target.url) == ("org/a", "org/poems@3", "unix:/engine-1")
        with pytest.raises(ModelNotFound):
            await table.routing.resolve("org/poems@1", "generate")


async def test_an_adapter_that_is_being_loaded_is_asked_for_again_soon(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        one = await table.add("org/a", adapter_ids=["org/poems"])
        with pytest.raises(EngineStarting, match="org/poems is being loaded") as refusal:
            await table.routing.resolve("org/poems", "generate")
        assert refusal.value.retry_after_s == 1
        await table.change(one, adapter_ids=[])
        with pytest.raises(ModelNotFound, match="org/poems"):
            await table.routing.resolve("org/poems", "generate")


async def test_an_adapter_serves_until_the_engine_has_what_is_wanted_instead(tmp_path: Path) -> None:
    """The next one may fail to load: then nothing may have changed."""
    async with rows(tmp_path) as table:
        await table.add("org/a", adapter_ids=["org/prose"], loaded={"org/poems": "org/poems@1"})
        assert (await table.routing.resolve("org/poems", "generate")).served_name == "org/poems@1"


async def test_an_adapter_that_is_loaded_comes_before_one_that_is_to_be(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a", adapter_ids=["org/poems"], loaded={"org/poems": "org/poems@1"})
        await table.add("org/a", adapter_ids=["org/poems"], options={"seed": 1})
        assert await table.url("org/poems") == "unix:/engine-1"
        assert await table.url("org/a") == "unix:/engine-2"


async def test_an_alias_leads_to_a_model_or_an_adapter(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a", adapter_ids=["org/poems"], loaded={"org/poems": "org/poems@1"})
        await table.alias("support/production", "org/a")
        await table.alias("poet", "org/poems")
        assert (await table.routing.resolve("support/production", "generate")).served_name == "org/a"
        assert (await table.routing.resolve("poet", "generate")).served_name == "org/poems@1"
        await table.alias("poet", "org/a")
        assert (await table.routing.resolve("poet", "generate")).served_name == "org/a"
        await table.alias("poet", None)
        with pytest.raises(ModelNotFound):
            await table.routing.resolve("poet", "generate")


async def test_an_alias_to_what_is_not_in_service_says_so(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a")
        await table.alias("best", "org/b")
        with pytest.raises(ModelNotFound, match=r"'best' .*It is an alias of 'org/b', which is not in service"):
            await table.routing.resolve("best", "generate")
        assert await table.routing.where("best") is None
        await table.add("org/b", State.STARTING)
        with pytest.raises(EngineStarting):
            await table.routing.resolve("best", "generate")


async def test_a_model_in_service_wins_over_an_alias_of_its_name(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a")
        await table.alias("gpt", "org/a")
        assert await table.url("gpt") == "unix:/engine-1"
        await table.add("gpt")
        assert await table.url("gpt") == "unix:/engine-2"
        assert {served.name: served.root for served in await table.routing.listing()}["gpt"] is None


async def test_a_built_in_alias_that_is_pinned_stops_following(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a")
        await table.alias("default", "org/a")
        await table.add("org/b")
        assert await table.url("default") == "unix:/engine-1"
        assert await table.url("Compressa-LLM") == "unix:/engine-2"
        assert await table.url(None) == "unix:/engine-2", "a request that names nothing goes to the current one"
        await table.alias("default", None)
        assert await table.url("default") == "unix:/engine-2"


async def test_answers_come_from_memory(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a", adapter_ids=["org/poems"], loaded={"org/poems": "org/poems@1"})
        await table.alias("poet", "org/poems")
        await table.url("org/a")
        queries = []
        event.listen(table.sessions._reader.sync_engine, "before_cursor_execute", lambda *args: queries.append(args[2]))
        began_at = time.monotonic()
        asked = 0
        while time.monotonic() - began_at < 0.5:
            for name in ("org/a", "poet", "default", None):
                await table.url(name)
                asked += 1
        # One snapshot is three queries, and a busy machine may need over a second for a few of them.
        assert len(queries) <= 4 * (1 + int(time.monotonic() - began_at)) < asked


async def test_what_another_process_changed_is_seen_after_a_second(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a")
        sessions = Sessions(table.sessions.url)
        other = Routing(sessions, patience_s=PATIENCE_S)
        assert (await other.resolve("default", "generate")).model_id == "org/a"
        await table.add("org/b")

        async def so() -> bool:
            return (await other.resolve("default", "generate")).model_id == "org/b"

        await eventually(so, "the other process sees it, and nobody told it")
        await other.close()
        await sessions.close()


async def test_a_change_during_a_read_is_not_missed(tmp_path: Path) -> None:
    """A snapshot taken while something changes must not be taken for fresh afterwards."""
    async with rows(tmp_path) as table:
        await table.add("org/0")
        await table.add("org/1")
        await table.alias("it", "org/0")
        for turn in range(1, 21):
            table.routing.changed()
            asking = asyncio.create_task(table.url("it"))
            for _ in range(turn):
                await asyncio.sleep(0)
            await table.alias("it", f"org/{turn % 2}")
            assert (await table.routing.resolve("it", "generate")).model_id == f"org/{turn % 2}"
            await asking


async def test_every_request_during_the_move_of_an_alias_is_answered(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/0")
        await table.add("org/1")
        await table.alias("it", "org/0")
        answers: set[str] = set()
        is_over = asyncio.Event()

        async def keep_asking() -> None:
            while not is_over.is_set():
                answers.add(await table.url("it"))
                await asyncio.sleep(0)

        asking = [asyncio.create_task(keep_asking()) for _ in range(8)]
        for turn in range(1, 31):
            await table.alias("it", f"org/{turn % 2}")
        is_over.set()
        await asyncio.gather(*asking)
        assert answers == {"unix:/engine-1", "unix:/engine-2"}


async def test_open_requests_are_counted_by_engine_and_by_name(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a", adapter_ids=["org/poems"], loaded={"org/poems": "org/poems@1"})
        base = await table.routing.resolve("org/a", "generate")
        poems = await table.routing.resolve("org/poems", "generate")
        with table.routing.request(base), table.routing.request(poems):
            with table.routing.request(poems):
                assert table.routing.requests.count(base.url) == 3
                assert table.routing.requests.count(base.url, "org/poems@1") == 2
            assert table.routing.requests.count(base.url, "org/poems@1") == 1
            assert table.routing.requests.count("unix:/another") == 0
        with pytest.raises(RuntimeError), table.routing.request(base):
            raise RuntimeError
        assert table.routing.requests.count(base.url) == 0
        assert not table.routing.requests._open, "an engine that is gone leaves nothing behind"


async def test_what_is_closed_gets_no_request_even_if_the_rows_still_name_it(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        one = await table.add("org/a", adapter_ids=["org/poems"], loaded={"org/poems": "org/poems@1"})
        url = await table.url("org/a")
        table.routing.requests.close_to(url, "org/poems@1")
        assert await table.url("org/a") == url
        with pytest.raises(EngineStarting):
            await table.url("org/poems")
        table.routing.requests.open_to(url, ["org/poems@1"])
        assert await table.url("org/poems") == url
        table.routing.requests.close_to(url)
        for name in ("org/a", "org/poems", "default", None):
            with pytest.raises(EngineStarting):
                await table.url(name)
        await table.change(one, engine_url="unix:/new")
        assert await table.url("org/a") == "unix:/new"
        assert not table.routing.requests._closed, "an engine that is gone leaves nothing behind"


@pytest.mark.parametrize("state", [State.IDLE, State.DRAINING])
async def test_a_request_wakes_an_idle_deployment_and_is_answered(tmp_path: Path, state: State) -> None:
    async with rows(tmp_path) as table:
        one = await table.add("org/a", state, adapter_ids=["org/poems"], loaded={"org/poems": "org/poems@1"})
        await table.alias("best", "org/a")
        names = ("org/a", "org/poems", "best", "default", None)
        asking = [asyncio.create_task(table.routing.resolve(name, "generate")) for name in names for _ in range(5)]

        async def is_wished() -> bool:
            return (await table.row(one)).wake_requested

        await eventually(is_wished, "the wish is in the row")
        await eventually(lambda: table.signals, "the supervisor is told")
        # As its supervisor does it: the wish is taken back as soon as it is acted on.
        await table.change(one, state=State.STARTING, wake_requested=False, engine_url="unix:/new", loaded=[])
        late = asyncio.create_task(table.routing.resolve("org/a", "generate"))
        assert not (await asyncio.wait([*asking, late], timeout=0.2))[0], "nobody is sent away meanwhile"
        await table.change(one, state=State.READY)
        loaded = [{"adapter_id": "org/poems", "name": "org/poems@1", "path": "/p"}]
        await table.change(one, loaded=loaded)
        targets = await asyncio.gather(*asking, late)
        assert {target.url for target in targets} == {"unix:/new"}
        assert {target.served_name for target in targets} == {"org/a", "org/poems@1"}
        assert table.signals == 1, "one of them wrote the wish"


async def test_looking_at_a_name_wakes_nothing(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        one = await table.add("org/a", State.IDLE)
        way = await table.routing.where("default")
        assert way is not None
        assert way.deployment.id == one
        await table.routing.listing()
        assert not (await table.row(one)).wake_requested
        assert table.signals == 0


async def test_an_idle_current_deployment_stays_the_current_one(tmp_path: Path) -> None:
    async with rows(tmp_path, wake_timeout_s=0.1) as table:
        await table.add("org/a")
        idle = await table.add("org/b", State.IDLE)
        assert await table.url("org/a") == "unix:/engine-1"
        with pytest.raises(EngineStarting):
            await table.routing.resolve("default", "generate")
        assert (await table.row(idle)).wake_requested


async def test_a_serving_engine_of_the_model_spares_waking_another(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a")
        idle = await table.add("org/a", State.IDLE, options={"seed": 1})
        assert await table.url("org/a") == "unix:/engine-1"
        assert not (await table.row(idle)).wake_requested


async def test_the_wait_for_an_idle_deployment_is_bounded(tmp_path: Path) -> None:
    async with rows(tmp_path, wake_timeout_s=0.3) as table:
        one = await table.add("org/a", State.IDLE)
        began_at = time.monotonic()
        with pytest.raises(EngineStarting, match=r"org/a was idle, .* waited for 0\.3 s") as refusal:
            await table.routing.resolve("org/a", "generate")
        assert time.monotonic() - began_at >= 0.3
        assert refusal.value.retry_after_s > 0
        assert (await table.row(one)).wake_requested, "it wakes all the same"


async def test_a_waiting_request_is_told_when_the_engine_does_not_come_back(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        one = await table.add("org/a", State.IDLE)
        asking = asyncio.create_task(table.routing.resolve("org/a", "generate"))
        await eventually(lambda: table.signals, "the wish is written")
        await table.change(one, state=State.FAILED, wanted=Wanted.DOWN)
        with pytest.raises(
            EngineStarting, match=r"org/a was idle, and its engine has not come back: GET /api/v1/jobs/"
        ):
            await asking
        with pytest.raises(ModelNotFound):
            await table.routing.resolve("org/a", "generate")


async def test_a_waiting_request_goes_to_another_engine_that_takes_over(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        one = await table.add("org/a", State.IDLE)
        asking = asyncio.create_task(table.routing.resolve("default", "generate"))
        await eventually(lambda: table.signals, "the wish is written")
        await table.add("org/b")
        await table.change(one, wanted=Wanted.DOWN)
        assert (await asking).model_id == "org/b"


async def test_a_client_that_leaves_does_not_take_the_wish_of_others_with_it(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        one = await table.add("org/a", State.IDLE)
        for _ in range(3):
            leaving = asyncio.create_task(table.routing.resolve("org/a", "generate"))
            await asyncio.sleep(0)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        staying = asyncio.create_task(table.routing.resolve("org/a", "generate"))
        await eventually(lambda: table.signals, "the wish is written")
        await table.change(one, state=State.READY, engine_url="unix:/new")
        assert (await staying).url == "unix:/new"


async def test_an_engine_that_starts_for_the_first_time_is_not_waited_for(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        await table.add("org/a", State.STARTING)
        with pytest.raises(EngineStarting, match="org/a is starting"):
            await table.routing.resolve("org/a", "generate")
        assert table.signals == 0
