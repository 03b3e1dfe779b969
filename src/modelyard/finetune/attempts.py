"""One run of the trainer child: its folder, its command, its end.

    attempt-<n>/training.json     what it is to do (`trainer.spec`)
    attempt-<n>/progress.jsonl    what it reports
    attempt-<n>/result.json       what came of it

A child that died is told from one that failed, and one that the system killed for its memory from one that was killed
otherwise, as far as the kernel's own counters tell.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard import evidence
from modelyard.child_environment import child_environment
from modelyard.finetune.tables import Finetune
from modelyard.hardware import GIB
from modelyard.models import store
from modelyard.models.ids import folder_name
from modelyard.models.tables import Model
from modelyard.processes import Child, Command, Outcome
from modelyard.settings import Settings
from modelyard.trainer.spec import Hyperparameters, Mode, Spec

MIB = 1024**2
#: How much of its log shows how a child died.
LAST_LINES, LAST_BYTES = 8, 4096
#: How a library says that it got no memory, before it aborts the process: Rust's (the tokenizer) and C++'s.
_ABORTED = re.compile(r"memory allocation of (\d+) bytes failed|std::bad_alloc")
#: How the launcher of several processes says that a signal ended one of them; itself it leaves with an exit code.
_KILLED = re.compile(r"^ *exitcode *: -(\d+) ", re.MULTILINE)


def newest(folder: Path) -> int:
    """Return the number of the newest attempt in a job's folder, 0 if there was none."""
    return len(list(folder.glob("attempt-*")))


def spec_of(
    row: Finetune, base: Model, settings: Settings, *, data: Path, work: Path, folder: Path, memory_bytes: int | None
) -> Spec:
    """Return what the trainer is to do in the attempt that has a folder."""
    tensorboard = settings.tensorboard_dir
    return Spec(
        mode=Mode.TRAIN,
        name=row.name,
        model_id=row.model_id,
        model_dir=str(store.folder_of(settings.models_dir, base.path)),
        adapter_id=row.adapter_id,
        data=str(data),
        max_line_bytes=settings.dataset_line_mib * MIB,
        hyperparameters=Hyperparameters(**row.hyperparameters),
        work_dir=str(work),
        progress=str(folder / "progress.jsonl"),
        result=str(folder / "result.json"),
        now=row.created_at.timestamp(),
        tensorboard_dir=str(tensorboard / folder_name(row.adapter_id)) if tensorboard is not None else None,
        memory_bytes=memory_bytes,
        disk_reserve_bytes=int(settings.disk_reserve_gib * GIB),
    )


def command(settings: Settings, folder: Path, env: Mapping[str, str], processes: int = 1) -> Command:
    """Return the command of the attempt in a folder; `env` says which accelerator is its.

    More than one process are started, and ended with one another, by `accelerate launch` (`trainer.launcher`).
    """
    python = str(settings.trainer_python or sys.executable)
    threads = str(max(1, physical_cores() // processes))
    extra = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
    trainer = ("-m", "modelyard.trainer", str(folder / "training.json"))
    if processes == 1:
        return Command((python, "-P", *trainer), child_environment(extra | dict(env)))
    launch = (
        "-m", "modelyard.trainer.launcher",
        # Its --cpu would start one process; the trainers themselves take the processor where there is no GPU.
        "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--log_dir", str(folder),
    )  # fmt: skip
    alone = {
        # What -P says, for each process.
        "PYTHONSAFEPATH": "1",
        # The configuration of whoever's home this is must not steer it.
        "HF_HOME": str(folder / "hf"),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # The launcher passes SIGTERM on; it must not kill what still writes a checkpoint.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(settings.trainer_stop_timeout_s)),
    }
    return Command((python, *launch, *trainer), child_environment(extra | alone | dict(env)))


def physical_cores(sysfs: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return how many cores this server may use: threads of one core that compute only wait for each other."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add((sysfs / f"cpu{cpu}/topology/thread_siblings_list").read_text("ascii"))
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what the trainer wrote as its result; None if it wrote none that is whole."""
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if isinstance(result, dict) else None


@dataclass(frozen=True)
class Kills:
    """Processes that the kernel has killed for want of memory: on the machine, and in this server's container."""

    machine: int
    container: int

    @classmethod
    def so_far(cls, vmstat: Path = Path("/proc/vmstat"), cgroup: Path = Path("/sys/fs/cgroup")) -> Kills:
        """Read the kernel's counters; what cannot be read is 0."""
        return cls(_counter(vmstat), _counter(cgroup / "memory.events"))


def _counter(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text("ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def death(child: Child, log: Path, before: Kills, memory_bytes: int | None, taken_bytes: int) -> dict[str, Any]:
    """Return the failure of a child that ended without a result.

    Args:
        child: The child.
        log: What it wrote.
        before: The kernel's counters from before it started, or was adopted.
        memory_bytes: What it had been given; None where that is not known.
        taken_bytes: What it had taken when it last said so; 0 if it never did.
    """
    outcome = child.outcome or Outcome(None, None)
    words = _last_words(log)
    if (killed := _KILLED.search("\n".join(words))) is not None and outcome.exit_code:
        outcome = Outcome(None, int(killed[1]))
    shown = evidence.clipped(words[-LAST_LINES:])
    if outcome.signal is None and outcome.exit_code is not None:
        return {
            "code": "trainer_died",
            "message": f"The trainer ended before its work was done ({outcome.describe()}).",
            "hint": "Look at the job's log. MODELYARD_TRAINER_PYTHON must be a Python with torch, transformers and "
            "peft: `modelyard doctor` checks it.",
            "evidence": shown,
        }
    figures = [f"had been given {memory_bytes / GIB:.1f} GiB of memory"] if memory_bytes is not None else []
    figures += [f"had taken {taken_bytes / GIB:.1f} GiB when it last said so"] if taken_bytes else []
    given = f" It {' and '.join(figures)}." if figures else ""
    if (shortage := shortage_of(outcome, words)) is not None:
        return {
            "code": "out_of_memory",
            "message": f"Memory did not suffice: {shortage}, and the trainer ended ({outcome.describe()}).{given}",
            "hint": "Rows take memory by their number and length: train on fewer or shorter ones. Or set batch_size, "
            "higher than auto took it: more memory is set aside for such a training, where the machine has it free.",
            "evidence": shown,
        }
    now = Kills.so_far()
    for_memory = now.container > before.container or now.machine > before.machine
    known = ", for want of memory, as the kernel's counter says" if for_memory else ""
    return {
        "code": "trainer_killed",
        "message": f"The trainer was ended from outside ({outcome.describe()}{known}).{given}",
        "hint": "If memory is short, free some, or train with a smaller batch_size, max_seq_len or rank. Then POST "
        "/api/v1/finetune/{id}/resume/ goes on from the last checkpoint.",
        "evidence": shown,
    }


def shortage_of(outcome: Outcome, words: Sequence[str]) -> str | None:
    """Return in words the allocation for which a process aborted itself; None: it ended of something else.

    `words` are the last lines of its log.
    """
    found = _ABORTED.search("\n".join(words)) if outcome.signal == signal.SIGABRT else None
    if found is None:
        return None
    return f"an allocation of {int(found[1]) / MIB:.1f} MiB failed" if found[1] else "an allocation failed"


def _last_words(log: Path) -> list[str]:
    """Return the last lines of a log that may not be there."""
    with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()
    return []
