"""Several processes share one training as the server starts them: with `accelerate launch`, here on the processor."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from modelyard.finetune import attempts
from modelyard.processes import Child, Outcome
from modelyard.settings import Settings
from tests.eventually import PATIENCE_S
from tests.trainer.runs import RUN_S, Run, Trainers, make_run, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS: dict[str, Any] = {"validation_split": 0.1, "checkpoint_steps": 2}
STEPS = 24
#: As `/proc/net/tcp` has them: a socket's state, and 127.0.0.1.
LISTENS, LOOPBACK = "0A", "0100007F:"


class Launched:
    """A training of two processes under their launcher."""

    def __init__(self, run: Run, process: subprocess.Popen[bytes]) -> None:
        self._run = run
        self._process = process

    def processes(self) -> dict[str, int]:
        """Return the pids of all that is there: of the launcher under "", of each other under its number."""
        found = {}
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and str(self._run.path).encode() in (folder / "cmdline").read_bytes():
                    lines = (folder / "environ").read_bytes().split(b"\0")
                    number = next((line[5:].decode() for line in lines if line.startswith(b"RANK=")), "")
                    found[number] = int(folder.name)
        return found

    def when(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition while the training runs."""
        deadline = time.monotonic() + RUN_S
        while not condition():
            assert self._process.poll() is None, self._run.log.read_text("utf-8")[-3000:]
            assert time.monotonic() < deadline, "the condition never held"

    def wait(self) -> int:
        """Return the launcher's exit code, after seeing that nothing is left."""
        code = self._process.wait(RUN_S)
        deadline = time.monotonic() + PATIENCE_S
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {left}"
        return code

    def kill(self) -> None:
        """Kill the launcher."""
        self._process.kill()


@contextmanager
def launched(run: Run, processes: int = 2) -> Iterator[Launched]:
    """Start a training by the server's command."""
    settings = Settings(data_dir=run.folder / "data")
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = attempts.command(settings, run.folder, env, processes)
    with open(run.log, "ab") as log:
        process = subprocess.Popen(
            command.argv, env=dict(command.env), cwd=run.folder, stdout=log, stderr=log, start_new_session=True
        )
    there = Launched(run, process)
    try:
        yield there
    finally:
        for pid in {process.pid, *there.processes().values()} if process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def to_the_end(run: Run) -> None:
    """Have two processes do a training, or what is left of it."""
    with launched(run) as there:
        assert there.wait() == 0, run.log.read_text("utf-8")[-3000:]


def reaches(run: Run, step: int) -> Callable[[], bool]:
    """Return the condition that a training has told of a step."""
    return lambda: max(run.steps(), default=0) >= step


def listening(pid: int) -> list[str]:
    """Return the addresses on which a process listens, as the kernel writes them."""
    tables = [Path(f"/proc/{pid}/net/{name}").read_text("ascii") for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    addresses = {line[9]: line[1] for line in lines if line[3] == LISTENS}
    sockets = {target[8:-1] for target in links(pid) if target.startswith("socket:[")}
    return [address for inode, address in addresses.items() if inode in sockets]


def links(pid: int) -> Iterator[str]:
    """Yield what the open files of a process are."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            yield os.readlink(path)


def test_two_processes_learn_what_one_does(tmp_path: Path, tiny_llama: Path, trainers: Trainers) -> None:
    from safetensors.torch import load_file

    # Steps of three forward passes or more, and one of a single row, of which the second process has nothing.
    changes = {**SETTINGS, "dropout": 0.0, "gradient_accumulation": 3, "max_steps": 8, "learning_rate": 1e-3}
    one, two = (make_run(tmp_path / name, tiny_llama, 28, **changes) for name in ("one", "two"))
    assert trainers.run(one) == 0
    (prepared,) = one.told("prepared")
    assert prepared["rows"] % prepared["rows_per_step"] == 1
    to_the_end(two)
    figures = [run.done()["figures"] for run in (one, two)]
    assert [each["processes"] for each in figures] == [1, 2]
    for name in ("steps", "tokens", "learnt_tokens", "batch_size", "padding_share", "checkpoints", "best_step"):
        assert figures[0][name] == figures[1][name], name
    for kind in ("loss", "validation_loss", "grad_norm"):
        told = [[point[kind] for point in run.told("point") if kind in point] for run in (one, two)]
        assert told[0] == pytest.approx(told[1], rel=2e-3), kind
        assert len(told[0]) == (4 if kind == "validation_loss" else 8)
    weights = [load_file(run.work / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    away = sum(float((weights[0][name] - weights[1][name]).norm()) ** 2 for name in weights[0]) ** 0.5
    # `lora_B` begins with zeros: its length is what was learnt.
    learnt = sum(float(weights[0][name].norm()) ** 2 for name in weights[0] if "lora_B" in name) ** 0.5
    assert 0 < away < 0.02 * learnt


def test_two_processes_killed_in_the_midst_go_on_to_the_weights_of_undisturbed_ones(
    tmp_path: Path, tiny_llama: Path
) -> None:
    alone, killed = (make_run(tmp_path / name, tiny_llama, dropout=0.1, **SETTINGS) for name in ("alone", "killed"))
    to_the_end(alone)
    with launched(killed) as there:
        there.when(reaches(killed, 7))
        # The others have sessions of their own: they end with their launcher all the same.
        there.kill()
        assert there.wait() == -signal.SIGKILL
    assert killed.result() is None
    to_the_end(killed)
    assert killed.steps().count(1) == 1
    assert killed.weights() == alone.weights()
    for name in ("tokens", "first_loss", "last_loss", "best_loss", "last_validation_loss"):
        assert killed.done()["figures"][name] == alone.done()["figures"][name], name
    assert {point["step"] for point in alone.told("point")} == set(range(1, STEPS + 1))


def test_a_training_that_is_asked_to_end_goes_on_with_more_processes_or_fewer(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, max_steps=200, **SETTINGS)
    trainers.start(run)
    assert trainers.signal_when(reaches(run, 3), signal.SIGTERM)
    assert trainers.wait() == 0
    reached = []
    for at_least in (8, 200):
        result = run.result()
        assert result is not None
        assert result["stopped"] is True
        assert (run.work / "checkpoints" / f"step-{result['step']}" / "manifest.json").is_file()
        reached.append(result["step"])
        run.forget_result()
        if at_least == 200:
            assert trainers.run(run) == 0
            break
        with launched(run) as there:
            there.when(reaches(run, at_least))
            # As a keeper does it; the launcher passes it on.
            os.killpg(there.processes()[""], signal.SIGTERM)
            there.wait()
    assert 3 <= reached[0] < 8 <= reached[1] < 200
    # Not one step was done twice.
    assert run.steps() == list(range(1, 201))
    assert run.done()["figures"]["processes"] == 1


def test_no_process_can_be_reached_from_other_machines_and_where_one_is_killed_all_end_and_it_counts_as_killed(
    tmp_path: Path, tiny_llama: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, max_steps=500, **SETTINGS)
    with launched(run) as there:
        there.when(reaches(run, 3))
        found = [address for pid in there.processes().values() for address in listening(pid)]
        os.kill(there.processes()["1"], signal.SIGKILL)
        code = there.wait()
    # The store by which they meet, and what each has for the others' gradients.
    assert len(found) >= 3
    assert {address for address in found if not address.startswith(LOOPBACK)} == set()
    assert code > 0
    result = run.result()
    assert result is None or result["stopped"], result
    child = Child(run.folder, "token", tmp_path / "entry", 0, None)
    child.outcome = Outcome(code, None)
    died = attempts.death(child, run.log, attempts.Kills.so_far(), None, 0)
    assert died["code"] == "trainer_killed"
    assert "SIGKILL" in died["message"]


def test_what_goes_wrong_in_all_processes_is_told_once(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, learning_rate=1e30, warmup_steps=0, **SETTINGS)
    with launched(run) as there:
        assert there.wait() > 0
    assert run.failure()["code"] == "loss_not_finite"


def test_memory_that_does_not_suffice_in_one_process_makes_passes_smaller_in_all(
    tmp_path: Path, tiny_llama: Path
) -> None:
    run = make_run(
        tmp_path / "run", tiny_llama, lines=rows(400, longest=250), batch_size=None, gradient_accumulation=1,
        max_steps=20, validation_split=0.0,
    )  # fmt: skip
    with launched(run) as there:
        there.when(reaches(run, 4))
        pid = there.processes()["1"]
        status = Path(f"/proc/{pid}/status").read_text("ascii")
        taken = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
        _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
        resource.prlimit(pid, resource.RLIMIT_DATA, (taken + 16 * 1024**2, hard))
        code = there.wait()
    # Nobody waits for the one that could not go on: all try again with half of the rows.
    notes = [note for note in run.told("note") if "Memory did not suffice" in note["message"]]
    assert notes[0]["data"]["batch_size"] == 8, run.log.read_text("utf-8")[-3000:]
    if code == 0:
        assert run.done()["figures"]["batch_size"] == notes[-1]["data"]["batch_size"]
        assert run.steps() == list(range(1, 21))
    else:  # the limit is lifted for the next try, but kernels that could not be made may stay so
        assert run.failure()["code"] == "out_of_memory"
