"""A branch that has moved on: what serves stays with its commit until it is deployed again, and nothing is deleted."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from modelyard.deploy import actions
from modelyard.deploy.plan import plan
from modelyard.deploy.schemas import DeployOut
from modelyard.deploy.tables import Strategy
from modelyard.errors import Conflict
from modelyard.jobs import actions as jobs
from modelyard.jobs.tables import JobStatus
from modelyard.models import actions as models
from tests.deploy.yard import DeployYard, deploy_yard
from tests.eventually import eventually

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("on_each_database")]

OLD, NEW = "0" * 40, "1" * 40


async def move_on(yard: DeployYard, model_id: str) -> Path:
    """Bring a newer commit of a model, as a download does; return its folder."""
    before = yard.settings.models_dir / model_id.replace("/", "--")
    after = before.with_name(f"{before.name}@2")
    shutil.copytree(before, after)
    result = {
        "adapter": False,
        "base_model_id": None,
        "task": "generate",
        "commit": NEW,
        "size_bytes": 2,
        "path": after.name,
    }
    async with yard.sessions.begin() as session:
        await models.add(session, model_id, "main", result)
    return after


def started_on(yard: DeployYard, model_id: str) -> list[str]:
    """Return the folders that the model's engines were started on."""
    starts = [one["argv"] for one in yard.record(model_id, "start")]
    return [Path(argv[argv.index("--model") + 1]).name for argv in starts]


async def swept(yard: DeployYard) -> list[str]:
    async with yard.sessions.read() as session:
        in_use = await actions.folders_in_use(session)
        return [folder.name for folder in await models.sweep(session, yard.settings.models_dir, (), in_use)]


async def test_an_engine_that_is_started_again_stays_with_its_commit_until_it_is_deployed_again(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", path="org--a")
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        await move_on(yard, "org/a")
        os.kill(yard.record("org/a", "start")[-1]["pid"], signal.SIGKILL)
        await eventually(lambda: len(started_on(yard, "org/a")) == 2, "the engine is started again")
        row = await yard.becomes(first, "READY")
        assert DeployOut.of(row).commit == OLD
        planned = await plan(yard.sessions, yard.settings, actions.Wish("org/a"))
        assert planned.way != "in_place", "another commit is another engine"
        second = await yard.deploy("org/a")
        assert second != first
        assert DeployOut.of(await yard.becomes(second, "READY")).commit == NEW
        assert (await yard.ended(first)).status == JobStatus.KILLED
        assert started_on(yard, "org/a") == ["org--a", "org--a", "org--a@2"]
        assert await yard.deploy("org/a") == second, "nothing has moved since"


async def test_a_newer_commit_that_does_not_start_leaves_the_older_one_in_service(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        first = await yard.deploy("org/a")
        await yard.becomes(first, "READY")
        after = await move_on(yard, "org/a")
        (after / "misbehave.json").write_text(
            f'{{"record_dir": "{yard.record_dirs["org/a"]}", "die_at_start": {{"stderr": "ValueError: no"}}}}'
        )
        assert (await yard.ended(await yard.deploy("org/a", strategy=Strategy.REPLACE))).status == JobStatus.FAILED
        async with yard.sessions.read() as session:
            back = await actions.current(session)
        assert DeployOut.of(await yard.becomes(back.job_id, "READY")).commit == OLD
        assert started_on(yard, "org/a")[-1] == "org--a"


async def test_the_folder_of_an_older_commit_goes_when_nobody_serves_it_any_more(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", path="org--a/old")
        before, after = yard.settings.models_dir / "org--a" / "old", yard.settings.models_dir / "org--a" / "new"
        files = [path for path in before.parent.iterdir() if path.is_file()]
        for folder in (before, after):
            folder.mkdir()
            for path in files:
                shutil.copyfile(path, folder / path.name)
        for path in files:
            path.unlink()
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        result = {"adapter": False, "base_model_id": None, "task": "generate", "commit": NEW, "size_bytes": 2}
        async with yard.sessions.begin() as session:
            await models.add(session, "org/a", "main", {**result, "path": "org--a/new"})
        assert await swept(yard) == []
        await yard.take_down(job_id)
        await yard.ended(job_id)
        assert await swept(yard) == ["old"]
        assert after.is_dir()


@pytest.mark.parametrize("what", ["model", "adapter"])
async def test_what_is_being_downloaded_is_answered_with_its_job_and_its_bytes(what: str, tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        wish = actions.Wish("org/b") if what == "model" else actions.Wish("org/a", ["org/b"])
        async with yard.sessions.begin() as session:
            job = await jobs.create(
                session, kind=models.DOWNLOAD, name="DOWNLOAD_org/b", spec={"revision": "main"}, subject="org/b"
            )
            with pytest.raises(Conflict, match="nothing of it has arrived"):
                await actions.deploy(session, wish)
            job.progress_done, job.progress_total, job.progress_unit = 5, 40, "bytes"
            with pytest.raises(Conflict, match="5 of 40 bytes") as refused:
                await actions.deploy(session, wish)
            assert refused.value.code == "download_running"
            assert str(job.id) in refused.value.message
            assert refused.value.param == ("model_id" if what == "model" else "adapter_ids")
            await session.rollback()
