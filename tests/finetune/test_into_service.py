"""A trained adapter goes into service beside what is there, or its training says why it could not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from modelyard.deploy import actions, succession
from modelyard.deploy.tables import Deployment, Strategy
from modelyard.errors import JobFailure
from modelyard.finetune.into_service import promote, put_into_service
from modelyard.jobs import actions as jobs
from modelyard.jobs.runner import JobContext, JobInterrupted
from modelyard.jobs.tables import Job, JobStatus
from modelyard.routing import aliases
from modelyard.routing.tables import Alias
from tests.deploy.yard import DeployYard, deploy_yard, until_interrupted
from tests.engine.test_adapter_probes import TRAINED, write_probes
from tests.eventually import eventually

pytestmark = [pytest.mark.timeout(120)]

ORG_A = "org/a"


@dataclass
class Training:
    """A training that has published its adapter, and what it does next."""

    yard: DeployYard
    context: JobContext

    async def deploys(self) -> dict[str, Any]:
        yard = self.yard
        return await put_into_service(self.context, yard.sessions, yard.settings, model_id=ORG_A, adapter_id=TRAINED)

    async def failure(self) -> JobFailure:
        with pytest.raises(JobFailure) as caught:
            await self.deploys()
        assert caught.value.code == "adapter_not_deployed"
        return caught.value

    async def again(self) -> Training:
        """Return it as a server sees it that was started again."""
        return Training(self.yard, await _context(self.yard, self.context.id))


async def _context(yard: DeployYard, job_id: UUID) -> JobContext:
    async with yard.sessions.read() as session:
        job = await jobs.get(session, job_id)
    return JobContext(job, yard.settings.jobs_dir / str(job.id), yard.sessions)


@asynccontextmanager
async def training(data_dir: Path, misbehave: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[Training]:
    async with deploy_yard(data_dir, {"FT": until_interrupted}, **settings) as yard:
        await yard.add_model(ORG_A, misbehave=misbehave)
        write_probes(await yard.add_adapter(TRAINED, ORG_A, path="ft@support"))
        async with yard.sessions.begin() as session:
            job = Job(kind="FT", name="FT", spec={}, status=JobStatus.RUNNING)
            session.add(job)
            await session.flush()
        yield Training(yard, await _context(yard, job.id))


async def live(yard: DeployYard) -> list[Deployment]:
    async with yard.sessions.read() as session:
        return [one for one in await succession.live(session) if await actions.is_wanted(session, one)]


@pytest.mark.usefixtures("on_each_database")
async def test_the_running_engine_of_the_base_serves_it_too_and_nothing_else_changes(tmp_path: Path) -> None:
    async with training(tmp_path) as ft:
        yard = ft.yard
        await yard.add_model("org/b")
        await yard.add_adapter("org/poems", ORG_A)
        job_id = await yard.deploy(ORG_A, ["org/poems"], {"max_loras": 3}, idle_timeout_s=600.0)
        await yard.becomes(job_id, "READY")
        other = await yard.deploy("org/b", keep_others=True)
        await yard.becomes(other, "READY")
        before = await yard.deployment(job_id)
        checks = await ft.deploys()
        assert (checks["tokens_equal"], checks["acts"], checks["changed_answers"]) == (True, True, 6)
        row = await yard.deployment(job_id)
        assert row.adapter_ids == ["org/poems", TRAINED]
        assert (row.options, row.idle_timeout_s, row.current_at) == (
            before.options, before.idle_timeout_s, before.current_at
        )  # fmt: skip
        assert (await yard.routing.resolve(TRAINED, "generate")).served_name == f"{TRAINED}@1"
        assert (await yard.routing.resolve("default", "generate")).model_id == "org/b", "what is current stays so"
        assert len(yard.record(ORG_A, "start")) == 1
        assert await ft.deploys() == checks, "it may be repeated"
        assert await (await ft.again()).deploys() == checks


async def test_a_base_that_is_not_in_service_is_deployed_with_it_beside_the_current_one(tmp_path: Path) -> None:
    async with training(tmp_path) as ft:
        yard = ft.yard
        await yard.add_model("org/b")
        await yard.becomes(await yard.deploy("org/b"), "READY")
        assert (await ft.deploys())["acts"]
        assert {one.model_id for one in await live(yard)} == {ORG_A, "org/b"}
        assert (await yard.routing.resolve("default", "generate")).model_id == "org/b"
        assert (await yard.routing.resolve(TRAINED, "generate")).model_id == ORG_A


async def test_a_base_at_rest_is_woken_for_it(tmp_path: Path) -> None:
    async with training(tmp_path) as ft:
        job_id = await ft.yard.deploy(ORG_A, idle_timeout_s=0.3)
        await ft.yard.becomes(job_id, "IDLE")
        assert (await ft.deploys())["acts"]
        assert len(ft.yard.record(ORG_A, "start")) == 2


async def test_an_engine_without_places_for_adapters_is_left_alone(tmp_path: Path) -> None:
    async with training(tmp_path) as ft:
        job_id = await ft.yard.deploy(ORG_A, options={"max_loras": 0})
        await ft.yard.becomes(job_id, "READY")
        assert (await ft.deploys())["acts"]
        assert sorted(one.options.get("max_loras", -1) for one in await live(ft.yard)) == [-1, 0]


@pytest.mark.usefixtures("on_each_database")
async def test_one_that_does_not_act_fails_the_training_with_that_cause(tmp_path: Path) -> None:
    async with training(tmp_path, {"adapter_ignored": [TRAINED]}) as ft:
        job_id = await ft.yard.deploy(ORG_A)
        await ft.yard.becomes(job_id, "READY")
        failure = await ft.failure()
        assert "(adapter_does_not_act)" in failure.message
        assert "in the store, but not in service" in failure.message
        assert (await ft.yard.deployment(job_id)).state == "READY"
        assert "(adapter_does_not_act)" in (await (await ft.again()).failure()).message, "it is not tried again"


async def test_one_whose_base_cannot_start_fails_the_training_with_that_cause(tmp_path: Path) -> None:
    async with training(tmp_path, {"die_at_start": {"stderr": "ValueError: no", "exit_code": 1}}) as ft:
        failure = await ft.failure()
        assert f"{TRAINED} is trained and in the store" in failure.message
        assert await live(ft.yard) == []


async def test_one_that_no_engine_can_take_is_told_before_anything_changes(tmp_path: Path) -> None:
    async with training(tmp_path, engine_max_loras=0) as ft:
        failure = await ft.failure()
        assert "MODELYARD_ENGINE_MAX_LORAS is 0" in failure.message
        assert await live(ft.yard) == []


async def test_a_deployment_that_is_taken_down_meanwhile_fails_the_training(tmp_path: Path) -> None:
    async with training(tmp_path, {"slow_load": 3.0}) as ft:
        job_id = await ft.yard.deploy(ORG_A)
        await ft.yard.becomes(job_id, "READY")
        deploying = asyncio.ensure_future(ft.failure())
        await eventually(lambda: _wants(ft.yard, job_id, TRAINED), "it is wanted")
        await ft.yard.take_down(job_id)
        assert "taken out of service meanwhile" in (await deploying).message


async def test_adapters_that_somebody_else_asks_for_meanwhile_fail_the_training(tmp_path: Path) -> None:
    async with training(tmp_path, {"slow_load": 1.0}) as ft:
        await ft.yard.add_adapter("org/poems", ORG_A)
        job_id = await ft.yard.deploy(ORG_A)
        await ft.yard.becomes(job_id, "READY")
        deploying = asyncio.ensure_future(ft.failure())
        await eventually(lambda: _wants(ft.yard, job_id, TRAINED), "it is wanted")
        await ft.yard.deploy(ORG_A, ["org/poems"])
        assert "(adapters_changed)" in (await deploying).message


async def test_one_that_falls_with_another_adapter_is_asked_for_again(tmp_path: Path) -> None:
    async with training(tmp_path, {"slow_load": 0.5, "fail_adapters": {"org/bad": "it does not fit"}}) as ft:
        await ft.yard.add_adapter("org/bad", ORG_A)
        job_id = await ft.yard.deploy(ORG_A)
        await ft.yard.becomes(job_id, "READY")
        await ft.yard.deploy(ORG_A, ["org/bad"])
        await eventually(lambda: _wants(ft.yard, job_id, "org/bad"), "the bad one is wanted")
        assert (await ft.deploys())["acts"]
        assert (await ft.yard.deployment(job_id)).adapter_ids == [TRAINED]


async def test_a_deployment_of_others_that_serves_it_too_is_as_good(tmp_path: Path) -> None:
    async with training(tmp_path, {"slow_load": 0.5}) as ft:
        job_id = await ft.yard.deploy(ORG_A)
        await ft.yard.becomes(job_id, "READY")
        deploying = asyncio.ensure_future(ft.deploys())
        await eventually(lambda: _wants(ft.yard, job_id, TRAINED), "it is wanted")
        await ft.yard.deploy(ORG_A, [TRAINED], {"max_loras": 2}, strategy=Strategy.REPLACE)
        assert (await deploying)["acts"]
        assert [one.options for one in await live(ft.yard)] == [{"max_loras": 2}]


async def test_an_interrupt_takes_the_wish_back(tmp_path: Path) -> None:
    async with training(tmp_path, {"slow_load": 2.0}) as ft:
        job_id = await ft.yard.deploy(ORG_A)
        await ft.yard.becomes(job_id, "READY")
        deploying = asyncio.ensure_future(ft.deploys())
        await eventually(lambda: _wants(ft.yard, job_id, TRAINED), "it is wanted")
        ft.context.interrupted.set()
        with pytest.raises(JobInterrupted):
            await deploying
        row = await ft.yard.deployment(job_id)
        assert (row.adapter_ids, row.wanted) == ([], "UP")


async def test_an_interrupt_takes_down_what_was_deployed_for_it(tmp_path: Path) -> None:
    async with training(tmp_path, {"start_delay_s": 5.0}) as ft:
        deploying = asyncio.ensure_future(ft.deploys())
        await eventually(lambda: _any(ft.yard), "its base is deployed")
        ft.context.interrupted.set()
        with pytest.raises(JobInterrupted):
            await deploying
        assert await live(ft.yard) == []


async def _any(yard: DeployYard) -> bool:
    return bool(await live(yard))


async def _wants(yard: DeployYard, job_id: UUID, adapter_id: str) -> bool:
    return adapter_id in (await yard.deployment(job_id)).adapter_ids


async def _target(yard: DeployYard, name: str) -> str | None:
    async with yard.sessions.read() as session:
        return (await session.scalars(select(Alias.target).where(Alias.name == name))).first()


@pytest.mark.usefixtures("on_each_database")
async def test_an_alias_moves_only_to_what_is_better_and_can_be_taken_back(tmp_path: Path) -> None:
    async with training(tmp_path) as ft:
        sessions = ft.yard.sessions

        async def promoted(condition: str, evaluation: dict[str, Any] | None) -> dict[str, Any]:
            return await promote(
                sessions, name="support", adapter_id=TRAINED,
                wanted={"alias": "default", "if": condition}, evaluation=evaluation,
            )  # fmt: skip

        stays = {"moved": False, "alias": "default", "from": None, "to": TRAINED}
        assert await promoted("better", None) == {
            **stays, "why": "No rows were held back, so that nothing tells whether it is better."
        }  # fmt: skip
        assert await promoted("better", {"better": False, "why": "The loss is higher."}) == {
            **stays, "why": "The loss is higher."
        }  # fmt: skip
        assert await _target(ft.yard, "default") is None
        async with sessions.begin() as session:
            await aliases.put(session, "default", ORG_A)
        found = await promoted("better", {"better": True, "why": "The loss is lower."})
        assert found == {
            "moved": True, "alias": "default", "from": ORG_A, "to": TRAINED, "why": "The loss is lower."
        }  # fmt: skip
        assert await promoted("better", {"better": True, "why": "The loss is lower."}) == found, "after a restart"
        assert await _target(ft.yard, "default") == TRAINED
        async with sessions.read() as session:
            last = (await aliases.history(session, "default", limit=1))[0]
        assert last.reason == "training support"
        async with sessions.begin() as session:
            await aliases.rollback(session, "default")
        assert await _target(ft.yard, "default") == ORG_A
        assert (await promoted("always", None))["moved"]


async def test_an_alias_that_became_the_name_of_a_model_stays_and_says_so(tmp_path: Path) -> None:
    async with training(tmp_path) as ft:
        found = await promote(
            ft.yard.sessions, name="support", adapter_id=TRAINED,
            wanted={"alias": ORG_A, "if": "always"}, evaluation=None,
        )  # fmt: skip
        assert not found["moved"]
        assert "is a model or an adapter in the store" in found["why"]
