"""LangChain's chat model and embeddings, which are built on the official client, against real vLLM."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.service import LLAMA, MINILM, Service

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

QUESTION = "Name three rivers."


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Rome", "Oslo"]
    days: int = Field(ge=1, le=7)


@pytest.fixture
def chat(service: Service, monkeypatch: pytest.MonkeyPatch) -> Any:
    """LangChain's chat model as its documentation has it for a server of one's own."""
    langchain = pytest.importorskip("langchain_openai")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    return langchain.ChatOpenAI(
        base_url=f"{service.server.address}/v1", api_key="none", model="default", temperature=0, max_tokens=24,
        max_retries=0, extra_body={"ignore_eos": True},
    )  # fmt: skip


@pytest.fixture
def structured(chat: Any, service: Service) -> Any:
    """The same, able to end an answer that has to be JSON."""
    return chat.model_copy(update={"extra_body": None, "max_tokens": 100, "logit_bias": service.no_white_space})


def test_an_answer_is_the_same_whole_streamed_and_in_a_batch(chat: Any) -> None:
    whole = chat.invoke(QUESTION)
    assert whole.content
    assert whole.response_metadata["model_name"] == LLAMA
    assert whole.usage_metadata["output_tokens"] == 24
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert len(chunks) > 4, "it came in pieces"
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [24]
    batch = chat.batch([QUESTION, "Hi", [("system", "Be short."), ("human", QUESTION)]])
    assert [answer.usage_metadata["output_tokens"] for answer in batch] == [24] * 3


def test_an_answer_becomes_an_object(structured: Any) -> None:
    for method in ("json_schema", "function_calling"):
        answer = structured.with_structured_output(Weather, method=method, strict=True).invoke(QUESTION)
        assert isinstance(answer, Weather), method


def test_a_bound_tool_is_called_and_its_result_taken(structured: Any) -> None:
    bound = structured.bind_tools([Weather], tool_choice="Weather", strict=True)
    answer = bound.invoke(QUESTION)
    [call] = answer.tool_calls
    assert call["name"] == "Weather"
    Weather.model_validate(call["args"])
    gathered: Any = None
    for chunk in bound.stream(QUESTION):
        gathered = chunk if gathered is None else gathered + chunk
    assert [(one["name"], one["args"]) for one in gathered.tool_calls] == [(call["name"], call["args"])]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    assert structured.invoke([("human", QUESTION), answer, result]).usage_metadata["input_tokens"] > 12


def test_what_is_refused_is_the_official_clients_exception(chat: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="org/other"):
        chat.model_copy(update={"model_name": "org/other"}).invoke(QUESTION)
    with pytest.raises(openai.BadRequestError):
        chat.invoke(QUESTION, max_tokens=1_000_000)


def test_texts_are_embedded_as_the_official_client_does(client: openai.OpenAI) -> None:
    langchain = pytest.importorskip("langchain_openai")
    embeddings = langchain.OpenAIEmbeddings(
        base_url=str(client.base_url), api_key="none", model="Compressa-Embedding",
        check_embedding_ctx_length=False, max_retries=0,
    )  # fmt: skip
    texts = ["a river", "річка", "", "a longer text, with more than a few words"]
    expected = [one.embedding for one in client.embeddings.create(model=MINILM, input=texts).data]
    for one, other in zip(embeddings.embed_documents(texts), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert embeddings.embed_query(texts[0]) == pytest.approx(expected[0], abs=1e-5)
