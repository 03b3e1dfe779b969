"""Filters are real child processes here: fed, answered, killed and forgotten. None is left, nor a descriptor of one."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from modelyard import filters
from modelyard.filters import Filter, FilterFailed
from tests.eventually import PATIENCE_S, eventually

MIB = 1024 * 1024
HASH = "import hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
NEVER_READ = "import time; time.sleep(600)"


@asynccontextmanager
async def running(program: str) -> AsyncIterator[Filter]:
    """Run a filter, and see that it leaves neither a process nor a descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    found = Filter(program)
    try:
        yield found
    finally:
        await found.close()
        await found.close()
    assert not Path(f"/proc/{found.pid}").exists(), "it is gone, and not as a zombie"
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_filter_answers_what_it_was_fed(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    blocks = [os.urandom(size) for size in (0, 1, 300_000, 5 * MIB, 17)]

    async def run() -> None:
        async with running(HASH) as found:
            for block in blocks:
                await found.feed(block)
            assert (await found.finish()).decode().strip() == hashlib.sha256(b"".join(blocks)).hexdigest()
        async with running("sys.stdout.buffer.write(bytes(3_000_000))") as found:
            assert await found.finish() == bytes(3_000_000)

    with asyncio.Runner(loop_factory=loop) as runner:
        before = len(os.listdir("/proc/self/fd"))
        runner.run(run())
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # the loop's own, made with its first watcher


async def test_a_filter_that_is_killed_takes_no_more_and_says_how_it_ended() -> None:
    async with running(HASH) as found:
        await found.feed(bytes(MIB))
        os.kill(found.pid, signal.SIGKILL)
        with pytest.raises(BrokenPipeError):
            await found.feed(bytes(100 * MIB))
        with pytest.raises(FilterFailed, match="killed by SIGKILL"):
            await found.finish()


async def test_a_filter_may_answer_before_the_end_and_its_answer_counts() -> None:
    async with running("os = __import__('os'); os.read(0, 10); os.write(1, b'enough')") as found:
        with pytest.raises(BrokenPipeError):
            await found.feed(bytes(100 * MIB))
        assert await found.finish() == b"enough"


async def test_a_filter_that_fails_has_no_answer() -> None:
    async with running("print('half'); sys.stdout.flush(); sys.exit(3)") as found:
        with pytest.raises(FilterFailed, match="exit code 3"):
            await found.finish()


async def test_a_filter_that_does_not_go_on_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "STALL_S", 0.2)
    async with running(NEVER_READ) as found:
        with pytest.raises(FilterFailed, match="takes nothing"):
            await found.feed(bytes(5 * MIB))
        with pytest.raises(FilterFailed, match="does not answer"):
            await found.finish()


async def test_a_feed_that_is_cancelled_leaves_a_filter_that_can_be_closed() -> None:
    async with running(NEVER_READ) as found:
        feeding = asyncio.create_task(found.feed(bytes(5 * MIB)))
        await asyncio.sleep(0)
        assert not feeding.done()
        feeding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await feeding


async def test_a_filter_knows_no_secret_and_finds_the_modules_of_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_ADMIN_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    program = "import os, msgspec, modelyard; print('MODELYARD_ADMIN_KEY' in os.environ, modelyard.__file__)"
    async with running(program) as found:
        import modelyard

        assert (await found.finish()).decode().split() == ["False", modelyard.__file__]


async def test_a_filter_that_cannot_be_started_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OSError, match="No such file"):
        Filter(HASH)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_filter_ends_with_its_server_however_that_ends() -> None:
    program = f"""
import asyncio
from modelyard.filters import Filter
async def run():
    found = Filter({HASH!r})
    await found.feed(bytes(100))
    print(found.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(run())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        server.kill()
        server.wait(PATIENCE_S)
    await eventually(lambda: not _runs(pid), "the filter is gone")


def _runs(pid: int) -> bool:
    try:
        return b"hashlib" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
