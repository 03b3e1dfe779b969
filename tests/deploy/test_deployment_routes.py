"""All deployments over REST: listed, looked at, taken out of service one by one."""

from __future__ import annotations

import threading
from contextlib import suppress
from http.client import HTTPException
from typing import Any

import pytest

from tests.deploy.live import EMBEDDER, POEMS, A, B, LiveYard

pytestmark = pytest.mark.timeout(180)

NOBODY = "00000000-0000-4000-8000-000000000000"


def is_asked(live: LiveYard, max_tokens: int) -> bool:
    return any(f'"max_tokens": {max_tokens}' in one["body"] for one in live.record(A, "request"))


def test_several_deployments_stand_side_by_side_and_the_current_one_comes_first(live: LiveYard) -> None:
    a = live.deploy(A)
    b = live.deploy(B, keep_others=True)
    vectors = live.deploy(EMBEDDER)
    assert [one["id"] for one in live.deployments()] == [vectors["id"], b["id"], a["id"]]
    assert live.deploy(A, keep_others=True)["id"] == a["id"]
    assert [one["id"] for one in live.deployments()] == [a["id"], vectors["id"], b["id"]]
    assert live.server.get("/api/v1/deploy/?task=generate").json()["id"] == a["id"]
    for model in (A, B, None):
        assert live.ask(model).json()["model"] == (model or A)


def test_the_list_is_read_page_by_page(live: LiveYard) -> None:
    for model_id in (A, B, EMBEDDER):
        live.deploy(model_id, keep_others=True)
    for query in ("?", "?all=true&"):
        whole = [one["id"] for one in live.deployments(query)]
        assert len(whole) >= 3
        pages: list[str] = []
        while page := live.deployments(f"{query}limit=2" + (f"&before={pages[-1]}" if pages else "")):
            assert len(page) <= 2
            pages += [one["id"] for one in page]
        assert pages == whole
    refused = live.server.get(f"/api/v1/deployments/?before={NOBODY}")
    assert (refused.status, refused.error_code, refused.json()["error"]["param"]) == (
        404,
        "deployment_not_found",
        "before",
    )
    assert live.server.get("/api/v1/deployments/?limit=0").status == 422


def test_one_is_taken_out_of_service_and_the_others_stay(live: LiveYard) -> None:
    a, b = live.deploy(A), live.deploy(B, keep_others=True)
    answer = live.server.delete(f"/api/v1/deployments/{a['id']}")
    assert (answer.status, answer.json()["wanted"]) == (200, "DRAINED")
    ended = live.becomes(a["id"], "STOPPED")
    assert ended["ended_at"] is not None
    # The job's end is the runner's to write, a moment after the deployment's.
    path = f"/api/v1/jobs/{a['job_id']}/status"
    live.until(lambda: live.server.get(path).json()["status"] == "KILLED", "the job is killed")
    assert [one["id"] for one in live.deployments()] == [b["id"]]
    assert {a["id"], b["id"]} <= {one["id"] for one in live.deployments("?all=true")}
    assert live.ask(B).status == 200
    assert live.ask(A).error_code == "model_not_found"


def test_an_unknown_one_is_a_404_and_an_ended_one_a_409(live: LiveYard) -> None:
    for method in ("GET", "DELETE"):
        answer = live.server.request(method, f"/api/v1/deployments/{NOBODY}")
        assert (answer.status, answer.error_code) == (404, "deployment_not_found")
        assert live.server.request(method, "/api/v1/deployments/nonsense").status == 422
    a = live.deploy(A)
    assert live.server.delete(f"/api/v1/deployments/{a['id']}?drain=false").status == 200
    live.becomes(a["id"], "STOPPED")
    answer = live.server.delete(f"/api/v1/deployments/{a['id']}")
    assert (answer.status, answer.error_code) == (409, "deployment_ended")
    assert live.server.get(f"/api/v1/deployments/{a['id']}").json()["state"] == "STOPPED"


@pytest.mark.parametrize("drain", [True, False])
def test_requests_in_progress_end_whole_unless_they_are_cut_off(live: LiveYard, drain: bool) -> None:
    live.misbehave(A, chunk_ms=100)
    a = live.deploy(A)
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(live.ask(A, max_tokens=40))
        except (OSError, HTTPException) as error:
            answers.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    live.until(lambda: is_asked(live, 40), "the request is with the engine")
    for _ in range(2):  # safe to repeat
        answer = live.server.delete(f"/api/v1/deployments/{a['id']}?drain={str(drain).lower()}")
        assert answer.status == 200, answer.text
    assert live.ask(A).status == 404, "nobody new is let in"
    live.becomes(a["id"], "STOPPED")
    asking.join()
    [answer] = answers
    if drain:
        assert answer.status == 200
        assert answer.json()["usage"]["completion_tokens"] == 40
    else:
        assert getattr(answer, "status", 0) != 200


def test_what_drains_can_be_told_to_end_now_but_not_given_time_again(live: LiveYard) -> None:
    live.misbehave(A, chunk_ms=1000)
    a = live.deploy(A)

    def ask() -> None:
        with suppress(OSError, HTTPException):  # it is cut off
            live.ask(A, max_tokens=30)

    asking = threading.Thread(target=ask)
    asking.start()
    live.until(lambda: is_asked(live, 30), "the request is with the engine")
    wanted = []
    for query in ("", "?drain=false", "?drain=true"):
        answer = live.server.delete(f"/api/v1/deployments/{a['id']}{query}")
        wanted.append(answer.json().get("wanted", answer.status))
    assert wanted[:2] == ["DRAINED", "DOWN"]
    assert wanted[2] in ("DOWN", 409)
    live.becomes(a["id"], "STOPPED")
    asking.join()


def test_a_deployment_shows_what_is_wanted_and_what_is(live: LiveYard) -> None:
    one = live.deploy(A, POEMS, strategy="replace", idle_timeout_s=600, options={"seed": 3})
    assert list(one)[:2] == ["model_id", "adapter_ids"]
    assert one["adapter_ids"] == one["served_adapter_ids"] == [POEMS]
    assert (one["strategy"], one["idle_timeout_s"], one["wanted"], one["adapter_failure"]) == (
        "replace",
        600,
        "UP",
        None,
    )
    assert one["memory_bytes"] > 0
    assert one["ended_at"] is None
    assert one == live.server.get(f"/api/v1/deployments/{one['id']}").json()
    status = live.server.get("/api/v1/deploy/status").json()
    assert status["job"]["id"] == one["job_id"] == status["job_id"]
