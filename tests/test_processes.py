"""Children under real keepers: started, stopped, orphaned, adopted. Every test ends with nothing of them left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from modelyard import keeper as keeper_module
from modelyard.child_environment import child_environment
from modelyard.processes import Child, Children, Command, Outcome
from modelyard.server_lock import ServerLock
from tests.eventually import eventually

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = Path(__file__).parent / "servers" / "children"
#: Keeps a test on a busy machine from waiting for a child that would have ended politely.
AMPLE_S = 60.0


def program(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", str(PROGRAMS / f"{name}.py"), *arguments)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", code)


def living(token: str) -> list[int]:
    """Return every process, the keeper included, that carries the token; a zombie carries nothing."""
    marker = f"MODELYARD_CHILD={token}".encode()
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if marker in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue
    return found


def token_of(folder: Path) -> str:
    return str(json.loads((folder / "spec.json").read_text("utf-8"))["token"])


def kept(child: Child) -> list[int]:
    """Return the processes of the child without its keeper."""
    return [pid for pid in living(token_of(child.folder)) if pid != child.pid]


class Yard:
    """A data folder whose lock the test holds, as the server would."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = ServerLock(root / "server.lock")
        self.children = Children(self.lock.path, grace_s=AMPLE_S)
        self.log = root / "log.txt"
        self._count = 0

    def folder(self) -> Path:
        self._count += 1
        return self.root / f"run-{self._count}"

    async def start(self, argv: tuple[str, ...], *, stop_timeout_s: float = AMPLE_S, **command: Any) -> Child:
        command.setdefault("env", child_environment())
        started = Command(argv, **command)
        return await self.children.start(self.folder(), started, log=self.log, stop_timeout_s=stop_timeout_s)

    async def said(self, word: str) -> None:
        """Wait until a child has written the word to the log."""
        await eventually(lambda: self.log.exists() and word in self.log.read_text("utf-8"), f"'{word}' in the log")

    def left(self) -> dict[str, list[int]]:
        return {
            spec.parent.name: pids for spec in self.root.glob("*/spec.json") if (pids := living(token_of(spec.parent)))
        }


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    yard = Yard(tmp_path)
    assert yard.lock.take()
    try:
        yield yard
        assert yard.left() == {}, "processes of these runs outlived the test"
    finally:
        for pids in yard.left().values():
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        yard.lock.release()


def descriptors() -> set[str]:
    """Return what this process has open, without the descriptor that lists them."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return set(links)


def zombies() -> set[int]:
    return {
        pid
        for pid in keeper_module.children_of(os.getpid())
        if Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    }


# How a child ends


@pytest.mark.parametrize("code", [0, 1, 3, 255])
async def test_a_child_that_exits_is_known_by_its_exit_code(yard: Yard, code: int) -> None:
    child = await yard.start(python(f"raise SystemExit({code})"))
    outcome = await child.wait()
    assert outcome == Outcome(code, None)
    assert outcome.succeeded == (code == 0)
    assert outcome.describe() == f"exit code {code}"
    assert not child.is_alive


async def test_a_child_that_a_signal_ended_is_known_by_the_signal(yard: Yard) -> None:
    child = await yard.start(python("import os; os.kill(os.getpid(), 9)"))
    assert await child.wait() == Outcome(None, signal.SIGKILL)
    assert child.outcome is not None
    assert child.outcome.describe() == "killed by SIGKILL"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_start_stop_and_wait_work_on_either_event_loop(
    yard: Yard, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    async def one_round() -> None:
        child = await yard.start(program("tidy", "0"))
        await yard.said("tidy")
        assert await child.stop() == Outcome(7, None, stopped=True)

    run(one_round())


async def test_the_processor_time_of_a_child_is_that_of_all_its_processes(yard: Yard) -> None:
    code = "import os, time\nif os.fork():\n time.sleep(600)\nos.setsid()\nif os.fork(): os._exit(0)\nwhile True: pass"
    child = await yard.start(python(code))
    await eventually(lambda: len(kept(child)) == 2, "the one that works has left its group and its parent")
    before = await child.processor_times()
    assert child.pid not in before, "its keeper is none of them"

    async def used_s() -> float:
        now = await child.processor_times()
        return sum(now.values()) - sum(before.get(pid, 0.0) for pid in now)

    await eventually(lambda: _above(used_s, 0.3), "it has worked")
    await child.kill()
    assert await child.processor_times() == {}


async def test_to_wait_for_a_processor_is_work_too(yard: Yard) -> None:
    code = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nos.fork(); os.fork()\nwhile True: pass"
    child = await yard.start(python(code))
    await eventually(lambda: len(kept(child)) == 4, "four share one processor")
    before, began = await child.processor_times(), time.monotonic()
    await asyncio.sleep(1.0)  # the time that is measured
    after, seconds = await child.processor_times(), time.monotonic() - began
    assert sum(after.values()) - sum(before.values()) > 2 * seconds
    await child.kill()


async def _above(count: Callable[[], Awaitable[float]], least: float) -> bool:
    return await count() > least


async def test_what_a_child_prints_is_appended_to_its_log(yard: Yard) -> None:
    yard.log.write_text("from an earlier run\n", "utf-8")
    child = await yard.start(python("import sys; print('out'); print('err', file=sys.stderr)"))
    await child.wait()
    assert sorted(yard.log.read_text("utf-8").splitlines()) == ["err", "from an earlier run", "out"]


async def test_a_child_that_talks_a_lot_is_never_held_up_and_nothing_is_lost(yard: Yard) -> None:
    child = await yard.start(python("for number in range(400_000): print(f'line {number:06} of many')"))
    assert (await child.wait()).succeeded
    lines = yard.log.read_text("utf-8").splitlines()
    assert len(lines) == 400_000
    assert lines[-1] == "line 399999 of many"


async def test_a_program_that_does_not_exist_is_exit_code_127_and_a_line_in_the_log(yard: Yard) -> None:
    child = await yard.start(("/nowhere/no-such-program", "--flag"))
    assert await child.wait() == Outcome(127, None)
    assert yard.log.read_text("utf-8") == "cannot run /nowhere/no-such-program: No such file or directory\n"


async def test_a_working_folder_that_does_not_exist_is_exit_code_127_and_a_line_in_the_log(yard: Yard) -> None:
    child = await yard.start(python("pass"), cwd=yard.root / "absent")
    assert await child.wait() == Outcome(127, None)
    assert "No such file or directory" in yard.log.read_text("utf-8")


async def test_a_child_runs_in_its_folder_unless_told_otherwise(yard: Yard) -> None:
    child = await yard.start(python("import os; print(os.getcwd())"))
    await child.wait()
    other = await yard.start(python("import os; print(os.getcwd())"), cwd=yard.root)
    await other.wait()
    assert yard.log.read_text("utf-8").splitlines() == [str(child.folder), str(yard.root)]


async def test_the_end_of_a_child_shows_though_nobody_waits_for_it(yard: Yard) -> None:
    child = await yard.start(python("pass"))
    await eventually(lambda: not child.is_alive, "the end is seen")
    assert child.outcome == Outcome(0, None)
    assert not list((yard.root / "run").iterdir())


async def test_many_may_wait_and_one_that_gives_up_leaves_the_child_alone(yard: Yard) -> None:
    child = await yard.start(program("tidy", "0"))
    await yard.said("tidy")
    waiting = [asyncio.create_task(child.wait()) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    assert child.is_alive
    await child.stop()
    assert await asyncio.gather(*waiting[1:]) == [Outcome(7, None, stopped=True)] * 4


# Stopping


async def test_stopping_gives_a_child_the_time_that_it_needs(yard: Yard) -> None:
    child = await yard.start(program("tidy", "0.3"))
    await yard.said("tidy")
    assert await child.stop() == Outcome(7, None, stopped=True)


async def test_stopping_again_and_at_the_same_time_sends_one_sigterm_and_gives_one_outcome(yard: Yard) -> None:
    child = await yard.start(program("tidy", "0.5"))
    await yard.said("tidy")
    outcomes = await asyncio.gather(*(child.stop() for _ in range(10)))
    assert outcomes == [Outcome(7, None, stopped=True)] * 10
    assert await child.stop() == outcomes[0]
    assert Counter(yard.log.read_text("utf-8").split()) == {"tidy": 1, "SIGTERM": 1}


async def test_a_child_that_ignores_sigterm_is_killed_after_its_stop_timeout(yard: Yard) -> None:
    child = await yard.start(program("deaf"), stop_timeout_s=0.4)
    await yard.said("deaf")
    began = time.monotonic()
    assert await child.stop() == Outcome(None, signal.SIGKILL, stopped=True)
    assert 0.4 <= time.monotonic() - began < 10


@pytest.mark.parametrize("end", [Child.stop, Child.kill])
async def test_a_child_that_has_to_be_killed_leaves_no_shared_memory(
    yard: Yard, end: Callable[[Child], Coroutine[Any, Any, Outcome]]
) -> None:
    child = await yard.start((sys.executable, str(PROGRAMS / "sharer.py")), stop_timeout_s=0.4)
    await yard.said("sharing")
    memory = Path("/dev/shm", yard.log.read_text("utf-8").split()[1].rstrip("."))
    assert memory.exists()
    assert (await end(child)).exit_code is None
    assert not memory.exists()


async def test_killing_ends_a_child_at_once_whatever_its_stop_timeout(yard: Yard) -> None:
    child = await yard.start(program("deaf"))
    await yard.said("deaf")
    assert await child.kill() == Outcome(None, None)
    assert await child.kill() == Outcome(None, None)


async def test_a_child_that_has_ended_may_still_be_stopped(yard: Yard) -> None:
    child = await yard.start(python("raise SystemExit(5)"))
    await child.wait()
    assert await child.stop() == Outcome(5, None)


async def test_a_child_that_is_suspended_can_be_stopped(yard: Yard) -> None:
    child = await yard.start(program("tidy", "0"), stop_timeout_s=0.3)
    await yard.said("tidy")
    for pid in kept(child):
        os.kill(pid, signal.SIGSTOP)
    assert await child.stop() == Outcome(None, signal.SIGKILL, stopped=True)


@pytest.mark.parametrize(
    ("manner", "expected"),
    [("leave", Outcome(0, None)), ("crash", Outcome(None, signal.SIGSEGV))],
)
async def test_relatives_do_not_outlive_a_child_that_ended_by_itself(
    yard: Yard, manner: str, expected: Outcome
) -> None:
    child = await yard.start(program("family", manner))
    assert await child.wait() == expected
    assert living(token_of(child.folder)) == []


@pytest.mark.parametrize("manner", ["stay", "deaf"])
async def test_stopping_ends_relatives_that_ignore_signals_or_left_for_their_own_session(
    yard: Yard, manner: str
) -> None:
    child = await yard.start(program("family", manner), stop_timeout_s=0.5)
    await yard.said("family complete")
    assert len(kept(child)) == 4
    assert (await child.stop()).stopped
    assert living(token_of(child.folder)) == []


async def test_a_start_that_is_cancelled_leaves_nothing_running(yard: Yard) -> None:
    for delay in (0.0, 0.001, 0.01, 0.02, 0.03, 0.05):
        starting = asyncio.create_task(yard.start(program("deaf"), stop_timeout_s=0.1))
        await asyncio.wait({starting}, timeout=delay)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await starting).stop()  # it had started before it could be cancelled
        assert yard.left() == {}


# The keeper


@pytest.mark.parametrize("name", ["deaf", "family"])
async def test_a_keeper_that_is_killed_takes_everything_along_and_the_outcome_says_so(yard: Yard, name: str) -> None:
    child = await yard.start(program(name, "deaf"))
    await yard.said({"deaf": "deaf", "family": "family complete"}[name])
    os.kill(child.pid, signal.SIGKILL)
    outcome = await child.wait()
    assert outcome == Outcome(None, None)
    assert not outcome.succeeded
    assert outcome.describe() == "killed together with its keeper"
    assert living(token_of(child.folder)) == []


async def test_the_scratch_folder_is_removed_however_the_child_ends(yard: Yard) -> None:
    for end in ("exit", "stop", "keeper killed"):
        scratch = yard.root / "scratch"
        scratch.mkdir()
        (scratch / "engine.sock").touch()
        child = await yard.start(python("pass") if end == "exit" else program("tidy", "0"), scratch=scratch)
        if end == "keeper killed":
            os.kill(child.pid, signal.SIGKILL)
        await (child.stop() if end == "stop" else child.wait())
        assert not scratch.exists(), end


async def test_a_child_that_is_stopped_at_the_moment_of_its_start_hears_of_it(yard: Yard) -> None:
    began = time.monotonic()
    for _ in range(5):
        child = await yard.start(program("tidy", "0"))
        assert (await child.stop()).stopped
    assert time.monotonic() - began < AMPLE_S / 2


async def test_a_folder_is_never_run_twice(yard: Yard) -> None:
    child = await yard.start(python("print('once')"))
    command = Command(python("print('twice')"), child_environment())
    for _ in range(2):  # while it runs, and when it is over
        with pytest.raises(FileExistsError, match="has seen a run"):
            await yard.children.start(child.folder, command, log=yard.log, stop_timeout_s=1)
        await child.wait()
    assert yard.log.read_text("utf-8") == "once\n"


async def test_of_many_starts_in_one_folder_at_the_same_time_exactly_one_runs(yard: Yard) -> None:
    folder = yard.folder()
    command = Command(python("print('ran')"), child_environment())
    started = await asyncio.gather(
        *(yard.children.start(folder, command, log=yard.log, stop_timeout_s=1) for _ in range(8)),
        return_exceptions=True,
    )
    children = [one for one in started if isinstance(one, Child)]
    assert len(children) == 1
    assert sum(isinstance(one, FileExistsError) for one in started) == 7
    assert (await children[0].wait()).succeeded
    assert yard.log.read_text("utf-8") == "ran\n"
    assert not list((yard.root / "run").iterdir())


async def test_of_two_keepers_raced_into_one_folder_one_gives_way(yard: Yard) -> None:
    for number in range(5):
        folder = yard.folder()
        folder.mkdir()
        ran = yard.root / f"ran-{number}"
        spec = {
            "argv": ["/bin/sh", "-c", f"echo ran >> {ran}"], "cwd": str(folder), "scratch": None, "grace_s": 60,
            "owner_lock": str(yard.lock.path), "stop_timeout_s": 1, "token": f"raced-{number}-{os.getpid()}",
        }  # fmt: skip
        keeper_module.write_json(str(folder / "spec.json"), spec)
        keepers = [
            await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", keeper_module.__file__, str(folder))
            for _ in range(2)
        ]
        assert sorted([await keeper.wait() for keeper in keepers]) == [0, 75]
        assert ran.read_text("utf-8") == "ran\n"


async def test_a_log_that_cannot_be_opened_fails_the_start_and_leaves_the_folder_usable(yard: Yard) -> None:
    folder, command = yard.folder(), Command(python("pass"), child_environment())
    with pytest.raises(RuntimeError, match=r"absent/log\.txt"):
        await yard.children.start(folder, command, log=yard.root / "absent" / "log.txt", stop_timeout_s=1)
    assert not list((yard.root / "run").iterdir())
    assert await yard.children.adopt(folder) is None
    child = await yard.children.start(folder, command, log=yard.log, stop_timeout_s=1)
    assert (await child.wait()).succeeded


async def test_a_keeper_that_cannot_begin_fails_the_start_and_runs_nothing(yard: Yard) -> None:
    folder = yard.folder()
    folder.mkdir()
    (folder / "keeper.json").symlink_to(folder / "absent")  # no reader finds it until the keeper has replaced it
    (folder / "outcome.json").touch()  # a keeper that comes late gives way before it starts anything
    with pytest.raises(RuntimeError, match="did not start"):
        await yard.children.start(folder, Command(python("print('ran')"), {}), log=yard.log, stop_timeout_s=1)
    assert yard.log.read_text("utf-8") == ""
    assert not list((yard.root / "run").iterdir())


# What a child gets


async def test_a_child_sees_none_of_the_servers_secrets_and_the_hub_is_offline(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "MODELYARD_ADMIN_KEY", "MODELYARD_DATABASE_URL", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN", "DATABASE_URL", "PGPASSWORD", "OPENAI_API_KEY", "SOMETHING_ELSE",
    ):  # fmt: skip
        monkeypatch.setenv(name, "a-secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:a-secret@proxy")
    child = await yard.start(program("tidy", "0"), env=child_environment({"ENGINE_SETTING": "on"}))
    await yard.said("tidy")
    for pid in (*kept(child), child.pid):
        seen = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        assert "a-secret" not in " ".join(seen)
        assert {"HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "ENGINE_SETTING=on"} <= set(seen)
        assert f"PATH={os.environ['PATH']}" in seen
    await child.stop()


def test_only_a_download_knows_the_way_to_the_hub_and_even_that_only_the_token_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    monkeypatch.setenv("HF_TOKEN", "the-servers")
    download = child_environment({"HF_TOKEN": "the-jobs"}, hub=True)
    assert download["HTTPS_PROXY"] == "http://proxy"
    assert download["HF_TOKEN"] == "the-jobs"
    assert "HF_HUB_OFFLINE" not in download
    assert "HF_TOKEN" not in child_environment(hub=True)
    assert "HTTPS_PROXY" not in child_environment()


async def test_a_child_inherits_no_descriptor_and_no_ignored_signal(yard: Yard) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        child = await yard.start(program("tidy", "0"))
        await yard.said("tidy")
        for pid in (*kept(child), child.pid):
            opened = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
            assert opened.pop("0") == "/dev/null"
            assert {opened.pop("1"), opened.pop("2")} == {str(yard.log)}
            assert set(opened.values()) <= {str(child.folder / "keeper.lock")}
        await child.stop()
        grep = await yard.start(("grep", "-h", "SigIgn\\|SigBlk", "/proc/self/status"))
        assert (await grep.wait()).succeeded
        masks = [int(mask, 16) for mask in yard.log.read_text("utf-8").split()[-3::2]]
        assert [mask & 0x7FFFFFFF for mask in masks] == [0, 0]  # above lie the C library's own signals
    finally:
        os.close(reading)
        os.close(writing)


async def test_thirty_runs_leak_no_descriptor_no_zombie_and_no_entry(yard: Yard) -> None:
    async def one(number: int) -> None:
        child = await yard.start(program("tidy", "0") if number % 3 else python("pass"), stop_timeout_s=0.2)
        await (child.stop() if number % 2 else child.kill())

    await one(1)  # what is opened once (the loop's threads) is not a leak
    opened, dead = descriptors(), zombies()
    for number in range(30):
        await one(number)
    await asyncio.gather(*(one(number) for number in range(6)))
    assert descriptors() - opened == set()
    assert zombies() - dead == set()
    assert not list((yard.root / "run").iterdir())


# The server


class StandIn:
    """The stand-in server, as a process that can be killed."""

    def __init__(self, yard: Yard, *arguments: str) -> None:
        yard.lock.release()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.servers.children.server", *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def line(self) -> str:
        assert self._process.stdout is not None
        return (await asyncio.to_thread(self._process.stdout.readline)).strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def stand_in(yard: Yard, folder: Path, grace_s: float, argv: tuple[str, ...], *first: str) -> StandIn:
    (folder / "scratch").mkdir(parents=True)
    return StandIn(yard, *first, str(yard.lock.path), str(folder), str(grace_s), "0.3", *argv)


async def test_a_child_lives_on_when_its_server_is_killed_and_the_next_server_adopts_it(yard: Yard) -> None:
    folder = yard.folder()
    with stand_in(yard, folder, AMPLE_S, program("tidy", "0")) as server:
        verb, pid = (await server.line()).split()
        assert verb == "started"
        await eventually(lambda: "tidy" in folder.with_suffix(".log").read_text("utf-8"), "the child has begun")
    assert yard.lock.take()
    child = await yard.children.adopt(folder)
    assert child is not None
    assert child.is_alive
    assert child.pid == int(pid)
    assert len(living(token_of(folder))) == 2
    waiting = asyncio.create_task(child.wait())
    assert await child.stop() == Outcome(7, None, stopped=True)
    assert await waiting == child.outcome


async def test_an_adopted_child_that_ends_by_itself_is_seen_to(yard: Yard) -> None:
    folder = yard.folder()
    code = "import pathlib, time\nwhile not pathlib.Path('go').exists(): time.sleep(0.01)\nraise SystemExit(4)"
    with stand_in(yard, folder, AMPLE_S, python(code)) as server:
        await server.line()
    assert yard.lock.take()
    child = await yard.children.adopt(folder)
    assert child is not None
    assert child.is_alive
    (folder / "go").touch()
    assert await child.wait() == Outcome(4, None)


async def test_a_child_that_no_server_comes_back_for_ends_after_the_grace(yard: Yard) -> None:
    folder = yard.folder()
    with stand_in(yard, folder, 1.5, program("family", "deaf")) as server:
        await server.line()
        await eventually(lambda: "complete" in folder.with_suffix(".log").read_text("utf-8"), "the family is there")
    killed_at = time.monotonic()
    token = token_of(folder)
    assert len(living(token)) == 5
    await eventually(lambda: not living(token), "the end of the family")
    assert time.monotonic() - killed_at > 1
    assert not (folder / "scratch").exists()
    child = await yard.children.adopt(folder)
    assert child is not None
    assert await child.wait() == Outcome(None, signal.SIGKILL, stopped=True, abandoned=True)


async def test_a_server_that_comes_back_within_the_grace_stops_the_clock(yard: Yard) -> None:
    folder = yard.folder()
    with stand_in(yard, folder, 2.0, program("deaf")) as server:
        await server.line()
    assert yard.lock.take()
    await asyncio.sleep(4)  # what must not happen has no condition to wait for
    child = await yard.children.adopt(folder)
    assert child is not None
    assert child.is_alive
    assert await child.stop() == Outcome(None, signal.SIGKILL, stopped=True)


async def test_a_server_killed_and_started_again_and_again_keeps_the_same_child(yard: Yard) -> None:
    folder = yard.folder()
    with stand_in(yard, folder, AMPLE_S, program("deaf")) as server:
        _, pid = (await server.line()).split()
    for _ in range(3):
        with StandIn(yard, str(yard.lock.path), str(folder), str(AMPLE_S), "0.3") as server:
            assert await server.line() == f"adopted {pid}"
    assert yard.lock.take()
    child = await yard.children.adopt(folder)
    assert child is not None
    await child.stop()


async def test_the_outcome_is_known_under_a_supervisor_that_ignores_sigchld(yard: Yard) -> None:
    with stand_in(yard, yard.folder(), AMPLE_S, python("raise SystemExit(6)"), "ignore-sigchld") as server:
        assert (await server.line()).startswith("started")
        assert await asyncio.wait_for(server.line(), 30) == "exit code 6"


async def test_a_run_that_has_ended_is_adopted_with_its_outcome(yard: Yard) -> None:
    child = await yard.start(python("raise SystemExit(9)"))
    await child.wait()
    adopted = await yard.children.adopt(child.folder)
    assert adopted is not None
    assert not adopted.is_alive
    assert await adopted.wait() == await adopted.stop() == await adopted.kill() == Outcome(9, None)


async def test_nothing_is_adopted_where_nothing_ran(yard: Yard) -> None:
    assert await yard.children.adopt(yard.folder()) is None


@pytest.mark.parametrize("lock_is_held", [False, True])
async def test_a_pid_that_now_belongs_to_another_process_is_not_believed(yard: Yard, lock_is_held: bool) -> None:
    child = await yard.start(program("deaf"))
    await yard.said("deaf")
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    bystander = subprocess.Popen(["sleep", "600"])
    # With the lock free even a true pair of pid and start time is somebody else's; with it held the time decides.
    started = keeper_module.start_time(bystander.pid) - lock_is_held
    keeper_module.write_json(str(child.folder / "keeper.json"), {"pid": bystander.pid, "start_time": started})
    held = keeper_module.take_lock(str(child.folder / "keeper.lock")) if lock_is_held else None
    try:
        adopted = await yard.children.adopt(child.folder)
        assert adopted is not None
        assert await adopted.stop() == await adopted.kill() == Outcome(None, None)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        if held is not None:
            os.close(held)


async def test_a_keeper_killed_while_no_server_was_there_is_cleared_up_after_at_adoption(yard: Yard) -> None:
    folder = yard.folder()
    with stand_in(yard, folder, AMPLE_S, program("family", "deaf")) as server:
        _, pid = (await server.line()).split()
        await eventually(lambda: "complete" in folder.with_suffix(".log").read_text("utf-8"), "the family is there")
    os.kill(int(pid), signal.SIGKILL)
    assert yard.lock.take()
    assert living(token_of(folder))
    child = await yard.children.adopt(folder)
    assert child is not None
    assert await child.wait() == Outcome(None, None)
    assert living(token_of(folder)) == []
    assert not (folder / "scratch").exists()


async def test_strays_are_ended_and_what_is_to_be_kept_is_not(yard: Yard) -> None:
    wanted = await yard.start(program("tidy", "0"))
    stray = await yard.start(program("deaf"), stop_timeout_s=0.2)
    homeless = await yard.start(program("deaf"))
    token = token_of(homeless.folder)
    homeless.folder.rename(yard.root.parent / f"{yard.root.name}-gone")
    assert await yard.children.end_strays(keep={wanted.folder}) == [stray.folder]
    assert living(token) == []
    assert not stray.is_alive or (await stray.wait()).stopped
    assert await yard.children.end_strays(keep={wanted.folder.parent}) == [], "what lies below is kept as well"
    assert wanted.is_alive
    await wanted.stop()
    assert await yard.children.end_strays(keep=set()) == []


async def test_a_run_that_ended_is_not_named_for_ever_where_its_folder_is_kept(yard: Yard) -> None:
    """A server that was killed in the middle of a start, or whose child then ended, leaves an entry."""
    run = yard.root / "run"
    ended = yard.root / "job" / "attempt-1"
    with stand_in(yard, ended, AMPLE_S, python("pass")) as server:
        assert (await server.line()).startswith("started")
        await eventually(lambda: living(token_of(ended)) == [], "it has ended")
    assert yard.lock.take()
    never = yard.root / "job" / "attempt-2"
    never.mkdir()
    (run / token_of(ended)).write_text(str(ended), "utf-8")
    (run / "0123456789abcdef").write_text(str(never), "utf-8")
    assert await yard.children.end_strays(keep={yard.root / "job"}) == []
    assert list(run.iterdir()) == []


async def test_the_strays_of_many_deaf_children_are_ended_side_by_side(yard: Yard) -> None:
    strays = [await yard.start(program("deaf"), stop_timeout_s=1.5) for _ in range(6)]
    began = time.monotonic()
    assert set(await yard.children.end_strays(keep=set())) == {stray.folder for stray in strays}
    assert time.monotonic() - began < 6


# The lock


async def test_the_lock_lets_in_one_server_and_names_it(yard: Yard) -> None:
    assert yard.lock.take()  # holding it already
    other = ServerLock(yard.lock.path)
    assert not other.take()
    assert other.holder() == str(os.getpid())
    with StandIn(yard, str(yard.lock.path), str(yard.folder()), "1", "1", "true") as server:
        assert (await server.line()).startswith("started")
        assert not other.take()
        assert await asyncio.wait_for(server.line(), 30) == "exit code 0"
        with StandIn(yard, str(yard.lock.path), str(yard.folder()), "1", "1", "true") as second:
            assert await second.line() == "locked out"
    assert other.take()  # its holder was killed
    other.release()
    other.release()
    assert yard.lock.take()


def test_asking_for_the_lock_disturbs_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    assert not keeper_module.lock_is_held(path)
    held = keeper_module.take_lock(path)
    assert held is not None
    assert [keeper_module.lock_is_held(path) for _ in range(3)] == [True] * 3
    assert keeper_module.take_lock(path) is None
    os.close(held)
    assert not keeper_module.lock_is_held(path)
