"""The keeper: a tiny process between the server and each child, so that no child is ever orphaned.

Run as `python -I -S keeper.py FOLDER` by `processes.Children.start`, with `spec.json` in the folder and with the
child's environment as its own. It imports nothing of Modelyard: it must start in milliseconds and outlive us.

It holds a lock on `keeper.lock` for as long as it lives, writes `keeper.json` (pid and start time) before anything
else starts, runs the command in a session of its own, and writes `outcome.json` when the last process of it is gone.
SIGTERM asks it to end the command: SIGTERM to the group, SIGKILL after `stop_timeout_s` to all of it but what
removes its shared memory. When no server has held
`owner_lock` for `grace_s` seconds, it does the same by itself. As a subreaper it inherits every grandchild whose
parent died, so that an engine's workers cannot outlive their engine. It kills no pid that it is not the parent of.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import signal
import struct
import sys
import time
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# struct flock of 64-bit Linux: type, whence, start, length, pid.
FLOCK = "@hhqqi0q"
TICK_S = 1.0
LATE_CHILDREN_S = 2.0


def lock_is_held(path: str) -> bool:
    """True if some process holds a lock on the file. Asking takes no lock, so it disturbs nobody."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        query = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_OFD_GETLK, query))
        return bool(answer[0] != fcntl.F_UNLCK)
    finally:
        os.close(file)


def take_lock(path: str) -> int | None:
    """Take the lock on the file and return the descriptor that holds it until it is closed; None if another has it.

    The lock belongs to the descriptor (an 'open file description' lock): the kernel gives it back when the process
    ends, however it ends.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        os.close(file)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise  # a file system without locks must not look like another holder
    return file


def start_time(pid: int | str) -> int:
    """Return when a process started, in clock ticks since boot. With the pid it names a process for good."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def processor_times(root: int) -> dict[int, float]:
    """Return how long each process that descends from `root` worked or waited for its turn to, in seconds by pid.

    On a busy machine one that works may be on the processor for a small part of the time only.
    """
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    times: dict[int, float] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            parents[int(name)] = int(fields[1])
            times[int(name)] = (int(fields[11]) + int(fields[12])) / ticks_per_s
            # Of its first thread alone, which for a server is the one that answers; not every kernel tells.
            with open(f"/proc/{name}/schedstat", "rb") as file:
                times[int(name)] += int(file.read().split()[1]) / 1e9
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: times[pid] for pid in found - {root}}


def write_json(path: str, value: dict[str, Any]) -> None:
    """Write the file beside and move it into place: a reader sees all of it or nothing."""
    beside = f"{path}.{os.getpid()}"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def prctl(option: int, value: int) -> None:
    """Set a property of this process (prctl(2)); a kernel that does not know it is not told so."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def children_of(pid: int) -> list[int]:
    """Return the direct children of a process, those that it inherited included."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == pid:
                    found.append(int(name))
    return found


def is_resource_tracker(pid: int | str) -> bool:
    """True if a process is Python's resource tracker, which removes the shared memory that dead processes left."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"multiprocessing.resource_tracker" in file.read()
    except OSError:
        return False


class Keeper:
    """One run of one command; `run` returns when nothing of it is left."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        with open(f"{folder}/spec.json", encoding="utf-8") as file:
            spec = json.load(file)
        self.argv: list[str] = spec["argv"]
        self.cwd: str = spec["cwd"]
        self.scratch: str | None = spec["scratch"]
        self.owner_lock: str = spec["owner_lock"]
        self.grace_s: float = spec["grace_s"]
        self.stop_timeout_s: float = spec["stop_timeout_s"]
        self.child = 0
        self.status: int | None = None
        self.stopped = False
        self.abandoned = False
        self.kill_at: float | None = None

    def run(self) -> int:
        held = take_lock(f"{self.folder}/keeper.lock")
        if held is None or os.path.exists(f"{self.folder}/outcome.json"):
            return 75  # a keeper has, or had, this folder: a run is never repeated in place
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        watched = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        write_json(f"{self.folder}/keeper.json", {"pid": os.getpid(), "start_time": start_time("self")})
        self.child = self._spawn(watched)
        owner_seen_at = time.monotonic()
        while not self._reap():
            caught = signal.sigtimedwait(watched, self._patience_s())
            now = time.monotonic()
            if caught is not None and caught.si_signo in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self._ask_to_end()
            if lock_is_held(self.owner_lock):
                owner_seen_at = now
            elif now - owner_seen_at > self.grace_s and not self.stopped:
                self.abandoned = True
                self._ask_to_end()
            if self.kill_at is not None and now > self.kill_at:
                self._kill_hard()
        self._end_rest()
        self._remove_scratch()
        assert self.status is not None
        code = os.waitstatus_to_exitcode(self.status)
        write_json(
            f"{self.folder}/outcome.json",
            {
                "exit_code": code if code >= 0 else None,
                "signal": -code if code < 0 else None,
                "stopped": self.stopped,
                "abandoned": self.abandoned,
                "ended_at": time.time(),
            },
        )
        return 0

    def _spawn(self, watched: set[signal.Signals]) -> int:
        keeper = os.getpid()
        # Closed by the exec: a word to the group that came before it is a group's would be lost.
        begun, begins = os.pipe()
        child = os.fork()
        if child:
            os.close(begins)
            os.read(begun, 1)
            os.close(begun)
            return child
        try:
            os.setsid()
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:
                os._exit(125)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would pass that on
                signal.signal(number, signal.SIG_DFL)
            os.chdir(self.cwd)
            os.execvpe(self.argv[0], self.argv, os.environ)
        except OSError as error:
            os.write(2, f"cannot run {self.argv[0]}: {error.strerror}\n".encode())
        os._exit(127)

    def _patience_s(self) -> float:
        if self.kill_at is None:
            return TICK_S
        return min(TICK_S, max(self.kill_at - time.monotonic(), 0.05))

    def _reap(self) -> bool:
        """Collect what has ended; return whether the command itself has."""
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == self.child:
                # Before it is collected: until then its pid, and so the group's, cannot become somebody else's.
                self._kill_group(signal.SIGTERM)
                self.status = os.waitpid(self.child, 0)[1]
                return True
            os.waitpid(ended.si_pid, 0)
        return False

    def _ask_to_end(self) -> None:
        if self.stopped:
            return  # asked once is enough: a second SIGTERM makes many programs drop what they are finishing
        self.stopped = True
        self.kill_at = time.monotonic() + self.stop_timeout_s
        self._kill_group(signal.SIGTERM)

    def _kill_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child, number)

    def _kill_hard(self) -> None:
        """SIGKILL the group, all but resource trackers: killed too, they would leave shared memory behind for good.

        They end by themselves once all others are gone. To be repeated: a process may be born meanwhile.
        """
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                process = os.pidfd_open(int(name))
                try:
                    # Asked after it was opened: from then on the pid cannot be another's unseen.
                    if os.getpgid(int(name)) == self.child and not is_resource_tracker(name):
                        signal.pidfd_send_signal(process, signal.SIGKILL)
                finally:
                    os.close(process)

    def _end_rest(self) -> None:
        """End every process that the command left behind, until this keeper has no child at all."""
        asked = False
        kill_after = time.monotonic() + LATE_CHILDREN_S
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid:
                continue
            if not asked:
                asked = True
                self._signal_orphans(signal.SIGTERM)
            elif time.monotonic() > kill_after:
                self._signal_orphans(signal.SIGKILL)
            time.sleep(0.02)

    def _signal_orphans(self, number: signal.Signals) -> None:
        for orphan in children_of(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                # Those in the command's own group were asked together with it.
                if number == signal.SIGKILL or os.getpgid(orphan) != self.child:
                    os.kill(orphan, number)

    def _remove_scratch(self) -> None:
        """Remove the private folder of this run (a socket and the like); it holds files only."""
        if self.scratch is None:
            return
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.scratch):
                os.unlink(entry.path)
        with contextlib.suppress(OSError):
            os.rmdir(self.scratch)


def close_inherited() -> None:
    """Close what the server had open and passable (a pipe of its terminal): its reader would wait for the child."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.close(int(name))


if __name__ == "__main__":
    close_inherited()
    sys.exit(Keeper(sys.argv[1]).run())
