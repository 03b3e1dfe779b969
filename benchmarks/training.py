"""How fast an adapter is trained, beside a loop written by hand, TRL and LLaMA-Factory; and how soon training begins.

    python benchmarks/training.py [--only speed | --only start] [--rounds 3] [--write]

Speed: our trainer child and the others (`training_child`), each in a process of its own, with the same rows, settings
and threads, one after the other in each round, on a tiny model and on a larger one (`training_inputs`). What counts is
the tokens of the rows, without padding, per second; the first steps don't, while kernels are prepared. A step is timed
when its line arrives in the file of progress, of everybody in the same way. Ratios are of the same round. Before
anything is said, all must have learnt from the same tokens, with as many weights in the same kinds of numbers, and
have come to about the same loss.

Start: from POST /api/v1/finetune/ to the first step, on a whole server, by the lines of the trainer's progress as they
arrive, and what the imports in it take by themselves. --write puts the tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report, training_rivals, training_start
from benchmarks.training_inputs import LARGER, TINY, conversations
from modelyard.child_environment import child_environment
from modelyard.finetune.attempts import physical_cores
from modelyard.trainer.spec import Hyperparameters, Mode, Spec

HERE = Path(__file__).resolve().parent
GOAL = 0.95
#: Steps that don't count, and those at the end whose mean loss is compared.
SKIPPED, LAST = 5, 10
#: How much the others' last loss may differ: other rows are in the last steps.
TOLERANCE = 0.06
POLL_S = 0.005
LIMIT_S = 600.0
OURS, PACKED, LOOP, GROUPED, TRL, LLAMAFACTORY = (
    "Modelyard",
    "Modelyard, packing",
    "PyTorch and PEFT by hand",
    "the same, rows grouped by length",
    "TRL, SFTTrainer",
    "LLaMA-Factory",
)


@dataclass(frozen=True)
class Task:
    """A training: the model, how many rows, how often they are seen, and rows of a step."""

    model: str
    rows: int
    epochs: int
    batch_size: int = 4

    @property
    def title(self) -> str:
        """What it is, in words."""
        times = "once" if self.epochs == 1 else f"{self.epochs} times"
        return f"{self.model.capitalize()} model, {self.rows} rows, seen {times}, {self.batch_size} a step"


#: With a number of steps that `LAST` divides: the libraries say the loss of so many steps at once.
TASKS = (Task(TINY, 240, 1), Task(LARGER, 80, 1))


@dataclass(frozen=True)
class Run:
    """One training; memory is the most that was resident, `began_s` from the start of the process to the first step."""

    tokens_per_s: float
    memory_mb: float
    began_s: float
    tokens: int
    padding: float
    loss: float
    learning: int | None
    kinds: tuple[str, ...] | None


def spec(task: Task, models: Path, folder: Path, *, packing: bool = False) -> Spec:
    """Write the rows of a task into a folder, and return what everybody is to do."""
    data = folder / "rows.jsonl"
    data.write_text("\n".join(conversations(task.rows)) + "\n", "utf-8")
    settings = Hyperparameters(
        epochs=float(task.epochs),
        max_steps=None,
        learning_rate=1e-3,
        lr_schedule="linear",
        warmup_steps=2,
        batch_size=task.batch_size,
        gradient_accumulation=1,
        rank=16,
        alpha=32.0,
        dropout=0.0,
        target_modules=None,
        max_seq_len=1024,
        seed=0,
        packing=packing,
        quantization=None,
        validation_split=0.0,
        early_stopping=None,
        # The others write none.
        checkpoint_steps=1_000_000,
    )
    return Spec(
        mode=Mode.TRAIN,
        name="benchmark",
        model_id=f"local:{task.model}",
        model_dir=str(models / task.model),
        adapter_id="ft:benchmark",
        data=str(data),
        max_line_bytes=1 << 20,
        hyperparameters=settings,
        work_dir=str(folder / "work"),
        progress=str(folder / "progress.jsonl"),
        result=str(folder / "result.json"),
    )


def follow(argv: Sequence[str], task: Task, models: Path, threads: int, *, packing: bool = False) -> Run:
    """Run a trainer on a task with so many threads, and return how it went.

    Raises:
        SystemExit: it failed, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wanted = spec(task, models, folder, packing=packing)
        wanted.write(folder / "training.json")
        Path(wanted.work_dir).mkdir()
        points: list[tuple[float, dict[str, Any]]] = []
        began = time.perf_counter()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*argv, str(folder / "training.json")], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
                env=child_environment({"OMP_NUM_THREADS": str(threads)}),
            )  # fmt: skip
        lines = training_start.Lines(Path(wanted.progress))
        status, memory_kib, over = None, 0, False
        try:
            while not over:
                # Once more when it has ended, for what it said last.
                over = status is not None
                now = time.perf_counter()
                points += [(now, line) for line in lines.new() if line["kind"] == "point" and "step" in line]
                if status is None:
                    pid, ended, usage = os.wait4(process.pid, os.WNOHANG)
                    if pid:
                        status, memory_kib = os.waitstatus_to_exitcode(ended), usage.ru_maxrss
                        process.returncode = status
                    elif now - began > LIMIT_S:
                        raise SystemExit(f"{argv[-1]}: not done within {LIMIT_S:g} s")
                    time.sleep(POLL_S)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        if status or not Path(wanted.result).exists():
            raise SystemExit(f"{' '.join(argv)} failed: {(folder / 'log').read_text('utf-8', 'replace')[-2000:]}")
        result = json.loads(Path(wanted.result).read_text("utf-8"))
    return measured(points, began, memory_kib * 1024 / 1e6, result)


def measured(
    points: Sequence[tuple[float, Mapping[str, Any]]], began: float, memory_mb: float, result: Mapping[str, Any]
) -> Run:
    """Return what the points of a training say, each with the time at which it was read."""
    steps = [(at, point) for at, point in points if "tokens" in point]
    (since, first), (until, last) = steps[SKIPPED - 1], steps[-1]
    losses = [point["loss"] for _, point in points if "loss" in point and point["step"] > last["step"] - LAST]
    # Ours has them among its figures.
    figures = result.get("figures", result)
    return Run(
        tokens_per_s=(last["tokens"] - first["tokens"]) / (until - since),
        memory_mb=memory_mb,
        began_s=steps[0][0] - began,
        tokens=last["tokens"],
        padding=figures["padding_share"],
        loss=statistics.fmean(losses),
        learning=result.get("learning"),
        kinds=tuple(result["kinds"] + result["base_kinds"]) if "kinds" in result else None,
    )


def trainers() -> dict[str, list[str]]:
    """Return the command of each trainer that there is, without its last word."""
    child = str(HERE / "training_child.py")
    # -P: a file beside the script, datasets.py, would be taken for the package of that name.
    found = {
        OURS: [sys.executable, "-P", "-m", "modelyard.trainer"],
        PACKED: [sys.executable, "-P", "-m", "modelyard.trainer"],
        LOOP: [sys.executable, "-P", child, "loop"],
        GROUPED: [sys.executable, "-P", child, "grouped"],
    }
    for name, who in ((TRL, "trl"), (LLAMAFACTORY, "llamafactory")):
        if python := training_rivals.python_of(who):
            found[name] = [str(python), "-P", child, who]
    return found


def measure(
    task: Task, rounds: int, models: Path, commands: Mapping[str, Sequence[str]], threads: int
) -> dict[str, list[Run]]:
    """Let everybody train in each round."""
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, argv in commands.items():
            run = follow(argv, task, models, threads, packing=name == PACKED)
            found[name].append(run)
            print(
                f"{task.model}, round {number + 1}: {name:34} {run.tokens_per_s:8,.0f} tokens/s "
                f"{run.memory_mb:6,.0f} MB, loss {run.loss:.3f}",
                flush=True,
            )
    expect_the_same(found)
    return found


def expect_the_same(found: Mapping[str, Sequence[Run]]) -> None:
    """Make sure that everybody did the same work.

    Raises:
        SystemExit: somebody learnt from other tokens, with other weights, or to another end.
    """
    checks: list[tuple[str, Callable[[Run], Any]]] = [
        ("tokens", lambda run: run.tokens),
        ("weights that learn", lambda run: run.learning),
        ("kinds of numbers", lambda run: run.kinds),
    ]
    runs = [(name, run) for name, some in found.items() for run in some]
    for what, value in checks:
        if len({value(run) for _, run in runs} - {None}) > 1:
            raise SystemExit(f"not the same {what}: { {name: value(run) for name, run in runs} }")
    middle = statistics.median(run.loss for _, run in runs)
    for name, run in runs:
        if abs(run.loss / middle - 1) > TOLERANCE:
            raise SystemExit(f"{name} came to a loss of {run.loss:.3f}, the middle of all is {middle:.3f}")


def speed_lines(task: Task, found: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return a task's table."""
    tokens = next(iter(found.values()))[0].tokens
    goals = {LOOP: f", goal {GOAL}"}
    lines = [
        f"### {task.title}",
        "",
        f"{tokens:,} tokens of the rows; rounds: {len(next(iter(found.values())))}.",
        "",
        "|  | tokens per second, median (range) | Modelyard beside it, median of the rounds (range) | padding "
        "| peak memory | process to first step |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        speeds = [run.tokens_per_s for run in runs]
        beside = ""
        if name != OURS:
            ratios = [ours.tokens_per_s / run.tokens_per_s for ours, run in zip(found[OURS], runs, strict=True)]
            beside = report.spread(ratios) + goals.get(name, "")
        lines.append(
            f"| {name} | {report.spread(speeds, ',.0f')} | {beside} "
            f"| {statistics.median(run.padding for run in runs):.0%} "
            f"| {statistics.median(run.memory_mb for run in runs):,.0f} MB "
            f"| {statistics.median(run.began_s for run in runs):.1f} s |"
        )
    return [*lines, ""]


def speed(rounds: int, models: Path, tasks: Sequence[Task], threads: int) -> list[str]:
    """Measure the trainings, and return the section about them."""
    commands = trainers()
    lines = [
        "LoRA of rank 16 on all linear layers, base in bfloat16, adapter in float32, AdamW; only what assistants say "
        f"is learnt; threads: {threads}. Tokens are those of the rows: padding, named as a share of all that is "
        "computed, costs its time but does not count.",
        "",
    ]
    for task in tasks:
        lines += speed_lines(task, measure(task, rounds, models, commands, threads))
    if TRL in commands:
        pinned = ", ".join(pin.replace("==", " ") for pins in training_rivals.PINS.values() for pin in pins)
        lines += [f"Others: {pinned}, both under autocast to bfloat16, as they are by default."]
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "start"])
    parser.add_argument("--model", choices=[task.model for task in TASKS], help="measure the speed on one model only")
    parser.add_argument("--rounds", type=int, default=3)
    # As many as a server gives to its trainer.
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    sections = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch) / "models"
        make = [sys.executable, "-P", str(HERE / "training_inputs.py"), str(models)]
        subprocess.run(make, check=True, env={**os.environ, "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
        if arguments.only != "start":
            tasks = [task for task in TASKS if arguments.model in (None, task.model)]
            sections["Training"] = speed(arguments.rounds, models, tasks, arguments.threads)
        if arguments.only != "speed":
            rows = conversations(TASKS[0].rows)
            starts = training_start.measure(models, TINY, rows, Path(scratch) / "data", arguments.rounds)
            sections["Start of a training"] = training_start.lines(starts, training_start.imports())
    for subject, lines in sections.items():
        print("\n".join(["", subject, "", *lines]), flush=True)
        if arguments.write:
            report.write(HERE / "RESULTS.md", subject, lines)


if __name__ == "__main__":
    main()
