"""REST for models, over HTTP, with real downloads from a real hub."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx2
import pytest
from fastapi import FastAPI

from modelyard.errors import ModelyardError
from modelyard.finetune.backups import AdapterBackups
from modelyard.http import error_response
from modelyard.jobs.tables import JobStatus
from modelyard.models.routes import api
from modelyard.storage import open_storage
from tests.models.repositories import adapter, llama
from tests.models.yard import Yard, make_settings, open_yard
from tests.servers.hub import Fault, Hub


@asynccontextmanager
async def client_of(data_dir: Path, hub: Hub) -> AsyncIterator[tuple[httpx2.AsyncClient, Yard]]:
    async with open_yard(make_settings(data_dir, hub.endpoint)) as yard:
        app = FastAPI()
        app.include_router(api)
        backups = AdapterBackups(yard.settings.models_dir, yard.sessions, open_storage(yard.settings))
        app.state.services = SimpleNamespace(sessions=yard.sessions, settings=yard.settings, backups=backups)

        async def answer(_request: object, error: Exception) -> Any:
            assert isinstance(error, ModelyardError)
            return error_response(error)

        app.add_exception_handler(ModelyardError, answer)
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://yard/api/v1") as client:
            yield client, yard


async def bring(client: httpx2.AsyncClient, yard: Yard, model_id: str, **more: str) -> None:
    answer = await client.post("/models/add/", params={"model_id": model_id, **more})
    assert answer.status_code == 200, answer.text
    assert (await yard.ended(UUID(answer.json()["id"]))).status == JobStatus.FINISHED


async def test_one_of_several_adapters_in_folders_is_added_by_its_folder(hub: Hub, tmp_path: Path) -> None:
    law, poems = adapter("acme/tiny", r=4), adapter("acme/tiny", r=16)
    files = {f"{folder}/{name}": one for folder, each in (("law", law), ("poems", poems)) for name, one in each.items()}
    hub.add("acme/adapters", {"README.md": b"#", "law/optimizer.pt": b"state", **files})
    async with client_of(tmp_path, hub) as (client, yard):
        answer = await client.post("/models/add/", params={"model_id": "acme/adapters"})
        job = await yard.ended(UUID(answer.json()["id"]))
        assert job.failure is not None
        assert job.failure.code == "adapters_in_folders"
        await bring(client, yard, "acme/adapters", subfolder="law")
        await bring(client, yard, "acme/adapters/poems")
        listed = {one["model_id"]: one for one in (await client.get("/models/")).json()}
        assert set(listed) == {"acme/adapters/law", "acme/adapters/poems"}
        for model_id, files in (("acme/adapters/law", law), ("acme/adapters/poems", poems)):
            model = await yard.model(model_id)
            assert model is not None
            kept = (yard.folder(model) / "adapter_config.json").read_bytes()
            assert (kept, model.base_model_id) == (files["adapter_config.json"], "acme/tiny")
            assert (await client.get(f"/models/{model_id}")).json()["adapter"] is True
        answer = await client.post("/models/add/", params={"model_id": "acme/adapters", "subfolder": "Law"})
        job = await yard.ended(UUID(answer.json()["id"]))
        assert job.failure is not None
        assert job.failure.code == "unknown_model"
        assert "no folder 'Law'; it has 'law', 'poems'" in job.failure.message
        assert (await client.delete("/models/acme/adapters/law")).status_code == 200


@pytest.mark.parametrize("subfolder", ["..", "../other", "a/../..", ".git", "a b", "a/b/c", "a--b", "%2e%2e"])
async def test_a_folder_that_is_no_folders_name_is_refused(hub: Hub, tmp_path: Path, subfolder: str) -> None:
    async with client_of(tmp_path, hub) as (client, _):
        params = {"model_id": "acme/adapters", "subfolder": subfolder}
        answer = await client.post("/models/add/", params=params)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "model_id")


@pytest.mark.parametrize("hint", ["/data/models/tiny-v2", "Acme/Tiny", None])
async def test_the_base_of_an_adapter_can_be_named_when_it_is_added_or_later(
    hub: Hub, tmp_path: Path, hint: str | None
) -> None:
    hub.add("acme/lora", adapter(hint))
    hub.add("acme/tiny", llama())

    async def base(client: httpx2.AsyncClient) -> str | None:
        found: str | None = (await client.get("/models/acme/lora")).json()["base_model_id"]
        return found

    async with client_of(tmp_path, hub) as (client, yard):
        await bring(client, yard, "acme/lora")
        assert await base(client) == (hint if hint == "Acme/Tiny" else None)
        await bring(client, yard, "acme/tiny")
        await bring(client, yard, "acme/lora", base_model_id="acme/tiny")
        assert await base(client) == "acme/tiny"
        await bring(client, yard, "acme/lora")
        assert await base(client) == "acme/tiny", "what nobody says again stays"
        for wrong, status, code in (("acme/tiyn", 404, "model_not_found"), ("acme/lora", 422, "invalid_value")):
            answer = await client.post("/models/add/", params={"model_id": "acme/lora", "base_model_id": wrong})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (status, "base_model_id", code)
        assert (
            "there are: acme/tiny"
            in (await client.post("/models/add/", params={"model_id": "acme/lora", "base_model_id": "acme/other"})).text
        )
        answer = await client.post("/models/add/", params={"model_id": "acme/lora", "base_model_id": "../x"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "base_model_id")
        answer = await client.post("/models/add/", params={"model_id": "acme/tiny", "base_model_id": "acme/tiny"})
        job = await yard.ended(UUID(answer.json()["id"]))
        assert job.failure is not None
        assert job.failure.code == "not_an_adapter"


def tensors(**shapes: list[int]) -> bytes:
    """Return weights of zeros with these shapes; a name's dots are written as two underscores."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * shape[0] * shape[1]
        header[name.replace("__", ".")] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(at)


def lora(layer: str, inputs: int) -> dict[str, bytes]:
    place = f"base_model__model__model__layers__0__self_attn__{layer}"
    matrices = {f"{place}__lora_A__weight": [4, inputs], f"{place}__lora_B__weight": [16, 4]}
    config = adapter(None, r=4, lora_alpha=8, target_modules=[layer])
    return {**config, "adapter_model.safetensors": tensors(**matrices)}


async def test_a_base_that_an_adapter_does_not_fit_is_refused_when_it_is_added(hub: Hub, tmp_path: Path) -> None:
    base = {"model.safetensors": tensors(model__layers__0__self_attn__q_proj__weight=[16, 8])}
    hub.add("acme/tiny", {**llama(), **base})
    loras = {"acme/fits": lora("q_proj", 8), "acme/wide": lora("q_proj", 32), "acme/other": lora("c_attn", 8)}
    for name, files in loras.items():
        hub.add(name, files)
    async with client_of(tmp_path, hub) as (client, yard):
        await bring(client, yard, "acme/tiny")
        await bring(client, yard, "acme/fits", base_model_id="acme/tiny")
        for is_there in (False, True):
            for name, words in (
                ("acme/wide", "leads from 32 to 16 numbers at"), ("acme/other", "its base has no 'c_attn'"),
            ):  # fmt: skip
                params = {"model_id": name, "base_model_id": "acme/tiny"}
                if is_there:
                    params["revision"] = await bring_at(client, yard, name)
                answer = await client.post("/models/add/", params=params)
                job = await yard.ended(UUID(answer.json()["id"]))
                assert job.failure is not None, (name, is_there)
                assert job.failure.code == "unsupported_adapter"
                assert words in job.failure.message
                assert "base_model_id" in job.failure.hint
                found = await yard.model(name)
                assert (found is not None) == is_there
                assert found is None or found.base_model_id is None


async def bring_at(client: httpx2.AsyncClient, yard: Yard, model_id: str) -> str:
    """Add a model without a word on its base, and return the commit that is there."""
    await bring(client, yard, model_id)
    model = await yard.model(model_id)
    assert model is not None
    return model.commit


async def test_models_are_added_listed_shown_and_deleted(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("acme/tiny", llama())
    hub.add("acme/lora", adapter("acme/tiny"))
    async with client_of(tmp_path, hub) as (client, yard):
        assert (await client.get("/models/")).json() == []
        answer = await client.post("/models/add", params={"model_id": "acme/tiny"})
        job = answer.json()
        assert set(job) >= {"id", "name", "status", "started_at"}
        assert job["name"] == "DOWNLOAD_acme/tiny"
        await yard.ended(UUID(job["id"]))
        await bring(client, yard, "acme/lora")
        listed = (await client.get("/models")).json()
        assert [(entry["model_id"], entry["adapter"], entry["base_model_id"]) for entry in listed] == [
            ("acme/lora", True, "acme/tiny"),
            ("acme/tiny", False, None),
        ]
        assert listed[1]["commit"] == commit
        assert listed[1]["added_at"].endswith("Z")
        for path in ("/models/acme/tiny", "/models/acme/tiny/", "/models/acme%2Ftiny"):
            assert (await client.get(path)).json() == listed[1]
        refused = await client.delete("/models/acme/tiny")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
        assert (await client.delete("/models/acme/lora")).json()["model_id"] == "acme/lora"
        assert (await client.delete("/models/acme%2Ftiny/")).status_code == 200
        assert (await client.get("/models/")).json() == []
        assert not (yard.models_dir / "acme--tiny").exists()
        gone = await client.delete("/models/acme/tiny")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_same_request_returns_the_same_job_while_it_runs(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/tiny", llama())
    hub.misbehave("acme/tiny", "", Fault("stall", times=None))
    async with client_of(tmp_path, hub) as (client, _yard):
        first = (await client.post("/models/add/?model_id=acme/tiny", content=b"")).json()
        again = (await client.post("/models/add/?model_id=acme/tiny&revision=main")).json()
        assert first["id"] == again["id"]
        other = await client.post("/models/add/?model_id=acme/tiny&revision=v2")
        assert (other.status_code, other.json()["error"]["code"]) == (409, "download_running")


@pytest.mark.parametrize("model_id", ["../../etc/passwd", "a/b/c/d/e", "a b", "", "local:../x", "a" * 300])
async def test_a_name_that_cannot_be_is_422_with_a_reason(hub: Hub, tmp_path: Path, model_id: str) -> None:
    async with client_of(tmp_path, hub) as (client, _yard):
        answer = await client.post("/models/add/", params={"model_id": model_id})
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("model_id", "invalid_value")
        assert (await client.get(f"/models/{model_id or 'x'}")).status_code == 404


def test_every_route_is_described() -> None:
    app = FastAPI()
    app.include_router(api)
    operations = [operation for path in app.openapi()["paths"].values() for operation in path.values()]
    assert len(operations) == 4
    for operation in operations:
        assert operation["summary"]
        assert operation["description"]
        assert "401" in operation["responses"]
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert app.openapi()["components"]["schemas"]["ModelOut"]["examples"]
