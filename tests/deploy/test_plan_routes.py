"""POST /api/v1/deploy/plan/: the deploy's body, and what it would take and do."""

from __future__ import annotations

import pytest

from tests.deploy.live import EMBEDDER, POEMS, WIDE, A, B, LiveYard

pytestmark = pytest.mark.timeout(180)


def test_a_plan_tells_memory_cache_disk_and_who_leaves(live: LiveYard) -> None:
    old = live.deploy(A)
    answer = live.server.post("/api/v1/deploy/plan/", {"model_id": B, "options": {"max_model_len": 512}})
    assert answer.status == 200, answer.text
    found = answer.json()
    assert (found["model_id"], found["fits"], found["strategy"]) == (B, True, "side_by_side")
    [leaving] = found["leaving"]
    assert (leaving["deployment_id"], leaving["model_id"], leaving["leaves"]) == (old["id"], A, "after")
    assert leaving["memory_bytes"] > 0
    memory = found["memory"]
    assert memory["kv_cache_bytes"] == int(0.1 * 1024**3)
    assert memory["request_tokens"] == 512
    assert memory["full_length_requests"] == round(memory["kv_cache_tokens"] / 512, 2)
    parts = ("weights_bytes", "processes_bytes", "kv_cache_bytes")
    assert memory["total_bytes"] == sum(memory[part] for part in parts) + (memory["adapters_bytes"] or 0)
    assert found["disk"]["model_bytes"] > 0
    assert found["disk"]["free_bytes"] > 0
    assert found["message"].startswith(f"{B} needs ")
    assert (found["failure"], found["hints"]) == (None, [])
    # Nothing has come of it.
    assert [one["model_id"] for one in live.deployments()] == [A]


def test_an_embedding_model_takes_nobodys_place(live: LiveYard) -> None:
    live.deploy(A)
    found = live.server.post("/api/v1/deploy/plan/", {"model_id": EMBEDDER}).json()
    assert (found["strategy"], found["leaving"]) == ("side_by_side", [])


def test_other_adapters_are_a_change_in_place(live: LiveYard) -> None:
    live.deploy(A)
    found = live.server.post("/api/v1/deploy/plan/", {"model_id": A, "adapter_ids": [POEMS]}).json()
    assert (found["strategy"], found["adapter_ids"], found["leaving"]) == ("in_place", [POEMS], [])
    assert found["disk"]["adapters_bytes"] > 0


def test_what_does_not_fit_is_a_plan_with_the_failure_and_hints_and_no_error(live: LiveYard) -> None:
    body = {"model_id": A, "options": {"cpu_kv_cache_gib": 4000}}
    answer = live.server.post("/api/v1/deploy/plan/", body)
    assert answer.status == 200
    found = answer.json()
    assert (found["fits"], found["failure"]["code"]) == (False, "not_enough_memory")
    hinted = next(hint for hint in found["hints"] if hint.startswith("Set cpu_kv_cache_gib to at most "))
    size = float(hinted.removeprefix("Set cpu_kv_cache_gib to at most ").removesuffix("."))
    # Others use this machine's memory too: a little less than what was free a moment ago.
    body["options"] = {"cpu_kv_cache_gib": 0.8 * size}
    assert live.server.post("/api/v1/deploy/plan/", body).json()["fits"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model_id": "no/such"}, 404, "model_id"),
        ({"model_id": A, "adapter_ids": ["no/such"]}, 404, "adapter_ids"),
        ({"model_id": POEMS}, 422, "model_id"),
        ({"model_id": B, "adapter_ids": [POEMS]}, 422, "adapter_ids"),
        ({"model_id": A, "options": {"max_model_len": 1}}, 422, "options.max_model_len"),
        ({"model_id": A, "surprise": 1}, 422, "surprise"),
    ],
)
def test_what_a_deploy_refuses_a_plan_refuses_in_the_same_words(
    live: LiveYard, body: dict[str, object], status: int, param: str
) -> None:
    planned, deployed = (live.server.post(path, body) for path in ("/api/v1/deploy/plan/", "/api/v1/deploy/"))
    assert planned.status == status, planned.text
    assert planned.json()["error"]["param"] == param
    assert planned.json() == deployed.json()


def test_an_adapter_that_the_running_engine_cannot_take_is_refused_as_the_deploy_would(live: LiveYard) -> None:
    live.deploy(A)
    body = {"model_id": A, "adapter_ids": [WIDE]}
    planned, deployed = (live.server.post(path, body) for path in ("/api/v1/deploy/plan/", "/api/v1/deploy/"))
    assert planned.status == 422
    assert planned.json() == deployed.json()
