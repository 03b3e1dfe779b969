"""Who leaves for whom, and who comes back: wishes that cross one another before anybody has come to them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from modelyard.deploy import actions, succession
from modelyard.deploy.tables import Deployment, Strategy, Wanted
from modelyard.errors import EngineStarting, ModelNotFound
from modelyard.jobs.tables import JobStatus
from tests.deploy.yard import DeployYard, deploy_yard
from tests.eventually import eventually

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("on_each_database")]

DEAD = {"die_at_start": {"stderr": "ValueError: no"}}


async def only_one_live(yard: DeployYard, model_id: str, *states: str) -> Deployment:
    """Wait until the only deployment is one of the model, and in one of the states."""

    async def so() -> Deployment | None:
        async with yard.sessions.read() as session:
            found = await succession.live(session)
        is_so = [one.model_id for one in found] == [model_id] and found[0].state in states
        return found[0] if is_so else None

    found: Deployment = await eventually(so, f"{model_id} is {' or '.join(states)}, and nothing else is there")
    return found


async def wish_at_once(yard: DeployYard, *wishes: actions.Wish) -> list[UUID]:
    """Take several wishes before the supervisor comes to the first."""
    async with yard.sessions.begin() as session:
        job_ids = [(await actions.deploy(session, wish))[0].id for wish in wishes]
    return job_ids


async def in_service(yard: DeployYard, job_id: UUID) -> tuple[str, str]:
    row = await yard.deployment(job_id)
    return row.state, row.wanted


async def test_a_model_deployed_again_stays_though_another_was_to_take_its_place(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b", misbehave={"start_delay_s": 0.5})
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        second = await yard.deploy("org/b")
        assert await yard.deploy("org/a", keep_others=True) == first
        await yard.becomes(second, "READY")
        assert await in_service(yard, first) == ("READY", Wanted.UP)
        assert (await yard.routing.resolve("default", "generate")).model_id == "org/a", "the last one asked for"


@pytest.mark.parametrize("bad", [{"fail_adapters": {"org/mute": "no"}}, {"fail_load": {"org/mute": "no"}}])
async def test_what_comes_back_serves_without_an_adapter_that_does_not_work(
    tmp_path: Path, bad: dict[str, Any]
) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave=bad)
        await yard.add_adapter("org/mute", "org/a")
        await yard.add_adapter("org/poems", "org/a")
        await yard.add_model("org/dead", misbehave=DEAD)
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        # Nobody has tried the adapters when their model is to leave.
        again, dead = await wish_at_once(
            yard,
            actions.Wish("org/a", ["org/mute", "org/poems"]),
            actions.Wish("org/dead", strategy=Strategy.REPLACE),
        )
        assert again == first
        assert (await yard.ended(dead)).status == JobStatus.FAILED
        assert (await yard.ended(first)).status == JobStatus.KILLED
        row = await only_one_live(yard, "org/a", "READY")
        assert [one["adapter_id"] for one in row.loaded] == ["org/poems"]
        assert row.adapter_failure is not None
        assert row.adapter_failure["adapter_id"] == "org/mute"


async def test_what_comes_back_is_tried_again_when_its_engine_dies(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={**DEAD, "starts": [2]})
        await yard.add_model("org/dead", misbehave=DEAD)
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        dead = await yard.deploy("org/dead", strategy=Strategy.REPLACE)
        assert (await yard.ended(dead)).status == JobStatus.FAILED
        row = await only_one_live(yard, "org/a", "READY")
        assert row.restarts == 1
        assert len(yard.record("org/a", "start")) == 3


async def test_what_comes_back_does_so_again_when_it_was_replaced_before_it_was_ready(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"start_delay_s": 1.0, "starts": [2]})
        await yard.add_model("org/dead", misbehave=DEAD)
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        assert (await yard.ended(await yard.deploy("org/dead", strategy=Strategy.REPLACE))).status == JobStatus.FAILED
        back = await only_one_live(yard, "org/a", "STARTING")
        assert (await yard.ended(await yard.deploy("org/dead"))).status == JobStatus.FAILED
        assert (await yard.ended(back.job_id)).status == JobStatus.KILLED
        row = await only_one_live(yard, "org/a", "READY")
        assert row.job_id not in (first, back.job_id)


async def test_what_left_for_a_model_that_had_served_and_then_does_not_start_again_comes_back(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_max_restarts=1, engine_restart_delay_s=2.0) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        second = await yard.deploy("org/b", keep_others=True)
        await yard.becomes(second, "READY")
        yard.misbehave("org/a", DEAD)
        os.kill(yard.record("org/a", "start")[0]["pid"], signal.SIGKILL)
        await yard.becomes(first, "BACKOFF")
        assert await yard.deploy("org/a", strategy=Strategy.REPLACE) == first
        assert (await yard.ended(second)).status == JobStatus.KILLED
        assert (await yard.ended(first)).status == JobStatus.FAILED
        await only_one_live(yard, "org/b", "READY")


async def test_nobody_is_called_back_for_a_model_that_served_and_died(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_max_restarts=0) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/b")
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        second = await yard.deploy("org/b")
        await yard.becomes(second, "READY")
        assert (await yard.ended(first)).status == JobStatus.KILLED
        os.kill(yard.record("org/b", "start")[0]["pid"], signal.SIGKILL)
        assert (await yard.ended(second)).status == JobStatus.FAILED
        with pytest.raises((ModelNotFound, EngineStarting)):
            await yard.routing.resolve("org/a", "generate")
        async with yard.sessions.read() as session:
            assert not await succession.live(session)
