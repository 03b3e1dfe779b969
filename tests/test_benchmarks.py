"""What the benchmarks say must be so: that they see a stream that stood still, one cut short, and a request refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from benchmarks import datasets, raw, raw_beams, report, training
from benchmarks.changes import Names, Yard, adapter_lines, measure_adapters, measure_switch, switch_lines
from benchmarks.gateway import Cell
from benchmarks.load import Address, Result, run
from benchmarks.training_start import Lines
from benchmarks.watching import Askers, Watched

from tests.deploy.live import POEMS, PROSE, WIDE, A, B, LiveYard, live_yard

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"
PAUSE_S = 0.3


def chunk(text: str) -> bytes:
    data = text.encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str, finish: str | None = None) -> bytes:
    return chunk("data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]}) + "\n\n")


LAST = event("end", "length")
END = chunk("data: [DONE]\n\n") + b"0\r\n\r\n"


@asynccontextmanager
async def answering(*parts: bytes) -> AsyncIterator[int]:
    """Serve one answer to everybody, with a pause before each part but the first; closed after the last."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        for number, part in enumerate(parts):
            await asyncio.sleep(PAUSE_S if number else 0)
            writer.write(part)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_the_cost_of_a_proxy_is_set_beside_that_of_the_same_round_and_says_how_far_rounds_lie_apart() -> None:
    def rounds(*cpu_us: float) -> list[Cell]:
        return [Cell(Result(chunks=10), 10 * one / 1e6) for one in cpu_us]

    cells = {(1, "direct"): rounds(0, 0, 0), (1, "nginx"): rounds(10, 20, 40), (1, "Modelyard"): rounds(20, 60, 60)}
    assert report.cost("Cost", cells, [1])[4:6] == [
        "| nginx | 20.0 µs (10.0 to 40.0) |",
        "| Modelyard | 60.0 µs (20.0 to 60.0), 2.00 (1.50 to 3.00) of nginx |",
    ]


async def one_stream(port: int) -> Result:
    return await run(Address("/v1/chat/completions", "m", port=port), 1, 8, 0.0, Watched)


async def test_the_largest_gap_of_a_stream_is_the_time_for_which_it_stood_still() -> None:
    async with answering(HEAD + event("") + event("a"), event("b") + event("c"), LAST + END) as port:
        found = await one_stream(port)
    assert found.failures == []
    [gap] = found.gaps_s
    assert PAUSE_S * 0.9 < gap < PAUSE_S * 1.9


async def test_the_wait_for_the_first_token_is_no_gap() -> None:
    async with answering(HEAD + event(""), event("a") + LAST + END) as port:
        found = await one_stream(port)
    assert found.gaps_s == [0.0]
    assert found.first_s[0] > PAUSE_S * 0.9


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([HEAD + event("") + event("a"), event("b")], "connection lost"),
        ([HEAD + event("") + event("a"), event("b", "abort") + END], "ended short"),
        ([HEAD + event("") + event("a"), LAST + b"0\r\n\r\n"], "ended short"),
        ([REFUSAL], "503"),
    ],
    ids=["broken off", "ended by the engine", "without its mark", "refused"],
)
async def test_a_stream_without_its_whole_answer_is_a_failure(parts: list[bytes], said: str) -> None:
    async with answering(*parts) as port:
        found = await one_stream(port)
    [failure] = found.failures
    assert said in failure


async def test_clients_that_are_refused_or_cut_short_count_it_and_ask_on() -> None:
    short = json.dumps({"model": "m", "usage": {"completion_tokens": 3}}).encode()
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(short), short)
    for part, said in ((REFUSAL, "status 503"), (answer, ""), (HEAD + event("a"), "ClientPayloadError")):
        async with answering(part) as port:
            askers = Askers(port, "default", clients=1, rest_s=0.01)
            asking = asyncio.ensure_future(askers.run())
            while len(askers.answers) < 4:
                await asyncio.sleep(0.01)
            askers.is_over = True
            await asking
        assert all(one.failure for one in askers.answers)
        assert said in askers.answers[0].failure


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveYard]:
    with live_yard(tmp_path_factory.mktemp("live")) as found:
        yield found


@pytest.mark.slow
async def test_changes_are_measured_on_a_whole_server_and_cost_no_request(live: LiveYard) -> None:
    for model_id in (A, B):
        live.misbehave(model_id, chunk_ms=2)
    live.deploy(A, WIDE)
    async with aiohttp.ClientSession(live.server.address) as session:
        yard = Yard(session, live.server.port, Names(A, B, WIDE, POEMS, PROSE))
        changes = await measure_adapters(yard, 1, 5.0, clients=4)
        assert [*changes.still.failures, *changes.changing.failures, *changes.leaving.failures] == []
        assert all(changes.seconds.values()), "each kind of change was made"
        assert len(changes.leaving.gaps_s) >= 2
        assert "| load | 1 |" in "\n".join(adapter_lines(changes, 4))
        found = await measure_switch(yard, clients=4, around_s=0.5, requests=20)
    assert found.failures == []
    assert {one.model for one in found.answers} == {A, B}
    assert all(found.phases().values())
    assert "| failed | 0 (goal 0) |" in "\n".join(switch_lines(found, 4))
    live.clear()


def test_beam_searches_are_compared_round_by_round() -> None:
    found = {1: {raw_beams.OURS: [1.0, 4.0, 2.0], raw_beams.VLLMS: [1.0, 1.0, 1.0]}}
    [row] = [line for line in raw_beams.lines(found) if line.startswith("| 1 |")]
    assert row == "| 1 | 2.00 s (1.00 to 4.00) | 1.00 s (1.00 to 1.00) | 2.00 (1.00 to 4.00) |"


def test_a_ratio_is_of_the_same_round_and_above_one_where_the_server_is_faster() -> None:
    seconds = {raw.MODELYARD: [1.0, 2.0, 4.0], raw.VLLM: [2.0, 2.0, 2.0], raw.TRANSFORMERS: [10.0, 20.0, 40.0]}
    lines = raw.batch_lines(seconds, {raw.VLLM: 1.0, raw.TRANSFORMERS: 0.5})
    [vllm] = [line for line in lines if line.startswith(f"| {raw.VLLM}")]
    assert "1.00 (0.50 to 2.00), goal 0.95 | 100% |" in vllm
    [transformers] = [line for line in lines if line.startswith(f"| {raw.TRANSFORMERS}")]
    assert "10.00 (10.00 to 10.00)" in transformers


def test_prompts_are_the_same_in_every_run_and_no_two_alike() -> None:
    assert raw.prompts(64) == raw.prompts(64)
    assert len(set(raw.prompts(64))) == 64


def a_training(tokens_per_s: float) -> training.Run:
    """Return what a training of 20 steps of 10 tokens measures, of which the first ones take 100 times as long."""
    at, points = 5.0, []
    for step in range(1, 21):
        at += (10 / tokens_per_s) * (100 if step <= training.SKIPPED else 1)
        points.append((at, {"step": step, "tokens": 10 * step, "loss": 9.0 if step <= 10 else 3.0}))
    return training.measured(points, 1.0, 700.0, {"figures": {"padding_share": 0.2}})


def test_the_speed_of_a_training_is_that_after_its_first_steps_and_its_loss_that_of_the_last() -> None:
    found = a_training(50.0)
    assert found.tokens_per_s == pytest.approx(50.0)
    assert found.began_s == pytest.approx(4.0 + 20.0)
    assert (found.tokens, found.loss) == (200, 3.0)


def test_trainings_are_compared_in_the_round_that_they_ran_in() -> None:
    runs = {training.OURS: [50.0, 100.0, 30.0], training.LOOP: [25.0, 100.0, 10.0]}
    found = {name: [a_training(speed) for speed in speeds] for name, speeds in runs.items()}
    text = "\n".join(training.speed_lines(training.TASKS[0], found))
    assert "| 25 (10 to 100) | 2.00 (1.00 to 3.00), goal 0.95 |" in text


@pytest.mark.parametrize(
    ("other", "said"),
    [({"tokens": 190}, "not the same tokens"), ({"kinds": ("torch.bfloat16",)}, "kinds of numbers"),
     ({"learning": 7}, "weights that learn"), ({"loss": 4.0}, "a loss of 4.000")],
    ids=["fewer tokens", "other numbers", "fewer weights", "another end"],
)  # fmt: skip
def test_a_training_that_was_another_work_is_not_compared(other: dict[str, object], said: str) -> None:
    same = replace(a_training(50.0), learning=8, kinds=("torch.float32",))
    training.expect_the_same({training.OURS: [a_training(50.0)], training.LOOP: [same], training.TRL: [same]})
    with pytest.raises(SystemExit, match=said):
        training.expect_the_same(
            {training.OURS: [a_training(50.0)], training.LOOP: [same], training.TRL: [replace(same, **other)]}  # type: ignore[arg-type]
        )


def test_a_line_of_progress_counts_once_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    lines = Lines(file)
    assert lines.new() == []
    file.write_text('{"step": 1}\n{"st')
    assert lines.new() == [{"step": 1}]
    with file.open("a") as more:
        more.write('ep": 2}\n')
    assert [lines.new(), lines.new()] == [[{"step": 2}], []]


def test_the_longest_wait_is_said_apart_from_those_that_the_machine_itself_made() -> None:
    alone = [datasets.Wait(4.0), datasets.Wait(26.4)]
    assert datasets.longest(alone) == "26 ms"
    assert datasets.longest([*alone, datasets.Wait(20.0, met_giving_back=True)]) == "26 ms"
    met = datasets.longest([*alone, datasets.Wait(98.0, met_giving_back=True)])
    assert met.startswith("26 ms, and 98 ms while")
    assert datasets.longest([datasets.Wait(98.0, met_giving_back=True)]).startswith("0 ms, and 98 ms while")
