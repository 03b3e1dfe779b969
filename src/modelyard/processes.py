"""Start, adopt and end children. Beside `filters`, whose children live by a pipe, nothing else touches processes.

Each child runs under a keeper (`modelyard.keeper`) in a folder of its own, one run per folder:

    spec.json      what to run                   written by `start`
    keeper.lock    locked while the keeper lives
    keeper.json    pid and start time            written by the keeper before the command starts
    outcome.json   how it ended                  written by the keeper when nothing is left of it

`Child.wait` works the same for a child that this server started and for one that it adopted. A bare pid is never
trusted: a keeper is known by the lock that it holds together with its start time, and its other processes by a
token in their environment. A keeper that was killed takes the command with it; what that leaves is found by the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modelyard import keeper as keeper_module
from modelyard.keeper import is_resource_tracker, lock_is_held, processor_times, start_time, take_lock, write_json

log = logging.getLogger(__name__)

TOKEN = "MODELYARD_CHILD"
KEEPER_START_S = 20.0
KEEPER_END_S = 20.0


@dataclass(frozen=True)
class Command:
    """The command of a child: an argv (never a shell line), its whole environment, and where it runs.

    `scratch` is a private folder of files (a socket), which the keeper removes when the run is over.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path | None = None
    scratch: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """The end of a child: an exit code or a signal; neither if its keeper was killed and nobody saw it end.

    `stopped`: it was asked to. `abandoned`: it was asked to by its keeper, because no server came back in time.
    """

    exit_code: int | None
    signal: int | None
    stopped: bool = False
    abandoned: bool = False

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0

    def describe(self) -> str:
        """Return the end in words, such as `exit code 1` or `killed by SIGKILL`."""
        if self.exit_code is not None:
            return f"exit code {self.exit_code}"
        if self.signal is None:
            return "killed together with its keeper"
        try:
            return f"killed by {signal.Signals(self.signal).name}"
        except ValueError:
            return f"killed by signal {self.signal}"


class Child:
    """A child that was started or adopted. `outcome` is None until it has ended."""

    def __init__(self, folder: Path, token: str, run_entry: Path, pid: int, pidfd: int | None) -> None:
        self.folder = folder
        self.pid = pid
        self.outcome: Outcome | None = None
        self._token = token
        self._run_entry = run_entry
        self._pidfd = pidfd
        self._ended: asyncio.Task[Outcome] | None = None

    @property
    def is_alive(self) -> bool:
        """True if something of the child may still run."""
        return self.outcome is None

    def watch(self) -> asyncio.Task[Outcome]:
        """Begin to watch for the end, so that `outcome` tells it and no zombie stays, awaited or not."""
        if self._ended is None:
            self._ended = asyncio.create_task(self._watch(), name=f"watch {self.folder.name}")
        return self._ended

    async def wait(self) -> Outcome:
        """Wait until nothing of the child is left. May be awaited by many; cancelling one leaves the child alone."""
        if self.outcome is not None:
            return self.outcome
        return await asyncio.shield(self.watch())

    async def stop(self) -> Outcome:
        """Ask the child to end, kill it after its stop timeout, and wait until it is gone. Safe to repeat."""
        if self.outcome is None and self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        return await self.wait()

    async def kill(self) -> Outcome:
        """Kill the keeper and all that it keeps at once, with no word to the child. The last resort."""
        if self.outcome is None and self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        return await self.wait()

    async def processor_times(self) -> dict[int, float]:
        """Return how long each of its processes has worked or waited for a processor, by pid; nothing once it ended."""
        return await asyncio.to_thread(processor_times, self.pid) if self.is_alive else {}

    def variable(self, name: str) -> str | None:
        """Return a variable of the environment that it was started with; None without, or once it ended. Blocks."""
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0"):
                key, _, value = entry.partition(b"=")
                if key.decode("utf-8", "replace") == name:
                    return value.decode("utf-8", "replace")
        return None

    async def _watch(self) -> Outcome:
        if self._pidfd is not None:
            loop, gone = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(self._pidfd, gone.set)
            try:
                await gone.wait()
            finally:
                loop.remove_reader(self._pidfd)
                os.close(self._pidfd)
                self._pidfd = None
            await asyncio.to_thread(_reap, self.pid)
        self.outcome = await asyncio.to_thread(_read_outcome, self.folder, self._token)
        self._run_entry.unlink(missing_ok=True)
        return self.outcome


class Children:
    """Starts and adopts children for the server that holds `owner_lock`.

    `grace_s` is how long a child outlives a server that was killed. The folder `run` beside the lock names every
    live child, so that a new server finds strays without walking all folders.
    """

    def __init__(self, owner_lock: Path, grace_s: float) -> None:
        self._owner_lock = owner_lock
        self._grace_s = grace_s
        self._run = owner_lock.parent / "run"

    async def start(self, folder: Path, command: Command, *, log: Path, stop_timeout_s: float) -> Child:
        """Start the command in a folder that has seen no run before; its output is appended to `log`.

        Returns when the keeper has taken over, which takes some 30 ms; the command may fail later still.

        Raises:
            RuntimeError: the keeper did not start (no memory, no processes left); nothing runs.
            FileExistsError: the folder has seen a run.
        """
        starting = asyncio.create_task(asyncio.to_thread(self._start, folder, command, log, stop_timeout_s))
        try:
            child = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread goes on: without this its child would run on with nobody who knows of it.
            with contextlib.suppress(RuntimeError, FileExistsError):
                await (await starting).stop()
            raise
        child.watch()
        return child

    def _start(self, folder: Path, command: Command, log: Path, stop_timeout_s: float) -> Child:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._run.mkdir(exist_ok=True, mode=0o700)
        token = uuid.uuid4().hex
        entry = self._run / token
        spec = {
            "argv": list(command.argv),
            "cwd": str(command.cwd or folder),
            "scratch": str(command.scratch) if command.scratch else None,
            "owner_lock": str(self._owner_lock),
            "grace_s": self._grace_s,
            "stop_timeout_s": stop_timeout_s,
            "token": token,
        }
        # The keeper's lock, so that of two starts in one folder exactly one writes what is to run.
        claim = take_lock(str(folder / "keeper.lock"))
        try:
            if claim is None or (folder / "spec.json").exists():
                raise FileExistsError(f"{folder} has seen a run already")
            entry.write_text(str(folder), "utf-8")
            write_json(str(folder / "spec.json"), spec)
        finally:
            if claim is not None:
                os.close(claim)
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            pid = os.posix_spawn(
                sys.executable,
                # -I -S: the child's environment must not steer the keeper. -B: an unwritable installation is fine.
                [sys.executable, "-I", "-S", "-B", keeper_module.__file__, str(folder)],
                {**command.env, TOKEN: token},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,
                # A server that was started with SIGCHLD ignored (some supervisors do) would blind the keeper.
                setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
                setsigmask=(),
            )
        except (OSError, ValueError) as error:
            (folder / "spec.json").unlink()
            entry.unlink()
            raise RuntimeError(f"the keeper of {folder.name} did not start with its log in {log}: {error}") from error
        pidfd = os.pidfd_open(pid)
        deadline = time.monotonic() + KEEPER_START_S
        while not (folder / "keeper.json").exists():
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone or time.monotonic() > deadline:
                if not gone:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    os.waitpid(pid, 0)
                os.close(pidfd)
                entry.unlink(missing_ok=True)
                raise RuntimeError(f"the keeper of {folder.name} did not start (status {status})")
            time.sleep(0.002)
        return Child(folder, token, entry, pid, pidfd)

    async def adopt(self, folder: Path) -> Child | None:
        """Return the child that was started in this folder, alive or ended; None if none ever was.

        One whose keeper was killed counts as ended, and what it left running is ended before this returns.
        """
        child = await asyncio.to_thread(self._adopt, folder)
        if child is not None and child.is_alive:
            child.watch()
        return child

    def _adopt(self, folder: Path) -> Child | None:
        try:
            token = json.loads((folder / "spec.json").read_text("utf-8"))["token"]
        except FileNotFoundError:
            return None
        entry = self._run / token
        # The server may have been killed between starting the keeper and the keeper's first line.
        deadline = time.monotonic() + 1.0
        while not (folder / "keeper.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        pid, pidfd = _open_keeper(folder)
        child = Child(folder, token, entry, pid, pidfd)
        if pidfd is None:
            child.outcome = _read_outcome(folder, token)
            entry.unlink(missing_ok=True)
        return child

    async def is_running(self, folder: Path) -> bool:
        """True if a child that was started in this folder is alive. Takes no part in it."""
        return await asyncio.to_thread(_is_running, folder)

    async def end_strays(self, keep: set[Path]) -> list[Path]:
        """End every live child whose folder is not in or below one of `keep`. For the start of a server.

        Returns:
            The folders of those that were ended.
        """
        entries = sorted(self._run.iterdir()) if self._run.is_dir() else []
        ended = await asyncio.gather(*(self._end_stray(entry, keep) for entry in entries))
        return [folder for folder in ended if folder is not None]

    async def _end_stray(self, entry: Path, keep: set[Path]) -> Path | None:
        folder = Path(await asyncio.to_thread(entry.read_text, "utf-8"))
        if folder in keep or not keep.isdisjoint(folder.parents):
            # What ended while no server looked is cleared up after here: of several runs only the newest is adopted.
            if not await self.is_running(folder) and await asyncio.to_thread(self._adopt, folder) is None:
                await asyncio.to_thread(entry.unlink, missing_ok=True)  # killed before it had written what to run
            return None
        child = await self.adopt(folder)
        if child is None:  # its folder is gone; its processes need not be
            await asyncio.to_thread(_kill_by_token, entry.name)
        stray = child is not None and child.is_alive
        if child is not None and stray:
            log.warning("ending a stray child in %s", folder)
            await child.stop()
        await asyncio.to_thread(entry.unlink, missing_ok=True)
        return folder if stray else None


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # an adopted keeper is not ours to reap
        os.waitpid(pid, os.WNOHANG)


def _is_running(folder: Path) -> bool:
    _, pidfd = _open_keeper(folder)
    if pidfd is None:
        return False
    os.close(pidfd)
    return True


def _open_keeper(folder: Path) -> tuple[int, int | None]:
    """Return the keeper's pid and, if that very process still lives, a descriptor of it."""
    try:
        known = json.loads((folder / "keeper.json").read_text("utf-8"))
    except FileNotFoundError:
        return 0, None
    pid = int(known["pid"])
    if not lock_is_held(str(folder / "keeper.lock")):
        return pid, None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return pid, None
    # The descriptor is opened before the start time is read: from here on the pid cannot be used again unseen.
    with contextlib.suppress(OSError):
        if start_time(pid) == known["start_time"]:
            return pid, pidfd
    os.close(pidfd)
    return pid, None


def _read_outcome(folder: Path, token: str) -> Outcome:
    known = outcome_of(folder)
    if known is None:
        _kill_by_token(token)
        _remove_scratch(folder)
        return Outcome(None, None)
    return known


def outcome_of(folder: Path) -> Outcome | None:
    """Return how the child that was started in this folder ended; None if it runs, or nobody saw its end."""
    try:
        known = json.loads((folder / "outcome.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    return Outcome(known["exit_code"], known["signal"], known["stopped"], known["abandoned"])


def _remove_scratch(folder: Path) -> None:
    try:
        scratch = json.loads((folder / "spec.json").read_text("utf-8"))["scratch"]
    except FileNotFoundError:  # somebody removed the folder of the run while it lasted
        return
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)


def _kill_by_token(token: str) -> None:
    """Kill every process that carries the token in its environment, until there is none."""
    marker = f"{TOKEN}={token}".encode()
    began = time.monotonic()
    while time.monotonic() < began + KEEPER_END_S:
        # A tracker removes the shared memory of the others and ends by itself when they are gone.
        spare_trackers = time.monotonic() < began + KEEPER_END_S / 4
        found = False
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(int(name))
                try:
                    if marker in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                        found = True
                        if spare_trackers and is_resource_tracker(name):
                            continue
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                finally:
                    os.close(pidfd)
        if not found:
            return
        time.sleep(0.02)
    log.error("processes with %s=%s would not die", TOKEN, token)
