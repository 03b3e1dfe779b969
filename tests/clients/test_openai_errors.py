"""What goes wrong, as the official client's own exceptions: real servers, and engines that misbehave on purpose."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.clients.service import until
from tests.models import repositories
from tests.server import ENGINE_PYTHON, Server, serving
from tests.servers.engine import read_record

pytestmark = pytest.mark.timeout(180)

MODEL = "local:tiny"
ASKED: Any = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
KEY = "a key that is long enough"


@contextmanager
def deployed(folder: Path, how: dict[str, Any]) -> Iterator[tuple[Server, openai.OpenAI]]:
    """Run a server whose one engine misbehaves like this, from the request for its deployment on."""
    model = folder / "imports" / "tiny"
    for name, content in repositories.llama().items():
        (model / name).parent.mkdir(exist_ok=True, parents=True)
        (model / name).write_bytes(content)
    settings = {
        "MODELYARD_IMPORT_DIR": str(folder / "imports"),
        "MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON),
        "MODELYARD_DISK_RESERVE_GIB": "0",
        "MODELYARD_ENGINE_STOP_TIMEOUT_S": "1",
        "MODELYARD_ENGINE_RESTART_DELAY_S": "0.2",
    }
    with serving(folder / "data", **settings) as server:
        server.post(f"/api/v1/models/add/?model_id={MODEL}")
        until(lambda: server.get("/api/v1/models/").json(), "the model is in the store", server)
        [config] = server.data_dir.glob("models/*/*/config.json")
        how = {"record_dir": str(folder), **how}
        (config.parent / "misbehave.json").write_text(json.dumps(how), "utf-8")
        assert server.post("/api/v1/deploy/", {"model_id": MODEL}).status == 200
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
            yield server, client


def is_ready(server: Server) -> bool:
    answer = server.get("/api/v1/deploy/")
    return answer.status == 200 and bool(answer.json()["state"] == "READY")


def until_ready(server: Server, folder: Path, start: int = 1) -> None:
    """Wait for the engine of this start; a death that nobody has seen yet leaves the one before as ready."""
    until(lambda: len(read_record(folder, "start")) >= start and is_ready(server), f"start {start} is ready", server)


def test_a_wrong_key_is_an_authentication_error(tmp_path: Path) -> None:
    with serving(tmp_path / "data", MODELYARD_ADMIN_KEY=KEY) as server:
        address = f"{server.address}/v1"
        with openai.OpenAI(base_url=address, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="admin key") as refused:
                client.models.list()
            assert refused.value.code == "unauthorized"
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(**ASKED, stream=True)
        with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
            assert list(client.models.list()) == []
            with pytest.raises(openai.NotFoundError, match="there are none") as missing:
                client.chat.completions.create(**ASKED)
            assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(**ASKED)


def test_what_the_gateway_refuses_is_a_bad_request_that_names_the_field(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    with (
        serving(tmp_path / "data") as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="a template is a program") as refused:
            client.chat.completions.create(**ASKED, extra_body={"chat_template": "{{ x }}"})
        assert refused.value.param == "chat_template"
        with pytest.raises(openai.BadRequestError, match="data: URL"):
            client.chat.completions.create(**{**ASKED, "messages": [{"role": "user", "content": [image]}]})


@pytest.mark.slow
def test_while_an_engine_starts_the_client_is_told_when_to_come_back_and_does(tmp_path: Path) -> None:
    with deployed(tmp_path, {"start_delay_s": 3}) as (server, client):
        with pytest.raises(openai.InternalServerError) as starting:
            client.chat.completions.create(**ASKED)
        assert (starting.value.status_code, starting.value.code) == (503, "engine_starting")
        assert 1 <= int(starting.value.response.headers["Retry-After"]) <= 60
        assert not is_ready(server)
        # The client heeds Retry-After: with its own number of retries it just takes longer.
        patient = client.with_options(max_retries=openai.DEFAULT_MAX_RETRIES)
        assert patient.chat.completions.create(**ASKED).choices[0].message.content


def test_an_engine_that_dies_within_a_stream_is_an_exception(tmp_path: Path) -> None:
    with deployed(tmp_path, {"starts": [1, 2, 3], "die_mid_stream": 5, "chunk_ms": 5, "signal": 9}) as (server, client):
        streams: tuple[Callable[[], Any], ...] = (
            lambda: client.chat.completions.create(**ASKED, stream=True),
            lambda: client.completions.create(model="default", prompt="Hi", max_tokens=50, stream=True),
            lambda: client.responses.create(model="default", input="Hi", max_output_tokens=50, stream=True),
        )
        for start, stream in enumerate(streams, 1):
            until_ready(server, tmp_path, start)
            parts = stream()
            assert next(parts)
            with pytest.raises(openai.APIConnectionError):
                list(parts)


def test_an_engine_that_dies_before_it_answers_is_an_internal_server_error(tmp_path: Path) -> None:
    # The first request is the probe of readiness.
    with deployed(tmp_path, {"starts": [1], "die_on_request": 2}) as (server, client):
        until_ready(server, tmp_path)
        with pytest.raises(openai.InternalServerError) as died:
            client.chat.completions.create(**ASKED)
        assert (died.value.status_code, died.value.code) == (502, "engine_failed")
        until_ready(server, tmp_path, start=2)
        assert client.chat.completions.create(**ASKED).choices[0].message.content


@pytest.mark.parametrize("way", ["closed", "timed out"])
def test_a_client_that_gives_up_ends_its_generation(tmp_path: Path, way: str) -> None:
    with deployed(tmp_path, {"chunk_ms": 20}) as (server, client):
        until_ready(server, tmp_path)
        asked = {**ASKED, "max_tokens": 2000}
        if way == "closed":
            with client.chat.completions.create(**asked, stream=True) as stream:
                assert next(stream).choices
        else:
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(**asked, timeout=0.5)
        until(lambda: read_record(tmp_path, "cancelled"), "the engine has stopped", server)
        assert read_record(tmp_path, "cancelled")[0]["tokens"] < 2000
