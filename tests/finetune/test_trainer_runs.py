"""The trainer of a training whose setting asks for several processes: run, interrupted and resumed by a real server."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.finetune import yard
from tests.finetune.yard import FINETUNE, LONG, at_step, ended, finished, shown, training_server, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def trainers(folder: Path) -> list[int]:
    """Return the processes that have a training of a data folder on their command line, launchers left out."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            words = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
            if str(folder).encode() in words and b"training.json" in words and b"trainer.launcher" not in words:
                found.append(int(process.name))
    return found


def test_processes_that_share_a_training_end_when_it_is_interrupted_and_go_on_when_resumed_or_one_was_killed(
    tmp_path: Path, imports: Path
) -> None:
    with training_server(tmp_path / "data", imports, MODELYARD_TRAINER_PROCESSES="2") as server:
        finetune = yard.start(server, yard.add_dataset(server), hyperparameters=LONG | {"max_steps": 150})
        at_step(server, finetune, 8)
        jobs = server.data_dir / "jobs"
        assert len(trainers(jobs)) == 2
        assert server.post(f"{FINETUNE}interrupt/").status == 200
        stopped = ended(server, finetune)
        assert stopped["job"]["status"] == "KILLED"
        until(lambda: not trainers(jobs), "none of the processes is left", 30.0, server)
        assert server.post(f"{FINETUNE}{finetune['id']}/resume/").status == 200
        at_step(server, finetune, stopped["curve"][-1]["step"] + 6)
        os.kill(trainers(jobs)[-1], signal.SIGKILL)
        done = finished(server, shown(server, finetune))
        said = [event["message"] for event in yard.events(server, done)]
    assert sum("Going on from the last checkpoint" in message for message in said) == 1, "\n".join(said)
    assert not trainers(jobs)
    assert done["figures"]["processes"] == 2
    assert done["figures"]["steps"] == 150
