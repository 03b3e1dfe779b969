"""The job of a training with the imitation trainer, which can be told how to misbehave; on the whole real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import PATIENCE_S
from tests.finetune.yard import (
    FINETUNE,
    MODEL,
    QUICK,
    TRAINER_PYTHON,
    adapter_files,
    add_dataset,
    at_step,
    ended,
    events,
    finished,
    in_phase,
    rows,
    shown,
    start,
    training_server,
    until,
)
from tests.hostile_tokenizers import greedy
from tests.server import Server

#: So many steps that nobody waits for the last one.
ENDLESS: dict[str, Any] = QUICK | {"max_steps": 100_000, "checkpoint_steps": 20}
PACE = "pace=0.02"
#: What is there one after the other while an adapter is published; its row follows the last of them.
PUBLISHING = (
    "finetunes/{id}/result.json",
    "models/{name}",
    "objects/finetune/{id}/adapter/adapter_config.json",
    "objects/finetune/{id}/adapter/complete.json",
)


@pytest.fixture(scope="module")
def dataset_id(quick: Server) -> str:
    return add_dataset(quick)


def objects(server: Server, finetune: dict[str, Any], below: str = "") -> list[str]:
    """Return what the storage has of a training."""
    folder = server.data_dir / "objects" / "finetune" / finetune["id"] / below
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def work(server: Server, finetune: dict[str, Any]) -> Path:
    return server.data_dir / "finetunes" / str(finetune["id"])


def trainers(server: Server) -> list[int]:
    """Return the trainers that run."""
    return [pid for pid, command in server.processes().items() if "trainer.py" in command]


def stop(server: Server, finetune: dict[str, Any]) -> dict[str, Any]:
    """Interrupt a training and return it as it is when it has ended."""
    assert server.post(f"/api/v1/jobs/{finetune['job']['id']}/interrupt/").status == 200
    found = ended(server, finetune)
    assert found["job"]["status"] == "KILLED"
    return found


def messages(server: Server, finetune: dict[str, Any]) -> list[str]:
    return [event["message"] for event in events(server, finetune)]


# What comes of it


def test_a_training_ends_with_its_adapter_in_the_store_and_nothing_else_left(quick: Server, dataset_id: str) -> None:
    found = finished(quick, start(quick, dataset_id, "River names"))
    assert (found["phase"], found["adapter_id"]) == ("DONE", "ft:river-names")
    assert found["figures"]["steps"] == 6
    assert found["prepared"] == {"rows": 24, "steps": 6}
    assert found["versions"] == {"imitation": "1"}
    assert found["job"]["progress"] == {"done": 6, "total": 6, "unit": "steps"}
    assert [point["step"] for point in found["curve"]] == [1, 2, 3, 4, 5, 6]
    assert found["first_step_at"] is not None
    assert found["finished_at"] >= found["first_step_at"] >= found["created_at"]
    model = quick.get("/api/v1/models/ft:river-names").json()
    assert (model["adapter"], model["base_model_id"], model["task"]) == (True, MODEL, "generate")
    assert model["training"]["finetune_id"] == found["id"]
    assert model["training"]["name"] == "River names"
    assert model["training"]["dataset_id"] == dataset_id
    assert model["training"]["hyperparameters"]["max_steps"] == 6
    assert (model["training"]["seed"], model["training"]["checks"]) == (0, None)
    assert quick.get(f"/api/v1/models/{MODEL}").json()["training"] is None
    assert not work(quick, found).exists()
    assert objects(quick, found, "checkpoints") == []
    assert "adapter_model.safetensors" in objects(quick, found, "adapter")


def test_points_come_over_the_jobs_events_as_they_are_measured(quick: Server, dataset_id: str) -> None:
    found = finished(quick, start(quick, dataset_id, hyperparameters=QUICK | {"max_steps": 30}))
    told = [point["step"] for event in events(quick, found) for point in event["data"].get("points", ())]
    assert told == list(range(1, 31))
    assert {"phase": "training"} in [event["data"] for event in events(quick, found)]


def test_a_line_that_is_no_report_is_passed_over(quick: Server, dataset_id: str) -> None:
    found = finished(quick, start(quick, dataset_id, "garbage=1"))
    assert found["curve_points"] == 6


def test_two_trainings_of_the_same_name_have_adapters_of_their_own(quick: Server, dataset_id: str) -> None:
    one, two, three = (start(quick, dataset_id, "The same") for _ in range(3))
    assert [one["adapter_id"], two["adapter_id"], three["adapter_id"]] == [
        "ft:the-same", "ft:the-same-2", "ft:the-same-3",
    ]  # fmt: skip
    for each in (one, two, three):
        finished(quick, each)
    assert adapter_files(quick, "ft:the-same") == adapter_files(quick, "ft:the-same-3")


def test_the_curve_is_thinned_evenly_with_its_first_and_last_point(quick: Server, dataset_id: str) -> None:
    found = finished(quick, start(quick, dataset_id, hyperparameters=QUICK | {"max_steps": 101}))
    thinned = quick.get(f"{FINETUNE}{found['id']}?points=11").json()
    assert [point["step"] for point in thinned["curve"]] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 101]
    assert thinned["curve_points"] == 101


# The queue, and what is held meanwhile


def test_trainings_wait_in_a_queue_and_what_they_need_cannot_be_deleted(quick: Server) -> None:
    dataset_id = add_dataset(quick)
    first = start(quick, dataset_id, f"{PACE} first", hyperparameters=ENDLESS)
    at_step(quick, first, 1)
    waited_for = add_dataset(quick)
    second, third = start(quick, waited_for, "second"), start(quick, dataset_id, "third")
    assert (shown(quick, first)["place"], second["place"], third["place"]) == (None, 1, 2)
    assert shown(quick, third)["phase"] == "QUEUED"
    assert quick.get(f"{FINETUNE}status").json()["id"] == first["id"]
    for held in (dataset_id, waited_for):
        answer = quick.delete(f"/api/v1/datasets/{held}/")
        assert (answer.status, answer.error_code) == (409, "dataset_in_use")
    answer = quick.delete(f"/api/v1/models/{MODEL}")
    assert (answer.status, answer.error_code) == (409, "model_in_use")
    # One that waits goes without a turn, and lets go of what it held.
    assert quick.post(f"/api/v1/jobs/{second['job']['id']}/interrupt/").status == 200
    assert ended(quick, second)["job"]["status"] == "KILLED"
    assert quick.delete(f"/api/v1/datasets/{waited_for}/").status == 200
    until(lambda: shown(quick, third)["place"] == 1, "the third one is next")
    stop(quick, first)
    finished(quick, third)
    assert quick.delete(f"/api/v1/datasets/{dataset_id}/").status == 200


def test_so_many_trainings_run_at_once_as_the_setting_says(llama: Path, tmp_path: Path) -> None:
    settings = {"MODELYARD_TRAINER_PYTHON": str(TRAINER_PYTHON), "MODELYARD_MAX_FINETUNES": "2"}
    with training_server(tmp_path / "data", llama, **settings) as server:
        dataset_id = add_dataset(server)
        three = [start(server, dataset_id, f"{PACE} {number}", hyperparameters=ENDLESS) for number in range(3)]
        for one in three[:2]:
            at_step(server, one, 1)
        assert len(trainers(server)) == 2
        assert shown(server, three[2])["place"] == 1
        stop(server, three[0])
        at_step(server, three[2], 1)


def test_nothing_is_held_after_a_failure(quick: Server) -> None:
    dataset_id = add_dataset(quick)
    found = ended(quick, start(quick, dataset_id, "fail=loss_not_finite"))
    assert found["job"]["failure"] == {
        "code": "loss_not_finite", "message": "It failed.", "hint": "Do this.", "evidence": ["a line"],
    }  # fmt: skip
    assert quick.delete(f"/api/v1/datasets/{dataset_id}/").status == 200
    assert not (work(quick, found) / "data.jsonl").exists()


# Interrupts


@pytest.mark.parametrize("phase", ["loading", "training", "evaluating"])
def test_an_interrupt_in_each_phase_of_the_trainer_ends_it_and_it_goes_on(
    quick: Server, dataset_id: str, phase: str
) -> None:
    """The same training is resumed from what is there; the imitation holds again, so that it is ended once more."""
    finetune = start(quick, dataset_id, f"hold={phase}")
    until(lambda: {"phase": phase} in [event["data"] for event in events(quick, finetune)], f"it is {phase}")
    if phase == "training":
        at_step(quick, finetune, 1)
    found = stop(quick, finetune)
    assert not trainers(quick)
    assert not (work(quick, found) / "data.jsonl").exists()
    assert quick.get(f"/api/v1/models/{found['adapter_id']}").status == 404
    stored = [name for name in objects(quick, found, "checkpoints") if name.endswith("complete.json")]
    assert bool(stored) == (phase != "loading")
    assert found["checkpoint_step"] == {"loading": None, "training": 1, "evaluating": 6}[phase]
    answer = quick.post(f"{FINETUNE}{found['id']}/resume/")
    assert answer.status == 200
    assert answer.json()["id"] != found["job"]["id"]
    until(lambda: trainers(quick), "a trainer runs again")
    stop(quick, shown(quick, finetune))


@pytest.mark.slow
def test_a_trainer_that_does_not_hear_is_killed_in_the_end(llama: Path, tmp_path: Path) -> None:
    settings = {"MODELYARD_TRAINER_PYTHON": str(TRAINER_PYTHON), "MODELYARD_TRAINER_STOP_TIMEOUT_S": "0.5"}
    with training_server(tmp_path / "data", llama, **settings) as server:
        finetune = start(server, add_dataset(server), f"{PACE} deaf=1", hyperparameters=ENDLESS)
        at_step(server, finetune, 25)
        found = stop(server, finetune)
        assert found["checkpoint_step"] >= 20
        assert not trainers(server)


def test_an_interrupted_training_goes_on_from_the_storage_where_this_machine_has_nothing(
    quick: Server, dataset_id: str
) -> None:
    undisturbed = finished(
        quick, start(quick, dataset_id, "pace=0 undisturbed", hyperparameters=QUICK | {"max_steps": 60})
    )
    finetune = start(quick, dataset_id, "pace=0.05 elsewhere", hyperparameters=QUICK | {"max_steps": 60})
    at_step(quick, finetune, 5)
    found = stop(quick, finetune)
    assert found["checkpoint_step"] >= 5
    shutil.rmtree(work(quick, found))
    assert quick.post(f"{FINETUNE}{found['id']}/resume/").status == 200
    again = finished(quick, shown(quick, finetune))
    assert f"Going on from step {found['checkpoint_step']}." in messages(quick, again)
    assert [point["step"] for point in again["curve"]] == list(range(1, 61))
    assert adapter_files(quick, again["adapter_id"]) == adapter_files(quick, undisturbed["adapter_id"])


def test_a_checkpoint_that_was_changed_in_the_storage_is_not_used(quick: Server, dataset_id: str) -> None:
    finetune = start(quick, dataset_id, f"{PACE} changed", hyperparameters=ENDLESS)
    until(lambda: (shown(quick, finetune)["checkpoint_step"] or 0) >= 20, "a checkpoint is stored")
    found = stop(quick, finetune)
    shutil.rmtree(work(quick, found))
    folder = quick.data_dir / "objects" / "finetune" / found["id"] / "checkpoints"
    for path in folder.glob("*/weights.bin"):
        path.write_bytes(b"other bytes")
    assert quick.post(f"{FINETUNE}{found['id']}/resume/").status == 200
    again = shown(quick, finetune)
    at_step(quick, again, 1)
    until(lambda: any("is not used" in message for message in messages(quick, again)), "it is said")
    assert not any(message.startswith("Going on from") for message in messages(quick, again))
    stop(quick, again)


# Deaths


def test_a_trainer_that_is_killed_is_replaced_and_goes_on_from_its_checkpoint(quick: Server, dataset_id: str) -> None:
    found = finished(quick, start(quick, dataset_id, "kill=5"))
    warnings = [event for event in events(quick, found) if event["level"] == "warning"]
    assert warnings[0]["data"] == {"code": "trainer_killed"}
    assert "SIGKILL" in warnings[0]["message"]
    assert "Going on from step 4." in messages(quick, found)
    assert [point["step"] for point in found["curve"]] == [1, 2, 3, 4, 5, 6]


def test_a_trainer_that_is_killed_again_and_again_is_given_up(quick: Server, dataset_id: str) -> None:
    found = ended(quick, start(quick, dataset_id, "kill=1 times=99"))
    assert found["job"]["status"] == "FAILED"
    failure = found["job"]["failure"]
    assert failure["code"] == "trainer_killed"
    assert f"{FINETUNE}{found['id']}/resume/" in failure["hint"]


def test_a_trainer_that_leaves_without_a_result_fails_with_its_last_words(quick: Server, dataset_id: str) -> None:
    found = ended(quick, start(quick, dataset_id, "exit=3"))
    failure = found["job"]["failure"]
    assert (failure["code"], failure["evidence"][-1]) == ("trainer_died", "the last word")
    assert "exit code 3" in failure["message"]


def test_a_trainer_python_that_is_none_is_said_to_be_so(llama: Path, tmp_path: Path) -> None:
    with training_server(tmp_path / "data", llama, MODELYARD_TRAINER_PYTHON="/nonexistent/python") as server:
        found = ended(server, start(server, add_dataset(server)))
        assert found["job"]["failure"]["code"] == "trainer_died"
        assert "MODELYARD_TRAINER_PYTHON" in found["job"]["failure"]["hint"]


def test_an_adapter_that_no_engine_could_serve_is_not_published(quick: Server, dataset_id: str) -> None:
    found = ended(quick, start(quick, dataset_id, "broken=1"))
    assert found["job"]["failure"]["code"] == "unservable_adapter"
    assert quick.get(f"/api/v1/models/{found['adapter_id']}").status == 404
    assert not list((quick.data_dir / "models" / ".partial").glob("ft@*"))


def test_a_dataset_that_was_changed_in_the_storage_is_refused(quick: Server) -> None:
    dataset_id = add_dataset(quick)
    (quick.data_dir / "objects" / dataset_id / "data.jsonl").write_bytes(rows(3))
    found = ended(quick, start(quick, dataset_id))
    assert found["job"]["failure"]["code"] == "dataset_damaged"


# The server ends


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("hold", ["loading", "training", "evaluating"])
def test_a_server_that_ends_in_any_phase_of_the_trainer_comes_back_to_it(
    llama: Path, tmp_path: Path, how: str, hold: str
) -> None:
    with training_server(tmp_path / "data", llama, MODELYARD_TRAINER_PYTHON=str(TRAINER_PYTHON)) as server:
        finetune = start(server, add_dataset(server), f"hold={hold}")
        until(lambda: {"phase": hold} in [event["data"] for event in events(server, finetune)], f"it is {hold}")
        (before,) = trainers(server)
        if how == "kill":
            server.kill()
            server.start()
            until(lambda: "The trainer has gone on" in " ".join(messages(server, finetune)), "it is adopted")
            assert trainers(server) == [before]
        else:
            assert server.stop() == 0
            assert not server.processes()
            server.start()
            until(lambda: trainers(server), "a trainer runs again")
            assert trainers(server) != [before]
        assert shown(server, finetune)["job"]["status"] == "RUNNING"
        stop(server, finetune)


@pytest.mark.slow
def test_a_server_that_is_killed_again_and_again_counts_each_point_once(llama: Path, tmp_path: Path) -> None:
    with training_server(tmp_path / "data", llama, MODELYARD_TRAINER_PYTHON=str(TRAINER_PYTHON)) as server:
        dataset_id = add_dataset(server)
        settings = QUICK | {"max_steps": 120, "checkpoint_steps": 10}
        finetune = start(server, dataset_id, "pace=0.03", hyperparameters=settings)
        for step in (10, 40, 70):
            at_step(server, finetune, step)
            server.kill()
            if step == 40:  # the trainer is gone as well when the server comes back
                for pid in trainers(server):
                    os.kill(pid, signal.SIGKILL)
                until(lambda: not server.processes(), "nothing of it runs")
            server.start()
        found = finished(server, finetune)
        assert [point["step"] for point in found["curve"]] == list(range(1, 121))
        told = [point["step"] for event in events(server, found) for point in event["data"].get("points", ())]
        # Only the steps that were done again are told again.
        assert sorted(set(told)) == list(range(1, 121))
        assert len(told) - len(set(told)) <= 10
        undisturbed = finished(server, start(server, dataset_id, "pace=0", hyperparameters=settings))
        assert adapter_files(server, found["adapter_id"]) == adapter_files(server, undisturbed["adapter_id"])


@pytest.mark.slow
def test_a_trainer_that_did_its_work_while_no_server_was_there_is_not_run_again(llama: Path, tmp_path: Path) -> None:
    with training_server(tmp_path / "data", llama, MODELYARD_TRAINER_PYTHON=str(TRAINER_PYTHON)) as server:
        settings = QUICK | {"max_steps": 40}
        finetune = start(server, add_dataset(server), "pace=0.1", hyperparameters=settings)
        at_step(server, finetune, 2)
        server.kill()
        until(lambda: not server.processes(), "the trainer and its keeper have ended by themselves")
        server.start()
        found = finished(server, finetune)
        assert len(list((server.data_dir / "jobs" / found["job"]["id"]).glob("attempt-*"))) == 1
        assert [point["step"] for point in found["curve"]] == list(range(1, 41))


@pytest.mark.slow
def test_a_row_that_a_crash_left_out_is_written_for_the_folder_that_is_in_place(llama: Path, tmp_path: Path) -> None:
    """As the crash leaves it: the job RUNNING, the trainer's result and the folder there, and no row of the adapter."""
    with training_server(tmp_path / "data", llama, MODELYARD_TRAINER_PYTHON=str(TRAINER_PYTHON)) as server:
        kept = tmp_path / "kept"
        finetune = start(server, add_dataset(server), "hold=evaluating")
        in_phase(server, finetune, "EVALUATING")
        shutil.copytree(work(server, finetune), kept)
        stop(server, finetune)
        done = start(server, finetune["dataset_id"], "pace=0")
        found = finished(server, done)
        (folder,) = (server.data_dir / "models" / "ft@pace-0").iterdir()
        server.kill()
        result = {"adapter_dir": str(work(server, done) / "adapter"), "figures": found["figures"], "evaluation": None,
                  "versions": found["versions"], "learnt_from": {}}  # fmt: skip
        shutil.copytree(folder, work(server, done) / "adapter")
        (work(server, done) / "adapter" / "README.md").unlink()
        (work(server, done) / "result.json").write_text(json.dumps(result))
        with closing(sqlite3.connect(server.data_dir / "modelyard.db")) as database, database:
            database.execute("DELETE FROM models WHERE model_id = 'ft:pace-0'")
            job_id = done["job"]["id"].replace("-", "")
            database.execute("UPDATE jobs SET status = 'RUNNING', finished_at = NULL WHERE id = ?", (job_id,))
        server.start()
        until(lambda: server.get("/api/v1/models/ft:pace-0").status == 200, "the row is there")
        finished(server, done)
        assert not trainers(server)


@pytest.mark.slow
def test_a_server_killed_at_each_step_of_publishing_ends_with_the_adapter_in_the_store_once(
    llama: Path, tmp_path: Path
) -> None:
    with training_server(tmp_path / "data", llama, MODELYARD_TRAINER_PYTHON=str(TRAINER_PYTHON)) as server:
        dataset_id = add_dataset(server)
        undisturbed = adapter_files(server, finished(server, start(server, dataset_id, "pace=0"))["adapter_id"])
        for number, moment in enumerate(PUBLISHING):
            finetune = start(server, dataset_id, f"Moment {number} pace=0")
            name = finetune["adapter_id"].replace(":", "@")
            there = server.data_dir / moment.format(id=finetune["id"], name=name)
            deadline = time.monotonic() + PATIENCE_S
            while not there.exists():
                assert time.monotonic() < deadline, moment
            server.kill()
            server.start()
            found = finished(server, finetune)
            assert found["phase"] == "DONE"
            assert adapter_files(server, found["adapter_id"]) == undisturbed
            assert [one["model_id"] for one in server.get("/api/v1/models/").json()].count(found["adapter_id"]) == 1
            assert "adapter/complete.json" in objects(server, found)
            assert not objects(server, found, "checkpoints")
            assert not work(server, found).exists()
            assert len(list((server.data_dir / "jobs" / found["job"]["id"]).glob("attempt-*"))) == 1
        partial = server.data_dir / "models" / ".partial"
        assert not partial.exists() or not list(partial.iterdir())


@pytest.mark.slow
def test_a_storage_that_is_away_is_waited_for_and_an_interrupt_or_a_kill_meanwhile_loses_nothing(
    llama: Path, tmp_path: Path
) -> None:
    away = {
        "MODELYARD_STORAGE_URL": "s3://nobody/there", "MODELYARD_S3_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    with training_server(tmp_path / "data", llama, MODELYARD_TRAINER_PYTHON=str(TRAINER_PYTHON)) as server:
        there = dict(server.settings)
        dataset_id = add_dataset(server)
        killed = start(server, dataset_id, "hold=training killed")
        at_step(server, killed, 1)
        queued = start(server, dataset_id, "queued")
        assert server.stop() == 0
        shutil.rmtree(work(server, killed))
        server.settings = there | away
        server.start()
        waits = "Trying again"
        until(lambda: waits in " ".join(messages(server, killed)), "it waits for the storage", 60.0, server)
        assert (shown(server, killed)["phase"], shown(server, queued)["place"]) == ("PREPARING", 1)
        server.kill()
        server.start()
        stop(server, killed)
        until(lambda: waits in " ".join(messages(server, queued)), "the next one waits for it", 60.0, server)
        server.kill()
        server.settings = there
        server.start()
        finished(server, queued)
        assert server.post(f"{FINETUNE}{killed['id']}/resume/").status == 200
        again = shown(server, killed)
        until(lambda: "Going on from step 1." in messages(server, again), "it goes on", 60.0, server)
        stop(server, again)


def test_a_hostile_tokenizer_ends_a_training_with_the_reason_before_a_trainer_reads_it(
    quick: Server, dataset_id: str
) -> None:
    [folder] = (quick.data_dir / "models").glob("*/*/tokenizer.json")
    good = folder.read_bytes()
    try:
        folder.write_bytes(greedy())
        body = {"name": "Hostile", "model_id": MODEL, "dataset_id": dataset_id, "hyperparameters": QUICK}
        plan = quick.post(f"{FINETUNE}plan/", body)
        assert (plan.status, plan.error_code) == (422, "bad_tokenizer")
        found = ended(quick, start(quick, dataset_id, "Hostile"))
        assert (found["job"]["status"], found["job"]["failure"]["code"]) == ("FAILED", "bad_tokenizer")
        assert "killed by SIGABRT" in found["job"]["failure"]["message"]
    finally:
        folder.write_bytes(good)


def test_a_base_that_was_added_before_todays_rules_is_scanned_again_before_a_trainer_reads_it(
    quick: Server, dataset_id: str
) -> None:
    [folder] = {path.parent for path in (quick.data_dir / "models").glob("*/*/tokenizer.json")}
    hostile = folder / "processor_config.json"
    try:
        hostile.write_bytes(b'{"audio_tokenizer_name_or_path": "evil/repository"}')
        body = {"name": "Old", "model_id": MODEL, "dataset_id": dataset_id, "hyperparameters": QUICK}
        plan = quick.post(f"{FINETUNE}plan/", body)
        assert (plan.status, plan.error_code) == (422, "loads_from_elsewhere")
        refused = quick.post(FINETUNE, body)
        assert (refused.status, refused.error_code) == (422, "loads_from_elsewhere")
    finally:
        hostile.unlink()
