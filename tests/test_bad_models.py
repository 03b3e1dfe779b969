"""A model with a hostile configuration, in the store since before it was looked at, breaks no list and no plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.datasets.forms import FORM_HEADERS, questions, upload
from tests.datasets.test_routes import until
from tests.models.repositories import as_json, llama
from tests.server import Server, serving

GOOD, BAD = "local:good", "local:bad"
HOSTILE: list[Any] = [
    {"model_type": []},
    {"model_type": {"a": 1}, "architectures": [[]]},
    {"num_hidden_layers": 10**400, "num_attention_heads": 4, "hidden_size": 16},
    {"num_hidden_layers": 2, "num_attention_heads": -4, "hidden_size": 16, "max_position_embeddings": 512},
    {"num_hidden_layers": "2", "num_attention_heads": "4", "hidden_size": "16", "vocab_size": "64"},
    {"text_config": {"num_hidden_layers": [[]], "hidden_size": {}}},
    {"max_position_embeddings": float("nan"), "vocab_size": float("inf")},
    {"architectures": ["\ud800"], "model_type": "\ud800"},
    [],
    7,
]
RAW = [as_json(value) for value in HOSTILE] + [
    b"",
    b'{"a":' * 100_000,
    b'{"num_hidden_layers": ' + b"9" * 5000 + b"}",
    b"\xff",
]


def add(server: Server, model_id: str) -> None:
    job = server.post(f"/api/v1/models/add/?model_id={model_id}").json()["id"]
    until(lambda: server.get(f"/api/v1/jobs/{job}/status/").json()["status"] == "FINISHED", "the model is added")


def test_one_bad_model_breaks_no_list_and_is_refused_with_its_fault(tmp_path: Path) -> None:
    imports = tmp_path / "imports"
    for name in ("good", "bad"):
        for path, content in llama(seed=name).items():
            place = imports / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    with serving(tmp_path / "data", MODELYARD_IMPORT_DIR=str(imports)) as server:
        add(server, GOOD)
        add(server, BAD)
        body = upload(questions(20))
        dataset = server.request("POST", "/api/v1/datasets/upload/", body=body, headers=FORM_HEADERS).json()["id"]
        [stored] = (server.data_dir / "models").glob("*bad*/*/config.json")
        training = {"name": "A training", "model_id": BAD, "dataset_id": dataset}
        for content in RAW:
            stored.write_bytes(content)
            listed = server.get("/api/v1/finetune/models/")
            assert [one["model_id"] for one in listed.json()] == [GOOD], content[:80]
            assert {one["model_id"] for one in server.get("/api/v1/models/").json()} == {GOOD, BAD}
            plan = server.post("/api/v1/deploy/plan/", {"model_id": BAD})
            assert plan.status == 200, plan.text
            assert (plan.json()["fits"], plan.json()["failure"]["code"]) == (False, "broken_model"), content[:80]
            assert "config.json" in plan.json()["failure"]["message"]
            for path in ("/api/v1/finetune/", "/api/v1/finetune/plan/"):
                refused = server.post(path, training)
                assert (refused.status, refused.error_code) == (422, "not_trainable"), refused.text
                assert "config.json" in refused.json()["error"]["message"]
