"""How a trainer is started, and what its end is taken for."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.finetune import attempts
from modelyard.finetune.attempts import Kills
from modelyard.processes import Child, Outcome
from modelyard.settings import Settings

GIB = 1024**3
NONE = Kills(0, 0)


def ended(tmp_path: Path, outcome: Outcome) -> Child:
    child = Child(tmp_path, "token", tmp_path / "entry", 0, None)
    child.outcome = outcome
    return child


def test_threads_of_one_core_count_as_one(tmp_path: Path) -> None:
    for cpu in range(256):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text("0-255")
    assert attempts.physical_cores(tmp_path) == 1


def test_where_the_system_does_not_tell_every_processor_counts(tmp_path: Path) -> None:
    import os

    assert attempts.physical_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_the_kernels_counters_are_read_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("pgfault 12\noom_kill 3\n")
    (tmp_path / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert Kills.so_far(tmp_path / "vmstat", tmp_path) == Kills(3, 1)
    assert Kills.so_far(tmp_path / "none", tmp_path / "none") == NONE


def test_a_trainer_that_was_killed_is_told_with_the_memory_that_it_had(tmp_path: Path) -> None:
    died = attempts.death(ended(tmp_path, Outcome(None, 9)), tmp_path / "log", Kills.so_far(), 4 * GIB, 3 * GIB)
    assert died["code"] == "trainer_killed"
    assert "SIGKILL" in died["message"]
    assert "given 4.0 GiB" in died["message"]
    assert "taken 3.0 GiB" in died["message"]
    assert "want of memory" not in died["message"]
    before = Kills(-1, -1)  # the kernel has killed something since then
    assert "for want of memory" in attempts.death(
        ended(tmp_path, Outcome(None, 9)), tmp_path / "log", before, None, 0
    )["message"]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("memory allocation of 33554432 bytes failed", "an allocation of 32.0 MiB failed"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "an allocation failed"),
    ],
)
def test_a_trainer_that_aborted_for_want_of_memory_is_told_so_with_advice_that_helps(
    tmp_path: Path, line: str, says: str
) -> None:
    (tmp_path / "log").write_text(f"tokenizing\n{line}\nFatal Python error: Aborted\n")
    died = attempts.death(ended(tmp_path, Outcome(None, 6)), tmp_path / "log", Kills.so_far(), GIB, 0)
    assert died["code"] == "out_of_memory"
    assert says in died["message"]
    assert "given 1.0 GiB" in died["message"]
    # A smaller batch_size would be given less.
    assert "fewer or shorter" in died["hint"]
    assert "smaller batch_size" not in died["hint"]
    # The same words, and another end: nothing is known.
    assert attempts.shortage_of(Outcome(None, 9), [line]) is None
    assert attempts.shortage_of(Outcome(None, 6), ["Aborted"]) is None


def test_a_trainer_that_left_by_itself_shows_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\n" * 50 + "ModuleNotFoundError: No module named 'torch'\n")
    died = attempts.death(ended(tmp_path, Outcome(1, None)), tmp_path / "log", NONE, None, 0)
    assert died["code"] == "trainer_died"
    assert "MODELYARD_TRAINER_PYTHON" in died["hint"]
    assert died["evidence"][-1] == "ModuleNotFoundError: No module named 'torch'"
    assert len(died["evidence"]) <= 20


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null"])
def test_what_is_no_whole_result_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    assert attempts.read_result(tmp_path) is None


def test_several_processes_are_started_by_accelerate_and_by_nobodys_configuration(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, trainer_python=Path("/somewhere/python"), trainer_stop_timeout_s=12.5)
    one = attempts.command(settings, tmp_path / "attempt-1", {"CUDA_VISIBLE_DEVICES": "3"})
    assert one.argv == ("/somewhere/python", "-P", "-m", "modelyard.trainer", f"{tmp_path}/attempt-1/training.json")
    four = attempts.command(settings, tmp_path / "attempt-1", {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4)
    assert four.argv[:3] == ("/somewhere/python", "-m", "modelyard.trainer.launcher")
    assert four.argv[four.argv.index("--num_processes") + 1] == "4"
    assert four.argv[-3:] == one.argv[-3:]
    assert four.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert four.env["HF_HOME"].startswith(str(tmp_path))
    # The launcher would kill a process that still writes a checkpoint sooner than the server does.
    assert float(four.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= settings.trainer_stop_timeout_s


def test_a_process_that_its_launcher_saw_killed_was_killed(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("Root Cause:\n  rank      : 1\n  exitcode  : -9 (pid: 12)\n  error_file: <N/A>\n")
    died = attempts.death(ended(tmp_path, Outcome(1, None)), tmp_path / "log", Kills.so_far(), None, 0)
    assert died["code"] == "trainer_killed"
    assert "SIGKILL" in died["message"]
    (tmp_path / "log").write_text("Root Cause:\n  rank      : 1\n  exitcode  : 1 (pid: 12)\n  error_file: <N/A>\n")
    died = attempts.death(ended(tmp_path, Outcome(1, None)), tmp_path / "log", Kills.so_far(), None, 0)
    assert died["code"] == "trainer_died"
