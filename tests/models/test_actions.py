"""What may be done with models, on both databases."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from modelyard.db import Base, Sessions
from modelyard.db import database_url as async_url
from modelyard.errors import Conflict, ModelInUse, ModelNotFound, Unprocessable
from modelyard.jobs import actions as jobs
from modelyard.models import actions

# As a higher room does it: whatever refers to a model keeps it. Not on `Base`, for it is no table of ours.
USES = "CREATE TABLE uses (model_id VARCHAR(200) REFERENCES models (model_id) ON DELETE RESTRICT)"


@asynccontextmanager
async def opened(database_url: str) -> AsyncIterator[Sessions]:
    sessions = Sessions(async_url(database_url, Path(os.devnull)))
    try:
        async with sessions._writer.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(text(USES))
        yield sessions
    finally:
        await sessions.close()


def result(**values: Any) -> dict[str, Any]:
    return {"commit": "c" * 40, "size_bytes": 3_000_000_000, "adapter": False, "base_model_id": None,
            "task": "generate", "path": f"x/{'c' * 40}", **values}  # fmt: skip


async def test_the_same_model_makes_the_same_job_while_it_runs(database_url: str) -> None:
    async with opened(database_url) as sessions:
        async with sessions.begin() as session:
            first = await actions.request_download(session, "acme/tiny")
        async with sessions.begin() as session:
            again = await actions.request_download(session, "acme/tiny", "main")
            other = await actions.request_download(session, "acme/other")
        assert first.id == again.id != other.id
        assert (first.name, first.kind, first.subject) == ("DOWNLOAD_acme/tiny", "DOWNLOAD", "acme/tiny")
        assert first.spec == {"model_id": "acme/tiny", "revision": "main"}


async def test_adapters_do_not_crowd_models_out_of_what_an_error_names(database_url: str) -> None:
    async with opened(database_url) as sessions:
        async with sessions.begin() as session:
            for number in range(30):
                adapter = result(adapter=True, base_model_id="zeta/base")
                await actions.add(session, f"acme/lora-{number:02}", "main", adapter)
            await actions.add(session, "zeta/base", "main", result())
            await actions.add(session, "zeta/embedder", "main", result(task="embed"))
        async with sessions.read() as session:
            with pytest.raises(ModelNotFound, match=r"there are: zeta/base, zeta/embedder, acme/lora-00"):
                await actions.get(session, "no/such")
            with pytest.raises(ModelNotFound, match=r"there are: zeta/base, zeta/embedder\."):
                await actions.get_for_use(session, "no/such", among=actions.BASES)
            with pytest.raises(ModelNotFound, match=r"there are: zeta/base, zeta/embedder\."):
                await actions.request_download(session, "acme/new", base_model_id="no/such")


async def test_the_base_that_an_adapter_is_said_to_have_may_still_be_on_its_way(database_url: str) -> None:
    async with opened(database_url) as sessions:
        with pytest.raises(ModelNotFound, match="'acme/tiny'") as caught:
            async with sessions.begin() as session:
                await actions.request_download(session, "acme/lora", base_model_id="acme/tiny")
        assert caught.value.param == "base_model_id"
        async with sessions.begin() as session:
            await actions.request_download(session, "acme/tiny")
            job = await actions.request_download(session, "acme/lora", base_model_id="acme/tiny")
        assert job.spec["base_model_id"] == "acme/tiny"


async def test_adds_of_the_same_model_at_the_same_moment_make_one_job(database_url: str) -> None:
    async with opened(database_url) as sessions:

        async def add() -> UUID:
            async with sessions.begin() as session:
                job = await actions.request_download(session, "acme/tiny")
                await asyncio.sleep(0.02)
                return job.id

        assert len(set(await asyncio.gather(*(add() for _ in range(6))))) == 1


async def test_a_job_that_was_interrupted_is_not_taken_up_again(database_url: str) -> None:
    async with opened(database_url) as sessions, sessions.begin() as session:
        first = await actions.request_download(session, "acme/tiny")
        await jobs.interrupt(session, first.id)
        assert (await actions.request_download(session, "acme/tiny")).id != first.id


async def test_another_revision_while_one_is_on_its_way_is_a_conflict(database_url: str) -> None:
    async with opened(database_url) as sessions, sessions.begin() as session:
        first = await actions.request_download(session, "acme/tiny", "v1")
        # No revision is main, which is not what is on its way either.
        for other in ("v2", None, "main"):
            with pytest.raises(Conflict, match="'v1'") as caught:
                await actions.request_download(session, "acme/tiny", other)
            assert caught.value.code == "download_running"
        assert (await actions.request_download(session, "acme/tiny", "v1")).id == first.id


async def test_a_name_that_cannot_be_makes_no_job(database_url: str) -> None:
    async with opened(database_url) as sessions, sessions.begin() as session:
        for model_id, revision in (("../etc", None), ("acme/tiny", "a..b"), ("local:mine", "main")):
            with pytest.raises(Unprocessable):
                await actions.request_download(session, model_id, revision)
        assert await jobs.newest(session, limit=10) == []


async def test_adding_twice_replaces_the_row(database_url: str) -> None:
    async with opened(database_url) as sessions:
        async with sessions.begin() as session:
            first = await actions.add(session, "acme/tiny", "main", result())
        async with sessions.begin() as session:
            await actions.add(session, "acme/tiny", "v2", result(commit="d" * 40))
        async with sessions.read() as session:
            (model,) = await actions.all_models(session)
        assert (model.id, model.revision, model.commit) == (first.id, "v2", "d" * 40)
        assert model.size_bytes == 3_000_000_000
        assert model.added_at.utcoffset() is not None


async def test_a_missing_model_is_an_error_that_names_what_is_there(database_url: str) -> None:
    async with opened(database_url) as sessions, sessions.begin() as session:
        await actions.add(session, "acme/tiny", "main", result())
        with pytest.raises(ModelNotFound, match="acme/tiny"):
            await actions.get(session, "acme/other")
        with pytest.raises(ModelNotFound):
            await actions.delete(session, "acme/other")


async def test_a_model_that_something_refers_to_cannot_be_deleted(database_url: str) -> None:
    async with opened(database_url) as sessions:
        async with sessions.begin() as session:
            await actions.add(session, "acme/tiny", "main", result())
            await session.execute(text("INSERT INTO uses VALUES ('acme/tiny')"))
        with pytest.raises(ModelInUse, match="deployed"):
            async with sessions.begin() as session:
                await actions.delete(session, "acme/tiny")
        async with sessions.begin() as session:
            assert await actions.find(session, "acme/tiny") is not None
            await session.execute(text("DELETE FROM uses"))
        async with sessions.begin() as session:
            await actions.delete(session, "acme/tiny")
        async with sessions.read() as session:
            assert await actions.find(session, "acme/tiny") is None


async def test_the_base_of_an_adapter_cannot_be_deleted_before_it(database_url: str) -> None:
    async with opened(database_url) as sessions, sessions.begin() as session:
        await actions.add(session, "acme/lora", "main", result(adapter=True, base_model_id="acme/tiny"))
        await actions.add(session, "acme/tiny", "main", result())
        with pytest.raises(ModelInUse, match="acme/lora"):
            await actions.delete(session, "acme/tiny")
        await actions.delete(session, "acme/lora")
        await actions.delete(session, "acme/tiny")
        assert await actions.all_models(session) == []


async def test_a_model_cannot_be_deleted_while_it_is_downloaded_anew(database_url: str) -> None:
    async with opened(database_url) as sessions, sessions.begin() as session:
        await actions.add(session, "acme/tiny", "main", result())
        job = await actions.request_download(session, "acme/tiny", "v2")
        with pytest.raises(Conflict, match=str(job.id)):
            await actions.delete(session, "acme/tiny")


async def test_the_sweep_keeps_folders_of_rows_and_of_unfinished_downloads(database_url: str, tmp_path: Path) -> None:
    for name in ("acme--tiny/new", "acme--tiny/old", "acme--coming/1"):
        (tmp_path / name).mkdir(parents=True)
    async with opened(database_url) as sessions, sessions.begin() as session:
        await actions.add(session, "acme/tiny", "main", result(path="acme--tiny/new"))
        await actions.request_download(session, "acme/coming")
        assert await actions.sweep(session, tmp_path) == [tmp_path / "acme--tiny" / "old"]
