"""From POST /api/v1/finetune/ to the first step, on a whole server, and what the time goes into.

The trainer's lines of progress are read as they arrive, so that each part ends when whoever follows the job could know
it. What the imports take by themselves is measured in processes that do nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.server import Server, serving

from benchmarks.tiny_yard import until

POLL_S = 0.005
LIMIT_S = 300.0
ANSWER, BEGIN = "POST, answered", "the job begins, has its data and its room, and the trainer's Python runs"
LOAD, ROWS, MODEL, STEP = (
    "configuration and tokenizer, with imports",
    "rows become tokens",
    "base and adapter, with imports",
    "the first step",
)
PARTS = (ANSWER, BEGIN, LOAD, ROWS, MODEL, STEP)
#: The trainer's phases in their order; each ends the part before it.
PHASES = {"loading": BEGIN, "tokenizing": LOAD, "loading again": ROWS, "training": MODEL}
TIMED_IMPORTS = """
import json, time
found, began = {}, time.perf_counter()
def took(name):
    global began
    now = time.perf_counter()
    found[name], began = now - began, now
import torch
took("torch")
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama
took("transformers, its models")
import peft
took("PEFT")
from transformers import Trainer, TrainingArguments
took("transformers, Trainer")
print(json.dumps(found))
"""


class Lines:
    """The lines that are appended to a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the whole lines that came since the last call; none while there is no file."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            return [json.loads(line) for line in whole.splitlines()]
        return []


def measure(models: Path, name: str, rows: Sequence[str], data_dir: Path, rounds: int) -> list[dict[str, float]]:
    """Train that often on a new server with this model in its store; return the seconds of each part, of each time."""
    settings = {"MODELYARD_IMPORT_DIR": str(models), "MODELYARD_DISK_RESERVE_GIB": "0"}
    with serving(data_dir, **settings) as server:
        assert server.post(f"/api/v1/models/add/?model_id=local:{name}").status == 200
        until(lambda: server.get("/api/v1/models/").json(), "the store has the model", 60.0)
        dataset_id = upload(server, rows)
        return [start(server, f"local:{name}", dataset_id, number) for number in range(rounds)]


def upload(server: Server, rows: Sequence[str]) -> str:
    """Upload a dataset and return its id."""
    mark = "a-line-that-no-row-has"
    head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    body = f"{head}{chr(10).join(rows)}\r\n--{mark}--\r\n".encode()
    sent = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    answer = server.request("POST", "/api/v1/datasets/upload/", body=body, headers=sent)
    assert answer.status == 200, answer.text
    found: str = answer.json()["id"]
    return found


def start(server: Server, model_id: str, dataset_id: str, number: int) -> dict[str, float]:
    """Ask for a training, wait for its first step, and have it end; return the seconds of each part.

    Raises:
        SystemExit: it failed, or took no step in time.
    """
    wanted = {
        "name": f"start {number}",
        "model_id": model_id,
        "dataset_id": dataset_id,
        "hyperparameters": {"batch_size": 4, "epochs": 100},
    }
    began = time.perf_counter()
    answer = server.post("/api/v1/finetune/", wanted)
    assert answer.status == 200, answer.text
    parts, last = {ANSWER: time.perf_counter() - began}, time.perf_counter()
    job_id = answer.json()["id"]
    for part, at in _moments(server, job_id):
        parts[part], last = at - last, at
    assert server.post(f"/api/v1/jobs/{job_id}/interrupt/").status == 200
    until(lambda: server.get(f"/api/v1/jobs/{job_id}/status/").json()["finished_at"], "the training ended", 60.0)
    return parts


def _moments(server: Server, job_id: str) -> Iterator[tuple[str, float]]:
    """Yield each part with the moment of its end, until the first step."""
    lines = Lines(server.data_dir / "jobs" / job_id / "attempt-1" / "progress.jsonl")
    seen: list[str] = []
    deadline = time.perf_counter() + LIMIT_S
    while STEP not in seen:
        if time.perf_counter() > deadline:
            raise SystemExit(f"no step was taken within {LIMIT_S:g} s: {server.get('/api/v1/finetune/status/').text}")
        found = lines.new()
        now = time.perf_counter()
        for line in found:
            phase = line.get("phase", "")
            part = STEP if line["kind"] == "point" else PHASES.get(phase if BEGIN not in seen else _later(phase))
            if part and part not in seen:
                seen.append(part)
                yield part, now
        if not found:
            time.sleep(POLL_S)
            if not seen and server.get(f"/api/v1/jobs/{job_id}/status/").json()["finished_at"]:
                raise SystemExit(f"the training failed: {server.get(f'/api/v1/jobs/{job_id}/status/').text}")


def _later(phase: str) -> str:
    return "loading again" if phase == "loading" else phase


def imports(times: int = 3) -> dict[str, float]:
    """Return what each of the trainer's large imports takes, one after the other in a new process; medians."""
    found = []
    for _ in range(times):
        done = subprocess.run([sys.executable, "-P", "-c", TIMED_IMPORTS], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def lines(starts: Sequence[Mapping[str, float]], imported: Mapping[str, float]) -> list[str]:
    """Return the section."""
    totals = [sum(one.values()) for one in starts]
    found = [
        f"Tiny Llama, a whole server, trainings one after the other: {len(starts)}.",
        "",
        "|  | median | range |",
        "|---|---|---|",
        f"| **from POST /api/v1/finetune/ to the first step** | {statistics.median(totals):.1f} s "
        f"| {min(totals):.1f} to {max(totals):.1f} s |",
    ]
    for part in PARTS:
        seconds = [one[part] for one in starts]
        found.append(f"| {part} | {statistics.median(seconds):.2f} s | {min(seconds):.2f} to {max(seconds):.2f} s |")
    named = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in imported.items())
    return [*found, "", f"Of it imports, alone in a process: {named}; together {sum(imported.values()):.1f} s."]
