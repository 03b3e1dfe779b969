"""POST /api/v1/finetune/plan on the real server and the real trainer, and what the last training tells."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from modelyard.db import Sessions, database_url
from modelyard.errors import JobFailure
from modelyard.finetune.errands import refusal
from modelyard.finetune.planning import history
from modelyard.finetune.schemas import HyperparametersIn
from modelyard.finetune.tables import Finetune
from modelyard.foundation import migrate
from modelyard.jobs import actions as jobs
from tests.finetune.yard import FINETUNE, MODEL, QUICK, add_dataset, finished, rows, start, training_server, until
from tests.server import Answer, Server

PLAN = f"{FINETUNE}plan/"
PLAN_S = 240.0
#: Some steps more, so that there is something to compare.
SETTINGS = QUICK | {"max_steps": 40, "validation_split": 0.1, "learning_rate": "auto"}


def plan(server: Server, learnt: str, **more: Any) -> Answer:
    body = {"name": "Planned", "model_id": MODEL, "dataset_id": learnt, "hyperparameters": SETTINGS} | more
    return server.request("POST", PLAN, json_body=body, timeout_s=PLAN_S)


def planned(server: Server, learnt: str, **more: Any) -> dict[str, Any]:
    answer = plan(server, learnt, **more)
    assert answer.status == 200, (answer.text, server.log[-3000:])
    found: dict[str, Any] = answer.json()
    return found


def leftovers(server: Server) -> list[Path]:
    errands = server.data_dir / "jobs/errands"
    return list(errands.iterdir()) if errands.exists() else []


@pytest.mark.slow
def test_a_plan_measures_and_after_a_training_the_next_one_remembers(server: Server, dataset_id: str) -> None:
    first = planned(server, dataset_id)
    assert first["estimate"]["basis"] == "measured"
    assert first["estimate"]["memory_bytes"] == first["memory_bytes"] > 100 * 2**20
    assert first["prepared"]["rows"] + first["prepared"]["held_out_rows"] == 24
    assert (first["prepared"]["steps"], first["batch_size"], first["fits"]) == (40, 4, True)
    # What was left open is chosen, and only that.
    assert set(first["chosen"]) == {"learning_rate", "retention"}
    assert 0 < first["chosen"]["learning_rate"]["value"] < 0.1
    assert "rank 4" in first["chosen"]["learning_rate"]["why"]
    assert first["minutes"] == pytest.approx(first["seconds"]["total"] / 60, abs=0.01)
    assert (first["accelerator"]["busy"], first["on_busy"]) == (False, "wait")
    # Nothing is kept: no training, no job, no adapter, no file.
    assert server.get(FINETUNE).json() == []
    assert [job["kind"] for job in server.get("/api/v1/jobs/").json() if job["kind"] != "DOWNLOAD"] == []
    assert not leftovers(server)

    done = finished(server, start(server, dataset_id, hyperparameters=SETTINGS))
    assert {"seconds", "memory_bytes", "tokens_per_s", "basis"} <= set(done["estimate"])
    assert done["prepared"]["chosen"] == first["chosen"]
    kept = server.get(f"/api/v1/models/{done['adapter_id']}").json()["training"]["hyperparameters"]
    assert kept["learning_rate"] == first["chosen"]["learning_rate"]["value"]
    second = planned(server, dataset_id)
    assert second["estimate"] == {
        "seconds": pytest.approx(done["figures"]["training_seconds"], rel=0.05),
        "memory_bytes": done["figures"]["peak_memory_bytes"],
        "tokens_per_s": done["figures"]["tokens_per_s"],
        "basis": "history",
    }
    # Another rank is another training: that is measured.
    other = planned(server, dataset_id, hyperparameters=SETTINGS | {"rank": 8})
    assert other["estimate"]["basis"] == "measured"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({"model_id": "no/such"}, 404, "model_not_found"),
        ({"dataset_id": str(uuid.uuid4())}, 404, "dataset_not_found"),
        ({"hyperparameters": {"rank": 512}}, 422, "invalid_value"),
        ({"hyperparameters": SETTINGS | {"epochs": 3}}, 422, "invalid_value"),
        ({"hyperparameters": SETTINGS | {"target_modules": ["no_proj"]}}, 422, "unknown_target_modules"),
        ({"hyperparameters": SETTINGS | {"max_seq_len": 100_000}}, 422, "max_seq_len_too_long"),
    ],
)
def test_what_the_training_would_be_refused_for_is_refused_here_too(
    server: Server, dataset_id: str, more: dict[str, Any], status: int, code: str
) -> None:
    answer = plan(server, dataset_id, **more)
    assert (answer.status, answer.error_code) == (status, code), answer.text
    assert not leftovers(server)


def test_the_evidence_of_a_failure_is_in_the_answer_to_a_plan() -> None:
    lines = ["line 1: the chat template leaves out the tools", "line 2: nothing to learn"]
    for code in ("nothing_to_learn", "out_of_memory", "trainer_failed"):
        error = refusal(JobFailure(code, "None of the rows can be learnt from.", "See the reasons.", lines)).envelope()
        assert error["error"]["evidence"] == lines
    assert "evidence" not in refusal(JobFailure("nothing_to_learn", "None.")).envelope()["error"]


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory, imports: Path) -> Iterator[Server]:
    """A server that may give engines and trainings together less memory than one training wants."""
    data = tmp_path_factory.mktemp("tight") / "data"
    with training_server(data, imports, MODELYARD_ENGINE_MEMORY_GIB="0.2") as found:
        yield found


@pytest.mark.slow
def test_where_there_is_no_room_nothing_is_measured_and_rows_and_memory_are_told_all_the_same(tight: Server) -> None:
    found = planned(tight, add_dataset(tight, rows(40)))
    assert (found["estimate"], found["seconds"], found["minutes"], found["fits"]) == (None, None, None, None)
    assert found["prepared"]["rows"] > 30
    assert found["memory_bytes"] > 0.2 * 2**30
    assert found["accelerator"]["needed_bytes"] == found["memory_bytes"]
    assert found["accelerator"]["free_bytes"] <= 0.2 * 2**30


@pytest.mark.slow
def test_a_client_that_goes_away_ends_its_plan(server: Server, dataset_id: str) -> None:
    before = set(server.processes())
    with pytest.raises(TimeoutError):
        server.request(
            "POST", PLAN, timeout_s=2.0,
            json_body={"name": "x", "model_id": MODEL, "dataset_id": dataset_id, "hyperparameters": {"rank": 2}},
        )  # fmt: skip
    until(lambda: not leftovers(server) and set(server.processes()) <= before, "nothing of it is left")


FIGURES = {
    "device": "here", "dtype": "float32", "rows_per_step": 8, "batch_size": 8, "tokens_per_s": 500.0,
    "peak_memory_bytes": 10**9, "validation_seconds": 2.0, "training_seconds": 8.0,
    "seconds": {"loading": 5.0, "evaluating": 4.0},
}  # fmt: skip
PREPARED = {"longest": 300, "held_out_rows": 5}


@asynccontextmanager
async def opened(url: str, tmp_path: Path) -> AsyncIterator[Sessions]:
    address = database_url(url, tmp_path)
    migrate(address)
    sessions = Sessions(address)
    try:
        yield sessions
    finally:
        await sessions.close()


async def remember(sessions: Sessions, model_id: str, number: int, **values: Any) -> None:
    settings = asdict(HyperparametersIn(epochs=2, batch_size=8).filled())
    async with sessions.begin() as session:
        job = await jobs.create(session, kind="FT", name=f"FT_{number}", spec={}, subject=f"x{number}")
        row = {"hyperparameters": settings, "figures": FIGURES, "prepared": PREPARED} | values
        session.add(
            Finetune(
                job_id=job.id, name="x", model_id=model_id, dataset_id=uuid.uuid4(), adapter_id=f"ft:x-{number}", **row
            )
        )


async def test_the_newest_training_of_the_same_model_and_settings_tells(database_url: str, tmp_path: Path) -> None:
    asked = HyperparametersIn(max_steps=77, batch_size=8, learning_rate=0.5).filled()
    async with opened(database_url, tmp_path) as sessions:
        await remember(sessions, "acme/one", 1)
        await remember(sessions, "acme/one", 2, figures=FIGURES | {"tokens_per_s": 700.0})
        # Of these neither tells anything: another rank, one from before there was retention, no figures, figures that
        # lack some, another model.
        await remember(sessions, "acme/one", 3, hyperparameters=asdict(replace(asked, rank=2)))
        before = {name: value for name, value in asdict(asked).items() if name not in ("retention", "learnt_loss")}
        await remember(sessions, "acme/one", 7, hyperparameters=before)
        await remember(sessions, "acme/one", 4, figures=None)
        await remember(sessions, "acme/one", 5, figures={"tokens_per_s": 1.0})
        await remember(sessions, "acme/two", 6)
        async with sessions.read() as session:
            assert await history(session, "acme/one", asked) == {
                "device": "here", "dtype": "float32", "rows_per_step": 8, "batch_size": 8, "tokens_per_s": 700.0,
                "memory_bytes": 10**9, "validation_share": 0.25, "seconds": {"loading": 5.0, "evaluating": 4.0},
                "longest": 300, "held_out_rows": 5,
            }  # fmt: skip
            assert await history(session, "acme/none", asked) is None
            assert await history(session, "acme/one", replace(asked, batch_size=None)) is None
