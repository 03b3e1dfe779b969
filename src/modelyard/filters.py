"""Filters, as Unix has them: a child that reads bytes until there are no more, answers once, and is gone.

For computation that would hold up the server (Python computes in one thread at a time) but needs no more than the bytes
that pass through the server anyway. A filter has no keeper, no folder and no life of its own: a server that ends,
however it ends, closes the pipe, and the filter ends with it. What it writes on its standard error is the server's log.
Everything here is done in the event loop, in small steps; no thread waits for a pipe.

A filter that reads a stranger's file in a native parser gets `Limits`: the kernel ends it when it asks for more memory
or processor time than it is given, and what it writes beside its answer is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from modelyard.child_environment import child_environment
from modelyard.processes import Outcome
from modelyard.storage.streams import to_the_end

#: How much may lie between the server and a filter; a kernel that gives less is fine, too.
PIPE_BYTES = 1024 * 1024
#: A filter that takes nothing, or says nothing, for so long is given up.
STALL_S = 120.0
_ANSWER_BYTES = 256 * 1024


#: Threads that a library of a limited filter may start: each takes address space.
LIMITED_THREADS = 4


@dataclass(frozen=True)
class Limits:
    """Limits of a filter: address space, processor time over all its threads, and time without a sign of life."""

    memory_bytes: int
    cpu_s: int
    stall_s: float


class FilterFailed(Exception):
    """The filter ended without an answer, or does not go on; says how. `outcome` is None where it does not go on."""

    def __init__(self, message: str, outcome: Outcome | None = None) -> None:
        super().__init__(message)
        self.outcome = outcome


class Filter:
    """A running filter: `feed` it, then `finish`; `close` it whatever happened."""

    def __init__(self, program: str, limits: Limits | None = None) -> None:
        """Start Python with the text of a program, which finds the modules that this process finds.

        Raises:
            OSError: no process can be started.
        """
        self._stall_s = limits.stall_s if limits is not None else None
        first = "import sys; sys.path[:] = sys.argv[1:]"
        actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = []
        extra = {}
        if limits is not None:
            # Set by the child itself, in which nothing of a stranger has been read yet: posix_spawn has no way to.
            first += (
                f"; import resource as r; r.setrlimit(r.RLIMIT_AS, ({limits.memory_bytes}, {limits.memory_bytes}))"
                f"; r.setrlimit(r.RLIMIT_CPU, ({limits.cpu_s}, {limits.cpu_s + 5})); r.setrlimit(r.RLIMIT_CORE, (0, 0))"
            )
            threads = str(LIMITED_THREADS)
            extra = {"RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "MALLOC_ARENA_MAX": threads}
            actions = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        theirs, mine = os.pipe()
        self._into: int | None = mine
        try:
            self._from, theirs_too = os.pipe()
        except OSError:
            os.close(theirs)
            os.close(mine)
            raise
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(mine, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
                fcntl.fcntl(self._from, fcntl.F_SETPIPE_SZ, _ANSWER_BYTES)
            self.pid = os.posix_spawn(
                sys.executable,
                # -I -S: neither the environment nor a site's own files steer it; where modules are is said here.
                [sys.executable, "-I", "-S", "-c", f"{first}; {program}", *sys.path],
                child_environment(extra),
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 0), (os.POSIX_SPAWN_DUP2, theirs_too, 1), *actions],
                setsid=True,  # a Ctrl-C is the server's
                setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
                setsigmask=(),
            )
        except OSError:
            os.close(mine)
            os.close(self._from)
            raise
        finally:
            os.close(theirs)
            os.close(theirs_too)
        self._pidfd: int | None = os.pidfd_open(self.pid)
        os.set_blocking(mine, False)
        os.set_blocking(self._from, False)

    async def feed(self, data: bytes) -> None:
        """Hand over the next bytes; returns when the pipe has them.

        Raises:
            BrokenPipeError: the filter reads no more. `finish` tells why.
            FilterFailed: it takes nothing for a long time.
        """
        assert self._into is not None
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._into, view) :]
            except BlockingIOError:
                await self._ready(self._into, asyncio.get_running_loop().add_writer, "takes nothing")

    async def finish(self) -> bytes:
        """Say that there is no more, and return the answer.

        Raises:
            FilterFailed: it ended with another status than 0.
        """
        self.end_input()
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self, *, is_patient: bool = False) -> AsyncGenerator[bytes]:
        """Yield the answer as it comes; while one is fed, if it is read at the same time and `is_patient`.

        Raises:
            FilterFailed: it ended with another status than 0.
        """
        while True:
            try:
                piece = os.read(self._from, _ANSWER_BYTES)
            except BlockingIOError:
                try:
                    await self._ready(self._from, asyncio.get_running_loop().add_reader, "does not answer")
                except FilterFailed:
                    # While more may come in, silence says nothing: whoever feeds it waits for a client.
                    if not is_patient or self._into is None:
                        raise
                continue
            if not piece:
                break
            yield piece
        outcome = await self._ended()
        if not outcome.succeeded:
            raise FilterFailed(outcome.describe(), outcome)

    async def close(self) -> None:
        """End it at once if it still runs, and give everything back. Safe to repeat; nobody may be feeding it."""
        if self._pidfd is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.end_input()
        await to_the_end(asyncio.ensure_future(self._ended()))

    def end_input(self) -> None:
        """Say that there is no more. Safe to repeat."""
        if self._into is not None:
            os.close(self._into)
            self._into = None

    async def _ended(self) -> Outcome:
        """Wait for its end, collect it and close what is open."""
        assert self._pidfd is not None
        await self._ready(self._pidfd, asyncio.get_running_loop().add_reader, "does not end")
        outcome = self._collect()
        os.close(self._pidfd)
        os.close(self._from)
        self._pidfd = None
        return outcome

    def _collect(self) -> Outcome:
        try:
            status = os.waitpid(self.pid, 0)[1]
        except ChildProcessError:  # somebody has the kernel collect our children: nobody knows how it ended
            return Outcome(None, None)
        code = os.waitstatus_to_exitcode(status)
        return Outcome(code, None) if code >= 0 else Outcome(None, -code)

    async def _ready(self, descriptor: int, watch: Callable[..., None], otherwise: str) -> None:
        """Wait until a descriptor is ready, as `watch` has it."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        watch(descriptor, ready.set)
        try:
            async with asyncio.timeout(STALL_S if self._stall_s is None else self._stall_s):
                await ready.wait()
        except TimeoutError:
            raise FilterFailed(f"it {otherwise}") from None
        finally:
            loop.remove_writer(descriptor)
            loop.remove_reader(descriptor)
