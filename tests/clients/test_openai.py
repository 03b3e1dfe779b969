"""The official client in all that it can ask for, against real vLLM; errors are in test_openai_errors.py."""

from __future__ import annotations

import asyncio
import json
import math
from itertools import pairwise
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.service import LLAMA, MINILM, Service, until

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

MESSAGES: Any = [{"role": "user", "content": "Name three rivers."}]
LONG: Any = {"ignore_eos": True}


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Rome", "Oslo"]
    days: int = Field(ge=1, le=7)


class River(BaseModel):
    name: str = Field(max_length=10)
    size: Literal["small", "large"]
    bridges: int = Field(ge=0, le=99)


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    listed = {model.id for model in client.models.list()}
    assert {LLAMA, MINILM, "default", "Compressa-LLM", "Compressa-Embedding"} <= listed
    for name in listed:
        assert client.models.retrieve(name).id == name
    assert client.models.retrieve(LLAMA).object == "model"
    # The embedding model is current as well, but no chat model.
    assert client.models.retrieve("default").model_dump()["root"] == LLAMA
    with pytest.raises(openai.NotFoundError, match="local:no-such"):
        client.models.retrieve("local:no-such")


def test_a_chat_is_the_same_whole_streamed_and_asynchronous(service: Service, client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "messages": MESSAGES, "max_tokens": 24, "temperature": 0, "extra_body": LONG}
    whole = client.chat.completions.create(**asked)
    assert (whole.model, whole.choices[0].finish_reason) == (LLAMA, "length")
    assert whole.usage is not None
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == whole.choices[0].message.content
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24
    assert len(parts) > 4, "it came in pieces"

    async def ask_at_once() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0) as other:
            stream = await other.chat.completions.create(**asked, stream=True)
            text = "".join([part.choices[0].delta.content or "" async for part in stream])
            return [text, *await asyncio.gather(*(other.chat.completions.create(**asked) for _ in range(3)))]

    text, *answers = asyncio.run(ask_at_once())
    assert text == whole.choices[0].message.content
    assert {answer.usage.completion_tokens for answer in answers} == {24}


def test_a_chosen_tool_is_called_with_arguments_of_its_schema(service: Service, client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather, name="weather")
    asked: Any = {
        "model": "default", "messages": MESSAGES, "tools": [tool], "max_tokens": 100, "temperature": 0,
        "tool_choice": {"type": "function", "function": {"name": "weather"}}, "logit_bias": service.no_white_space,
    }  # fmt: skip
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    Weather.model_validate_json(call.function.arguments)

    streamed = client.chat.completions.create(**asked, stream=True)
    pieces = [piece for part in streamed for piece in part.choices[0].delta.tool_calls or []]
    assert pieces[0].function is not None
    assert pieces[0].function.name == "weather"
    arguments = "".join(piece.function.arguments or "" for piece in pieces if piece.function)
    assert json.loads(arguments) == json.loads(call.function.arguments)

    parsed = client.chat.completions.parse(**asked).choices[0].message.tool_calls
    assert parsed is not None
    assert isinstance(parsed[0].function.parsed_arguments, Weather)

    asked |= {"tool_choice": "none", "messages": [
        *MESSAGES, message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]}  # fmt: skip
    assert client.chat.completions.create(**asked).choices[0].message.content


def test_an_answer_keeps_to_a_json_schema(service: Service, client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["size", "count"],
        "additionalProperties": False,
    }
    asked: Any = {"model": "default", "messages": MESSAGES, "max_tokens": 100, "logit_bias": service.no_white_space}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(**asked, temperature=1, seed=seed, response_format=wanted)
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)
    parsed = client.chat.completions.parse(**asked, temperature=0, response_format=River)
    assert isinstance(parsed.choices[0].message.parsed, River)
    with client.chat.completions.stream(**asked, temperature=0, response_format=River) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed


def test_probabilities_come_with_the_tokens(client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "extra_body": LONG}
    choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 5
    for token in choice.logprobs.content:
        likeliest = [top.logprob for top in token.top_logprobs]
        assert len(likeliest) == 3
        assert token.logprob == max(likeliest) <= 0
        assert sum(map(math.exp, likeliest)) <= 1.001


def test_several_choices_differ_and_a_seed_brings_them_again(client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "messages": MESSAGES, "max_tokens": 12, "temperature": 1, "n": 3}

    def texts(seed: int) -> list[str | None]:
        choices = client.chat.completions.create(**asked, seed=seed).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        return [choice.message.content for choice in choices]

    first = texts(7)
    assert len(set(first)) == 3
    assert texts(7) == first
    assert texts(8) != first


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "prompt": "The longest river", "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**asked, extra_body=LONG).choices[0].text
    stop = text[10:13]
    stopped = client.completions.create(**asked, stop=[stop], extra_body=LONG).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_completion_repeats_its_prompt_with_its_probabilities(client: openai.OpenAI) -> None:
    prompt = "The longest river"
    answer = client.completions.create(
        model="default", prompt=prompt, max_tokens=3, temperature=0, echo=True, logprobs=2, extra_body=LONG
    )
    choice = answer.choices[0]
    assert choice.text.startswith(prompt)
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.text_offset is not None
    assert "".join(choice.logprobs.tokens[:3]) == choice.text[: choice.logprobs.text_offset[3]]
    assert answer.usage is not None
    assert len(choice.logprobs.tokens) == answer.usage.total_tokens
    first, *others = choice.logprobs.token_logprobs
    assert first is None, "nothing stands before the first token"
    assert all(value <= 0 for value in others)
    assert all(one <= other for one, other in pairwise(choice.logprobs.text_offset))


def test_a_response_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "input": "Hi", "max_output_tokens": 12, "temperature": 0, "extra_body": LONG}
    whole = client.responses.create(**asked)
    assert whole.output_text
    assert whole.usage is not None
    events = list(client.responses.create(**asked, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_an_embedding_model_says_that_it_does_not_chat(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="/embeddings") as refused:
        client.chat.completions.create(model=MINILM, messages=MESSAGES)
    assert refused.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model=LLAMA, input="Hi")


def test_values_that_vllm_refuses_are_bad_requests(client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "messages": MESSAGES}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"max_tokens": 1_000_000}, "2048"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 3}, "top_p"),
        ({"n": 0}, "n"),
    ]
    for values, told in refused:
        for streamed in (False, True):
            with pytest.raises(openai.BadRequestError, match=told):
                client.chat.completions.create(**asked, **values, stream=streamed)


def test_an_error_within_a_stream_is_an_exception(client: openai.OpenAI) -> None:
    # vLLM has answered 200 before it looks at this one.
    stream = client.chat.completions.create(model="default", messages=MESSAGES, logit_bias={"1000000": 1}, stream=True)
    with pytest.raises(openai.APIError, match="out-of-vocab"):
        list(stream)


@pytest.mark.parametrize("way", ["closed", "timed out"])
def test_a_stream_that_is_given_up_ends_its_generation(service: Service, client: openai.OpenAI, way: str) -> None:
    asked: Any = {"model": "default", "prompt": "Hi", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    until(lambda: service.running_requests() == 0, "the engine rests", service.server)
    if way == "closed":
        with client.completions.create(**asked, stream=True) as stream:
            assert next(stream).choices
            until(lambda: service.running_requests() == 1, "the engine generates", service.server)
    else:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(**asked, timeout=0.3)
    until(lambda: service.running_requests() == 0, "the generation has ended", service.server, within_s=5.0)
