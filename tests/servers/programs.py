"""Forks processes that run a program each, without the seconds that importing torch and vLLM takes.

On standard input, lines `{"code", "argv", "folder", "environment", "path"}`; on standard output, after each, a line
`{"status", "stdout", "stderr"}`; `status` is the exit code, or the negative number of the signal. It ends
with its standard input. What our plugins change is not imported here: a program finds it as a fresh process does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

#: What our plugins change: a program imports it itself.
UNTOUCHED = ("vllm.lora.punica_wrapper", "vllm.v1.sample.logits_processor", "vllm.lora.model_manager")


class Programs:
    """The process that forks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._read()["ready"]

    def run(
        self,
        code: str,
        *argv: str,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        path: Sequence[Path] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, in a folder, with more in its environment and on its `sys.path`."""
        assert self._process.stdin is not None
        order = {"code": code, "argv": argv, "folder": str(folder or Path.cwd()),
                 "environment": dict(environment or {}), "path": [str(one) for one in path]}  # fmt: skip
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        said = self._read()
        return subprocess.CompletedProcess(code, said["status"], said["stdout"], said["stderr"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks programs has ended"
        return dict(json.loads(line))


@contextmanager
def forking(log: Path) -> Iterator[Programs]:
    """Give a process that forks programs, and end it."""
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.servers.programs"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        yield Programs(process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def main() -> None:
    """Import what is slow, then fork for each line."""
    import torch
    import transformers  # noqa: F401
    import vllm.config
    import vllm.plugins  # noqa: F401

    assert not set(UNTOUCHED) & sys.modules.keys()
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps({"ready": True}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            pid = os.fork()
            if pid == 0:
                os._exit(run(order, stdout, stderr))
            _, status = os.waitpid(pid, 0)
            texts = []
            for file in (stdout, stderr):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        said = {"status": os.waitstatus_to_exitcode(status), "stdout": texts[0], "stderr": texts[1]}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


def run(order: dict[str, Any], stdout: IO[bytes], stderr: IO[bytes]) -> int:
    """Run a program in this process, and return its exit code."""
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    sys.path[:0] = order["path"]
    sys.argv = ["-c", *order["argv"]]
    try:
        exec(compile(order["code"], "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
