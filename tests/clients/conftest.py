"""One service for all clients."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.clients.service import Service, openai_client, running


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real server with a tiny Llama and all-MiniLM-L6-v2 on real vLLM; shared, and only its last tests change it."""
    with running(tmp_path_factory.mktemp("clients")) as found:
        yield found


@pytest.fixture(params=["/v1", "/api/v1"])
def client(request: pytest.FixtureRequest, service: Service) -> Iterator[openai.OpenAI]:
    """The official client, once at each of the two addresses."""
    with openai_client(service, request.param) as found:
        yield found
