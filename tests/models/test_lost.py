"""A model whose folder is gone from the data folder is said to be lost wherever it is named, and had back by adding."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.deploy.live import POEMS, A, B, live_yard


def test_a_model_that_was_lost_from_the_data_folder_is_said_to_be_lost(tmp_path: Path) -> None:
    with live_yard(tmp_path) as yard:
        server = yard.server

        def lost() -> dict[str, bool]:
            return {one["model_id"]: one["lost"] for one in server.get("/api/v1/models/").json()}

        assert not any(lost().values())
        yard.misbehave(A)
        yard.deploy(A, POEMS)
        assert server.get("/ready").status == 200
        for name in ("local@b", "local@poems"):
            shutil.rmtree(tmp_path / "data" / "models" / name)
        assert {name for name, is_lost in lost().items() if is_lost} == {B, POEMS}
        assert server.get(f"/api/v1/models/{B}").json()["lost"] is True

        for wish in ({"model_id": B}, {"model_id": A, "adapter_ids": [POEMS]}):
            answer = server.post("/api/v1/deploy/", wish)
            assert (answer.status, answer.error_code) == (409, "model_lost"), answer.text
            assert "POST /api/v1/models/add/" in answer.text
        answer = server.get(f"/api/v1/models/{B}/export")
        assert (answer.status, answer.error_code) == (409, "model_lost")
        ready = server.get("/ready")
        assert ready.status == 503
        [reason] = ready.json()["reasons"]  # of what is not wanted in service nothing is said
        assert reason.startswith(f"model_lost: {POEMS} is wanted in service and lost")
        assert yard.ask(POEMS).status == 200  # its engine has it

        for model_id in (B, POEMS):
            assert server.post(f"/api/v1/models/add/?model_id={model_id}").status == 200
        yard.until(lambda: not any(lost().values()), "they are back")
        assert server.get("/ready").status == 200
        yard.deploy(B)
