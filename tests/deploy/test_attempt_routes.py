"""Each start of an engine is told with its end, its cause and its own log, during the next one and after the end."""

from __future__ import annotations

import pytest

from tests.deploy.live import A, LiveYard

pytestmark = pytest.mark.timeout(180)


def test_the_log_and_the_cause_of_each_attempt_stay_readable(live: LiveYard) -> None:
    live.misbehave(A, die_after_s=0.5, starts=[1], last_words="ValueError: the moon is full")
    one = live.deploy(A)
    path = f"/api/v1/deployments/{one['id']}/attempts"
    live.until(lambda: len(live.server.get(f"{path}/").json()) == 2, "the engine is started again")
    live.becomes(one["id"], "READY")

    first, second = live.server.get(f"{path}/").json()
    assert (first["number"], second["number"]) == (1, 2)
    assert first["started_at"] <= second["started_at"]
    assert first["ended"] is not None
    assert "moon is full" in first["failure"]["message"]
    assert first["failure"]["evidence"] == ["ValueError: the moon is full"]
    assert (second["ended"], second["failure"]) == (None, None)
    assert "--served-model-name local:a" in second["command"]

    assert "moon is full" in live.server.get(f"{path}/1/log/").text
    assert "moon is full" not in live.server.get(f"{path}/2/log/").text
    assert len(live.server.get(f"{path}/1/log/?tail=1").text.splitlines()) == 1
    missing = live.server.get(f"{path}/3/log/")
    assert (missing.status, missing.error_code) == (404, "attempt_not_found")
    assert "started 2 times" in missing.json()["error"]["message"]

    assert live.server.delete(f"/api/v1/deployments/{one['id']}?drain=false").status == 200
    live.becomes(one["id"], "STOPPED")
    first, second = live.server.get(f"{path}/").json()
    assert "moon is full" in first["failure"]["message"]
    # It was asked to end: that is no failure.
    assert second["ended"] is not None
    assert second["failure"] is None


def test_a_failed_start_shows_its_evidence_on_the_job_too(live: LiveYard) -> None:
    words = "ValueError: GPT2LMHeadModel does not support LoRA yet."
    live.misbehave(A, die_at_start={"stderr": words})
    job_id = live.server.post("/api/v1/deploy/", {"model_id": A}).json()["id"]
    job = live.until(
        lambda: (found := live.server.get(f"/api/v1/jobs/{job_id}/status/").json())["status"] == "FAILED" and found,
        "the job has failed",
    )
    assert (job["failure"]["code"], job["failure"]["evidence"]) == ("adapters_unsupported", [words])
    one = live.of_job(job_id)
    [attempt] = live.server.get(f"/api/v1/deployments/{one['id']}/attempts/").json()
    assert attempt["failure"] == job["failure"]
