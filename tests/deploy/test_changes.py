"""Changes of what is in service, while it serves: adapters in place, models side by side, drained, at rest."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from modelyard.deploy import actions, succession
from modelyard.deploy.record import Record
from modelyard.deploy.tables import Strategy, Wanted
from modelyard.errors import Conflict, EngineStarting, ModelInUse, ModelNotFound
from modelyard.jobs import actions as jobs
from modelyard.jobs.tables import JobStatus
from modelyard.models import actions as models
from modelyard.signals import Topic
from tests.deploy.yard import DeployYard, deploy_yard
from tests.eventually import eventually

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("on_each_database")]


async def ask(url: str, model: str, max_tokens: int = 1) -> tuple[int, dict[str, Any]]:
    """Ask an engine for some tokens, as the gateway would."""
    reader, writer = await asyncio.open_unix_connection(url.removeprefix("unix:"))
    try:
        body = json.dumps({"model": model, "prompt": "x", "max_tokens": max_tokens}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split()[0])
        return int(head.split()[1]), json.loads(await reader.readexactly(length))
    finally:
        writer.close()


async def served(yard: DeployYard, job_id: Any, *adapter_ids: str) -> None:
    """Wait until the deployment serves exactly these adapters."""

    async def so() -> bool:
        return [one["adapter_id"] for one in (await yard.deployment(job_id)).loaded] == list(adapter_ids)

    await eventually(so, f"{adapter_ids or 'no adapter'} in service")


async def messages(yard: DeployYard, job_id: Any) -> str:
    return "\n".join(event.message for event in await yard.events(job_id))


async def test_adapters_come_and_go_on_the_running_engine(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        await yard.add_adapter("org/prose", "org/a")
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        assert await yard.deploy("org/a", ["org/poems"]) == job_id
        await served(yard, job_id, "org/poems")
        assert (await yard.job(job_id)).name == "DEPLOY_org/a_adapters_org/poems"
        target = await yard.routing.resolve("org/poems", "generate")
        assert target.served_name == "org/poems@1"
        assert (await ask(target.url, "org/poems@1"))[0] == 200
        assert await yard.deploy("org/a", ["org/prose"]) == job_id
        await served(yard, job_id, "org/prose")
        with pytest.raises(ModelNotFound):
            await yard.routing.resolve("org/poems", "generate")
        await eventually(
            lambda: (
                {"load org/prose@1", "unload org/poems@1"}
                <= {f"{one['action']} {one['name']}" for one in yard.record("org/a", "lora")}
            ),
            "the first adapter is unloaded",
        )
        assert len(yard.record("org/a", "start")) == 1, "the engine was never started again"


async def test_a_job_of_more_adapters_than_its_name_holds_is_named_in_part(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        adapter_ids = [f"org/{number}-{'x' * 150}" for number in range(4)]
        for adapter_id in adapter_ids:
            await yard.add_adapter(adapter_id, "org/a")
        job_id = await yard.deploy("org/a", adapter_ids)
        await yard.becomes(job_id, "READY")
        name = (await yard.job(job_id)).name
        assert len(name) == 512
        assert name.startswith("DEPLOY_org/a_adapters_org/0-xxx")
        assert name.endswith("...")


async def test_an_adapter_is_probed_before_clients_can_name_it(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        await yard.deploy("org/a", ["org/poems"])
        await served(yard, job_id, "org/poems")
        asked = [json.loads(one["body"]).get("model") for one in yard.record("org/a", "request")]
        assert "org/poems@1" in asked


@pytest.mark.parametrize("fault", ["fail_load", "fail_adapters"])
async def test_an_adapter_that_does_not_work_leaves_everything_as_it_was_and_says_why(
    tmp_path: Path, fault: str
) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={fault: {"org/bad": "it does not fit"}})
        await yard.add_adapter("org/good", "org/a")
        await yard.add_adapter("org/new", "org/a")
        await yard.add_adapter("org/bad", "org/a")
        job_id = await yard.deploy("org/a", ["org/good"])
        await yard.becomes(job_id, "READY")
        await yard.deploy("org/a", ["org/new", "org/bad"])

        async def refused() -> dict[str, str] | None:
            return (await yard.deployment(job_id)).adapter_failure

        failure = await eventually(refused, "the adapter is refused")
        assert failure["adapter_id"] == "org/bad"
        assert "it does not fit" in failure["message"]
        row = await yard.deployment(job_id)
        assert row.adapter_ids == ["org/good"]
        assert [one["adapter_id"] for one in row.loaded] == ["org/good"]
        assert row.state == "READY"
        assert (await yard.job(job_id)).name == "DEPLOY_org/a_adapters_org/good"
        assert (await yard.routing.resolve("org/good", "generate")).served_name == "org/good@1"
        with pytest.raises(ModelNotFound):
            await yard.routing.resolve("org/new", "generate")
        names = [f"{one['action']} {one['name']}" for one in yard.record("org/a", "lora")]
        assert "unload org/new@1" in names, "what was loaded before the bad one is unloaded again"
        assert "it does not fit" in await messages(yard, job_id)


async def test_a_first_start_with_an_adapter_that_does_not_load_fails_and_says_why(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"fail_load": {"org/bad": "it does not fit"}})
        await yard.add_adapter("org/bad", "org/a")
        job = await yard.ended(await yard.deploy("org/a", ["org/bad"]))
        assert job.failure is not None
        assert job.failure.code == "adapter_not_loaded"
        assert "it does not fit" in job.failure.message


async def test_an_engine_that_died_comes_back_with_its_adapters(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        await yard.deploy("org/a", ["org/poems"])
        await served(yard, job_id, "org/poems")
        [start] = yard.record("org/a", "start")
        os.kill(start["pid"], signal.SIGKILL)
        await eventually(lambda: len(yard.record("org/a", "start")) == 2, "a second engine")
        await yard.becomes(job_id, "READY")
        await served(yard, job_id, "org/poems")
        target = await yard.routing.resolve("org/poems", "generate")
        assert (await ask(target.url, target.served_name))[0] == 200


async def test_an_adapter_whose_requests_run_is_unloaded_after_them(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        job_id = await yard.deploy("org/a", ["org/poems"])
        await yard.becomes(job_id, "READY")
        target = await yard.routing.resolve("org/poems", "generate")
        with yard.routing.request(target):
            await yard.deploy("org/a")
            await served(yard, job_id)
            await asyncio.sleep(1.5)  # longer than another gateway process may not have noticed
            assert not any(one["action"] == "unload" for one in yard.record("org/a", "lora"))
        await eventually(
            lambda: any(one["action"] == "unload" for one in yard.record("org/a", "lora")), "the unloading"
        )


async def test_an_adapter_with_a_request_stays_loaded_however_long_that_takes(tmp_path: Path) -> None:
    """vLLM dies when it reads an adapter again whose folder is gone: its hold must not time out."""
    async with deploy_yard(tmp_path, engine_drain_timeout_s=0.5) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        job_id = await yard.deploy("org/a", ["org/poems"])
        await yard.becomes(job_id, "READY")
        target = await yard.routing.resolve("org/poems", "generate")
        with yard.routing.request(target):
            await yard.deploy("org/a")
            await served(yard, job_id)
            await asyncio.sleep(2.0)
            async with yard.sessions.begin() as session:
                with pytest.raises(ModelInUse):
                    await models.delete(session, "org/poems")
        await eventually(lambda: any(one["action"] == "unload" for one in yard.record("org/a", "lora")), "an unloading")


async def test_an_adapter_that_gets_no_answer_in_time_is_refused_for_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelyard.engine.adapter_loading.PROBE_TIMEOUT_S", 0.3)
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"first_token_ms": 1000})
        await yard.add_adapter("org/poems", "org/a")
        job = await yard.ended(await yard.deploy("org/a", ["org/poems"]))
        assert job.failure is not None
        assert job.failure.code == "adapter_probe_timeout"
        assert "max_loras" in job.failure.hint


async def test_an_adapter_whose_files_went_bad_fails_a_start_by_its_name(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        folder = await yard.add_adapter("org/poems", "org/a")
        (folder / "adapter_model.safetensors").write_bytes(b"short")
        job = await yard.ended(await yard.deploy("org/a", ["org/poems"]))
        assert job.failure is not None
        assert job.failure.code == "bad_weights"
        assert "org/poems" in job.failure.message
        assert yard.record("org/a", "start") == []


async def test_a_model_is_started_beside_the_old_one_which_then_drains(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"chunk_ms": 100})
        await yard.add_model("org/b", misbehave={"start_delay_s": 0.3})
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        target = await yard.routing.resolve("default", "generate")
        answer = asyncio.create_task(ask(target.url, "org/a", max_tokens=100))  # ten seconds
        await eventually(lambda: len(yard.record("org/a", "request")) >= 2, "the request has begun")
        second = await yard.deploy("org/b")
        while (await yard.deployment(second)).state != "READY":
            assert (await yard.routing.resolve("default", "generate")).url, "at every moment somebody serves"
            await asyncio.sleep(0.02)
        assert (await yard.routing.resolve("default", "generate")).model_id == "org/b"
        await yard.becomes(first, "DRAINING")
        assert not answer.done()
        assert (await answer)[0] == 200, "the request that had begun ends whole"
        assert (await yard.ended(first)).status == JobStatus.KILLED
        [ended] = [one for one in yard.record("org/a", "finished") if one["tokens"] == 100]
        assert ended["status"] == 200


async def test_a_new_model_that_fails_to_start_leaves_the_old_one_in_service(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/bad", misbehave={"die_at_start": {"stderr": "ValueError: no", "after_s": 0.5}})
        first = await yard.deploy("org/a")
        before = await yard.becomes(first, "READY")
        assert (await yard.ended(await yard.deploy("org/bad"))).status == JobStatus.FAILED
        after = await yard.deployment(first)
        assert (after.state, after.wanted, after.engine_url) == ("READY", Wanted.UP, before.engine_url)
        assert (await yard.routing.resolve("default", "generate")).model_id == "org/a"
        assert (await yard.job(first)).status == JobStatus.RUNNING


#: Room for one engine of the imitation, as the fit check counts, and not for two.
ONE_ENGINE_GIB = 4.0


async def test_where_memory_allows_one_engine_only_the_old_one_drains_first(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_memory_gib=ONE_ENGINE_GIB) as yard:
        await yard.add_model("org/a", misbehave={"chunk_ms": 100})
        await yard.add_model("org/b")
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        target = await yard.routing.resolve("default", "generate")
        answer = asyncio.create_task(ask(target.url, "org/a", max_tokens=20))
        await eventually(lambda: len(yard.record("org/a", "request")) >= 2, "the request has begun")
        second = await yard.deploy("org/b")
        await yard.becomes(first, "DRAINING", "STOPPING", "STOPPED")
        with pytest.raises(EngineStarting):
            await yard.routing.resolve("default", "generate")
        assert (await answer)[0] == 200
        await yard.becomes(second, "READY")
        assert (await yard.ended(first)).status == JobStatus.KILLED
        assert "GiB" in await messages(yard, second), "the fit check says its numbers"
        assert yard.record("org/b", "start")[0]["at"] > yard.record("org/a", "stop")[0]["at"]


async def test_side_by_side_without_the_memory_fails_with_the_numbers_and_nothing_changes(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_memory_gib=ONE_ENGINE_GIB) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        job = await yard.ended(await yard.deploy("org/b", strategy=Strategy.SIDE_BY_SIDE))
        assert job.failure is not None
        assert job.failure.code == "not_enough_memory"
        assert "GiB" in job.failure.message
        assert (await yard.deployment(first)).state == "READY"
        assert (await yard.routing.resolve("default", "generate")).model_id == "org/a"


async def test_what_left_for_a_model_that_then_fails_comes_back(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        await yard.add_model("org/bad", misbehave={"die_at_start": {"stderr": "ValueError: no"}})
        first = await yard.deploy("org/a", ["org/poems"])
        await yard.becomes(first, "READY")
        second = await yard.deploy("org/bad", strategy=Strategy.REPLACE)
        assert (await yard.ended(second)).status == JobStatus.FAILED
        assert (await yard.ended(first)).status == JobStatus.KILLED

        async def back() -> bool:
            try:
                return (await yard.routing.resolve("org/poems", "generate")).model_id == "org/a"
            except (ModelNotFound, EngineStarting):
                return False

        await eventually(back, "the first model is in service again")
        assert "wanted again" in await messages(yard, second)


async def test_several_deployments_stand_beside_one_another_when_they_are_kept(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        first = await yard.deploy("org/a")
        second = await yard.deploy("org/b", keep_others=True)
        await yard.becomes(first, "READY")
        await yard.becomes(second, "READY")
        assert (await yard.routing.resolve("org/a", "generate")).model_id == "org/a"
        assert (await yard.routing.resolve("org/b", "generate")).model_id == "org/b"
        assert (await yard.routing.resolve("default", "generate")).model_id == "org/b"
        assert await yard.deploy("org/a", keep_others=True) == first
        assert (await yard.routing.resolve("default", "generate")).model_id == "org/a", "the current one"
        assert await yard.deploy("org/a") == first
        assert (await yard.ended(second)).status == JobStatus.KILLED, "not kept any more"


async def test_a_drained_deployment_takes_no_new_request_and_ends_when_the_others_have(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"chunk_ms": 100})
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        target = await yard.routing.resolve("default", "generate")
        answer = asyncio.create_task(ask(target.url, "org/a", max_tokens=20))
        await eventually(lambda: len(yard.record("org/a", "request")) >= 2, "the request has begun")
        await yard.take_down(job_id, Wanted.DRAINED)
        with pytest.raises(ModelNotFound):
            await yard.routing.resolve("default", "generate")
        assert (await answer)[0] == 200
        assert (await yard.ended(job_id)).status == JobStatus.KILLED


async def test_requests_that_do_not_end_in_time_are_cut_off_and_it_is_said(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_drain_timeout_s=1.5) as yard:
        await yard.add_model("org/a", misbehave={"chunk_ms": 200})
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        target = await yard.routing.resolve("default", "generate")
        answer = asyncio.create_task(ask(target.url, "org/a", max_tokens=1000))
        await eventually(lambda: len(yard.record("org/a", "request")) >= 2, "the request has begun")
        await yard.take_down(job_id, Wanted.DRAINED)
        assert (await yard.ended(job_id)).status == JobStatus.KILLED
        assert "1 request did not end within 2 s" in await messages(yard, job_id)
        answer.cancel()


async def test_a_draining_deployment_can_be_ended_at_once(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"chunk_ms": 200})
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        target = await yard.routing.resolve("default", "generate")
        answer = asyncio.create_task(ask(target.url, "org/a", max_tokens=1000))
        await eventually(lambda: len(yard.record("org/a", "request")) >= 2, "the request has begun")
        await yard.take_down(job_id, Wanted.DRAINED)
        await yard.becomes(job_id, "DRAINING")
        await yard.take_down(job_id, Wanted.DOWN)
        assert (await yard.ended(job_id)).status == JobStatus.KILLED
        answer.cancel()


async def test_requests_end_whole_if_the_wish_to_drain_comes_while_the_row_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"chunk_ms": 100})
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        target = await yard.routing.resolve("default", "generate")
        answer = asyncio.create_task(ask(target.url, "org/a", max_tokens=15))
        await eventually(lambda: len(yard.record("org/a", "request")) >= 2, "the request has begun")
        look, said = Record.look, asyncio.Event()

        async def look_as_the_wish_comes(self: Record, **how: Any) -> Any:
            found = await look(self, **how)
            if not said.is_set():
                said.set()
                await yard.take_down(job_id, Wanted.DRAINED)
                await self.context.interrupted.wait()
            return found

        monkeypatch.setattr(Record, "look", look_as_the_wish_comes)
        yard.sessions.signals.notify(Topic.DEPLOYMENTS)
        assert (await answer)[0] == 200
        assert said.is_set()
        assert (await yard.ended(job_id)).status == JobStatus.KILLED


async def test_an_idle_deployment_rests_and_the_next_request_waits_for_it(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"start_delay_s": 0.5})
        await yard.add_adapter("org/poems", "org/a")
        job_id = await yard.deploy("org/a", ["org/poems"], idle_timeout_s=1.0)
        await yard.becomes(job_id, "READY")
        row = await yard.becomes(job_id, "IDLE")
        assert row.engine_url is None
        assert row.memory_bytes is None
        assert (await yard.job(job_id)).status == JobStatus.RUNNING
        assert {one.name for one in await yard.routing.listing()} >= {"org/a", "default", "org/poems"}
        waiting = asyncio.create_task(yard.routing.resolve("org/poems", "generate"))
        others = asyncio.create_task(yard.routing.resolve("default", "generate"))
        await yard.becomes(job_id, "STARTING")
        target = await waiting
        assert (await ask(target.url, target.served_name))[0] == 200
        assert (await others).url == target.url
        assert len(yard.record("org/a", "start")) == 2


async def test_an_idle_deployment_whose_memory_another_took_waits_for_it(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_memory_gib=ONE_ENGINE_GIB) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        first = await yard.deploy("org/a", idle_timeout_s=0.5)
        await yard.becomes(first, "IDLE")
        second = await yard.deploy("org/b", keep_others=True)
        await yard.becomes(second, "READY")
        waiting = asyncio.create_task(yard.routing.resolve("org/a", "generate"))
        await yard.becomes(first, "STARTING")

        async def said() -> bool:
            return "Waiting for memory that others hold" in await messages(yard, first)

        await eventually(said, "it waits and says so")
        await yard.take_down(second)
        assert (await waiting).model_id == "org/a"


async def test_a_deployment_that_is_asked_now_and_then_does_not_rest(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        job_id = await yard.deploy("org/a", idle_timeout_s=2.0)
        row = await yard.becomes(job_id, "READY")
        assert row.engine_url is not None
        for _ in range(8):
            assert (await ask(row.engine_url, "org/a"))[0] == 200
            await asyncio.sleep(0.5)
        assert len(yard.record("org/a", "start")) == 1
        assert (await yard.deployment(job_id)).state == "READY"


async def test_the_current_deployments_come_back_after_a_restart_of_the_machine(tmp_path: Path) -> None:
    """Nothing but the disk is left: no process, no socket, no keeper's word."""
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        await yard.add_model("org/gone")
        stays = await yard.deploy("org/a", ["org/poems"])
        leaves = await yard.deploy("org/gone", keep_others=True)
        await yard.becomes(stays, "READY")
        await yard.becomes(leaves, "READY")
        await yard.take_down(leaves)
        await yard.ended(leaves)
        record_dirs = yard.record_dirs
    async with deploy_yard(tmp_path) as again:
        again.record_dirs.update(record_dirs)
        await again.becomes(stays, "READY")
        await served(again, stays, "org/poems")
        async with again.sessions.read() as session:
            assert [one.model_id for one in await succession.live(session)] == ["org/a"]
            assert (await actions.current(session)).model_id == "org/a"


async def test_a_server_killed_while_an_old_model_drains_ends_it_all_the_same(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        async with yard.sessions.begin() as session:  # the wish is there, and nobody has told
            await succession.take_down(session, await actions.of_job(session, first), Wanted.DRAINED)
    async with deploy_yard(tmp_path) as again:
        assert (await again.ended(first)).status == JobStatus.KILLED
        assert (await again.deployment(first)).state == "STOPPED"


async def test_an_adapter_whose_wish_was_taken_back_can_be_deleted_while_its_model_serves(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"slow_load": 0.5, "fail_load": {"org/bad": "no"}})
        for adapter_id in ("org/bad", "org/poems"):
            await yard.add_adapter(adapter_id, "org/a")
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        await yard.deploy("org/a", ["org/bad"])
        await eventually(lambda: _refused(yard, job_id), "the adapter is refused")

        async def deleted(adapter_id: str) -> bool:
            try:
                async with yard.sessions.begin() as session:
                    await models.delete(session, adapter_id)
            except Conflict:
                return False
            return True

        await eventually(lambda: deleted("org/bad"), "what did not load is not held any more")
        async with yard.sessions.begin() as session:  # both wishes are there before the task looks
            await actions.deploy(session, actions.Wish("org/a", ["org/poems"]))
            await actions.deploy(session, actions.Wish("org/a"))
        await eventually(lambda: deleted("org/poems"), "what was wanted for a moment is not held any more")
        assert (await yard.deployment(job_id)).state == "READY"


async def _refused(yard: DeployYard, job_id: Any) -> bool:
    return (await yard.deployment(job_id)).adapter_failure is not None


async def test_an_engine_that_dies_while_it_loads_an_adapter_does_not_take_the_wish_with_it(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"slow_load": 1.0, "starts": [1]})
        await yard.add_adapter("org/poems", "org/a")
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        await yard.deploy("org/a", ["org/poems"])
        await eventually(
            lambda: any(one["path"].endswith("load_lora_adapter") for one in yard.record("org/a", "request")),
            "the adapter is being loaded",
        )
        os.kill(yard.record("org/a", "start")[0]["pid"], signal.SIGKILL)
        await served(yard, job_id, "org/poems")
        assert (await yard.deployment(job_id)).adapter_failure is None


async def test_other_adapters_wanted_while_an_engine_restarts_without_one_are_not_forgotten(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        bad = {"slow_load": 1.0, "fail_load": {"org/poems": "not this time"}, "starts": [2]}
        await yard.add_model("org/a", misbehave=bad)
        await yard.add_adapter("org/poems", "org/a")
        await yard.add_adapter("org/prose", "org/a")
        job_id = await yard.deploy("org/a", ["org/poems"])
        await yard.becomes(job_id, "READY")
        loads = len(yard.record("org/a", "request"))
        os.kill(yard.record("org/a", "start")[0]["pid"], signal.SIGKILL)
        await eventually(
            lambda: any("load_lora" in one["path"] for one in yard.record("org/a", "request")[loads:]),
            "the adapter is being loaded again",
        )
        await yard.deploy("org/a", ["org/prose"])
        await served(yard, job_id, "org/prose")
        assert (await yard.deployment(job_id)).adapter_ids == ["org/prose"]


async def test_nobody_leaves_for_a_model_that_was_interrupted_before_it_was_ready(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b", misbehave={"start_delay_s": 0.5})
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        second = await yard.deploy("org/b")
        await eventually(lambda: yard.record("org/b", "start"), "the second engine starts")
        async with yard.sessions.begin() as session:  # the wish is there, and its task has not heard of it
            await jobs.interrupt(session, second)
        assert (await yard.ended(second)).status == JobStatus.KILLED
        row = await yard.deployment(first)
        assert (row.state, row.wanted) == ("READY", Wanted.UP)


@pytest.mark.parametrize("strategy", [Strategy.AUTO, Strategy.REPLACE])
async def test_a_model_that_is_to_be_kept_after_all_stays(tmp_path: Path, strategy: Strategy) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b", misbehave={"start_delay_s": 0.5})
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        second = await yard.deploy("org/b")
        assert await yard.deploy("org/b", strategy=strategy, keep_others=True) == second
        await yard.becomes(second, "READY")
        row = await yard.deployment(first)
        assert (row.state, row.wanted) == ("READY", Wanted.UP)


async def test_an_idle_deployment_that_is_deployed_again_starts_and_takes_the_others_place(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        first = await yard.deploy("org/a", idle_timeout_s=0.3)
        second = await yard.deploy("org/b", keep_others=True)
        await yard.becomes(second, "READY")
        await yard.becomes(first, "IDLE")
        assert await yard.deploy("org/a") == first
        await yard.becomes(first, "READY")
        assert (await yard.ended(second)).status == JobStatus.KILLED


async def test_a_deployment_about_to_rest_that_is_deployed_again_takes_the_others_place(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        second = await yard.deploy("org/b")
        await yard.becomes(second, "READY")
        first = await yard.deploy("org/a", keep_others=True, idle_timeout_s=0.3)
        await yard.becomes(first, "DRAINING")
        assert await yard.deploy("org/a") == first
        assert (await yard.ended(second)).status == JobStatus.KILLED
        assert (await yard.deployment(first)).state == "READY"


async def test_a_request_that_reached_a_deployment_about_to_rest_ends_whole_when_another_takes_its_place(
    tmp_path: Path,
) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"chunk_ms": 100})
        await yard.add_model("org/b")
        first = await yard.deploy("org/a", idle_timeout_s=0.3)
        await yard.becomes(first, "READY")
        target = await yard.routing.resolve("default", "generate")
        await yard.becomes(first, "DRAINING")
        with yard.routing.request(target):
            answer = asyncio.create_task(ask(target.url, "org/a", max_tokens=15))
            await yard.deploy("org/b")
            assert (await answer)[0] == 200
        assert (await yard.ended(first)).status == JobStatus.KILLED


async def test_a_server_killed_right_after_a_failure_brings_back_what_had_left_for_it(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/bad", misbehave={"die_at_start": {"stderr": "ValueError: no"}})
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        await yard.take_down(first)
        await yard.ended(first)
    async with deploy_yard(tmp_path) as yard, yard.sessions.begin() as session:
        # As such a server leaves it: what failed is written down, and nothing that follows from it.
        job, _ = await actions.deploy(session, actions.Wish("org/bad"))
        row = await actions.of_job(session, job.id)
        old = await actions.of_job(session, first)
        row.state, row.wanted, row.replaces = "FAILED", Wanted.DOWN, [str(old.id)]
        stored = await jobs.get(session, job.id)
        stored.failure_code, stored.failure_message = "not_enough_memory", "It lacks 3 GiB."
    async with deploy_yard(tmp_path) as yard:
        failed = await yard.ended(job.id)
        assert failed.status == JobStatus.FAILED
        assert failed.failure is not None
        assert failed.failure.code == "not_enough_memory", "it is not guessed anew from a log"

        async def back() -> bool:
            async with yard.sessions.read() as session:
                return [one.model_id for one in await succession.live(session)] == ["org/a"]

        await eventually(back, "the first model is wanted again")


@pytest.mark.parametrize("by", ["deployment", "job"])
async def test_what_was_interrupted_does_not_come_back_when_its_replacement_fails(tmp_path: Path, by: str) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/bad", misbehave={"die_at_start": {"stderr": "ValueError: no", "after_s": 2.5}})
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        second = await yard.deploy("org/bad")
        await (yard.take_down(first) if by == "deployment" else yard.interrupt(first))
        assert (await yard.ended(first)).status == JobStatus.KILLED
        assert (await yard.ended(second)).status == JobStatus.FAILED
        async with yard.sessions.read() as session:
            assert [one.id for one in await jobs.newest(session, limit=10)] == [second, first]
