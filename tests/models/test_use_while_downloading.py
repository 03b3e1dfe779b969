"""Using a model that is still on its way: every request that wants it is answered with its job and its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eventually import PATIENCE_S
from tests.finetune.yard import add_dataset, until
from tests.models.repositories import llama
from tests.server import serving
from tests.servers.hub import Fault, Hub

TINY = "acme/tiny"


@pytest.mark.slow
def test_a_model_that_is_being_downloaded_is_named_with_its_job_and_its_bytes(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(4_000_000))
    hub.misbehave(TINY, "model.safetensors", Fault("slow", bytes_per_s=200_000, times=None))
    with serving(tmp_path / "data", HF_ENDPOINT=hub.endpoint) as server:
        dataset_id = add_dataset(server)
        job = server.post(f"/api/v1/models/add/?model_id={TINY}").json()

        def has_arrived() -> bool:
            progress = server.get(f"/api/v1/jobs/{job['id']}/status/").json()["progress"]
            return progress is not None and progress["done"] >= 100_000

        until(has_arrived, "some of it is there", PATIENCE_S)
        wish = {"model_id": TINY}
        training = {"name": "t", "model_id": TINY, "dataset_id": dataset_id, "hyperparameters": {"max_steps": 1}}
        for path, body in (("deploy/", wish), ("deploy/plan/", wish), ("finetune/", training)):
            answer = server.post(f"/api/v1/{path}", body)
            assert (answer.status, answer.error_code) == (409, "download_running"), answer.text
            assert job["id"] in answer.text
            assert " bytes have arrived" in answer.text
            assert answer.json()["error"]["param"] == "model_id"
        missing = server.post("/api/v1/deploy/", {"model_id": "acme/other"})
        assert (missing.status, missing.error_code) == (404, "model_not_found")
        again = server.post(f"/api/v1/models/add/?model_id={TINY}")
        assert again.json()["id"] == job["id"]
        other = server.post(f"/api/v1/models/add/?model_id={TINY}&revision=v2")
        assert (other.status, other.error_code) == (409, "download_running")
        assert server.post(f"/api/v1/jobs/{job['id']}/interrupt/").status == 200
