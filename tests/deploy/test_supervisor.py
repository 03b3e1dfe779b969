"""Deployments against real engine processes that behave and misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from modelyard.deploy import actions, succession
from modelyard.deploy.schemas import DeployOut
from modelyard.engine import socket_dir
from modelyard.errors import EngineStarting, ModelNotFound, NothingDeployed, Unprocessable
from modelyard.jobs.tables import JobStatus
from modelyard.models import actions as models
from tests.deploy.yard import DeployYard, deploy_yard, sockets_of, traces_of
from tests.eventually import eventually
from tests.hostile_tokenizers import greedy, panicking

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("on_each_database")]


def runs(pid: int) -> bool:
    """Whether a process does anything: one that has ended and waits for its parent's word does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def nothing_is_left(yard: DeployYard, *job_ids: object) -> None:
    await eventually(lambda: not traces_of(yard.settings), "no trace of an engine is left")
    for job_id in job_ids:
        assert sockets_of(yard.log(job_id)) == []  # type: ignore[arg-type]


async def test_a_deployment_is_ready_once_its_engine_has_generated_a_token(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        job_id = await yard.deploy("org/tiny")
        with pytest.raises(EngineStarting):
            await yard.routing.resolve("org/tiny", "generate")
        deployment = await yard.becomes(job_id, "READY")
        assert deployment.ready_at is not None
        [request] = yard.record("org/tiny", "request")
        assert (request["path"], json.loads(request["body"])["max_tokens"]) == ("/v1/completions", 1)
        assert (await yard.job(job_id)).status == JobStatus.RUNNING
        target = await yard.routing.resolve("default", "generate")
        assert (target.model_id, target.url) == ("org/tiny", deployment.engine_url)

        assert (await yard.events(job_id))[0].message.startswith("Running")

        async def says_so() -> bool:
            return (await yard.events(job_id))[-1].message.startswith("Ready: org/tiny")

        # What is so is written before what is said of it.
        await eventually(says_so, "it says that it is ready")


@pytest.mark.parametrize(
    ("content", "said"), [(greedy(), "killed by SIGABRT"), (panicking(), "Cannot parse precompiled_charsmap")]
)
async def test_a_hostile_tokenizer_is_refused_before_an_engine_reads_it(
    tmp_path: Path, content: bytes, said: str
) -> None:
    async with deploy_yard(tmp_path) as yard:
        folder = await yard.add_model("org/odd")
        (folder / "tokenizer.json").write_bytes(content)
        job = await yard.ended(await yard.deploy("org/odd"))
        assert job.failure is not None
        assert (job.status, job.failure.code) == (JobStatus.FAILED, "bad_tokenizer")
        assert said in job.failure.message
        assert yard.record("org/odd") == [], "no engine has read it"
        assert (await yard.deployment(job.id)).state == "FAILED"


async def test_a_model_that_was_added_before_todays_rules_is_scanned_again_before_an_engine_reads_it(
    tmp_path: Path,
) -> None:
    async with deploy_yard(tmp_path) as yard:
        folder = await yard.add_model("org/old")
        (folder / "tokenizer_config.json").write_bytes(b'{"auto_map": {"AutoTokenizer": ["t.T", null]}}')
        job = await yard.ended(await yard.deploy("org/old"))
        assert job.failure is not None
        assert (job.status, job.failure.code) == (JobStatus.FAILED, "remote_code")
        assert "org/old was added before this was looked for" in job.failure.message
        assert "tokenizer_config.json" in job.failure.message
        assert yard.record("org/old") == [], "no engine has read it"


async def test_a_cure_that_the_engines_python_lacks_is_said_when_the_engine_stands(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny", misbehave={"lacks_cures": ["modelyard_lora"]})
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")

        async def warned() -> bool:
            return any("missing_cures" in (one.data or {}) for one in await yard.events(job_id))

        await eventually(warned, "it is told")
        [event] = [one for one in await yard.events(job_id) if "missing_cures" in (one.data or {})]
        assert (event.level, set(event.data["missing_cures"])) == ("warning", {"modelyard_lora"})
        assert "MODELYARD_ENGINE_PYTHON" in event.message


async def test_a_guessed_chat_template_is_announced_once_and_shown(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny", has_template=False)
        job_id = await yard.deploy("org/tiny")
        deployment = await yard.becomes(job_id, "READY")
        assert DeployOut.of(deployment).chat_template == "guessed"
        [start] = yard.record("org/tiny", "start")
        assert "--chat-template" in start["argv"]
        os.kill(start["pid"], signal.SIGKILL)
        await eventually(lambda: len(yard.record("org/tiny", "start")) == 2, "the second engine starts")
        await yard.becomes(job_id, "READY")
        events = [event for event in await yard.events(job_id) if "brings no chat template" in event.message]
        assert [event.level for event in events] == ["warning"]
        assert "add chat_template.jinja" in events[0].message


@pytest.mark.parametrize("source", ["own", "mistral"])
async def test_a_chat_template_that_is_not_guessed_is_shown_without_a_warning(tmp_path: Path, source: str) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny", has_template=source == "own", chat_template=source)
        job_id = await yard.deploy("org/tiny")
        assert DeployOut.of(await yard.becomes(job_id, "READY")).chat_template == source
        [start] = yard.record("org/tiny", "start")
        assert ("--tokenizer-mode" in start["argv"]) is (source == "mistral")
        assert "--chat-template" not in start["argv"]
        assert not [event for event in await yard.events(job_id) if "chat template" in event.message]


async def test_an_interrupt_ends_the_engine_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny", misbehave={"grandchild": True, "ignore_sigterm": True})
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")
        assert await yard.take_down() == job_id
        assert (await yard.ended(job_id)).status == JobStatus.KILLED
        await nothing_is_left(yard, job_id)
        async with yard.sessions.read() as session:
            with pytest.raises(NothingDeployed):
                await actions.current(session)
        with pytest.raises(ModelNotFound):
            await yard.routing.resolve("org/tiny", "generate")


@pytest.mark.parametrize(
    ("phase", "misbehave"),
    [
        ("before it binds", {"start_delay_s": 60}),
        ("never healthy", {"never": "healthy"}),
        ("in its first generation", {"never": "complete"}),
    ],
)
async def test_an_interrupt_in_each_phase_of_a_start_leaves_nothing_behind(
    tmp_path: Path, phase: str, misbehave: dict[str, object]
) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny", misbehave=misbehave)
        job_id = await yard.deploy("org/tiny")
        started = "request" if misbehave.get("never") == "complete" else "start"
        await eventually(lambda: yard.record("org/tiny", started), f"the engine is {phase}")
        await yard.interrupt(job_id)
        assert (await yard.ended(job_id)).status == JobStatus.KILLED
        assert (await yard.deployment(job_id)).state == "STOPPED"
        await nothing_is_left(yard, job_id)


async def test_an_interrupt_before_the_engine_starts_clears_the_deployment(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        async with yard.sessions.begin() as session:  # both wishes are there before the runner looks
            job, _ = await actions.deploy(session, actions.Wish("org/tiny"))
            await succession.take_down(session, await actions.current(session))
        assert (await yard.ended(job.id)).status == JobStatus.KILLED
        assert (await yard.deployment(job.id)).state == "STOPPED"
        assert yard.record("org/tiny") == []
        async with yard.sessions.begin() as session:
            await models.delete(session, "org/tiny")  # nothing holds it any more


async def test_an_interrupt_while_a_restart_is_waited_for_ends_it(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_restart_delay_s=60) as yard:
        await yard.add_model("org/tiny", misbehave={"die_after_s": 0.3, "starts": [1]})
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "BACKOFF")
        await yard.take_down()
        assert (await yard.ended(job_id)).status == JobStatus.KILLED
        await nothing_is_left(yard, job_id)


async def test_an_engine_that_dies_at_start_fails_the_job_with_its_cause(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        stderr = "ValueError: Model architectures ['FrobnicatorForCausalLM'] are not supported for now.\n"
        await yard.add_model("org/odd", misbehave={"die_at_start": {"stderr": stderr, "exit_code": 1}})
        job_id = await yard.deploy("org/odd")
        job = await yard.ended(job_id)
        assert job.status == JobStatus.FAILED
        assert job.failure is not None
        assert job.failure.code == "unsupported_architecture"
        assert "FrobnicatorForCausalLM" in job.failure.message
        assert "FrobnicatorForCausalLM" in yard.log(job_id)
        assert len(yard.record("org/odd", "start")) == 1
        await nothing_is_left(yard, job_id)
        async with yard.sessions.read() as session:
            with pytest.raises(NothingDeployed, match="FrobnicatorForCausalLM"):
                await actions.current(session)


async def test_an_engine_that_dies_in_service_is_started_again(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        job_id = await yard.deploy("org/tiny")
        before = await yard.becomes(job_id, "READY")
        [start] = yard.record("org/tiny", "start")
        os.kill(start["pid"], signal.SIGKILL)
        await eventually(lambda: len(yard.record("org/tiny", "request")) == 2, "the second engine was probed")
        after = await yard.becomes(job_id, "READY")
        assert after.restarts == 1
        assert after.engine_url != before.engine_url
        assert (await yard.job(job_id)).status == JobStatus.RUNNING
        warnings = [event.message for event in await yard.events(job_id) if event.level == "warning"]
        assert len([one for one in warnings if "SIGKILL" in one]) == 1


async def test_an_engine_that_keeps_dying_is_given_up_with_its_cause(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_max_restarts=2) as yard:
        await yard.add_model("org/tiny", misbehave={"die_after_s": 0.3, "exit_code": 3})
        job_id = await yard.deploy("org/tiny")
        job = await yard.ended(job_id)
        assert job.status == JobStatus.FAILED
        assert job.failure is not None
        assert "exit code 3" in job.failure.message
        assert len(yard.record("org/tiny", "start")) == 3
        assert (await yard.deployment(job_id)).state == "FAILED"
        await nothing_is_left(yard, job_id)


async def test_restarts_wait_twice_as_long_each_time(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_max_restarts=3, engine_restart_delay_s=0.2) as yard:
        await yard.add_model("org/tiny", misbehave={"die_after_s": 1.0})  # by then it has been ready
        job_id = await yard.deploy("org/tiny")
        await yard.ended(job_id)
        events = await yard.events(job_id)
        died = [event.at for event in events if event.level == "warning"]
        started = [event.at for event in events if event.message.startswith("Starting")][1:]
        waits = [(start - death).total_seconds() for death, start in zip(died, started, strict=True)]
        assert waits[0] >= 0.2
        assert waits[1] >= 0.4
        assert waits[2] >= 0.8


@pytest.mark.parametrize("never", ["bind", "healthy"])
async def test_an_engine_that_never_gets_ready_is_given_up(tmp_path: Path, never: str) -> None:
    async with deploy_yard(tmp_path, engine_start_timeout_s=1.5) as yard:
        await yard.add_model("org/tiny", misbehave={"never": never})
        job_id = await yard.deploy("org/tiny")
        job = await yard.ended(job_id)
        assert job.failure is not None
        assert job.failure.code == "engine_never_ready"
        await nothing_is_left(yard, job_id)


async def test_an_engine_that_answers_but_never_generates_is_given_up_in_time(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_start_timeout_s=1.5) as yard:
        await yard.add_model("org/tiny", misbehave={"never": "complete"})
        job_id = await yard.deploy("org/tiny")
        job = await yard.ended(job_id)
        assert job.failure is not None
        assert job.failure.code == "engine_never_ready"


async def test_the_first_error_of_an_engine_that_only_fails_stands_in_the_cause(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_start_timeout_s=1.5) as yard:
        await yard.add_model("org/tiny", misbehave={"fail": {"status": 500, "message": "no kernel image"}})
        job = await yard.ended(await yard.deploy("org/tiny"))
        assert job.failure is not None
        assert "no kernel image" in job.failure.message


@pytest.mark.parametrize("status", [400, 404, 501])
async def test_a_final_answer_to_the_first_prompt_ends_the_deployment_at_once(tmp_path: Path, status: int) -> None:
    async with deploy_yard(tmp_path, engine_start_timeout_s=900) as yard:
        message = "The model does not support Completions API"
        await yard.add_model("org/tiny", misbehave={"fail": {"status": status, "message": message}})
        job_id = await yard.deploy("org/tiny")
        job = await yard.ended(job_id)
        assert job.failure is not None
        assert job.failure.code == "engine_refuses"
        assert message in job.failure.message
        assert len(yard.record("org/tiny", "start")) == 1
        await nothing_is_left(yard, job_id)


async def test_an_engine_that_says_it_is_well_and_only_fails_is_given_up_before_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelyard.engine.readiness.FAILING_S", 0.3)
    async with deploy_yard(tmp_path, engine_start_timeout_s=900) as yard:
        await yard.add_model("org/tiny", misbehave={"fail": {"status": 500, "message": "a kernel failed"}})
        job = await yard.ended(await yard.deploy("org/tiny"))
        assert job.failure is not None
        assert job.failure.code == "engine_refuses"
        assert "a kernel failed" in job.failure.message


@pytest.mark.parametrize("task", ["generate", "embed"])
async def test_a_model_that_computes_nan_is_never_ready(tmp_path: Path, task: str) -> None:
    async with deploy_yard(tmp_path, engine_start_timeout_s=900) as yard:
        await yard.add_model("org/half", misbehave={"gives_nan": True}, task=task)
        job_id = await yard.deploy("org/half")
        job = await yard.ended(job_id)
        assert job.failure is not None
        assert job.failure.code == "model_gives_nan"
        assert "delete the model and add it again" in job.failure.hint
        await nothing_is_left(yard, job_id)


async def test_an_engine_that_computes_nan_after_a_restart_is_tried_again(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny", misbehave={"starts": [2], "gives_nan": True})
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")
        [start] = yard.record("org/tiny", "start")
        os.kill(start["pid"], signal.SIGKILL)
        await eventually(lambda: len(yard.record("org/tiny", "start")) == 3, "the third engine starts")
        assert (await yard.becomes(job_id, "READY")).restarts == 2
        warnings = [event.message for event in await yard.events(job_id) if event.level == "warning"]
        assert "computes no numbers" in warnings[1]


async def test_a_deploy_of_another_model_replaces_the_current_one(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        second = await yard.deploy("org/b")
        await yard.becomes(second, "READY")
        assert (await yard.ended(first)).status == JobStatus.KILLED
        assert any("Replaced by org/b, which is ready" in event.message for event in await yard.events(first))
        assert (await yard.routing.resolve("Compressa-LLM", "generate")).model_id == "org/b"
        stop_of_a = yard.record("org/a", "stop")
        assert stop_of_a, "the first engine was asked to end"


async def test_deploying_what_is_deployed_returns_its_job(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        first = await yard.deploy("org/a")
        assert await yard.deploy("org/a") == first
        await yard.becomes(first, "READY")
        assert await yard.deploy("org/a") == first
        other = await yard.deploy("org/a", options={"max_model_len": 512})
        assert other != first
        await yard.becomes(other, "READY")
        [_, start] = yard.record("org/a", "start")
        assert start["argv"][start["argv"].index("--max-model-len") + 1] == "512"


async def test_deploying_again_right_after_an_interrupt_starts_a_new_one(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        await yard.interrupt(first)
        second = await yard.deploy("org/a")
        assert second != first
        await yard.becomes(second, "READY")
        assert (await yard.ended(first)).status == JobStatus.KILLED


async def test_of_two_deploys_at_the_same_moment_one_stays_and_one_is_replaced(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        first, second = await asyncio.gather(yard.deploy("org/a"), yard.deploy("org/b"))
        states: set[str] = set()

        async def settled() -> bool:
            states.clear()
            states.update([(await yard.deployment(first)).state, (await yard.deployment(second)).state])
            return states == {"READY", "STOPPED"}

        await eventually(settled, f"one is ready and one has stopped: {states}")
        async with yard.sessions.read() as session:
            assert len(await succession.live(session)) == 1


async def test_generative_and_embedding_models_stand_side_by_side(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/e", task="embed")
        await yard.becomes(await yard.deploy("org/e"), "READY")
        await yard.becomes(await yard.deploy("org/a"), "READY")
        assert (await yard.routing.resolve("Compressa-Embedding", "embed")).model_id == "org/e"
        assert (await yard.routing.resolve("Compressa-LLM", "generate")).model_id == "org/a"
        assert (await yard.routing.resolve("default", "embed")).model_id == "org/e"
        assert (await yard.routing.resolve("default", "generate")).model_id == "org/a"
        async with yard.sessions.read() as session:
            assert (await actions.current(session)).model_id == "org/a"
            assert (await actions.current(session, "embed")).model_id == "org/e"


async def test_adapters_are_served_under_their_own_names(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        job_id = await yard.deploy("org/a", ["org/poems"])
        await yard.becomes(job_id, "READY")
        assert (await yard.job(job_id)).name == "DEPLOY_org/a_adapters_org/poems"
        target = await yard.routing.resolve("org/poems", "generate")
        assert (target.model_id, target.served_name) == ("org/a", "org/poems@1")


async def test_what_cannot_be_deployed_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/e", task="embed")
        await yard.add_model("org/other")
        await yard.add_model("org/poems", adapter=True, base_model_id="org/other")
        with pytest.raises(ModelNotFound, match="org/gone"):
            await yard.deploy("org/gone")
        with pytest.raises(ModelNotFound, match=r"no adapter 'org/gone' of 'org/other' .* are: org/poems\.") as refused:
            await yard.deploy("org/other", ["org/poems", "org/gone"])
        assert refused.value.param == "adapter_ids"
        with pytest.raises(Unprocessable, match="adapter of 'org/other'"):
            await yard.deploy("org/poems")
        with pytest.raises(Unprocessable, match="not of 'org/a'"):
            await yard.deploy("org/a", ["org/poems"])
        with pytest.raises(Unprocessable, match="not an adapter"):
            await yard.deploy("org/a", ["org/e"])
        with pytest.raises(Unprocessable, match="generative"):
            await yard.deploy("org/e", ["org/poems"])
        async with yard.sessions.read() as session:
            assert await succession.live(session) == []


async def test_a_model_too_long_or_too_large_fails_before_anything_starts(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        job = await yard.ended(await yard.deploy("org/a", options={"max_model_len": 4096}))
        assert job.failure is not None
        assert job.failure.code == "model_too_long"
        assert "4096" in job.failure.message
        assert "2048" in job.failure.message
        await yard.add_model("org/huge", size_bytes=10**15)
        job = await yard.ended(await yard.deploy("org/huge"))
        assert job.failure is not None
        assert job.failure.code == "not_enough_memory"
        assert "GiB" in job.failure.message
        assert yard.record("org/a") == yard.record("org/huge") == []


async def test_a_model_whose_configuration_is_gone_fails_with_a_reason(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        folder = await yard.add_model("org/a")
        (folder / "config.json").unlink()
        job = await yard.ended(await yard.deploy("org/a"))
        assert job.failure is not None
        assert job.failure.code == "broken_model"


async def test_the_keeper_of_an_engine_in_service_is_killed_and_another_engine_comes(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny", misbehave={"grandchild": True})
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")
        [start] = yard.record("org/tiny", "start")
        parent = int(Path(f"/proc/{start['pid']}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)
        await eventually(lambda: len(yard.record("org/tiny", "request")) == 2, "the second engine was probed")
        await yard.becomes(job_id, "READY")
        assert not runs(start["pid"])
        assert not runs(start["grandchild"])


async def test_the_server_stopping_in_good_order_ends_engines_and_a_new_one_brings_them_back(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")
        record_dir = yard.record_dirs["org/tiny"]
    assert traces_of(yard.settings) == []
    assert sockets_of(yard.log(job_id)) == []
    async with deploy_yard(tmp_path) as again:
        again.record_dirs["org/tiny"] = record_dir
        await eventually(lambda: len(again.record("org/tiny", "request")) == 2, "the second engine was probed")
        deployment = await again.becomes(job_id, "READY")
        assert deployment.restarts == 0
        assert (await again.job(job_id)).status == JobStatus.RUNNING
        await again.take_down()
        assert (await again.ended(job_id)).status == JobStatus.KILLED


@pytest.fixture
def hasty_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelyard.deploy.service.HEALTH_EVERY_S", 0.05)
    monkeypatch.setattr("modelyard.engine.silence.UNWELL_LIMIT", 3)
    monkeypatch.setattr("modelyard.engine.client.HEALTH_TIMEOUT_S", 0.3)


#: What an engine logs of a request, which looks like the cause of a death.
ANOTHERS = "ERROR Exception while compiling: ValueError: the pattern [a-z]{0,500} of somebody's schema"


async def test_an_engine_that_is_silent_and_idle_is_ended_and_named_so(tmp_path: Path, hasty_looks: None) -> None:
    async with deploy_yard(tmp_path, engine_max_restarts=0) as yard:
        await yard.add_model(
            "org/tiny", misbehave={"hangs": {"after_s": 0, "for_s": 0, "busy": False, "says": ANOTHERS}}
        )
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")
        [start] = yard.record("org/tiny", "start")
        os.kill(start["pid"], signal.SIGSTOP)  # it is there, and says nothing
        await eventually(lambda: len(yard.record("org/tiny", "start")) == 2, "the second engine is started")
        deployment = await yard.becomes(job_id, "READY")
        assert deployment.restarts == 0, "it did not die by itself"
        warnings = [event.message for event in await yard.events(job_id) if event.level == "warning"]
        assert "does not answer, and its processes do nothing" in warnings[0]
        assert not [one for one in warnings if "pattern" in one or "SIGKILL" in one], warnings


async def test_an_engine_that_is_silent_and_busy_is_left_alone(tmp_path: Path, hasty_looks: None) -> None:
    async with deploy_yard(tmp_path, engine_max_restarts=0) as yard:
        await yard.add_model("org/tiny", misbehave={"hangs": {"after_s": 1.5, "for_s": 4.0, "busy": True}})
        job_id = await yard.deploy("org/tiny")
        await yard.becomes(job_id, "READY")

        async def is_said(words: str) -> bool:
            return any(words in event.message for event in await yard.events(job_id))

        await eventually(lambda: is_said("its processes work"), "it is said that it works")
        await eventually(lambda: is_said("answers again after"), "it is said that it answers")
        assert len(yard.record("org/tiny", "start")) == 1
        assert (await yard.deployment(job_id)).state == "READY"


async def test_an_engine_that_works_for_too_long_without_an_answer_is_ended(tmp_path: Path, hasty_looks: None) -> None:
    hang = {"after_s": 1.5, "for_s": 60.0, "busy": True, "says": ANOTHERS}
    async with deploy_yard(tmp_path, engine_max_restarts=0, engine_busy_timeout_s=1.0) as yard:
        await yard.add_model("org/tiny", misbehave={"starts": [1], "hangs": hang})
        job_id = await yard.deploy("org/tiny")
        await eventually(lambda: len(yard.record("org/tiny", "start")) == 2, "the second engine is started")
        await yard.becomes(job_id, "READY")
        warnings = [event.message for event in await yard.events(job_id) if event.level == "warning"]
        assert any("without answering; it was ended" in one for one in warnings), warnings
        assert not any("pattern" in one for one in warnings), warnings


async def test_an_engine_that_hangs_again_and_again_is_given_up(
    tmp_path: Path, hasty_looks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelyard.engine.silence.FORGIVEN", 1)
    async with deploy_yard(tmp_path, engine_max_restarts=1) as yard:
        await yard.add_model("org/tiny", misbehave={"hangs": {"after_s": 0.5, "for_s": 60.0, "busy": False}})
        job_id = await yard.deploy("org/tiny")
        job = await yard.ended(job_id)
        assert (job.status, job.failure and job.failure.code) == (JobStatus.FAILED, "engine_silent")
        assert len(yard.record("org/tiny", "start")) == 3, "one is forgiven, one is the restart that it has"
        await nothing_is_left(yard, job_id)


async def test_the_private_folder_of_an_engine_that_was_about_to_start_is_not_left_behind(tmp_path: Path) -> None:
    folder = socket_dir.new_path()
    folder.mkdir(mode=0o700)
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        async with yard.sessions.begin() as session:  # as a server leaves it that was killed before it started one
            job, _ = await actions.deploy(session, actions.Wish("org/tiny"))
            (await actions.of_job(session, job.id)).engine_url = f"unix:{folder}/engine.sock"
        await yard.becomes(job.id, "READY")
        assert not folder.exists()


async def test_an_engine_whose_keeper_is_killed_as_it_starts_fails_with_its_cause(tmp_path: Path) -> None:
    def kill_the_first_keeper() -> None:
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            for proc in Path("/proc").iterdir():
                with suppress(OSError):
                    line = (proc / "cmdline").read_bytes() if proc.name.isdigit() else b""
                    if b"keeper.py" in line and str(tmp_path).encode() in line:
                        return os.kill(int(proc.name), signal.SIGKILL)
        return None

    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny", misbehave={"start_delay_s": 5.0})
        killing = asyncio.create_task(asyncio.to_thread(kill_the_first_keeper))
        job_id = await yard.deploy("org/tiny")
        job = await yard.ended(job_id)
        await killing
        assert job.failure is not None
        # The second where it got to its first line: then it is an engine that died.
        assert job.failure.code in ("engine_not_started", "engine_failed"), job.failure
        await nothing_is_left(yard, job_id)
