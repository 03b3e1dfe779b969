"""What a change costs those who ask meanwhile: adapters that come and go, and one model that takes another's place.

    python benchmarks/changes.py [--only adapters | --only switch] [--rounds 2] [--seconds 15] [--write]

A whole Modelyard with tiny Llamas on real vLLM, and 16 clients.

Adapters: half of the clients stream from the model, half from an adapter that stays. Windows with changes and windows
without any, in turn and equally long, so that what the machine does besides weighs on both. A change is measured from
POST /deploy to the first answer of a request that names the adapter (asked for every 10 ms), or, for one that leaves,
to the first 404. A stream with the leaving adapter is begun before each exchange and unload, and must end whole.

Switch: the clients ask for short answers by the alias `default`, streamed and not in turn, from some seconds before the
POST of another model until some seconds after the old one's engine is gone.

Every failed request is counted, with nothing tried again. --write puts the tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report, tiny_yard
from benchmarks.load import Address, Result, run
from benchmarks.watching import Answered, Askers, Watched

HERE = Path(__file__).resolve().parent
CLIENTS = 16
TOKENS = 256
REQUESTS = 1000
POLL_S = 0.01
#: Between two changes, and the least that must be left of a window to begin with three more.
REST_S = 0.5
CYCLE_S = 4.0
#: How long clients ask before and after a switch.
AROUND_S = 8.0
LIMIT_S = 600.0


@dataclass(frozen=True)
class Names:
    """A model, another that takes its place, and three adapters of the first."""

    model: str = "local:tiny-llama"
    other: str = "local:other-llama"
    stays: str = "local:stays"
    first: str = "local:first"
    second: str = "local:second"


@dataclass
class Windows:
    """What arrived in all windows of a kind."""

    gaps_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, results: Sequence[Result]) -> None:
        """Take in a window."""
        for one in results:
            self.gaps_s += one.gaps_s
            self.first_s += one.first_s
            self.failures += one.failures
            self.tokens += one.tokens
        self.seconds += max(one.seconds for one in results)


@dataclass
class AdapterChanges:
    """Seconds of each kind of change, the windows beside one another, and the streams of adapters that left."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"load": [], "exchange": [], "unload": []})
    still: Windows = field(default_factory=Windows)
    changing: Windows = field(default_factory=Windows)
    leaving: Windows = field(default_factory=Windows)


class Yard:
    """Short ways to what the changes need of a server, in the process that reads the streams: nothing blocks."""

    def __init__(self, session: aiohttp.ClientSession, port: int, names: Names = Names()) -> None:
        self._session = session
        self.port = port
        self.names = names

    async def deploy(self, model_id: str, adapter_ids: Sequence[str], **more: Any) -> str:
        """Ask for a deployment and return its job's id."""
        body = {"model_id": model_id, "adapter_ids": list(adapter_ids), **more}
        async with self._session.post("/api/v1/deploy/", json=body) as response:
            if response.status != 200:
                raise SystemExit(f"POST /deploy: {response.status} {await response.text()}")
            job_id: str = (await response.json())["id"]
            return job_id

    async def until(self, name: str, status: int) -> None:
        """Ask for a token by a name until the answer has a status: 200, or 404 for a name that leaves.

        Raises:
            SystemExit: another error came, or time is up. 503 says that the adapter is being loaded.
        """
        body = {"model": name, "prompt": "Hi", "max_tokens": 1}
        deadline = time.perf_counter() + LIMIT_S
        while True:
            async with self._session.post("/v1/completions", json=body) as response:
                text = await response.text()
            if response.status == status:
                return
            if response.status not in (200, 404, 503) or time.perf_counter() > deadline:
                raise SystemExit(f"{name} was to answer {status}, but did {response.status}: {text}")
            await asyncio.sleep(POLL_S)

    async def text(self, name: str) -> str:
        """Return the likeliest answer to a prompt."""
        body = {"model": name, "prompt": "The longest river", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        async with self._session.post("/v1/completions", json=body) as response:
            text: str = (await response.json())["choices"][0]["text"]
            return text

    async def deployments(self) -> list[dict[str, Any]]:
        """Return what is live."""
        async with self._session.get("/api/v1/deployments/") as response:
            found: list[dict[str, Any]] = await response.json()
            return found

    async def streams(self, name: str, clients: int, seconds: float) -> Result:
        """Stream from a model or an adapter; 0 seconds are one stream for each client."""
        address = Address("/v1/chat/completions", name, port=self.port)
        return await run(address, clients, TOKENS, seconds, Watched)


async def measure_adapters(yard: Yard, rounds: int, seconds: float, clients: int = CLIENTS) -> AdapterChanges:
    """Run windows with and without changes in turn; the model is in service with the adapter that stays."""
    found = AdapterChanges()
    await _window(yard, 1.0, clients)  # the first of everything is slower
    for number in range(rounds):
        kinds = [found.still, found.changing]
        for windows in kinds if number % 2 == 0 else kinds[::-1]:
            streaming = asyncio.ensure_future(_window(yard, seconds, clients))
            if windows is found.changing:
                await _change(yard, found, time.perf_counter() + seconds)
            windows.add(await streaming)
    return found


async def _window(yard: Yard, seconds: float, clients: int) -> Sequence[Result]:
    half, names = clients // 2, yard.names
    return await asyncio.gather(
        yard.streams(names.model, clients - half, seconds), yard.streams(names.stays, half, seconds)
    )


async def _change(yard: Yard, found: AdapterChanges, until: float) -> None:
    """Load an adapter, put another in its place, and unload that, as long as there is time."""
    stays, first, second = yard.names.stays, yard.names.first, yard.names.second
    steps = [("load", [stays, first], "", first), ("exchange", [stays, second], first, second),
             ("unload", [stays], second, "")]  # fmt: skip
    while until - time.perf_counter() > CYCLE_S:
        for kind, adapter_ids, leaves, comes in steps:
            await asyncio.sleep(REST_S)
            stream = asyncio.ensure_future(yard.streams(leaves, 1, 0.0)) if leaves else None
            await asyncio.sleep(REST_S)
            began = time.perf_counter()
            await yard.deploy(yard.names.model, adapter_ids)
            await yard.until(comes or leaves, 200 if comes else 404)
            found.seconds[kind].append(time.perf_counter() - began)
            if stream is not None:
                found.leaving.add([await stream])


async def expect_differences(yard: Yard) -> None:
    """Make sure that the adapters change answers, each in its own way."""
    names = yard.names
    adapters = [names.stays, names.first, names.second]
    await yard.deploy(names.model, adapters)
    for name in adapters:
        await yard.until(name, 200)
    texts = {await yard.text(name) for name in (names.model, *adapters)}
    if len(texts) < 4:
        raise SystemExit("the adapters do not differ from the model, or from one another")
    await yard.deploy(names.model, [names.stays])
    await yard.until(names.second, 404)


@dataclass
class Switch:
    """A switch under load: every answer, and the moments of it on `perf_counter`'s clock."""

    names: Names
    answers: list[Answered]
    asked_at: float
    gone_at: float

    @property
    def failures(self) -> list[str]:
        """What went wrong, request by request."""
        return [one.failure for one in self.answers if one.failure]

    @property
    def moved_s(self) -> float:
        """Seconds from the POST to the beginning of the first request that the new model answered."""
        moved = [one.began for one in self.answers if one.model == self.names.other]
        return min(moved, default=self.gone_at) - self.asked_at

    def phases(self) -> dict[str, list[Answered]]:
        """Return the answers by when they were asked for."""
        phases: dict[str, list[Answered]] = {"before": [], "during": [], "after": []}
        for one in self.answers:
            is_before, is_after = one.began < self.asked_at, one.began > self.gone_at
            phases["before" if is_before else "after" if is_after else "during"].append(one)
        return phases


async def measure_switch(
    yard: Yard, clients: int = CLIENTS, around_s: float = AROUND_S, requests: int = REQUESTS
) -> Switch:
    """Put another model in the place of the one in service, beside it, while clients ask all the time."""
    [old] = await yard.deployments()
    askers = Askers(yard.port, "default", clients)
    asking = asyncio.ensure_future(askers.run())
    try:
        await asyncio.sleep(around_s)
        asked_at = time.perf_counter()
        job_id = await yard.deploy(yard.names.other, [], strategy="side_by_side")
        while True:
            live = await yard.deployments()
            if old["id"] not in [one["id"] for one in live]:
                break
            if job_id not in [one["job_id"] for one in live] or time.perf_counter() - asked_at > LIMIT_S:
                raise SystemExit("the new model did not take the place of the old one")
            await asyncio.sleep(0.1)
        gone_at = time.perf_counter()
        while time.perf_counter() - gone_at < around_s or len(askers.answers) < requests:
            await asyncio.sleep(0.1)
    finally:
        askers.is_over = True
        with suppress(asyncio.CancelledError):
            await asking
    return Switch(yard.names, askers.answers, asked_at, gone_at)


def adapter_lines(found: AdapterChanges, clients: int = CLIENTS) -> list[str]:
    """Return the section on adapters."""
    failed = len(found.still.failures), len(found.changing.failures), len(found.leaving.failures)
    lines = [
        f"Tiny Llama, adapters of rank {tiny_yard.RANK} on all linear layers, {clients} streams of {TOKENS} tokens "
        f"at a time, half of them with an adapter that stays; {found.still.seconds:.0f} s without a change and "
        f"{found.changing.seconds:.0f} s with changes, in turn.",
        "",
        "| change | how many | median | longest | goal |",
        "|---|---|---|---|---|",
    ]
    for kind, seconds in found.seconds.items():
        if seconds:
            median = statistics.median(seconds)
            lines.append(f"| {kind} | {len(seconds)} | {median:.2f} s | {max(seconds):.2f} s | 1 s |")
    lines += ["", "|  | no change | changes |", "|---|---|---|"]
    rows: list[tuple[str, Any]] = [
        ("streams", lambda one: f"{len(one.gaps_s):,}"),
        ("failed (goal 0)", lambda one: str(len(one.failures))),
        ("largest gap between chunks, median of the streams", lambda one: _ms(statistics.median(one.gaps_s))),
        ("the same, 99 of 100 streams", lambda one: _ms(_percentile(one.gaps_s, 0.99))),
        ("the same, most of all", lambda one: _ms(max(one.gaps_s))),
        ("first token, median", lambda one: _ms(statistics.median(one.first_s))),
        ("first token, longest", lambda one: _ms(max(one.first_s))),
        ("tokens per second", lambda one: f"{one.tokens / one.seconds:,.0f}"),
    ]
    lines += [f"| {name} | {show(found.still)} | {show(found.changing)} |" for name, show in rows]
    lines += [
        "",
        f"Streams of an adapter that was taken away while they ran: {len(found.leaving.gaps_s)}, failed: {failed[2]}.",
        *_shown([*found.still.failures, *found.changing.failures, *found.leaving.failures]),
    ]
    return lines


def switch_lines(found: Switch, clients: int = CLIENTS) -> list[str]:
    """Return the section on the switch."""
    names = found.names
    by_model = {name: sum(one.model == name for one in found.answers) for name in (names.model, names.other)}
    lines = [
        f"From one tiny Llama to another, started beside it, by the alias `default`; {clients} clients, answers of 32 "
        "tokens, streamed and not in turn, with a rest of 200 ms between two requests of a client.",
        "",
        "|  |  |",
        "|---|---|",
        f"| requests | {len(found.answers):,} (goal: at least {REQUESTS:,}) |",
        f"| failed | {len(found.failures)} (goal 0) |",
        f"| answered by the old model | {by_model[names.model]:,} |",
        f"| answered by the new model | {by_model[names.other]:,} |",
        f"| from the POST to the first request for the new model | {found.moved_s:.1f} s |",
        f"| from the POST to the end of the old engine | {found.gone_at - found.asked_at:.1f} s |",
        "",
        "|  | requests | p50 | p99 | longest |",
        "|---|---|---|---|---|",
    ]
    for phase, answers in found.phases().items():
        if times := [one.seconds for one in answers]:
            parts = statistics.median(times), _percentile(times, 0.99), max(times)
            lines.append(f"| {phase} | {len(times):,} | {' | '.join(_ms(part) for part in parts)} |")
    lines += ["", "During it, two engines share the machine's cores, one of which starts.", *_shown(found.failures)]
    return lines


def _shown(failures: Sequence[str]) -> list[str]:
    return ["", "Failures:", "", *(f"- `{' '.join(one.split())[:200]}`" for one in failures[:10])] if failures else []


def _percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


async def measure(port: int, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Measure what was asked for; return the sections of the report."""
    sections = {}
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as session:
        yard = Yard(session, port)
        if arguments.only != "switch":
            await expect_differences(yard)
            sections["Change of adapters"] = adapter_lines(
                await measure_adapters(yard, arguments.rounds, arguments.seconds)
            )
            print("\n".join(["", "Change of adapters", "", *sections["Change of adapters"]]), flush=True)
        if arguments.only != "adapters":
            sections["Switch of models"] = switch_lines(await measure_switch(yard))
            print("\n".join(["", "Switch of models", "", *sections["Switch of models"]]), flush=True)
    return sections


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["adapters", "switch"])
    parser.add_argument("--rounds", type=int, default=2, help="windows of each kind")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a window")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        names = Names()
        made = [one.removeprefix("local:") for one in astuple(names)]
        with tiny_yard.yard(Path(scratch), made[:2], made[2:]) as server:
            tiny_yard.deploy(server, names.model, [names.stays])
            print("the model is in service", flush=True)
            sections = uvloop.run(measure(server.port, arguments))
    if arguments.write:
        for subject, lines in sections.items():
            report.write(HERE / "RESULTS.md", subject, lines)


if __name__ == "__main__":
    main()
