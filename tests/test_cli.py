"""The command line as a user meets it: settings from the environment, refusals in one line, an end in good order."""

from __future__ import annotations

import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.server import environment, run_modelyard, serving

FORBIDDEN = ("torch", "transformers", "vllm", "peft", "huggingface_hub", "boto3", "botocore", "alembic")


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_names_every_command_with_what_it_does(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ended = run_modelyard(*arguments, cwd=tmp_path)
    shown = ended.stdout + ended.stderr
    assert ended.returncode == (0 if arguments else 2)
    for command in ("serve", "migrate", "doctor", "demo"):
        assert re.search(rf"\b{command}\s+\w+", shown), command
    assert "MODELYARD_" in shown


@pytest.mark.parametrize("command", ["serve", "migrate", "doctor", "demo"])
def test_every_command_explains_itself(tmp_path: Path, command: str) -> None:
    ended = run_modelyard(command, "--help", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Usage: modelyard" in ended.stdout.replace("python -m ", "")


def test_serve_runs_from_any_folder_and_leaves_nothing_there(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        assert server.get("/health").status == 200
        left = {path.name for path in (tmp_path / "data-server").iterdir()}
        assert left == {"stdout.txt", "stderr.txt"}
        assert server.log == "", "a start that goes well is silent on stderr"


def test_the_first_line_names_the_address_and_the_documentation(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        lines = (tmp_path / "data-server" / "stdout.txt").read_text("utf-8").splitlines()
        assert lines == [
            f"Modelyard listens on {server.address} (documentation: {server.address}/api/docs)",
        ]


def test_settings_come_from_a_file_in_the_folder_and_the_environment_comes_before_it(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MODELYARD_DATA_DIR={tmp_path}/from-file\nMODELYARD_LOG_LEVEL=debug\n", "utf-8")
    assert run_modelyard("migrate", cwd=tmp_path).stdout.startswith(f"sqlite:///{tmp_path}/from-file/modelyard.db: ")
    ended = run_modelyard("migrate", cwd=tmp_path, MODELYARD_DATA_DIR=f"{tmp_path}/from-environment")
    assert ended.stdout == f"sqlite:///{tmp_path}/from-environment/modelyard.db: brought up to date.\n"


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_a_misspelt_setting_is_one_line_with_the_right_spelling(tmp_path: Path, command: str) -> None:
    ended = run_modelyard(command, cwd=tmp_path, MODELYARD_DATADIR=str(tmp_path / "data"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "modelyard: There is no setting MODELYARD_DATADIR. Did you mean MODELYARD_DATA_DIR?\n"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://[bucket", "invalid IPv6 URL"),
        ("s3:///prefix", "the bucket is missing"),
        ("file:///dev/null/objects", "Objects cannot be kept in /dev/null/objects"),
        ("s3://key:hunter2@bucket", "must hold no credentials"),
    ],
)
def test_a_bad_storage_url_is_one_line_and_nothing_stays_locked(tmp_path: Path, url: str, words: str) -> None:
    done = run_modelyard(
        "serve", cwd=tmp_path, MODELYARD_DATA_DIR=str(tmp_path / "data"), MODELYARD_STORAGE_URL=url, MODELYARD_PORT="0"
    )
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("modelyard: ")
    assert words in line
    assert "hunter2" not in line
    with serving(tmp_path / "data"):
        pass


def test_a_name_in_the_file_that_nothing_reads_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MODELYARD_DATA_DIR={tmp_path}/data\nMODELYARD_PORT=0\nPORT=hunter2\n", "utf-8")
    said = "Nothing reads PORT from .env. Did you mean MODELYARD_PORT?"
    with subprocess.Popen(
        [sys.executable, "-m", "modelyard", "serve"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Modelyard listens on")
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=30)[1]
    assert f"WARNING modelyard.server: {said}" in log
    assert "hunter2" not in log
    assert process.returncode == 0


def test_a_port_that_is_taken_is_one_line_and_nothing_stays_locked(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for _ in range(2):
            ended = run_modelyard("serve", cwd=tmp_path, MODELYARD_PORT=port, MODELYARD_DATA_DIR=str(tmp_path / "data"))
            assert (ended.returncode, ended.stdout) == (2, "")
            assert re.fullmatch(
                rf"modelyard: Cannot listen on 127\.0\.0\.1:{port}: Address already in use\. .*MODELYARD_PORT.*\n",
                ended.stderr,
            )


def test_it_listens_on_ipv6_as_well(tmp_path: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with subprocess.Popen(
        [sys.executable, "-m", "modelyard", "serve"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(MODELYARD_HOST="::1", MODELYARD_PORT="0", MODELYARD_DATA_DIR=str(tmp_path / "data")),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            if not line:
                pytest.skip(f"no IPv6 here: {process.communicate()[1].decode()}")
            port = int(re.match(r"Modelyard listens on http://\[::1\]:(\d+) ", line)[1])  # type: ignore[index]
            with socket.create_connection(("::1", port), timeout=10) as connection:
                connection.sendall(f"GET /ready HTTP/1.1\r\nHost: [::1]:{port}\r\nConnection: close\r\n\r\n".encode())
                assert b"200 OK" in connection.recv(4096)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_good_order_when_asked(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path / "data") as server:
        started = time.monotonic()
        server.signal(number)
        assert server.wait() == 0
        assert time.monotonic() - started < 20
        assert server.log == ""
        assert server.processes() == {}


async def test_it_ends_in_good_order_while_a_client_follows_a_job(tmp_path: Path) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
    with silent, serving(tmp_path / "data", HF_ENDPOINT=endpoint) as server:
        job_id = server.post("/api/v1/models/add/?model_id=no/such").json()["id"]
        await eventually(lambda: server.processes(), "the download's child runs")
        with server.opened("GET", f"/api/v1/jobs/{job_id}/events") as stream:
            assert stream.status == 200
            assert stream.readline()
            started = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - started < 20
            assert stream.read().endswith(b"\n\n"), "the stream has come to its end, between two events"
        assert server.log == ""
        assert server.processes() == {}, "the download's child ended with it"
        server.start()
        assert server.get(f"/api/v1/jobs/{job_id}/status").json()["status"] == "RUNNING", "and goes on with the server"


def test_neither_the_server_nor_what_it_loads_imports_what_belongs_to_children() -> None:
    script = "import sys, modelyard.server; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(asked.stdout.split())
    assert "fastapi" in loaded
    assert loaded.isdisjoint(FORBIDDEN)


def test_a_running_server_has_mapped_no_library_of_torch_and_stays_small(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        server.stop()
        server.start()  # one that has nothing to migrate
        for path in ("/ready", "/metrics", "/api/openapi.json", "/api/v1/models/", "/api/v1/jobs/", "/v1/models"):
            assert server.get(path).status == 200
        maps = Path(f"/proc/{server.pid}/maps").read_text("utf-8")
        assert "uvloop" in maps
        assert not re.search(r"libtorch|/(torch|vllm|transformers|tokenizers|numpy)/", maps)
        status = Path(f"/proc/{server.pid}/status").read_text("ascii")
        resident_kib = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]
        assert resident_kib * 1024 < 120e6


def frameworks_cpu_s() -> float:
    """Return the processor time, in seconds, of a Python that loads the packages the server is made of, and ends."""
    packages = "fastapi, uvicorn, uvloop, httptools, sqlalchemy.ext.asyncio, sqlalchemy.orm, pydantic_settings, typer"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {packages}, prometheus_client"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.slow
def test_a_start_adds_little_to_the_loading_of_its_packages(tmp_path: Path) -> None:
    """In seconds of the processor; `make bench` says how soon it answers."""
    from benchmarks.startup import GOAL_MB, Start, measure

    starts: list[Start] = []
    yardsticks: list[float] = []
    for _ in range(4):
        starts.append(measure(tmp_path / "data", idle_s=0.0))
        yardsticks.append(frameworks_cpu_s())
        if min(start.cpu_s for start in starts) < 1.5 * min(yardsticks):
            break
    else:
        pytest.fail(f"{starts} beside {yardsticks}")
    assert starts[-1].memory_mb < GOAL_MB
