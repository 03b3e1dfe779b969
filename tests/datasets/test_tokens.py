"""Rows are counted in tokens of a model in the store, by its own tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from modelyard.datasets.model_figures import max_length
from modelyard.demo.tiny_llama import make_llama
from tests.datasets.forms import FORM_HEADERS, chat, jsonl, upload
from tests.datasets.test_routes import UPLOAD, objects, until
from tests.hostile_tokenizers import greedy, panicking
from tests.models.repositories import llama
from tests.server import Server, serving
from tests.trainer.templates import FORGETFUL, need_transformers


def add(server: Server, name: str) -> None:
    job = server.post(f"/api/v1/models/add/?model_id=local:{name}").json()["id"]
    path = f"/api/v1/jobs/{job}/status/"
    until(lambda: server.get(path).json()["status"] in ("FINISHED", "FAILED"), "the model is in the store")
    assert server.get(path).json()["status"] == "FINISHED", server.get(path).text


def test_tokens_are_those_of_the_models_own_tokenizer_and_are_kept(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    imports = tmp_path / "imports"
    make_llama(imports / "tiny")
    shutil.copytree(imports / "tiny", imports / "forgetful")
    config = imports / "forgetful" / "tokenizer_config.json"
    (imports / "forgetful" / "chat_template.jinja").unlink(missing_ok=True)
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"chat_template": FORGETFUL}), "utf-8")
    for name, (_, changes) in REFUSED.items():
        shutil.copytree(imports / "tiny", imports / name)
        config = imports / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changes), "utf-8")
    tokenizer = Tokenizer.from_file(str(imports / "tiny" / "tokenizer.json"))
    limit = max_length(imports / "tiny")
    assert limit is not None
    rows: list[Any] = [chat(f"Question {number}?", "an answer " * number) for number in range(1, 40)]
    rows.append(chat("long", "very long " * limit))
    lengths = [
        sum(len(tokenizer.encode(said["content"], add_special_tokens=False).ids) for said in row["messages"])
        for row in rows
    ]
    with serving(tmp_path / "data", MODELYARD_IMPORT_DIR=str(imports)) as server:
        dataset = server.request("POST", UPLOAD, body=upload(jsonl(*rows)), headers=FORM_HEADERS).json()
        path = f"/api/v1/datasets/{dataset['id']}/report"
        assert server.get(f"{path}?model_id=local:tiny").error_code == "model_not_found"
        assert server.get(path).json()["tokens"] is None
        add(server, "tiny")
        found = server.get(f"{path}?model_id=local:tiny").json()["tokens"]
        assert (found["total"], found["longest"], found["counted_rows"]) == (sum(lengths), max(lengths), len(rows))
        assert (found["max_length"], found["truncated_rows"], found["is_exact"]) == (limit, 1, True)
        assert found["truncated_lines"] == [40]
        assert sum(bucket["rows"] for bucket in found["histogram"]) == len(rows)
        (kept,) = (name for name in objects(server) if "tokens-" in name)
        file = server.data_dir / "objects" / kept
        file.write_text(file.read_text("utf-8").replace(f'"total":{sum(lengths)}', '"total":7'), "utf-8")
        assert server.get(f"{path}?model_id=local:tiny").json()["tokens"]["total"] == 7
        what_trains(server)
        assert server.delete(f"/api/v1/datasets/{dataset['id']}").status == 200
        assert objects(server) == []


#: Models that no training takes, with the code that says so.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "quantised": ("not_trainable", {"quantization_config": {"quant_method": "awq"}}),
    "harmony": ("not_trainable", {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}),
    "short": ("tokens_beyond_embedding", {"vocab_size": 200}),
}


def what_trains(server: Server) -> None:
    """Ask what a training would learn from with a model whose template leaves rows out."""
    need_transformers()
    system = {"messages": [{"role": "system", "content": "Hush."}, *chat("a", "b")["messages"]]}  # type: ignore[misc]
    rows = [chat("a", "b"), system, {"text": "The mill at Hald."}, {"prompt": "c", "completion": "d" * 20}]
    dataset = server.request("POST", UPLOAD, body=upload(jsonl(*rows)), headers=FORM_HEADERS).json()
    add(server, "forgetful")
    path = f"/api/v1/datasets/{dataset['id']}/report?model_id=local:forgetful"
    found = server.get(path).json()["trains"]
    assert (found["rows"], found["tried_rows"], found["is_exact"], found["unknown"]) == (3, 4, True, None)
    reason = "the chat template leaves out message 1, whose role is system"
    assert (found["left_out_rows"], found["left_out"]) == (1, [{"line": 2, "reason": reason}])
    assert 0 < found["learnt_tokens"] < found["tokens"]
    assert [name for name in objects(server) if "trainable-" in name]
    assert server.get(path).json()["trains"] == found
    for name, (code, _) in REFUSED.items():
        add(server, name)
        answer = server.get(f"/api/v1/datasets/{dataset['id']}/report?model_id=local:{name}")
        assert answer.status == 200, answer.text
        trains = answer.json()["trains"]
        assert (trains["refusal"]["code"], trains["rows"], trains["unknown"]) == (code, None, None), name
        wanted = {"name": "x", "model_id": f"local:{name}", "dataset_id": dataset["id"]}
        refused = server.request("POST", "/api/v1/finetune/plan/", json_body=wanted, timeout_s=240.0)
        error = refused.json()["error"]
        assert (refused.status, error["code"], error["message"]) == (422, code, trains["refusal"]["message"])
    assert server.delete(f"/api/v1/datasets/{dataset['id']}").status == 200


def test_a_hostile_tokenizer_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    imports = tmp_path / "imports"
    hostile = {"greedy": greedy(), "panicking": panicking(), "broken": b"{}"}
    for name, content in hostile.items():
        for path, file in (llama() | {"tokenizer.json": content}).items():
            (imports / name / path).parent.mkdir(parents=True, exist_ok=True)
            (imports / name / path).write_bytes(file)
    with serving(tmp_path / "data", MODELYARD_IMPORT_DIR=str(imports)) as server:
        dataset = server.request("POST", UPLOAD, body=upload(jsonl(chat("a", "b"))), headers=FORM_HEADERS).json()
        codes = {}
        for name in hostile:
            add(server, name)
            refused = server.get(f"/api/v1/datasets/{dataset['id']}/report?model_id=local:{name}")
            codes[name] = (refused.status, refused.error_code)
            assert f"local:{name}" in refused.json()["error"]["message"]
        assert codes == {
            "greedy": (422, "bad_tokenizer"),
            "panicking": (422, "no_tokenizer"),
            "broken": (422, "no_tokenizer"),
        }
        assert server.get("/health").status == 200
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        assert "tokenizers" not in maps, "the library is never in the server itself"
