"""A whole server with imitation engines, whose store has two models, an embedding model and three adapters."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelyard.models.ids import folder_name
from tests.deploy.yard import CONFIG, write_adapter
from tests.eventually import PATIENCE_S
from tests.models import repositories
from tests.server import ENGINE_PYTHON, Answer, Server, serving
from tests.servers.engine import read_record

A, B, EMBEDDER = "local:a", "local:b", "local:vectors"
POEMS, PROSE, WIDE = "local:poems", "local:prose", "local:wide"
SETTINGS = {
    "MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON),
    "MODELYARD_ENGINE_STOP_TIMEOUT_S": "1",
    "MODELYARD_ENGINE_RESTART_DELAY_S": "0.1",
    "MODELYARD_ENGINE_CPU_KV_CACHE_GIB": "0.1",
    "MODELYARD_ENGINE_MAX_LORA_RANK": "8",
    "MODELYARD_DISK_RESERVE_GIB": "0",
}


class LiveYard:
    """The server, and short ways to what its users do all the time."""

    def __init__(self, server: Server, records: Path) -> None:
        self.server = server
        self.records = records
        self.record_dirs: dict[str, Path] = {}
        self.plans = 0

    def until(self, condition: Callable[[], Any], what: str, within_s: float = 2 * PATIENCE_S) -> Any:
        deadline = time.monotonic() + within_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{self.server.log[-2000:]}"
            time.sleep(0.02)
        return value

    def misbehave(self, model_id: str, **how: Any) -> None:
        """Tell the next engines of a model how to behave, and have them record anew."""
        [config] = self.server.data_dir.glob(f"models/{folder_name(model_id)}/*/config.json")
        self.plans += 1
        record_dir = self.record_dirs[model_id] = self.records / str(self.plans)
        record_dir.mkdir()
        (config.parent / "misbehave.json").write_text(json.dumps({"record_dir": str(record_dir), **how}), "utf-8")

    def record(self, model_id: str, kind: str) -> list[dict[str, Any]]:
        return read_record(self.record_dirs[model_id], kind)

    def deploy(self, model_id: str, *adapter_ids: str, **more: Any) -> dict[str, Any]:
        """Deploy, and return the deployment as soon as it serves what was asked for."""
        answer = self.server.post("/api/v1/deploy/", {"model_id": model_id, "adapter_ids": list(adapter_ids), **more})
        assert answer.status == 200, answer.text
        job_id = answer.json()["id"]
        return self.serves(job_id, *adapter_ids)

    def serves(self, job_id: str, *adapter_ids: str) -> dict[str, Any]:
        def so() -> dict[str, Any] | None:
            one = self.of_job(job_id)
            return one if one["state"] == "READY" and one["served_adapter_ids"] == list(adapter_ids) else None

        found: dict[str, Any] = self.until(so, f"the deployment of job {job_id} serves")
        return found

    def of_job(self, job_id: str) -> dict[str, Any]:
        [found] = [one for one in self.deployments("?all=true&limit=1000") if one["job_id"] == job_id]
        return found

    def deployments(self, query: str = "") -> list[dict[str, Any]]:
        answer = self.server.get(f"/api/v1/deployments/{query}")
        assert answer.status == 200, answer.text
        found: list[dict[str, Any]] = answer.json()
        return found

    def becomes(self, deployment_id: str, *states: str) -> dict[str, Any]:
        def so() -> dict[str, Any] | None:
            one: dict[str, Any] = self.server.get(f"/api/v1/deployments/{deployment_id}").json()
            return one if one["state"] in states else None

        found: dict[str, Any] = self.until(so, f"deployment {deployment_id} is {' or '.join(states)}")
        return found

    def ask(self, model: str | None, max_tokens: int = 2) -> Answer:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens}
        return self.server.post("/v1/chat/completions", body if model is None else {"model": model, **body})

    def alias(self, name: str, target: str) -> dict[str, Any]:
        answer = self.server.request("PUT", f"/api/v1/aliases/{name}", json_body={"target": target})
        assert answer.status == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def clear(self) -> None:
        """Take everything out of service, and delete every alias."""
        for one in self.deployments():
            assert self.server.delete(f"/api/v1/deployments/{one['id']}?drain=false").status in (200, 409)
        for alias in self.server.get("/api/v1/aliases/").json():
            assert self.server.delete(f"/api/v1/aliases/{alias['name']}").status == 200
        self.until(lambda: not self.deployments(), "nothing is in service")
        for model_id in (A, B, EMBEDDER):
            self.misbehave(model_id)


@contextmanager
def live_yard(folder: Path, **settings: str) -> Iterator[LiveYard]:
    """Run the server for the block, with further settings such as `MODELYARD_GRACE_S="5"`."""
    imports, records = folder / "imports", folder / "records"
    records.mkdir()
    for name in ("a", "b"):
        _write_model(imports / name)
    for name, rank in (("poems", 8), ("prose", 4), ("wide", 32)):
        _write_adapter(imports / name, rank, A)
    for path, content in repositories.embedder().items():
        (imports / "vectors" / path).parent.mkdir(parents=True, exist_ok=True)
        (imports / "vectors" / path).write_bytes(content)
    with serving(folder / "data", MODELYARD_IMPORT_DIR=str(imports), **{**SETTINGS, **settings}) as server:
        yard = LiveYard(server, records)
        for model_id in (A, B, EMBEDDER, POEMS, PROSE, WIDE):
            assert server.post(f"/api/v1/models/add/?model_id={model_id}").status == 200
        yard.until(lambda: len(server.get("/api/v1/models/").json()) == 6, "the store has them all")
        yield yard


def _write_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    size = CONFIG["hidden_size"]
    assert isinstance(size, int)
    header, end = {}, 0
    for layer in range(2):
        entry = {"dtype": "F32", "shape": [size, size], "data_offsets": [end, end + 4 * size * size]}
        header[f"model.layers.{layer}.self_attn.q_proj.weight"] = entry
        end += 4 * size * size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def _write_adapter(folder: Path, rank: int, base: str) -> None:
    folder.mkdir(parents=True)
    write_adapter(folder, rank)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}), "utf-8")
