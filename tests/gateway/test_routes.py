"""The gateway as OpenAI's own client meets it, and as the schema describes it."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from openai import NotFoundError, OpenAI
from prometheus_client import CollectorRegistry

from modelyard.gateway.routes import BASES, PASSAGES
from tests.gateway.conftest import Board, Running, gateway_app
from tests.gateway.test_relay import ask


@pytest.mark.parametrize("base", BASES)
def test_openais_client_lists_chats_streams_and_embeds(gateway: Running, base: str) -> None:
    gateway.engine("acme/tiny", "default")
    gateway.engine("acme/embedder", pooling=True)
    with OpenAI(base_url=gateway.url + base, api_key="unused", max_retries=0) as client:
        listed = list(client.models.list())
        assert [model.id for model in listed] == ["acme/tiny", "default", "acme/embedder"]
        assert {model.object for model in listed} == {"model"}
        chat = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )
        assert chat.choices[0].message.content == " tok0 tok1 tok2"
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 3
        stream = client.chat.completions.create(
            model="acme/tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
        )
        assert "".join(part.choices[0].delta.content or "" for part in stream) == " tok0 tok1 tok2 tok3"
        response = client.responses.create(model="acme/tiny", input="hi", max_output_tokens=2)
        assert response.output_text == " tok0 tok1"
        vectors = client.embeddings.create(model="acme/embedder", input=["a", "b"], encoding_format="float")
        assert len(vectors.data) == 2
        with pytest.raises(NotFoundError, match="acme/tiny") as caught:
            client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "hi"}])
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("base", BASES)
def test_openais_client_finds_one_model_by_an_id_with_a_slash(gateway: Running, base: str) -> None:
    gateway.engine("acme/tiny", "default")
    with OpenAI(base_url=gateway.url + base, api_key="unused", max_retries=0) as client:
        assert client.models.retrieve("default").model_dump()["root"] == "acme/tiny"
        assert client.models.retrieve("acme/tiny").id == "acme/tiny"
        assert ask(gateway, "/v1/models/acme/tiny", None, method="GET")[0] == 200
        with pytest.raises(NotFoundError):
            client.models.retrieve("nope")


def test_the_shared_address_of_two_lists_tells_its_callers_apart(gateway: Running) -> None:
    gateway.engine()
    openai = {"User-Agent": "OpenAI/Python 3.52.0", "x-stainless-lang": "python"}
    assert b"in-the-store" in ask(gateway, "/api/v1/models/", None, method="GET")[1]
    assert b"in-the-store" in ask(gateway, "/api/v1/models/", None, openai, method="GET")[1]
    assert b"in-the-store" in ask(gateway, "/api/v1/models", None, method="GET")[1]
    assert b'"acme/tiny"' in ask(gateway, "/api/v1/models", None, openai, method="GET")[1]
    assert b'"acme/tiny"' in ask(gateway, "/v1/models/", None, method="GET")[1]
    assert b"in-the-store" in ask(gateway, "/api/v1/models/acme/tiny", None, method="GET")[1]
    assert b'"object"' in ask(gateway, "/api/v1/models/acme/tiny", None, openai, method="GET")[1]


def test_the_schema_describes_every_passage_with_an_example_and_its_errors() -> None:
    app: FastAPI = gateway_app(Board(), CollectorRegistry(), 1)
    paths = app.openapi()["paths"]
    for base in BASES:
        for passed in PASSAGES:
            route = paths[f"{base}/{passed.endpoint.name}"]["post"]
            assert route["summary"]
            content = route["requestBody"]["content"]["application/json"]
            assert set(content["schema"]["required"]) <= set(content["example"])
            assert set(content["example"]) <= set(content["schema"]["properties"])
            answer = route["responses"]["200"]["content"]["application/json"]
            assert set(answer["example"]) == set(answer["schema"]["properties"])
            assert {"400", "404", "413", "502", "503"} <= set(route["responses"])
    ids = [route["operationId"] for path in paths.values() for route in path.values()]
    assert len(ids) == len(set(ids))
