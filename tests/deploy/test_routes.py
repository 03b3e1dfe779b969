"""Deploying over REST: what a wish may say, what is refused before anything starts, and what waits for an engine."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from modelyard.models.ids import folder_name
from tests.deploy.live import EMBEDDER, POEMS, PROSE, WIDE, A, B, LiveYard
from tests.server import Answer

pytestmark = pytest.mark.timeout(180)


def deploy(live: LiveYard, **wish: Any) -> Answer:
    return live.server.post("/api/v1/deploy/", {"model_id": A, **wish})


def test_other_adapters_change_the_running_engine(live: LiveYard) -> None:
    first = live.deploy(A, POEMS)
    assert first["served_adapter_ids"] == [POEMS]
    second = live.deploy(A, POEMS, PROSE)
    assert second["id"] == first["id"]
    for adapter_id in (POEMS, PROSE):
        assert live.ask(adapter_id).json()["model"].startswith(adapter_id)
    third = live.deploy(A, PROSE)
    assert third["id"] == first["id"]
    assert live.ask(POEMS).error_code == "model_not_found"
    assert len(live.record(A, "start")) == 1


def test_the_answer_to_a_deploy_warns_of_a_guessed_chat_template(live: LiveYard) -> None:
    answer = deploy(live).json()
    [warning] = answer["warnings"]
    assert "local:a brings no chat template" in warning
    assert live.server.get(f"/api/v1/models/{A}").json()["chat_template"] == "guessed"
    assert live.server.get("/api/v1/deploy/").json()["chat_template"] == "guessed"
    assert deploy(live, model_id=EMBEDDER).json()["warnings"] == []
    assert live.server.get(f"/api/v1/models/{EMBEDDER}").json()["chat_template"] is None


def test_an_adapter_with_a_template_of_its_own_is_said_wherever_it_is_deployed(live: LiveYard) -> None:
    [folder] = live.server.data_dir.glob(f"models/{folder_name(POEMS)}/*")
    template = folder / "chat_template.jinja"
    template.write_text("{{ messages }}", "utf-8")
    try:
        answer = deploy(live, adapter_ids=[POEMS]).json()
        [said] = [one for one in answer["warnings"] if POEMS in one]
        assert f"{POEMS} carries a chat template of its own, other than its base's" in said
        assert live.server.get(f"/api/v1/models/{POEMS}").json()["differs_from_base"] == ["chat_template"]
        events = live.server.get(f"/api/v1/jobs/{answer['id']}/events?follow=false").text
        assert "adapter_renders_otherwise" in events
    finally:
        template.unlink()
    live.deploy(A, POEMS)
    assert not [one for one in deploy(live, adapter_ids=[POEMS]).json()["warnings"] if POEMS in one]
    assert live.server.get(f"/api/v1/models/{POEMS}").json()["differs_from_base"] == []


def test_another_model_takes_the_place_of_the_current_one(live: LiveYard) -> None:
    a = live.deploy(A)
    b = live.deploy(B, strategy="side_by_side")
    assert live.ask("default").json()["model"] == B
    live.becomes(a["id"], "STOPPED")
    assert [one["id"] for one in live.deployments()] == [b["id"]]


def test_an_adapter_above_the_running_engines_rank_is_refused_with_the_way_out(live: LiveYard) -> None:
    one = live.deploy(A, POEMS)
    refused = deploy(live, adapter_ids=[POEMS, WIDE])
    assert (refused.status, refused.error_code) == (422, "invalid_value")
    assert refused.json()["error"]["param"] == "adapter_ids"
    assert f"'{WIDE}' has rank 32" in refused.text
    assert "ranks up to 8: deploy with options.max_lora_rank 32" in refused.text
    assert live.of_job(one["job_id"])["adapter_ids"] == [POEMS], "nothing has changed"
    other = live.deploy(A, POEMS, WIDE, options={"max_lora_rank": 32})
    assert other["id"] != one["id"]
    assert live.ask(WIDE).status == 200


def test_an_engine_that_starts_with_an_adapter_has_room_for_its_rank(live: LiveYard) -> None:
    one = live.deploy(A, WIDE)
    assert live.deploy(A, POEMS)["id"] == one["id"]
    assert live.deploy(A, WIDE)["id"] == one["id"], "the engine was started for its rank"


@pytest.mark.parametrize("adapters", [["local:nowhere"], [A], [B]])
def test_what_is_no_adapter_of_the_model_is_refused(live: LiveYard, adapters: list[str]) -> None:
    refused = deploy(live, adapter_ids=adapters)
    assert refused.status in (404, 422)
    assert refused.json()["error"]["param"] == "adapter_ids"
    assert live.deployments() == []


def test_a_deploy_without_room_for_adapters_takes_none(live: LiveYard) -> None:
    refused = deploy(live, adapter_ids=[POEMS, PROSE], options={"max_loras": 0})
    assert refused.status == 422
    assert "options.max_loras is 0" in refused.text
    assert "deploy with options.max_loras 2" in refused.text
    assert refused.json()["error"]["param"] == "adapter_ids"
    assert live.deployments() == []


def test_a_damaged_adapter_is_refused_before_a_job_is_made(live: LiveYard) -> None:
    [weights] = live.server.data_dir.glob("models/local@prose/*/adapter_model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64])
    try:
        jobs = len(live.server.get("/api/v1/jobs/").json())
        refused = deploy(live, adapter_ids=[PROSE])
        assert (refused.status, refused.error_code) == (422, "bad_weights")
        assert PROSE in refused.text
        assert len(live.server.get("/api/v1/jobs/").json()) == jobs
    finally:
        weights.write_bytes(whole)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strategy", "fast"), ("strategy", None), ("keep_others", "perhaps"), ("idle_timeout_s", 0.5),
        ("idle_timeout_s", -1), ("idle_timeout_s", "soon"), ("idle_timeout_s", 1e30), ("wanted", "UP"),
    ],
)  # fmt: skip
def test_a_wish_that_makes_no_sense_is_refused(live: LiveYard, field: str, value: object) -> None:
    refused = deploy(live, **{field: value})
    assert refused.status == 422
    assert refused.json()["error"]["param"] == field
    assert live.deployments() == []


def test_an_idle_engine_comes_back_for_those_who_ask(live: LiveYard) -> None:
    live.misbehave(A, start_delay_s=1)
    one = live.deploy(A, POEMS, idle_timeout_s=1)
    live.becomes(one["id"], "IDLE")
    cards = {card["id"] for card in live.server.get("/v1/models").json()["data"]}
    assert {A, POEMS, "default"} <= cards, "it is still in service"
    answers: list[Answer] = []
    asking = [
        threading.Thread(target=lambda name=name: answers.append(live.ask(name))) for name in (A, POEMS, "default", A)
    ]
    for thread in asking:
        thread.start()
    live.becomes(one["id"], "STARTING")
    assert live.server.get("/api/v1/deploy/").json()["state"] == "STARTING", "everybody can see it"
    for thread in asking:
        thread.join()
    assert [answer.status for answer in answers] == [200] * 4
    assert len(live.record(A, "start")) == 2, "they waited for one engine"


def test_a_client_that_leaves_while_an_engine_wakes_is_forgotten(live: LiveYard) -> None:
    live.misbehave(A, start_delay_s=3)
    one = live.deploy(A, idle_timeout_s=1)
    live.becomes(one["id"], "IDLE")
    before = in_flight(live)
    with pytest.raises(TimeoutError):
        live.server.request(
            "POST", "/v1/completions", json_body={"model": A, "prompt": "x", "max_tokens": 5}, timeout_s=0.5
        )
    live.until(lambda: in_flight(live) == before, "nobody waits for its answer")
    assert live.server.get(f"/api/v1/deployments/{one['id']}").json()["state"] != "READY", "it left before that"
    live.becomes(one["id"], "READY")
    assert not any('"max_tokens": 5' in request["body"] for request in live.record(A, "request"))


def in_flight(live: LiveYard) -> float:
    name = "modelyard_gateway_requests_in_flight "
    [line] = [line for line in live.server.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(line.removeprefix(name))
