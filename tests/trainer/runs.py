"""Trainings of the tiny Llama for tests: specs, rows, and a process that forks real trainers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelyard.demo.tiny_llama import make_llama
from modelyard.trainer.spec import Hyperparameters, Mode, Spec
from tests.eventually import PATIENCE_S
from tests.fixtures import missing

MODEL = "local:tiny-llama"
WORDS = ["bridge", "city", "engine", "house", "keeper", "light", "market", "model", "paper", "river", "stone", "water"]
DEFAULTS = Hyperparameters(
    epochs=None,
    max_steps=24,
    learning_rate=5e-3,
    lr_schedule="cosine",
    warmup_steps=3,
    batch_size=2,
    gradient_accumulation=2,
    rank=8,
    alpha=16.0,
    dropout=0.1,
    target_modules=None,
    max_seq_len=None,
    seed=1,
    packing=False,
    quantization=None,
    validation_split=None,
    early_stopping=None,
    checkpoint_steps=3,
)
#: A trainer that is on its own on a busy machine imports for so long.
RUN_S = 240.0


def needs_training() -> None:
    """Skip the test where torch, transformers or PEFT are not installed."""
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            missing("engine", f"{name} is not installed: make test installs it")


def rows(count: int, seed: int = 0, longest: int = 8) -> list[dict[str, Any]]:
    """Return questions and answers of random words."""
    chance = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(2, most)))

    return [
        {
            "messages": [
                {"role": "user", "content": f"{index}: {words(longest)}"},
                {"role": "assistant", "content": words(longest)},
            ]
        }
        for index in range(count)
    ]


def write_rows(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def llama(folder: Path) -> Path:
    """Return the tiny Llama's folder, made at the first call."""
    if not folder.exists():
        make_llama(folder)
    return folder


def environment() -> dict[str, str]:
    """Return what a trainer runs with: one thread, so that tests beside one another don't wait for each other's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MODELYARD_")}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@dataclass
class Run:
    """One training's folder, with what its attempts left."""

    spec: Spec
    folder: Path
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.folder / "training.json"
        Path(self.spec.work_dir).mkdir(parents=True, exist_ok=True)
        self.spec.write(self.path)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def work(self) -> Path:
        return Path(self.spec.work_dir)

    def result(self) -> dict[str, Any] | None:
        """Return the result, if there is one."""
        path = Path(self.spec.result)
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else None

    def done(self) -> dict[str, Any]:
        """Return the result of a training that worked; fail the test with its log if it did not."""
        result = self.result()
        assert result is not None, self.log.read_text("utf-8")[-3000:]
        assert "adapter_dir" in result, (result, self.log.read_text("utf-8")[-3000:])
        return result

    def failure(self) -> dict[str, Any]:
        """Return the failure of a training that did not work."""
        result = self.result()
        assert result is not None, self.log.read_text("utf-8")[-3000:]
        assert "failure" in result, result
        failure: dict[str, Any] = result["failure"]
        assert failure["message"].endswith("."), failure
        assert "Traceback" not in failure["message"] + failure["hint"], failure
        return failure

    def forget_result(self) -> None:
        """Do what the server does before another attempt."""
        Path(self.spec.result).unlink(missing_ok=True)

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Return the reports of one kind, in order."""
        path = Path(self.spec.progress)
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [each for each in map(json.loads, lines) if each["kind"] == kind]

    def steps(self) -> list[int]:
        """Return the steps that have a point with a loss, in the order of their reports."""
        return [point["step"] for point in self.told("point") if "loss" in point]

    def weights(self) -> str:
        """Return the hash of the final adapter's weights."""
        return hashlib.sha256((self.work / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def make_run(
    folder: Path, model: Path, count: int = 30, *, lines: list[dict[str, Any]] | None = None, **changes: Any
) -> Run:
    """Return a training in a new folder; `changes` are fields of the spec or of its hyperparameters."""
    folder.mkdir(parents=True)
    of_spec = {name: changes.pop(name) for name in list(changes) if name in Spec.__dataclass_fields__}
    values: dict[str, Any] = {
        "mode": Mode.TRAIN,
        "name": "test",
        "model_id": MODEL,
        "model_dir": str(model),
        "adapter_id": "ft:test",
        "data": str(write_rows(folder / "data.jsonl", lines or rows(count))),
        "max_line_bytes": 1024 * 1024,
        "hyperparameters": replace(DEFAULTS, **changes),
        "work_dir": str(folder / "work"),
        "progress": str(folder / "progress.jsonl"),
        "result": str(folder / "result.json"),
    }
    return Run(Spec(**{**values, **of_spec}), folder)


def run_alone(run: Run) -> int:
    """Run the trainer as the server does, as a process of its own, and return its exit code."""
    with open(run.log, "ab") as log:
        done = subprocess.run(
            [sys.executable, "-m", "modelyard.trainer", str(run.path)],
            env=environment(),
            stdout=log,
            stderr=log,
            timeout=RUN_S,
            check=False,
        )
    return done.returncode


class Trainers:
    """The process that forks trainers; one runs at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = 0
        assert self._read()["ready"]

    def start(self, run: Run, limits: Mapping[str, int] | None = None) -> None:
        """Fork a trainer for a run."""
        assert self._process.stdin is not None
        order = {"spec": str(run.path), "log": str(run.log), "limits": dict(limits or {})}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self.pid = self._read()["pid"]

    def wait(self) -> int:
        """Return the exit code of the trainer that runs, or the negative number of the signal that ended it."""
        return os.waitstatus_to_exitcode(self._read()["status"])

    def run(self, run: Run, limits: Mapping[str, int] | None = None) -> int:
        """Fork a trainer and wait for its end."""
        self.start(run, limits)
        return self.wait()

    def signal_when(self, condition: Callable[[], Any], number: int) -> bool:
        """Send the trainer a signal once a condition holds; return False if it ended before."""
        deadline = time.monotonic() + RUN_S
        while not condition():
            if not self.is_alive():
                return False
            assert time.monotonic() < deadline, "the condition never held"
        # Until it is waited for, the number belongs to it.
        os.kill(self.pid, number)
        return True

    def is_alive(self) -> bool:
        """Return whether the trainer runs."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state != "Z"

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks trainers has ended"
        return dict(json.loads(line))


@contextmanager
def forking(folder: Path) -> Iterator[Trainers]:
    """Give a process that forks trainers, and end it."""
    with open(folder / "trainers.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.servers.trainers"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield Trainers(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
