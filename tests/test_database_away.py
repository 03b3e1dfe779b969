"""A whole server whose PostgreSQL goes away, or hangs: what is in service is answered, and the rest is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.live import A, LiveYard, live_yard
from tests.fixtures import missing
from tests.server import Answer
from tests.servers import postgres
from tests.servers.lifetime import ServerMissing

pytestmark = [pytest.mark.timeout(180), pytest.mark.postgres]

CATS = " Soft paws at dawn; the house is theirs, and every sunny sill."
ONE, BATCH = "/api/generate-one", "/api/generate-batch"
SHORT = {"generation_config": {"do_sample": False, "max_new_tokens": 4}}
#: What a request may take while the database does not answer: once its first silence was waited for, nothing.
BOUND_S = 4.0
#: What /ready may take, whatever hangs.
READY_S = 6.0


@dataclass
class Away:
    yard: LiveYard
    go: Callable[[], None]
    come_back: Callable[[], None]


@pytest.fixture(params=["away", "frozen"])
def away(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Away]:
    try:
        with postgres.running() as url, live_yard(tmp_path, MODELYARD_DATABASE_URL=url) as yard:
            yard.misbehave(A, recites={"": CATS})
            yard.deploy(A)
            yard.alias("mine", A)
            outages = postgres.Outages(url)
            if request.param == "away":
                made = Away(yard, outages.stop, outages.start)
            else:
                made = Away(yard, outages.freeze, outages.thaw)
            try:
                yield made
            finally:
                made.come_back()
    except ServerMissing as error:
        missing("postgres", str(error))


def one(yard: LiveYard, request_id: str, **more: str) -> Answer:
    return yard.server.post(ONE, {"request_id": request_id, **SHORT, **more})


def test_what_is_in_service_is_answered_while_the_database_is_away(away: Away) -> None:
    yard, took = away.yard, []

    def answered(path: str, body: dict[str, Any]) -> None:
        began = time.monotonic()
        answer = yard.server.post(path, body)
        took.append(time.monotonic() - began)
        assert answer.status in (200, 206), (path, body, answer.status, answer.text)

    old = one(yard, "old", prompt="cats?").text
    assert CATS.startswith(old)
    assert old
    away.go()
    until, number = time.monotonic() + 4, 0
    while time.monotonic() < until:
        number += 1
        time.sleep(0.02)  # of more than a thousand texts that wait in memory the oldest are given up
        for name in (A, "mine", "default", None):
            named = {"model": name} if name is not None else {}
            answered("/v1/chat/completions", {**named, "messages": [{"role": "user", "content": "Hi"}]})
        answered("/v1/completions", {"model": A, "prompt": "x", "max_tokens": 2})
        answered(ONE, {"request_id": f"new-{number}", "prompt": "cats?", **SHORT})
        answered(BATCH, {"prompts": [{"request_id": f"batch-{number}", "prompt": "cats?"}], **SHORT})
    assert max(took) < BOUND_S
    assert sorted(took)[len(took) // 2] < 0.5, "nothing is waited for once the outage is known"

    began = time.monotonic()
    ready = yard.server.get("/ready")
    assert ready.status == 503
    assert any(reason.startswith("The database does not answer") for reason in ready.json()["reasons"])
    assert time.monotonic() - began < READY_S
    # What was kept meanwhile goes on; what was kept before cannot be read; what is not known may exist all the same.
    fresh = one(yard, "new-1")
    assert (fresh.status, CATS.startswith(old + fresh.text)) == (200, True), (old, fresh.text)
    refused = one(yard, "old")
    assert refused.status == 503, refused.text
    assert "request_id" in refused.text
    unknown = yard.ask("org/unknown")
    assert (unknown.status, unknown.error_code) == (503, "database_unavailable")
    assert "retry-after" in unknown.headers
    assert yard.server.get("/v1/models/org/unknown").status == 503
    listed = yard.server.get("/v1/models")
    assert (listed.status, {A, "mine"} <= {each["id"] for each in listed.json()["data"]}) == (200, True)
    figures = yard.server.get("/metrics").text
    assert "modelyard_continuations_lost_total 0.0" in figures
    assert "modelyard_continuations_unwritten 0.0" not in figures

    away.come_back()
    yard.until(lambda: "modelyard_continuations_unwritten 0.0" in yard.server.get("/metrics").text, "all is written")
    assert yard.ask("org/unknown").status == 404
    assert one(yard, "old").status == 200
    assert yard.server.stop() == 0
    yard.server.start()
    yard.until(lambda: yard.ask(A).status == 200, "it serves again")
    again = one(yard, "new-1")
    assert (again.status, CATS.startswith(old + fresh.text + again.text)) == (200, True)
