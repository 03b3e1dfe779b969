"""What requests write down of trainings, on both databases."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from modelyard.datasets import actions as datasets
from modelyard.errors import (
    Conflict,
    DatasetInUse,
    DatasetNotFound,
    FinetuneActive,
    FinetuneDone,
    FinetuneNotFound,
    JobFinished,
    ModelInUse,
    ModelNotFound,
    NoFinetune,
    Unprocessable,
)
from modelyard.export import exports
from modelyard.finetune import actions
from modelyard.finetune.schemas import HyperparametersIn
from modelyard.finetune.tables import FinetuneHold, Phase
from modelyard.jobs import actions as jobs
from modelyard.jobs.tables import JobStatus
from modelyard.models import actions as models
from tests.finetune.rows import MODEL, add_dataset, database, end, model, start


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("My Adapter Training", "my-adapter-training"),
        ("  Größe & Café №2  ", "gro-e-cafe-no2"),
        ("a" * 100, "a" * 60),
        ("a" * 59 + " b", "a" * 59),
        ("--__..", ""),
        ("训练", ""),
        ("v1.2.3", "v1-2-3"),
    ],
)
def test_a_name_becomes_what_an_id_may_hold(name: str, slug: str) -> None:
    assert actions.slug(name) == slug


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"epochs": None, "max_steps": None, "alpha": 32.0, "batch_size": None, "target_modules": None}),
        ({"epochs": "auto", "learning_rate": "auto", "max_steps": 5}, {"epochs": None, "learning_rate": None}),
        ({"max_steps": 5, "learning_rate": 0.1}, {"epochs": None, "max_steps": 5, "learning_rate": 0.1}),
        ({"rank": 8}, {"rank": 8, "alpha": 16.0}),
        ({"rank": 8, "alpha": 4}, {"alpha": 4.0}),
        ({"batch_size": 3, "target_modules": ["q_proj"]}, {"batch_size": 3, "target_modules": ["q_proj"]}),
    ],
)
def test_settings_that_are_left_out_are_filled_in(given: dict[str, Any], found: dict[str, Any]) -> None:
    filled = HyperparametersIn.model_validate(given).filled()
    assert {name: getattr(filled, name) for name in found} == found


async def test_a_training_is_written_with_its_job_and_what_it_holds(database_url: str, tmp_path: Path) -> None:
    async with database(database_url, tmp_path) as sessions:
        dataset = await add_dataset(sessions)
        row = await start(sessions, dataset)
        assert (row.adapter_id, row.phase, row.hyperparameters["rank"]) == ("ft:a-training", Phase.QUEUED, 16)
        async with sessions.read() as session:
            job = await jobs.get(session, row.job_id)
            assert (job.kind, job.name) == ("FT", f"FT_{MODEL}_{dataset.id}")
            assert job.spec == {"finetune_id": str(row.id)}
        with pytest.raises(DatasetInUse):
            async with sessions.begin() as session:
                await datasets.delete(session, dataset.id)
        with pytest.raises(ModelInUse):
            async with sessions.begin() as session:
                await models.delete(session, MODEL)


async def test_what_was_held_is_free_when_the_training_has_ended(database_url: str, tmp_path: Path) -> None:
    async with database(database_url, tmp_path) as sessions:
        dataset = await add_dataset(sessions)
        row = await start(sessions, dataset)
        await end(sessions, row)
        async with sessions.begin() as session:
            assert (await actions.get(session, row.id)).finished_at is not None
            assert (await session.scalars(select(FinetuneHold))).all() == []
            await datasets.delete(session, dataset.id)
            await models.delete(session, MODEL)


async def test_trainings_of_one_name_at_one_moment_have_ids_of_their_own(database_url: str, tmp_path: Path) -> None:
    async with database(database_url, tmp_path) as sessions:
        dataset = await add_dataset(sessions)
        async with sessions.begin() as session:
            session.add(model("ft:a-training-3", adapter=True, base_model_id=MODEL))
        rows = await asyncio.gather(*(_start_alone(sessions, dataset) for _ in range(4)))
        assert sorted(rows) == ["ft:a-training", "ft:a-training-2", "ft:a-training-4", "ft:a-training-5"]


async def _start_alone(sessions: Any, dataset: Any) -> str:
    from modelyard.finetune.schemas import FinetuneIn

    wanted = FinetuneIn.model_validate({"name": "A training", "model_id": MODEL, "dataset_id": dataset.id})
    async with sessions.begin() as session:
        job = await actions.start(session, wanted)
    async with sessions.read() as session:
        return (await actions.get(session, UUID(job.spec["finetune_id"]))).adapter_id


async def test_a_name_of_which_nothing_is_left_gets_an_id_all_the_same(database_url: str, tmp_path: Path) -> None:
    async with database(database_url, tmp_path) as sessions:
        row = await start(sessions, await add_dataset(sessions), "训练")
        assert row.adapter_id == f"ft:training-{row.id.hex[:8]}"


async def test_the_current_training_is_the_running_one_then_the_next_then_the_last(
    database_url: str, tmp_path: Path
) -> None:
    async with database(database_url, tmp_path) as sessions:
        async with sessions.read() as session:
            with pytest.raises(NoFinetune):
                await actions.current(session)
        dataset = await add_dataset(sessions)
        first, second, third = [await start(sessions, dataset) for _ in range(3)]

        async def current() -> object:
            async with sessions.read() as session:
                return (await actions.current(session)).id

        async with sessions.begin() as session:
            (await jobs.get(session, second.job_id)).status = JobStatus.RUNNING
        assert await current() == second.id
        async with sessions.read() as session:
            assert dict(await actions.places(session)) == {first.job_id: 1, third.job_id: 2}
        await end(sessions, second, JobStatus.FINISHED)
        assert await current() == first.id
        await end(sessions, first)
        await end(sessions, third)
        assert await current() == third.id
        with pytest.raises(JobFinished):
            async with sessions.begin() as session:
                await actions.interrupt(session)


@pytest.mark.parametrize("status", [JobStatus.KILLED, JobStatus.FAILED])
async def test_a_training_that_ended_early_is_resumed_by_a_new_job(
    status: JobStatus, database_url: str, tmp_path: Path
) -> None:
    async with database(database_url, tmp_path) as sessions:
        dataset = await add_dataset(sessions)
        row = await start(sessions, dataset)
        with pytest.raises(FinetuneActive):
            async with sessions.begin() as session:
                await actions.resume(session, row.id)
        await end(sessions, row, status)
        async with sessions.begin() as session:
            job = await actions.resume(session, row.id)
        async with sessions.read() as session:
            again = await actions.get(session, row.id)
            assert (again.job_id, again.phase, again.finished_at) == (job.id, Phase.QUEUED, None)
            assert job.id != row.job_id
            assert len((await session.scalars(select(FinetuneHold))).all()) == 1
        await end(sessions, again, JobStatus.FINISHED)
        with pytest.raises(FinetuneDone):
            async with sessions.begin() as session:
                await actions.resume(session, row.id)


async def test_what_is_gone_is_not_learnt_from(database_url: str, tmp_path: Path) -> None:
    async with database(database_url, tmp_path) as sessions:
        dataset = await add_dataset(sessions)
        row = await start(sessions, dataset)
        await end(sessions, row)
        async with sessions.begin() as session:
            await datasets.delete(session, dataset.id)
        with pytest.raises(DatasetNotFound):
            async with sessions.begin() as session:
                await actions.resume(session, row.id)
        with pytest.raises(DatasetNotFound):
            await start(sessions, dataset)
        with pytest.raises(ModelNotFound):
            await start(sessions, await add_dataset(sessions), model_id="no/such")
        async with sessions.begin() as session:
            session.add(model("acme/adapter", adapter=True, base_model_id=MODEL))
            session.add(model("acme/vectors", task="embed"))
        for model_id, code in (("acme/adapter", "is_adapter"), ("acme/vectors", "not_generative")):
            with pytest.raises(Unprocessable) as refused:
                await start(sessions, await add_dataset(sessions), model_id=model_id)
            assert refused.value.code == code


async def test_a_training_is_deleted_with_its_curve_once_it_has_ended(database_url: str, tmp_path: Path) -> None:
    async with database(database_url, tmp_path) as sessions:
        row = await start(sessions, await add_dataset(sessions))
        with pytest.raises(FinetuneActive):
            async with sessions.begin() as session:
                await actions.delete(session, row.id)
        await end(sessions, row)
        async with sessions.begin() as session:
            await actions.delete(session, row.id)
        async with sessions.read() as session:
            with pytest.raises(FinetuneNotFound):
                await actions.get(session, row.id)


@pytest.mark.parametrize(
    ("rows", "settings", "is_fine"),
    [
        (20, {}, True),
        (19, {}, False),
        (2, {"validation_split": 0.1}, True),
        (1, {"validation_split": 0.1}, False),
        (1000, {"validation_split": 0}, False),
    ],
)
async def test_what_is_measured_needs_rows_that_are_held_back(
    rows: int, settings: dict[str, Any], is_fine: bool, tmp_path: Path
) -> None:
    async with database(f"sqlite:///{tmp_path / 'test.db'}", tmp_path) as sessions:
        dataset = await add_dataset(sessions, rows)
        wish: dict[str, Any] = {"deploy": True, "promote": {"alias": "default"}, "hyperparameters": settings}
        if is_fine:
            assert (await start(sessions, dataset, **wish)).promote == {"alias": "default", "if": "better"}
        else:
            with pytest.raises(Unprocessable, match="validation_split"):
                await start(sessions, dataset, **wish)
        promote = {"alias": "default", "if": "always"}
        assert (await start(sessions, dataset, **wish | {"promote": promote})).promote == promote


async def test_a_training_stays_with_the_commit_that_it_began_on_and_its_folder_is_in_use(
    database_url: str, tmp_path: Path
) -> None:
    async with database(database_url, tmp_path) as sessions:
        row = await start(sessions, await add_dataset(sessions))
        moved = {"adapter": False, "base_model_id": None, "task": "generate", "commit": "f00d", "size_bytes": 1,
                 "path": "acme--tiny/f00d"}  # fmt: skip
        async with sessions.begin() as session:
            await models.add(session, MODEL, "main", moved)
        async with sessions.read() as session:
            base = models.at_pin(await models.get(session, MODEL), row.pinned)
            assert (base.commit, base.path, base.size_bytes) == ("c0ffee", "acme--tiny/c0ffee", 1000)
            assert (base.model_id, base.task) == (MODEL, "generate")
            assert await actions.folders_in_use(session) == {"acme--tiny/c0ffee"}
        await end(sessions, row)
        async with sessions.begin() as session:
            assert (await models.get(session, MODEL)).commit == "f00d", "the copy is not written back"
            assert await actions.folders_in_use(session) == set()
            await actions.resume(session, row.id)
            assert await actions.folders_in_use(session) == {"acme--tiny/c0ffee"}


async def test_an_adapter_is_merged_into_the_commit_that_it_was_trained_on_alone(
    database_url: str, tmp_path: Path
) -> None:
    async with database(database_url, tmp_path) as sessions:
        adapter = model("ft:mine", adapter=True, base_model_id=MODEL, training={"base_commit": "c0ffee"})
        moved = {"adapter": False, "base_model_id": None, "task": "generate", "commit": "f00d", "size_bytes": 1,
                 "path": "acme--tiny/f00d"}  # fmt: skip
        async with sessions.begin() as session:
            assert (await exports.base_of(session, adapter)).commit == "c0ffee"
            await models.add(session, MODEL, "main", moved)
            with pytest.raises(Conflict, match="revision=c0ffee") as refused:
                await exports.base_of(session, adapter)
            assert refused.value.code == "base_moved"
            foreign = model("acme/lora", adapter=True, base_model_id=MODEL)
            assert (await exports.base_of(session, foreign)).commit == "f00d"
