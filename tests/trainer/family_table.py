"""The table of families in docs/families.md: `python -m tests.trainer.family_table` tries all, and writes it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.eventually import PATIENCE_S
from tests.servers.families import NEED_A_GPU, STEPS
from tests.trainer.families import FAMILIES, SERVED
from tests.trainer.runs import environment

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = """# Families of models

Each family that transformers has as a language model and vLLM serves was tried as a tiny model of random weights: an
adapter is trained for four steps with the default `target_modules`, killed after the second, and resumed; it is held
against PEFT, and loaded into vLLM's own model of the architecture by the engine's own code. A test holds this table
against what it finds; `python -m tests.trainer.family_table` writes it.

- **adapters on**: the linear layers that text reaches, that can be trained, and that the engine serves. Routed experts
  and the layers that choose among them have none.
- **packs**: `packing` is taken; elsewhere it is refused, since a row would be told of the one before it.
- **PEFT reads it**: PEFT 0.21 by itself reads the adapter's files as they are, and answers as the trained model does.
  Where it does not, export the model merged for use outside.
- **served with adapters**: *yes*, tried; *on a GPU*: vLLM says so, and has no kernels to try it without; *no*: vLLM
  serves the model and no adapters on it: export it merged, and deploy that.

| family | class | adapters on | trains, resumes | packs | PEFT reads it | served with adapters |
|---|---|---|---|---|---|---|
"""


@dataclass
class Tried:
    """What trying a family came to: the answers of `tests.servers.families`."""

    family: str
    train: dict[str, Any]
    resume: dict[str, Any]
    serve: dict[str, Any]
    #: The ends of the logs.
    log: str

    @property
    def facts(self) -> dict[str, Any]:
        """What the resumed training told."""
        return dict(self.resume.get("result", {}))

    @property
    def served(self) -> dict[str, Any]:
        """What the engine's code told."""
        return dict(self.serve.get("result", {}))

    def row(self) -> str:
        """Return the family's row of the table."""
        facts = self.facts
        kinds = sorted({re.sub(r"(\.\d+)+$", "", layer).rpartition(".")[2] for layer in facts.get("layers", ())})
        trains = self.train == {"signal": signal.SIGKILL} and facts.get("steps") == STEPS
        resumes = bool(facts.get("resumed_from"))
        if self.family in NEED_A_GPU:
            served = "on a GPU" if self.served.get("lora") else "no"
        else:
            served = _yes(self.served.get("loaded") == 1)
        cells = (
            f"`{self.family}`",
            facts.get("architecture", "?"),
            " ".join(kinds),
            f"{_yes(trains)}, {_yes(resumes)}",
            _yes(facts.get("packs")),
            _yes(facts.get("peft_reads")),
            served,
        )
        return f"| {' | '.join(cells)} |"


def _yes(claim: Any) -> str:
    return "yes" if claim else "no"


class Forks:
    """The process that forks one for each thing that is done with a family."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._read()["ready"]

    def do(self, do: str, family: str, folder: Path) -> dict[str, Any]:
        """Do one thing, and return what came of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "family": family, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def try_family(self, family: str, folder: Path) -> Tried:
        """Train a family's tiny model, kill that, go on, and load the adapter as an engine does."""
        folder.mkdir(parents=True)
        train, resume, serve = (self.do(each, family, folder) for each in ("train", "resume", "serve"))
        logs = "".join(path.read_text("utf-8")[-1500:] for path in sorted(folder.glob("*.log")))
        return Tried(family, train, resume, serve, logs)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return dict(json.loads(line))


@contextmanager
def forking(folder: Path) -> Iterator[Forks]:
    """Give the process that forks, and end it."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(folder / "families.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.servers.families"],
            # Inkling's own collective operation would drop adapters, and vLLM refuses both together.
            env={**environment(), **quiet, "INKLING_MULTIMEM_AR": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield Forks(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def main() -> None:
    """Try the families that are named, or all, and write the table."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch, forking(Path(scratch)) as forks:
        for family in sys.argv[1:] or FAMILIES:
            tried = forks.try_family(family, Path(scratch) / family)
            rows[family] = tried.row()
            wrong = {name: said for name in ("train", "resume", "serve") if (said := getattr(tried, name)).get("error")}
            sys.stdout.write(f"{rows[family]}{os.linesep}" + (f"    {wrong}{os.linesep}" if wrong else ""))
            sys.stdout.flush()
    if TABLE.exists() and sys.argv[1:]:
        there = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("| `")]
        rows = {line.split("`")[1]: line for line in there} | rows
    # Those that are served with adapters first.
    order = sorted(rows, key=lambda family: (family not in SERVED, family))
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(HEAD + "".join(f"{rows[family]}\n" for family in order), "utf-8")


if __name__ == "__main__":
    main()
