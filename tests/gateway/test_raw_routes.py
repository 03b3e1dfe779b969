"""Raw prompts through the whole server: routes, adapters, a server that is killed, and errors in their one form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.live import POEMS, A, LiveYard, live_yard
from tests.gateway.lane import BATCH, CATS, DOGS, GREEDY, ONE

PLAIN = "text/plain; charset=utf-8"
END = "</s>"


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveYard]:
    with live_yard(tmp_path_factory.mktemp("yard")) as found:
        found.misbehave(A, recites={"dogs": DOGS, "": CATS})
        found.deploy(A, POEMS)
        yield found


def body(request_id: str, prompt: str | None, tokens: int = 500, **more: Any) -> dict[str, Any]:
    asked = {"request_id": request_id, "generation_config": {**GREEDY, "max_new_tokens": tokens}, **more}
    return asked if prompt is None else {**asked, "prompt": prompt}


@pytest.mark.parametrize("slash", ["", "/"])
def test_both_routes_answer_with_and_without_a_slash(yard: LiveYard, slash: str) -> None:
    one = yard.server.post(ONE + slash, body("slash", "cats?"))
    assert (one.status, one.headers["content-type"], one.text) == (200, PLAIN, CATS + END)
    many = yard.server.post(BATCH + slash, {"prompts": [{"request_id": "slash", "prompt": "dogs?"}]})
    assert (many.status, many.json()) == (200, [{"request_id": "slash", "response": DOGS + END}])


def test_an_adapter_is_named_by_its_id_and_its_text_goes_on_with_it(yard: LiveYard) -> None:
    assert yard.server.post(ONE, body("poem", "cats?", 5, model=POEMS)).text == CATS[:5]
    assert yard.server.post(ONE, body("poem", None)).text == CATS[5:] + END
    asked = [json.loads(one["body"]) for one in yard.record(A, "request") if one["path"] == "/v1/completions"]
    assert [one["model"].startswith(POEMS) for one in asked[-2:]] == [True, True]


def test_a_text_goes_on_after_the_server_was_killed(yard: LiveYard) -> None:
    assert yard.server.post(ONE, body("killed", "cats?", 5)).text == CATS[:5]
    yard.server.kill()
    yard.server.start()
    yard.until(lambda: yard.server.get("/v1/models").json()["data"], "the engine is adopted")
    assert yard.server.post(ONE, body("killed", None)).text == CATS[5:] + END


@pytest.mark.parametrize("path", [ONE, BATCH, f"{ONE}/"])
def test_an_error_that_is_found_before_the_lane_is_a_line_of_text_too(yard: LiveYard, path: str) -> None:
    answer = yard.server.get(path)
    assert (answer.status, answer.headers["content-type"], answer.headers["allow"]) == (405, PLAIN, "POST")
    assert answer.text == f"GET is not possible at {path}, but POST."
    foreign = yard.server.post(path, {}, {"Origin": "https://evil.example"})
    assert (foreign.status, foreign.headers["content-type"]) == (403, PLAIN)


def test_a_request_is_counted(yard: LiveYard) -> None:
    yard.server.post(ONE, body("counted", "cats?"))
    label = f'modelyard_gateway_requests_total{{endpoint="generate-one",model="{A}",status="200"}}'
    yard.until(lambda: label in yard.server.get("/metrics").text, "the request is among the figures")
