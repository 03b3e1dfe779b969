"""The data of the version before, in SQLite and in PostgreSQL, are taken along: nothing is lost, and all goes on."""

from __future__ import annotations

import json
import re
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.earlier.remembered import (
    ADAPTER,
    INTERRUPTED,
    POEM,
    RECITAL,
    RUNNING,
    SETTINGS,
    STEPS,
    lost,
    snapshot,
)
from tests.finetune.yard import FINETUNE, events, finished, shown, until
from tests.server import Server, serving

HERE = Path(__file__).parent
ALL_DEPLOYMENTS, ALL_TRAININGS = "/api/v1/deployments/?all=true&limit=1000", "/api/v1/finetune/"
#: What goes on changes. {job} and {training} are those that were in the middle, {deployment} is the one in service.
CHANGES = (
    r"/jobs/.*\[{job}\]\.(status|finished_at|progress\.done)",
    r"/finetune/\[{training}\]\.(job\.(status|finished_at|progress\.done)|phase|checkpoint_step|figures|versions|finished_at)",
    r"/finetune/{training}\.(job\.(status|finished_at|progress\.done)|phase|checkpoint_step|figures|versions|finished_at)",
    # Steps after the checkpoint are done again.
    r"/finetune/{training}\.(curve_points|curve\[\d+\]\.at)",
    r"/deployments/\?.*\[{deployment}\]\.(memory_bytes|ready_at)",
    # The engine had not ended yet.
    r"/deployments/{deployment}/attempts/\[1\]\.ended",
)


def one(elements: list[dict[str, Any]], **values: str) -> dict[str, Any]:
    [found] = [element for element in elements if values.items() <= element.items()]
    return found


@contextmanager
def restored(url: str, dump: str) -> Iterator[str]:
    """Make a database of a dump, for the block."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        database_url = url.replace("/postgres?", f"/{name}?")
        with psycopg.connect(database_url) as its:
            its.execute(dump.encode())
        yield database_url
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def upgraded(request: pytest.FixtureRequest, kind: str, folder: Path) -> Iterator[Server]:
    """Start this version on what the version before left."""
    with tarfile.open(HERE / f"{kind}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    if kind == "sqlite":
        with serving(folder / "data", **SETTINGS) as server:
            yield server
        return
    url: str = request.getfixturevalue("postgres_server")
    with (
        restored(url, (folder / "database.sql").read_text("utf-8")) as database_url,
        serving(folder / "data", MODELYARD_DATABASE_URL=database_url, **SETTINGS) as server,
    ):
        yield server


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_what_the_version_before_left_is_all_there_and_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    with upgraded(request, kind, tmp_path) as server:
        before = json.loads((tmp_path / "shown.json").read_text("utf-8"))
        deployment = one(before[ALL_DEPLOYMENTS], state="READY")
        running = one(before[ALL_TRAININGS], name=RUNNING)
        interrupted = one(before[ALL_TRAININGS], name=INTERRUPTED)

        is_served_again(server, deployment)
        goes_on_to_its_end(server, running)
        nothing_is_lost(before, snapshot(server), deployment, running)
        is_resumed_to_its_end(server, interrupted)


def is_served_again(server: Server, before: dict[str, Any]) -> None:
    """Expect the deployment back, with its adapters and aliases, and the text that had stopped to go on."""

    def is_back() -> bool:
        now = one(server.get(ALL_DEPLOYMENTS).json(), id=before["id"])
        return (now["state"], now["served_adapter_ids"]) == ("READY", before["served_adapter_ids"])

    assert ADAPTER in before["served_adapter_ids"]
    until(is_back, "the deployment is back", server=server)
    for name in ("default", "support", "trained", *before["served_adapter_ids"]):
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert server.post("/v1/chat/completions", body).status == 200, name
    answer = server.post("/api/generate-one", POEM | {"generation_config": {"do_sample": False}})
    assert (answer.status, answer.text) == (200, RECITAL[POEM["generation_config"]["max_new_tokens"] :] + "</s>")


def goes_on_to_its_end(server: Server, before: dict[str, Any]) -> None:
    """Expect the training that was in the middle to end, from its checkpoint on."""
    now = finished(server, before)
    assert [point["step"] for point in now["curve"]] == list(range(1, STEPS + 1))
    went_on = [event["data"]["step"] for event in events(server, now) if "Going on from" in event["message"]]
    assert len(went_on) == 1
    assert went_on[0] >= before["checkpoint_step"] >= 4


def nothing_is_lost(
    before: dict[str, Any], now: dict[str, Any], deployment: dict[str, Any], running: dict[str, Any]
) -> None:
    """Expect all that was shown, but for what went on meanwhile."""
    ids = {"job": running["job"]["id"], "training": running["id"], "deployment": deployment["id"]}
    changes = re.compile("|".join(pattern.format(**ids) for pattern in CHANGES))
    assert len(before) > 30
    differences = [f"{path}{words}" for path, shown in before.items() for words in lost(shown, now.get(path))]
    assert [words for words in differences if not changes.search(words)] == []


def is_resumed_to_its_end(server: Server, before: dict[str, Any]) -> None:
    """Expect the training that was interrupted to be resumable."""
    assert (before["job"]["status"], before["phase"]) == ("KILLED", "TRAINING")
    answer = server.post(f"{FINETUNE}{before['id']}/resume/")
    assert answer.status == 200, answer.text
    now = finished(server, shown(server, before))
    assert f"Going on from step {before['checkpoint_step']}." in [event["message"] for event in events(server, now)]
