"""A plan says what the deploy then does, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from modelyard.deploy.actions import Wish
from modelyard.deploy.plan import Plan, plan
from modelyard.deploy.tables import Deployment, Strategy
from modelyard.engine import attempts
from modelyard.engine.memory import CPU_PROCESSES_BYTES
from modelyard.errors import ModelNotFound, Unprocessable
from modelyard.hardware import GIB
from modelyard.jobs.tables import Job, JobEvent
from tests.deploy.yard import DeployYard, deploy_yard
from tests.eventually import eventually

pytestmark = [pytest.mark.usefixtures("on_each_database"), pytest.mark.timeout(120)]

#: Enough for one engine of the yard's models, and not for two.
ONE_ENGINE: dict[str, Any] = {"engine_memory_gib": 1.5 * CPU_PROCESSES_BYTES / GIB}


async def planned(yard: DeployYard, model_id: str, *adapter_ids: str, **wish: Any) -> Plan:
    return await plan(yard.sessions, yard.settings, Wish(model_id, adapter_ids, **wish))


async def rows(yard: DeployYard) -> list[int]:
    async with yard.sessions.read() as session:
        return [
            await session.scalar(select(func.count()).select_from(table)) or 0 for table in (Deployment, Job, JobEvent)
        ]


async def test_with_nothing_in_service_a_model_is_started_and_nobody_leaves(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        found = await planned(yard, "org/tiny")
        assert (found.way, found.fits, found.fits_beside, found.failure) == ("side_by_side", True, True, None)
        assert list(found.leaving) == []
        assert found.fit is not None
        assert found.free_bytes is not None
        assert found.free_after_bytes is not None
        assert found.fit.total_bytes >= CPU_PROCESSES_BYTES
        # What is free changes while it is looked at, but not by so much.
        assert abs(found.free_bytes - found.free_after_bytes - found.fit.total_bytes) < GIB


async def test_a_plan_leaves_the_database_and_the_yard_as_they_were(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        await yard.add_model("org/other")
        job_id = await yard.deploy("org/tiny")
        before = await yard.becomes(job_id, "READY")

        async def is_told() -> bool:
            return (await yard.events(job_id))[-1].message.startswith("Ready")

        await eventually(is_told, "the last event of the start is written")
        counted = await rows(yard)
        for strategy in Strategy:
            await planned(yard, "org/other", strategy=strategy)
        await planned(yard, "org/tiny", idle_timeout_s=7.0)
        assert await rows(yard) == counted
        after = await yard.deployment(job_id)
        assert (after.state, after.wanted, after.idle_timeout_s) == ("READY", "UP", None)
        assert after.current_at == before.current_at
        assert yard.record("org/other", "start") == []
        assert not (await yard.job(job_id)).interrupt_requested


async def test_where_both_fit_the_old_one_leaves_after_the_new_one_is_ready(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        await yard.add_model("org/other")
        old = await yard.becomes(await yard.deploy("org/tiny"), "READY")
        found = await planned(yard, "org/other")
        assert (found.way, found.fits_beside) == ("side_by_side", True)
        [leaving] = found.leaving
        assert (leaving.deployment_id, leaving.memory_bytes, leaving.first) == (old.id, old.memory_bytes, False)
        assert list((await planned(yard, "org/other", keep_others=True)).leaving) == []
        asked = await planned(yard, "org/other", strategy=Strategy.REPLACE)
        assert (asked.way, [one.first for one in asked.leaving]) == ("replace", [True])


async def test_where_both_do_not_fit_the_old_one_leaves_first_as_the_deploy_then_shows(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, **ONE_ENGINE) as yard:
        await yard.add_model("org/tiny")
        await yard.add_model("org/other")
        old = await yard.becomes(await yard.deploy("org/tiny"), "READY")
        found = await planned(yard, "org/other")
        assert (found.way, found.fits, found.fits_beside, found.failure) == ("replace", True, False, None)
        assert [(one.deployment_id, one.first) for one in found.leaving] == [(old.id, True)]
        assert found.free_bytes is not None
        assert found.free_bytes < CPU_PROCESSES_BYTES
        beside = await planned(yard, "org/other", strategy=Strategy.SIDE_BY_SIDE)
        assert (beside.way, beside.fits) == ("side_by_side", False)
        assert beside.failure is not None
        assert beside.failure.code == "not_enough_memory"
        assert (await planned(yard, "org/other", keep_others=True)).fits is False

        job_id = await yard.deploy("org/other")
        await yard.becomes(job_id, "READY")
        assert (await yard.deployment(old.job_id)).state == "STOPPED"
        assert found.fit is not None
        assert (await yard.deployment(job_id)).memory_bytes == found.fit.total_bytes


async def test_nobody_leaves_for_what_would_not_fit_in_its_place_either(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, **ONE_ENGINE) as yard:
        await yard.add_model("org/tiny")
        await yard.add_model("org/other")
        old = await yard.becomes(await yard.deploy("org/tiny"), "READY")
        wish = {"cpu_kv_cache_gib": 4000.0}
        found = await planned(yard, "org/other", options=wish)
        assert (found.way, found.fits, [one.first for one in found.leaving]) == ("side_by_side", False, [False])

        ended = await yard.ended(await yard.deploy("org/other", options=wish))
        assert ended.failure is not None
        assert found.failure is not None
        assert ended.failure.code == found.failure.code == "not_enough_memory"
        after = await yard.deployment(old.job_id)
        assert (after.state, after.wanted, after.ready_at) == ("READY", "UP", old.ready_at)


async def test_other_adapters_on_the_same_model_change_the_engine_that_runs(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, **ONE_ENGINE) as yard:
        await yard.add_model("org/tiny")
        await yard.add_adapter("org/poems", "org/tiny")
        await yard.becomes(await yard.deploy("org/tiny"), "READY")
        found = await planned(yard, "org/tiny", "org/poems")
        assert (found.way, found.fits, list(found.leaving), found.failure) == ("in_place", True, [], None)
        assert [one.model_id for one in found.adapters] == ["org/poems"]


async def test_what_no_memory_of_this_machine_would_hold_says_how_it_would_end_and_what_helps(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        found = await planned(yard, "org/tiny", options={"cpu_kv_cache_gib": 4000.0})
        assert not found.fits
        assert found.failure is not None
        assert found.fit is not None
        assert found.fit.message == found.failure.message
        assert any("cpu_kv_cache_gib" in hint for hint in found.fit.hints)
        ended = await yard.ended(await yard.deploy("org/tiny", options={"cpu_kv_cache_gib": 4000.0}))
        assert ended.failure is not None
        assert ended.failure.code == found.failure.code


async def test_a_length_that_the_model_does_not_reach_is_the_plans_failure_too(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        found = await planned(yard, "org/tiny", options={"max_model_len": 4096})
        assert found.failure is not None
        assert (found.fits, found.failure.code, found.fit) == (False, "model_too_long", None)


async def test_what_the_deploy_refuses_is_refused(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        await yard.add_adapter("org/poems", "org/tiny")
        with pytest.raises(ModelNotFound):
            await planned(yard, "org/none")
        with pytest.raises(Unprocessable):
            await planned(yard, "org/poems")


async def test_the_engine_of_a_plan_is_never_attempted(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/tiny")
        await planned(yard, "org/tiny")
        assert [attempts.newest(folder) for folder in yard.settings.jobs_dir.glob("*")] == []
