"""What the supervisor asks of an engine, against a real process that answers as vLLM does."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelyard.deploy.draining import Requests
from modelyard.deploy.open_requests import OpenRequests
from modelyard.engine.client import EngineClient, Health, newest_adapters, total
from tests.eventually import eventually
from tests.no_files import no_files_left
from tests.server import ENGINE_PYTHON

#: Slow enough to look at, and to be left alone: such a stream ends with its engine.
ENDLESS = {"chunk_ms": 20}


class Engine:
    """A running engine, a client of it, and streams that are open at it."""

    def __init__(self, folder: Path, client: EngineClient, http: aiohttp.ClientSession) -> None:
        self.folder = folder
        self.client = client
        self.http = http
        self.process: subprocess.Popen[bytes] | None = None
        self.streams: list[aiohttp.ClientResponse] = []

    def hang_up(self) -> None:
        for stream in self.streams:
            stream.close()

    def adapter(self, name: str, rank: int = 8) -> Path:
        """Return the folder of a new adapter, as far as this engine looks into it."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}), "utf-8")
        return folder

    async def stream(self, name: str, tokens: int = 2000) -> aiohttp.ClientResponse:
        """Begin a stream and return it once its first token has come."""
        body = {"model": name, "prompt": "Hi", "max_tokens": tokens, "stream": True}
        response = await self.http.post("/v1/completions", json=body)
        self.streams.append(response)
        assert response.status == 200, await response.text()
        assert b"tok0" in await response.content.readline()
        return response


@asynccontextmanager
async def engine(*arguments: str, **misbehave: Any) -> AsyncIterator[Engine]:
    # A socket's path may have a hundred characters: pytest's own folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="yard-"))
    path = folder / "engine.sock"
    (folder / "misbehave.json").write_text(json.dumps(misbehave), "utf-8")
    argv = [str(ENGINE_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", "base", "--uds", str(path), "--enable-lora", *arguments]  # fmt: skip
    env = {"PATH": os.environ["PATH"], "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

    def answers() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        process = stack.enter_context(subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL))
        stack.callback(process.kill)
        await eventually(answers, "the engine listens")
        http = aiohttp.ClientSession("http://engine", connector=aiohttp.UnixConnector(str(path), limit=0))
        await stack.enter_async_context(http)
        client = EngineClient(f"unix:{path}")
        stack.push_async_callback(client.close)
        found = Engine(folder, client, http)
        found.process = process
        stack.callback(found.hang_up)
        yield found


async def test_an_adapter_is_served_under_its_name_from_loading_to_unloading() -> None:
    async with engine() as yard:
        assert await yard.client.names() == ["base"]
        assert await yard.client.load_adapter("a@1", yard.adapter("a"), 5.0) == ""
        assert await yard.client.names() == ["base", "a@1"]
        assert await yard.client.generates("a@1", "generate", 5.0) is None
        assert await yard.client.unload_adapter("a@1", 5.0) == ""
        assert await yard.client.names() == ["base"]
        wrong = await yard.client.generates("a@1", "generate", 5.0)
        assert wrong is not None
        assert (wrong.status, wrong.is_final) == (404, True)


async def test_an_engine_that_cannot_be_asked_for_want_of_a_file_is_not_called_silent() -> None:
    async with engine() as yard:
        with no_files_left():
            assert await yard.client.health() == Health.GOOD
        assert await yard.client.health() == Health.GOOD


async def test_loading_and_unloading_may_be_repeated() -> None:
    async with engine() as yard:
        folder, other = yard.adapter("a"), yard.adapter("b")
        assert await yard.client.load_adapter("a@1", folder, 5.0) == ""
        assert await yard.client.load_adapter("a@1", folder, 5.0) == ""
        assert "already been loaded" in await yard.client.load_adapter("a@1", other, 5.0), "another adapter's name"
        assert await yard.client.unload_adapter("a@1", 5.0) == ""
        assert await yard.client.unload_adapter("a@1", 5.0) == ""
        assert await yard.client.unload_adapter("never there", 5.0) == ""


async def test_what_the_engine_says_against_an_adapter_is_one_line_in_its_own_words() -> None:
    async with engine("--max-lora-rank", "16") as yard:
        wrong = await yard.client.load_adapter("a@1", yard.adapter("a", rank=64), 5.0)
        assert wrong == "HTTP 500: LoRA rank 64 is greater than max_lora_rank 16."
        wrong = await yard.client.load_adapter("b@1", yard.folder / "nothing", 5.0)
        assert wrong == "HTTP 404: Loading lora b@1 failed: No adapter found for <path>"
        assert await yard.client.names() == ["base"]
    async with engine(fail_load="a complaint\nof two lines") as yard:
        assert await yard.client.load_adapter("a@1", yard.adapter("a"), 5.0) == "HTTP 500: a complaint of two lines"


async def test_an_adapter_may_load_and_fail_at_its_first_token() -> None:
    async with engine(fail_adapters={"bad": "shapes differ"}) as yard:
        for name in ("bad@1", "good@1"):
            assert await yard.client.load_adapter(name, yard.adapter(name), 5.0) == ""
        wrong = await yard.client.generates("bad@1", "generate", 5.0)
        assert wrong is not None
        assert "shapes differ" in wrong.message
        assert await yard.client.generates("good@1", "generate", 5.0) is None
        assert await yard.client.generates("base", "generate", 5.0) is None


@pytest.mark.parametrize("task", ["generate", "embed"])
async def test_an_answer_of_nan_is_no_answer(task: str) -> None:
    runner = ["--runner", "pooling"] if task == "embed" else []
    async with engine(*runner, gives_nan=True) as yard:
        wrong = await yard.client.generates("base", task, 5.0)
        assert wrong is not None
        assert wrong.is_not_finite
        assert wrong.is_final


@pytest.mark.parametrize(
    ("status", "is_final"),
    [(400, True), (404, True), (422, True), (501, True), (408, False), (429, False), (500, False), (503, False)],
)
async def test_only_an_answer_about_the_model_or_the_request_is_final(status: int, is_final: bool) -> None:
    async with engine(fail={"status": status, "message": "planned"}) as yard:
        wrong = await yard.client.generates("base", "generate", 5.0)
        assert wrong is not None
        assert (wrong.status, wrong.is_final) == (status, is_final)
        assert "planned" in wrong.message


async def test_an_engine_that_takes_too_long_to_load_is_given_up_and_can_be_asked_again() -> None:
    async with engine(slow_load=0.5) as yard:
        folder = yard.adapter("a")
        assert await yard.client.load_adapter("a@1", folder, 0.05) == "no answer within 0.05 s"
        assert await yard.client.load_adapter("a@1", folder, 20.0) == "", "whether or not the first one arrived"
        assert await yard.client.names() == ["base", "a@1"]


async def test_every_question_is_answered_while_many_streams_are_open() -> None:
    async with engine(**ENDLESS) as yard:
        await asyncio.gather(*(yard.stream("base") for _ in range(150)))
        assert await yard.client.health() == Health.GOOD
        assert await yard.client.load_adapter("a@1", yard.adapter("a"), 10.0) == ""
        assert await yard.client.names() == ["base", "a@1"]
        assert await yard.client.open_requests() == 150


async def test_open_requests_are_counted_and_a_client_that_leaves_is_not() -> None:
    async with engine(**ENDLESS) as yard:
        assert await yard.client.open_requests() == 0
        stays, leaves = await yard.stream("base"), await yard.stream("base")
        assert await yard.client.open_requests() == 2
        leaves.close()

        async def one_is_left() -> bool:
            return await yard.client.open_requests() == 1

        await eventually(one_is_left, "the engine counts one request")
        assert not stays.closed


async def test_a_request_that_waits_for_a_slot_counts_as_open() -> None:
    async with engine("--max-loras", "1", **ENDLESS) as yard:
        for name in ("a@1", "b@1"):
            assert await yard.client.load_adapter(name, yard.adapter(name), 5.0) == ""
        first = await yard.stream("a@1")
        waiting = asyncio.create_task(yard.client.generates("b@1", "generate", 20.0))

        async def both_count() -> bool:
            return await yard.client.open_requests() == 2

        await eventually(both_count, "two requests are open")
        assert not waiting.done()
        assert await yard.client.adapters_in_use() == {"a@1"}
        assert await yard.client.generates("base", "generate", 5.0) is None, "the base needs no slot"
        first.close()
        assert await waiting is None


async def test_an_adapter_is_in_use_until_its_last_request_has_ended_even_after_its_name_went() -> None:
    async with engine("--max-loras", "4", **ENDLESS) as yard:
        for name in ("a@1", "b@1"):
            assert await yard.client.load_adapter(name, yard.adapter(name), 5.0) == ""
        assert await yard.client.adapters_in_use() == set()
        first, second, third = await yard.stream("a@1", 30), await yard.stream("b@1"), await yard.stream("base")
        assert await yard.client.adapters_in_use() == {"a@1", "b@1"}
        assert await yard.client.unload_adapter("a@1", 5.0) == ""
        assert await yard.client.names() == ["base", "b@1"]
        assert b" tok29" in await first.content.read(), "what had begun ended whole"

        async def only_b() -> bool:
            return await yard.client.adapters_in_use() == {"b@1"}

        await eventually(only_b, "only the other adapter is in use")
        assert not second.closed
        assert not third.closed


@pytest.mark.parametrize("task", ["generate", "embed"])
async def test_the_number_of_work_done_stands_still_only_while_nobody_asks(task: str) -> None:
    runner = ["--runner", "pooling"] if task == "embed" else []
    async with engine(*runner) as yard:
        before = await yard.client.answered_requests()
        assert before is not None
        assert await yard.client.answered_requests() == before
        assert await yard.client.generates("base", task, 5.0) is None
        after = await yard.client.answered_requests()
        assert after is not None
        assert after > before


async def test_the_number_of_work_done_grows_while_a_request_runs() -> None:
    async with engine(**ENDLESS) as yard:
        await yard.stream("base")
        before = await yard.client.answered_requests()

        async def it_grew() -> bool:
            return (await yard.client.answered_requests() or 0) > (before or 0)

        await eventually(it_grew, "the number grows")


async def test_an_engine_that_is_gone_is_told_apart_from_one_that_has_nothing() -> None:
    async with engine() as yard:
        assert yard.process is not None
        folder = yard.adapter("a")
        yard.process.kill()
        yard.process.wait()
        assert await yard.client.names() is None
        assert await yard.client.open_requests() is None
        assert await yard.client.answered_requests() is None
        assert await yard.client.adapters_in_use() is None
        assert "Cannot connect" in await yard.client.load_adapter("a@1", folder, 5.0)
        assert "Cannot connect" in await yard.client.unload_adapter("a@1", 5.0)


async def test_an_engine_that_does_not_say_how_many_requests_it_has_is_not_drained_before_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modelyard.deploy.draining.FRESH_S", 0.0)
    client = EngineClient("unix:/nobody/listens/here.sock")
    for timeout_s, is_drained in ((60.0, False), (0.0, True)):
        requests = Requests(OpenRequests(), timeout_s)
        requests.of_engine("unix:/nobody/listens/here.sock", client)
        assert await requests.look_whether_drained() == 0
        assert requests.drained == is_drained
    await client.close()


async def test_something_else_on_the_socket_is_an_answer_that_cannot_be_used() -> None:
    path = Path(tempfile.mkdtemp(prefix="yard-")) / "engine.sock"
    body = b'{"data": [1, {"id": 2}], "error": {"message": []}}'

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, path)
    client = EngineClient(f"unix:{path}")
    assert await client.names() is None
    assert await client.open_requests() is None
    await client.close()
    server.close()
    shutil.rmtree(path.parent)


FIGURES = """\
# HELP vllm:num_requests_running Number of requests.
vllm:num_requests_running{engine="0",model_name="odd } name"} 2.0
vllm:num_requests_running{engine="1",model_name="b"} 3.0 1395066363000
vllm:num_requests_running_more{engine="0"} 100.0
vllm:num_requests_running{engine="2"} not-a-number
vllm:num_requests_running{engine="3"
vllm:bare 7
vllm:lora_requests_info{max_lora="2",running_lora_adapters="x@1,y@1",waiting_lora_adapters="x@1"} 1.7952220765e+09
vllm:lora_requests_info{max_lora="2",running_lora_adapters="",waiting_lora_adapters=""} 1.7952220760952573e+09
vllm:lora_requests_info{max_lora="2",running_lora_adapters="y@1",waiting_lora_adapters="y@1"} 1.7952220767095573e+09
vllm:lora_requests_info{max_lora="2",running_lora_adapters="z@1"}
"""


def test_figures_are_summed_over_engines_and_only_under_their_own_name() -> None:
    assert total(FIGURES, "vllm:num_requests_running") == 5.0
    assert total(FIGURES, "vllm:bare") == 7.0
    assert total(FIGURES, "vllm:absent") is None
    assert total("", "vllm:bare") is None


def test_of_the_sets_of_adapters_that_ran_the_newest_holds() -> None:
    assert newest_adapters(FIGURES) == {"y@1"}
    assert newest_adapters("") == set()
