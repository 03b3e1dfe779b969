"""The gateway's HTTP client alone beside aiohttp's, on the same replayed streams: python benchmarks/engine_client.py.

Each runs in a process of its own, on uvloop, without gateway, server and clients: it asks the replayed engine on its
Unix socket and gives each piece of the answer to a coroutine that is done at once, as uvicorn's is for a client that
keeps up. In turn, round by round: medians of the process's own time, for a chunk at 100 a second for each of 1, 16 and
64 streams, and for a request of one token, one after the other. --write puts the table into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.gateway import LEVELS, RATE, replay

HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}
PATH = "/v1/chat/completions"
CLIENTS = ("aiohttp", "own")
Ask = Callable[[int], Awaitable[int]]


async def handed_on(data: bytes) -> None:
    """Stand for the server's `send`: done at once."""


def body(tokens: int) -> bytes:
    messages = [{"role": "user", "content": "Tell me about rivers and the sea. " * 8}]
    return json.dumps({"model": "replay", "messages": messages, "max_tokens": tokens, "stream": True}).encode()


async def through_own(uds: str, work: Callable[[Ask], Awaitable[None]]) -> None:
    """Do work with the client of the gateway."""
    from modelyard.gateway.upstream import Engines

    engines, headers = Engines(), [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def ask(tokens: int) -> int:
        call = engines.call(f"unix:{uds}")
        try:
            await call.start(PATH, headers, body(tokens))
            await call.hand_on(handed_on)
            return call.status
        finally:
            call.close()

    await work(ask)
    await engines.close()


async def through_aiohttp(uds: str, work: Callable[[Ask], Awaitable[None]]) -> None:
    """Do work with aiohttp's client, set up for nothing but passing bytes on."""
    import aiohttp

    connector, timeout = aiohttp.UnixConnector(uds, limit=0), aiohttp.ClientTimeout(total=None)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, cookie_jar=jar, auto_decompress=False
    ) as session:

        async def ask(tokens: int) -> int:
            async with session.post(f"http://engine{PATH}", data=body(tokens), headers=HEADERS) as answer:
                async for piece in answer.content.iter_any():
                    await handed_on(piece)
                return answer.status

        await work(ask)


def measured(client: str, uds: str, clients: int, tokens: int, repeats: int) -> float:
    """Return the processor time of this process for a chunk (or a request of one token), in microseconds."""
    spent = 0.0

    async def work(ask: Ask) -> None:
        nonlocal spent
        # A connection for each is there, and every line of code has run once.
        assert set(await asyncio.gather(*(ask(2) for _ in range(clients)))) == {200}
        began = time.process_time()
        for _ in range(repeats):
            await asyncio.gather(*(ask(tokens) for _ in range(clients)))
        spent = time.process_time() - began

    uvloop.run({"own": through_own, "aiohttp": through_aiohttp}[client](uds, work))
    return spent / (clients * repeats * tokens) * 1e6


def main() -> None:
    """Read the command line, measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    parser.add_argument("--child", nargs=5, metavar="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        client, uds, *numbers = given.child
        print(measured(client, uds, *map(int, numbers)))
        return
    # Streams of 2 s each; requests one after the other.
    cases = {f"a chunk, {level} at a time": (level, int(2 * RATE), 1, True) for level in LEVELS}
    cases["a request"] = (1, 1, 2000, False)
    found: dict[tuple[str, str], list[float]] = {}
    folder = Path(tempfile.mkdtemp(prefix="my-bench-"))
    try:
        with replay(folder, RATE) as (paced, _), replay(folder, 0) as (fast, _):
            for number in range(given.rounds):
                for case, (clients, tokens, repeats, is_paced) in cases.items():
                    for client in CLIENTS[:: 1 if number % 2 else -1]:
                        uds = str(paced if is_paced else fast)
                        argv = [sys.executable, __file__, "--child", client, uds, *map(str, (clients, tokens, repeats))]
                        done = subprocess.run(argv, check=True, capture_output=True, text=True)
                        found.setdefault((case, client), []).append(float(done.stdout))
                        print(f"  round {number + 1}: {case}, {client}: {found[case, client][-1]:.1f} us", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = []
    for case in cases:
        theirs, own = found[case, "aiohttp"], found[case, "own"]
        ratios = [mine / other for mine, other in zip(own, theirs, strict=True)]
        rows.append([case, *(report.spread(one, ".1f", " µs") for one in (theirs, own)), report.spread(ratios)])
    head = ["processor time", "aiohttp's client", "the gateway's own", "own of aiohttp's"]
    lines = report.table("Medians, with the least and the most of all rounds", head, rows)
    print("\n".join(lines))
    if given.write:
        report.write(Path(__file__).with_name("RESULTS.md"), "Gateway, its client alone", lines)


if __name__ == "__main__":
    main()
