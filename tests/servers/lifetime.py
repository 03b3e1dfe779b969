"""Start a real server for tests as a child that never outlives the tests, however they end.

`launched` runs `python -m MODULE ARGUMENTS...`, waits for the one line that the server prints when it answers,
and ends it afterwards. `end_with_parent` is called by such a server first of all: the kernel then signals it when
its parent dies, SIGKILL included. A server that lacks a part of its own exits with `MISSING`.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Exit status of a server that cannot run here; the last line of its standard error says why.
MISSING = 69

PR_SET_PDEATHSIG = 1


class ServerMissing(Exception):
    """The server cannot run on this machine: a part of it is not installed or not allowed."""


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send `number` to this process when its parent dies."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def launched(module: str, *arguments: str, timeout_s: float = 60.0) -> Iterator[str]:
    """Run a server for the block and yield the line that it printed when it was ready.

    Raises:
        ServerMissing: it ended with `MISSING`.
        RuntimeError: it ended otherwise, or was not ready in time; the message carries its output.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            line = _first_line(process, time.monotonic() + timeout_s)
            if not line:
                gone = process.poll()
                if gone is None:
                    process.kill()
                process.wait()
                errors.seek(0)
                output = errors.read().decode(errors="replace").strip()
                if gone == MISSING:
                    raise ServerMissing(output.splitlines()[-1] if output else module)
                raise RuntimeError(f"{module} was not ready (exit status {gone}): {output}")
            yield line
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _first_line(process: subprocess.Popen[bytes], deadline: float) -> str:
    """Return the first line that the process prints; empty when it ended or the deadline passed."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(timeout=max(0.0, deadline - time.monotonic())):
            return ""
    # A server prints its line in one write, so that no reader waits on half of one.
    line = process.stdout.readline().decode().strip()
    if not line:
        process.wait(timeout=15)
    return line
