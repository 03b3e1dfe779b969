"""REST for trainings: the source document's commands as printed, lists, and every request that is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.finetune.errands import PARAMS
from modelyard.finetune.request_checks import check_settings
from modelyard.finetune.schemas import HyperparametersIn
from modelyard.hardware import this_machine
from tests.datasets.forms import questions
from tests.finetune.yard import (
    FINETUNE,
    MODEL,
    QUICK,
    TRAINER_PYTHON,
    add_dataset,
    add_model,
    at_step,
    ended,
    finished,
    shown,
    start,
    training_server,
    until,
)
from tests.server import Answer, Server

NOBODY = "00000000-0000-4000-8000-000000000000"
ENDLESS: dict[str, Any] = QUICK | {"max_steps": 100_000}


@pytest.fixture(scope="module")
def dataset_id(quick: Server) -> str:
    return add_dataset(quick)


def ask(server: Server, dataset_id: str, /, **fields: Any) -> Answer:
    """Send a request for a training with some fields of its own."""
    body = {"name": "Refused", "model_id": MODEL, "dataset_id": dataset_id, "hyperparameters": QUICK} | fields
    return server.post(FINETUNE, {key: value for key, value in body.items() if value is not ...})


def refusal(answer: Answer, status: int) -> dict[str, Any]:
    """Return the error of a refused request."""
    assert answer.status == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


def curl(server: Server, command: str) -> Any:
    """Run a command of the source document as it is printed, but for the port and what the store does not have."""
    shell = command.replace("http://localhost:8080", server.address).replace("NousResearch/Llama-2-7b-chat-hf", MODEL)
    done = subprocess.run(["bash", "-c", shell], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_the_commands_of_the_source_document_run_as_printed(database_url: str, llama: Path, tmp_path: Path) -> None:
    settings = {"MODELYARD_TRAINER_PYTHON": str(TRAINER_PYTHON), "MODELYARD_DATABASE_URL": database_url}
    with training_server(tmp_path / "data", llama, **settings) as server:
        listed = curl(
            server, "curl -X 'GET' 'http://localhost:8080/api/v1/finetune/models/' -H 'accept: application/json'"
        )
        assert [(one["model_id"], one["adapter"], one["base_model_id"]) for one in listed] == [(MODEL, False, None)]
        refused = server.get(f"{FINETUNE}status")
        assert (refused.status, refused.error_code) == (404, "no_finetune")
        refused = server.post(f"{FINETUNE}interrupt/")
        assert (refused.status, refused.error_code) == (404, "no_finetune")
        dataset_id = add_dataset(server)
        job = curl(
            server,
            """curl -X 'POST' \\
            'http://localhost:8080/api/v1/finetune/' \\
            -H 'accept: application/json' \\
            -H 'Content-Type: application/json' \\
            -d '{
            "name": "My Adapter Training hold=training",
            "model_id": "NousResearch/Llama-2-7b-chat-hf",
            "dataset_id": "01be6d68-f790-434b-aa6d-5bd492aef202",
            "hyperparameters": {"max_steps": 5}
            }'""".replace("01be6d68-f790-434b-aa6d-5bd492aef202", dataset_id),
        )
        assert set(job) >= {"id", "name", "status", "started_at"}
        assert (job["name"], job["status"]) == (f"FT_{MODEL}_{dataset_id}", "CREATED")
        status = "curl -X 'GET' 'http://localhost:8080/api/v1/finetune/status/' -H 'accept: application/json'"
        until(lambda: curl(server, status)["job"]["status"] == "RUNNING", "it runs")
        found = curl(server, status)
        assert found["name"] == "My Adapter Training hold=training"
        assert (found["model_id"], found["dataset_id"], found["job"]["id"]) == (MODEL, dataset_id, job["id"])
        assert uuid.UUID(found["id"]) != uuid.UUID(job["id"])
        interrupt = (
            "curl -X 'POST' 'http://localhost:8080/api/v1/finetune/interrupt/' -H 'accept: application/json' -d ''"
        )
        stopped = curl(server, interrupt)
        assert (stopped["id"], stopped["name"]) == (job["id"], job["name"])
        until(lambda: curl(server, status)["job"]["status"] == "KILLED", "it is killed, and still the last one")
        assert refusal(server.post(f"{FINETUNE}interrupt/"), 409)["code"] == "job_finished"
        done = finished(server, start(server, dataset_id, "To its end"))
        assert [point["step"] for point in done["curve"]] == [1, 2, 3, 4, 5, 6]
        assert server.get(f"/api/v1/models/{done['adapter_id']}").json()["training"]["name"] == "To its end"
        assert server.delete(f"{FINETUNE}{done['id']}").status == 200


def test_the_source_documents_body_alone_starts_a_training(quick: Server, dataset_id: str) -> None:
    answer = ask(quick, dataset_id, name="As printed", hyperparameters=...)
    assert answer.status == 200
    found = quick.get(FINETUNE).json()[0]
    settings = found["hyperparameters"]
    assert (settings["epochs"], settings["max_steps"]) == ("auto", None)
    assert (settings["learning_rate"], settings["lr_schedule"], settings["batch_size"]) == ("auto", "cosine", "auto")
    assert (settings["rank"], settings["alpha"], settings["target_modules"]) == (16, 32.0, "all-linear")
    assert (found["deploy"], found["promote"], found["on_busy"]) == (False, None, "wait")
    quick.post(f"/api/v1/jobs/{answer.json()['id']}/interrupt/")
    ended(quick, found)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model_id": "no/such"}, 404, "model_not_found", "model_id"),
        ({"dataset_id": NOBODY}, 404, "dataset_not_found", "dataset_id"),
        ({"dataset_id": "mine"}, 422, "invalid_value", "dataset_id"),
        ({"name": ""}, 422, "invalid_value", "name"),
        ({"name": "  "}, 422, "invalid_value", "name"),
        ({"name": "two\nlines"}, 422, "invalid_value", "name"),
        ({"name": "a\x00b"}, 422, "invalid_value", "name"),
        ({"name": "\ud800"}, 422, "invalid_value", "name"),
        ({"name": "x" * 201}, 422, "invalid_value", "name"),
        ({"name": ...}, 422, "invalid_value", "name"),
        ({"colour": "red"}, 422, "invalid_value", "colour"),
        ({"on_busy": "panic"}, 422, "invalid_value", "on_busy"),
        ({"promote": {"alias": "default"}}, 422, "invalid_value", "body"),
        ({"deploy": True, "promote": {"alias": "default", "if": "perhaps"}}, 422, "invalid_value", "promote.if"),
        ({"deploy": True, "promote": {"alias": "/", "if": "always"}}, 422, "invalid_value", "promote.alias"),
        ({"deploy": True, "promote": {"alias": MODEL, "if": "always"}}, 409, "alias_taken", "promote.alias"),
        ({"hyperparameters": {"epochs": 1, "max_steps": 2}}, 422, "invalid_value", "hyperparameters"),
        ({"hyperparameters": {"epochs": 0}}, 422, "invalid_value", "hyperparameters.epochs"),
        ({"hyperparameters": {"epochs": "many"}}, 422, "invalid_value", "hyperparameters.epochs"),
        ({"hyperparameters": {"learning_rate": 1e400}}, 422, "invalid_value", "hyperparameters.learning_rate"),
        ({"hyperparameters": {"learning_rate": -1}}, 422, "invalid_value", "hyperparameters.learning_rate"),
        ({"hyperparameters": {"lr_schedule": "zigzag"}}, 422, "invalid_value", "hyperparameters.lr_schedule"),
        ({"hyperparameters": {"batch_size": 0}}, 422, "invalid_value", "hyperparameters.batch_size"),
        ({"hyperparameters": {"batch_size": "most"}}, 422, "invalid_value", "hyperparameters.batch_size"),
        ({"hyperparameters": {"rank": 0}}, 422, "invalid_value", "hyperparameters.rank"),
        ({"hyperparameters": {"dropout": 1}}, 422, "invalid_value", "hyperparameters.dropout"),
        ({"hyperparameters": {"target_modules": []}}, 422, "invalid_value", None),
        ({"hyperparameters": {"validation_split": 0.9}}, 422, "invalid_value", "hyperparameters.validation_split"),
        ({"hyperparameters": {"quantization": "1bit"}}, 422, "invalid_value", "hyperparameters.quantization"),
        ({"hyperparameters": {"packing": "tight"}}, 422, "invalid_value", "hyperparameters.packing"),
        ({"hyperparameters": {"warmth": 3}}, 422, "invalid_value", "hyperparameters.warmth"),
        ({"hyperparameters": {"seed": -1}}, 422, "invalid_value", "hyperparameters.seed"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_is_wrong(
    quick: Server, dataset_id: str, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    before = len(quick.get("/api/v1/jobs/?kind=FT").json())
    error = refusal(ask(quick, dataset_id, **fields), status)
    assert error["code"] == code
    assert param is None or error["param"] == param
    assert len(quick.get("/api/v1/jobs/?kind=FT").json()) == before


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model_id": "no/such"}, 404, "model_not_found", "model_id"),
        ({"dataset_id": NOBODY}, 404, "dataset_not_found", "dataset_id"),
        ({"hyperparameters": {"rank": 65}}, 422, "invalid_value", "hyperparameters.rank"),
        ({"hyperparameters": {"max_seq_len": 100_000}}, 422, "max_seq_len_too_long", "hyperparameters.max_seq_len"),
        (
            {"hyperparameters": {"target_modules": ["q_proj", "no_proj"]}},
            422, "unknown_target_modules", "hyperparameters.target_modules",
        ),
        (
            {"deploy": True, "promote": {"alias": MODEL, "if": "always"}},
            409, "alias_taken", "promote.alias",
        ),
    ],
)  # fmt: skip
def test_what_a_plan_is_refused_for_at_once_no_job_is_made_of(
    quick: Server, dataset_id: str, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    before = len(quick.get("/api/v1/jobs/?kind=FT").json())
    body = {"name": "x", "model_id": MODEL, "dataset_id": dataset_id, **fields}
    started, planned = quick.post(FINETUNE, body), quick.post(f"{FINETUNE}plan/", body)
    error = refusal(started, status)
    assert (error["code"], error["param"]) == (code, param)
    assert planned.json() == started.json()
    assert len(quick.get("/api/v1/jobs/?kind=FT").json()) == before


@pytest.mark.parametrize(
    ("config", "settings", "code"),
    [
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, {"packing": True}, "packing_unsupported"),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, {}, None),
        ({"model_type": "llama"}, {"packing": True}, None),
        ({"max_position_embeddings": 64}, {"max_seq_len": 65}, "max_seq_len_too_long"),
        ({"max_position_embeddings": 64}, {"max_seq_len": 64}, None),
        ({"model_type": "gpt_oss"}, {"target_modules": ["experts"], "dropout": 0.1}, "experts_without_dropout"),
        ({"model_type": "gpt_oss"}, {"target_modules": ["experts"]}, None),
    ],
)
def test_settings_that_the_files_of_the_base_rule_out_are_refused_in_the_trainers_words(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], code: str | None
) -> None:
    found = None
    try:
        check_settings("acme/it", tmp_path, config, HyperparametersIn(**settings), is_own_python=False)
    except JobFailure as failure:
        found = failure.code
    assert found == code
    assert code is None or PARAMS[code].startswith("hyperparameters.")


@pytest.mark.skipif(this_machine().has_gpu, reason="here it can be done")
def test_a_base_in_4_bits_is_refused_at_once_where_there_is_no_gpu(quick: Server, dataset_id: str) -> None:
    error = refusal(ask(quick, dataset_id, hyperparameters={"quantization": "4bit"}), 422)
    assert (error["code"], error["param"]) == ("quantization_needs_gpu", "hyperparameters.quantization")
    body = {"name": "x", "model_id": MODEL, "dataset_id": dataset_id, "hyperparameters": {"quantization": "4bit"}}
    planned = quick.request("POST", f"{FINETUNE}plan/", json_body=body)
    assert refusal(planned, 422)["code"] == "quantization_needs_gpu"


def test_a_length_above_what_the_model_takes_is_refused_at_once(quick: Server, dataset_id: str) -> None:
    before = len(quick.get("/api/v1/jobs/?kind=FT").json())
    error = refusal(ask(quick, dataset_id, hyperparameters=QUICK | {"max_seq_len": 100_000}), 422)
    assert (error["code"], error["param"]) == ("max_seq_len_too_long", "hyperparameters.max_seq_len")
    assert len(quick.get("/api/v1/jobs/?kind=FT").json()) == before


def test_a_rank_above_what_engines_have_room_for_names_the_setting(quick: Server, dataset_id: str) -> None:
    error = refusal(ask(quick, dataset_id, hyperparameters=QUICK | {"rank": 65}), 422)
    assert error["param"] == "hyperparameters.rank"
    assert "MODELYARD_ENGINE_MAX_LORA_RANK" in error["message"]


@pytest.mark.parametrize(
    ("count", "more"),
    [
        (10, {"deploy": True, "promote": {"alias": "default", "if": "better"}}),
        (10, {"hyperparameters": {"early_stopping": 2}}),
        (50, {"hyperparameters": {"early_stopping": 2, "validation_split": 0}}),
        (1, {"hyperparameters": {"early_stopping": 2, "validation_split": 0.5}}),
    ],
)
def test_nothing_is_measured_where_nothing_is_held_back_and_the_answer_says_what_to_do(
    quick: Server, count: int, more: dict[str, Any]
) -> None:
    error = refusal(ask(quick, add_dataset(quick, questions(count)), **({"hyperparameters": ...} | more)), 422)
    assert error["param"] in ("promote.if", "hyperparameters.early_stopping")
    assert "hyperparameters.validation_split" in error["message"]


def test_an_adapter_given_as_base_is_refused_with_the_base_that_it_has(quick: Server, dataset_id: str) -> None:
    adapter_id = finished(quick, start(quick, dataset_id, "To be trained on"))["adapter_id"]
    error = refusal(ask(quick, dataset_id, model_id=adapter_id), 422)
    assert (error["code"], error["param"]) == ("is_adapter", "model_id")
    assert MODEL in error["message"]
    assert adapter_id not in {one["model_id"] for one in quick.get(f"{FINETUNE}models/").json()}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "not_trainable"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "not_trainable"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "not_trainable"),
        ({"quantization_config": {"quant_method": "awq"}}, "not_trainable"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "not_generative"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_and_not_listed(
    llama: Path, tmp_path: Path, change: dict[str, Any], code: str
) -> None:
    imports = tmp_path / "imports"
    shutil.copytree(llama, imports)
    shutil.copytree(llama / "tiny-llama", imports / "odd")
    config = imports / "odd" / "config.json"
    whole = config.read_text("utf-8")
    changed = json.dumps(json.loads(whole) | change)
    config.write_text(changed if code == "not_generative" else whole)
    with training_server(tmp_path / "data", imports) as server:
        add_model(server, "local:odd")
        # A download refuses most of them by now: these are in the store from before.
        [stored] = (server.data_dir / "models").glob("local@odd/*/config.json")
        stored.write_text(changed)
        error = refusal(ask(server, add_dataset(server), model_id="local:odd"), 422)
        assert (error["code"], error["param"]) == (code, "model_id")
        assert [one["model_id"] for one in server.get(f"{FINETUNE}models/").json()] == [MODEL]


def test_what_cannot_be_served_with_an_adapter_is_told_before_it_is_trained_to_be(llama: Path, tmp_path: Path) -> None:
    imports = tmp_path / "imports"
    shutil.copytree(llama, imports)
    with training_server(tmp_path / "data", imports) as server:
        [stored] = (server.data_dir / "models").glob("local@tiny-llama/*/config.json")
        known = json.loads(stored.read_text("utf-8"))
        stored.write_text(json.dumps(known | {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}))
        dataset_id = add_dataset(server)
        error = refusal(ask(server, dataset_id, deploy=True), 422)
        assert (error["code"], error["param"]) == ("adapters_unsupported", "deploy")
        assert "export?merged=true" in error["message"]
        # Trained it can be, and merged.
        assert ask(server, dataset_id, hyperparameters={"max_steps": 1}).status == 200


def test_trainings_are_listed_newest_first_in_pages(quick: Server, dataset_id: str) -> None:
    made = [finished(quick, start(quick, dataset_id, f"Page {number}"))["id"] for number in range(3)]
    assert [one["id"] for one in quick.get(f"{FINETUNE}?limit=2").json()] == [made[2], made[1]]
    assert quick.get(f"{FINETUNE}?limit=1&before={made[1]}").json()[0]["id"] == made[0]
    error = refusal(quick.get(f"{FINETUNE}?before={NOBODY}"), 404)
    assert (error["code"], error["param"]) == ("finetune_not_found", "before")


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("POST", "/resume/")])
def test_a_training_that_there_is_not_is_not_found(quick: Server, method: str, path: str) -> None:
    error = refusal(quick.request(method, f"{FINETUNE}{NOBODY}{path}"), 404)
    assert (error["code"], error["param"]) == ("finetune_not_found", "finetune_id")


def test_a_training_that_runs_or_is_done_is_neither_resumed_nor_deleted_before_its_end(
    quick: Server, dataset_id: str
) -> None:
    finetune = start(quick, dataset_id, "pace=0.02 busy", hyperparameters=ENDLESS)
    path = f"{FINETUNE}{finetune['id']}"
    at_step(quick, finetune, 1)
    assert refusal(quick.post(f"{path}/resume/"), 409)["code"] == "finetune_active"
    assert refusal(quick.delete(path), 409)["code"] == "finetune_active"
    quick.post(f"{FINETUNE}interrupt/")
    ended(quick, finetune)
    assert quick.delete(path).json()["id"] == finetune["id"]
    assert refusal(quick.get(path), 404)["code"] == "finetune_not_found"
    assert not (quick.data_dir / "finetunes" / finetune["id"]).exists()
    assert not (quick.data_dir / "objects" / "finetune" / finetune["id"]).exists()
    done = finished(quick, start(quick, dataset_id, "Done"))
    assert refusal(quick.post(f"{FINETUNE}{done['id']}/resume/"), 409)["code"] == "finetune_done"


def test_a_deleted_training_leaves_its_adapter_in_the_store(quick: Server, dataset_id: str) -> None:
    done = finished(quick, start(quick, dataset_id, "Kept adapter"))
    assert quick.delete(f"{FINETUNE}{done['id']}").status == 200
    assert quick.get("/api/v1/models/ft:kept-adapter").json()["training"]["finetune_id"] == done["id"]
    again = start(quick, dataset_id, "Kept adapter")
    assert again["adapter_id"] == "ft:kept-adapter-2"
    finished(quick, again)


def test_whatever_needs_the_files_of_a_lost_base_says_that_it_is_lost(quick: Server, dataset_id: str) -> None:
    found = at_step(quick, start(quick, dataset_id, "Hold hold=training"), 1)
    quick.post(f"/api/v1/jobs/{found['job']['id']}/interrupt/")
    ended(quick, found)
    jobs = len(quick.get("/api/v1/jobs/").json())
    [folder] = (quick.data_dir / "models" / MODEL.replace(":", "@")).iterdir()
    aside = folder.rename(folder.parent / "aside")
    try:
        body = {"name": "Lost", "model_id": MODEL, "dataset_id": dataset_id, "hyperparameters": QUICK}
        answers = [
            quick.post(FINETUNE, body),
            quick.post(f"{FINETUNE}plan/", body),
            quick.post(f"{FINETUNE}{found['id']}/resume/"),
            quick.get(f"/api/v1/datasets/{dataset_id}/report?model_id={MODEL}"),
            quick.get(f"/api/v1/models/{MODEL}/export"),
        ]
        assert [(one.status, one.error_code) for one in answers] == [(409, "model_lost")] * 5
        assert all("POST /api/v1/models/add/" in one.text for one in answers)
        assert len(quick.get("/api/v1/jobs/").json()) == jobs
    finally:
        aside.rename(folder)
    assert quick.post(f"{FINETUNE}{found['id']}/resume/").status == 200
    quick.post(f"{FINETUNE}interrupt/")
    ended(quick, found)


def test_a_training_whose_dataset_is_gone_is_not_resumed(quick: Server) -> None:
    dataset_id = add_dataset(quick)
    found = ended(quick, start(quick, dataset_id, "fail=bad_rows"))
    assert quick.delete(f"/api/v1/datasets/{dataset_id}/").status == 200
    assert refusal(quick.post(f"{FINETUNE}{found['id']}/resume/"), 404)["code"] == "dataset_not_found"
    assert shown(quick, found)["job"]["id"] == found["job"]["id"]


def test_a_body_that_is_no_object_is_refused(quick: Server) -> None:
    for body in (b"[]", b'"a training"', b"{", b""):
        answer = quick.request("POST", FINETUNE, body=body, headers={"Content-Type": "application/json"})
        assert answer.status in (400, 422), answer.text
