"""How long a deploy takes: from POST /deploy to the first token, beside the same vLLM command started by hand.

    python benchmarks/deploy.py [--rounds 2] [--write]

The two in turn, A B A B, on a tiny model. By hand means: the very command that Modelyard's engine ran with, from the
job's log, with the same environment variables, on a socket of its own, asked for one token as often as a patient shell
script would (every 0.1 s). The first start of all warms the page cache and is not counted. --write puts the table into
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.server import Server, serving

from benchmarks import report

HERE = Path(__file__).resolve().parent
MODEL = "local:tiny-llama"
LIMIT_S = 300.0
POLL_S = 0.1


class UnixConnection(http.client.HTTPConnection):
    """HTTP to an engine's socket."""

    def __init__(self, path: str) -> None:
        super().__init__("engine", timeout=LIMIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def first_token(ask: Any) -> None:
    """Ask for one token until it comes."""
    body = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 1})
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        with suppress(OSError, http.client.HTTPException):
            connection = ask()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            if connection.getresponse().status == 200:
                return
        time.sleep(POLL_S)
    raise SystemExit("no token came in time")


def deploy(server: Server) -> tuple[float, list[str], dict[str, str]]:
    """Deploy the model and take it down; return the seconds to the first token, and the engine's argv and variables."""
    began = time.monotonic()
    job_id = server.post("/api/v1/deploy/", {"model_id": MODEL}).json()["id"]
    first_token(lambda: http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S))
    seconds = time.monotonic() - began
    head = next(line for line in server.get(f"/api/v1/jobs/{job_id}/log").text.splitlines() if "=== attempt" in line)
    argv = shlex.split(head.split(": ", 1)[1].split("UTC: ")[-1])
    pid = next(pid for pid, command in server.processes().items() if " -m vllm" in command)
    variables = dict(
        item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text("utf-8").split("\0") if "=" in item
    )
    server.post("/api/v1/deploy/interrupt/")
    while server.processes():
        time.sleep(POLL_S)
    return seconds, argv, variables


def by_hand(argv: list[str], variables: dict[str, str]) -> float:
    """Start the command as it is, on another socket; return the seconds to the first token."""
    folder = tempfile.mkdtemp(prefix="by-hand-")
    place = argv.index("--uds") + 1
    argv = [*argv[:place], f"{folder}/engine.sock", *argv[place + 1 :]]
    variables = {**variables, "VLLM_RPC_BASE_PATH": folder}
    variables.pop("MODELYARD_CHILD", None)
    began = time.monotonic()
    with open(f"{folder}/log", "wb") as log:
        engine = subprocess.Popen(argv, env=variables, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        first_token(lambda: UnixConnection(f"{folder}/engine.sock"))
        return time.monotonic() - began
    finally:
        engine.send_signal(signal.SIGTERM)
        engine.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        imports = Path(scratch, "imports")
        make = [sys.executable, "-m", "modelyard.demo.tiny_llama", str(imports / "tiny-llama")]
        subprocess.run(make, check=True)
        with serving(Path(scratch, "data"), MODELYARD_IMPORT_DIR=str(imports)) as server:
            server.post(f"/api/v1/models/add/?model_id={MODEL}")
            while not server.get("/api/v1/models/").json():
                time.sleep(POLL_S)
            _, argv, variables = deploy(server)
            deployed, started = [], []
            for number in range(arguments.rounds):
                started.append(by_hand(argv, variables))
                seconds, argv, variables = deploy(server)
                deployed.append(seconds)
                print(f"round {number + 1}: by hand {started[-1]:.1f} s, deployed {deployed[-1]:.1f} s", flush=True)
    more = [ours - theirs for ours, theirs in zip(deployed, started, strict=True)]
    lines = [
        "From the wish to the first token, a tiny Llama on real vLLM, in turn; medians "
        f"of {arguments.rounds} rounds (lowest to highest).",
        "",
        "|  | seconds |",
        "|---|---|",
        f"| the vLLM command by hand | {_spread(started)} |",
        f"| POST /api/v1/deploy/ | {_spread(deployed)} |",
        f"| the difference, round by round | {_spread(more)} |",
    ]
    print("\n".join(lines))
    if arguments.write:
        report.write(HERE / "RESULTS.md", "Deploy", lines)


def _spread(values: list[float]) -> str:
    return report.spread(values, ".1f")


if __name__ == "__main__":
    main()
