"""`modelyard doctor`: a line for each thing, right about what is broken, and nothing changed by looking."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelyard.doctor import (
    Finding,
    Verdict,
    check_database,
    check_engine,
    check_hub,
    check_imports,
    check_settings,
    check_training,
)  # fmt: skip
from modelyard.engine.plugins.cures import WITHOUT
from modelyard.settings import Settings, load_settings
from tests.server import run_modelyard, serving


@pytest.fixture
def hub() -> Iterator[str]:
    """An address that answers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def python_with_vllm(folder: Path, answer: str) -> Path:
    """Return what stands for a Python that has vLLM: a program that answers the doctor's question."""
    program = folder / "python-with-vllm"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    return program


HEALTHY = f"echo a warning on the way; echo '{json.dumps(['0.32.0', '2.13.0+cpu', None, 0, [*WITHOUT]])}'"


def lines(text: str) -> dict[str, str]:
    """Return the verdict of each thing that was checked."""
    found = {}
    for line in text.splitlines():
        verdict, _, rest = line.partition(" ")
        if verdict in set(Verdict):
            found[rest.strip().partition(":")[0]] = verdict
    return found


def test_a_machine_without_faults_is_ok_and_nothing_is_made_by_looking(tmp_path: Path, hub: str) -> None:
    python = python_with_vllm(tmp_path, HEALTHY)
    done = run_modelyard(
        "doctor",
        cwd=tmp_path,
        MODELYARD_DATA_DIR=str(tmp_path / "data"),
        MODELYARD_ENGINE_PYTHON=str(python),
        HF_ENDPOINT=hub,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = lines(done.stdout)
    assert set(verdicts) >= {
        "Python",
        "settings",
        "data folder",
        "disk",
        "memory",
        "GPU",
        "database",
        "storage",
        "engine",
        "training",
    }
    assert {name for name, verdict in verdicts.items() if verdict == "FAIL"} == set()
    assert "vLLM 0.32.0, torch 2.13.0+cpu" in done.stdout
    assert list(tmp_path.iterdir()) == [python]


def test_a_name_in_the_file_that_nothing_reads_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # The suite's own variable is no setting, and would be refused as one.
    monkeypatch.delenv("MODELYARD_TEST_REQUIRE", raising=False)
    (tmp_path / ".env").write_text("AWS_REGION=eu-north-1\nMODELYARD_PORT=0\n", "utf-8")
    found = list(check_settings(load_settings()))
    [warned] = [finding for finding in found if finding.verdict is not Verdict.OK]
    assert (warned.verdict, warned.what) == (Verdict.WARN, "settings")
    assert warned.found == "Nothing reads AWS_REGION from .env. Did you mean AWS_DEFAULT_REGION?"


def test_everything_broken_is_named_with_what_to_do_and_the_status_is_1(tmp_path: Path) -> None:
    done = run_modelyard(
        "doctor",
        cwd=tmp_path,
        MODELYARD_DATA_DIR=str(Path("/proc/nowhere")),
        MODELYARD_DATABASE_URL="postgresql://someone:hidden@127.0.0.1:1/x",
        MODELYARD_STORAGE_URL="s3://bucket",
        MODELYARD_S3_ENDPOINT_URL="http://127.0.0.1:1",
        MODELYARD_ENGINE_PYTHON=str(python_with_vllm(tmp_path, "echo 'ModuleNotFoundError: no vllm' >&2; exit 1")),
        HF_ENDPOINT="http://127.0.0.1:1",
    )
    assert done.returncode == 1
    verdicts = lines(done.stdout)
    assert [verdicts[name] for name in ("data folder", "database", "storage", "engine")] == ["FAIL"] * 4
    assert verdicts["hub"] == "WARN"
    assert "ModuleNotFoundError: no vllm" in done.stdout
    assert "requirements/install.py engine" in done.stdout
    assert "hidden" not in done.stdout


def test_beside_a_running_server_it_says_which_process_it_is_and_disturbs_nothing(tmp_path: Path, hub: str) -> None:
    python = python_with_vllm(tmp_path, HEALTHY)
    with serving(tmp_path / "data") as server:
        done = run_modelyard(
            "doctor",
            cwd=tmp_path,
            MODELYARD_DATA_DIR=str(tmp_path / "data"),
            MODELYARD_ENGINE_PYTHON=str(python),
            HF_ENDPOINT=hub,
        )
        assert done.returncode == 0, done.stdout
        assert f"process {server.pid} runs on this data folder" in done.stdout
        assert server.get("/ready").status == 200


def test_a_wrong_setting_is_a_finding_and_no_traceback(tmp_path: Path) -> None:
    done = run_modelyard("doctor", cwd=tmp_path, MODELYARD_PORTT="1")
    assert (done.returncode, done.stderr) == (1, "")
    assert lines(done.stdout)["settings"] == "FAIL"
    assert "Did you mean MODELYARD_PORT?" in done.stdout


def test_a_hub_that_answers_at_all_is_reachable_and_a_wrong_address_is_a_warning(hub: str) -> None:
    def look(endpoint: str) -> Finding:
        return next(check_hub(Settings(HF_ENDPOINT=endpoint, _env_file=None)))

    assert look(hub).verdict is Verdict.OK
    assert look(f"{hub}/no/such/path").verdict is Verdict.OK
    assert look("no address at all").verdict is Verdict.WARN


def test_an_import_folder_that_is_not_there_is_a_warning_and_none_is_nothing_to_say(tmp_path: Path) -> None:
    def look(folder: Path | None) -> list[Verdict]:
        return [finding.verdict for finding in check_imports(Settings(import_dir=folder, _env_file=None))]

    assert look(tmp_path) == [Verdict.OK]
    assert look(tmp_path / "missing") == [Verdict.WARN]
    assert look(None) == []


def test_the_database_is_named_as_the_setting_would_name_it(tmp_path: Path) -> None:
    (finding,) = check_database(Settings(data_dir=tmp_path, _env_file=None))
    assert finding.found == f"sqlite:///{tmp_path}/modelyard.db (made at the first start)"
    (finding,) = check_database(Settings(database_url="postgresql://someone:hidden@host:port/name", _env_file=None))
    assert finding.verdict is Verdict.FAIL
    assert finding.found.startswith("MODELYARD_DATABASE_URL is not an address")


def test_a_python_without_what_trainings_need_is_told_what_is_missing(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', "utf-8")
    python.chmod(0o755)
    (finding,) = check_training(Settings(trainer_python=python, _env_file=None))
    assert finding.verdict is Verdict.WARN
    assert "peft" in finding.found
    assert "requirements/install.py train" in finding.todo
    (finding,) = check_training(Settings(trainer_python=tmp_path / "nothing", _env_file=None))
    assert (finding.verdict, finding.todo) == (Verdict.WARN, "Correct MODELYARD_TRAINER_PYTHON.")


@pytest.mark.engine
def test_the_trainer_of_this_environment_is_found() -> None:
    (finding,) = check_training(Settings(trainer_python=Path(sys.executable), _env_file=None))
    assert finding.found.startswith("torch 2.13.0")
    assert finding.verdict is Verdict.OK


def test_an_engines_python_without_a_cure_is_told(tmp_path: Path) -> None:
    answer = json.dumps(["0.32.0", "2.13.0+cpu", None, 0, sorted(set(WITHOUT) - {"modelyard_lora"})])
    python = python_with_vllm(tmp_path, f"echo '{answer}'")
    warning, _ = check_engine(Settings(engine_python=python, _env_file=None))
    assert (warning.verdict, warning.what) == (Verdict.WARN, "cures for vLLM")
    assert "lacks modelyard_lora" in warning.found
    assert "else requests to the base may be answered with an adapter" in warning.todo


@pytest.mark.engine
def test_the_engine_of_this_environment_is_found() -> None:
    settings = Settings(engine_python=Path(sys.executable), _env_file=None)
    (finding,) = check_engine(settings)
    assert finding.found.startswith("vLLM 0.32.0, torch 2.13.0")
