"""Anthropic's own client, whose interface vLLM speaks as well, against real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients.service import LLAMA, Service

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

ASKED: Any = {
    "extra_body": {"temperature": 0},
    "messages": [{"role": "user", "content": "Name three rivers."}],
    "max_tokens": 12,
}


@pytest.fixture(params=["", "/api"])
def anthropic(request: pytest.FixtureRequest, service: Service) -> Iterator[Any]:
    """The client, once at each of the two addresses; it adds /v1 itself."""
    package = pytest.importorskip("anthropic")
    with package.Anthropic(
        base_url=service.server.address + request.param, api_key="none", max_retries=0, timeout=120.0
    ) as found:
        yield found


def test_a_message_is_the_same_whole_and_streamed(anthropic: Any) -> None:
    whole = anthropic.messages.create(model="default", system="Be short.", **ASKED)
    assert (whole.model, whole.role) == (LLAMA, "assistant")
    assert whole.content[0].text
    with anthropic.messages.stream(model="default", system="Be short.", **ASKED) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens


def test_the_tokens_of_a_message_are_counted(anthropic: Any) -> None:
    counted = anthropic.messages.count_tokens(model="default", messages=ASKED["messages"])
    assert counted.input_tokens == anthropic.messages.create(model="default", **ASKED).usage.input_tokens


def test_what_is_refused_is_the_clients_own_exception(anthropic: Any) -> None:
    package = pytest.importorskip("anthropic")
    with pytest.raises(package.NotFoundError, match="org/other"):
        anthropic.messages.create(model="org/other", **ASKED)
    with pytest.raises(package.BadRequestError):
        anthropic.messages.create(model="default", **{**ASKED, "max_tokens": 1_000_000})
