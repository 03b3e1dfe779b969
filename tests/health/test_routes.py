"""Health, readiness and figures of a real server with two imitated engines."""

from __future__ import annotations

import functools
import resource
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import modelyard
from tests.eventually import eventually
from tests.fixtures import S3Server
from tests.models import repositories
from tests.server import ENGINE_PYTHON, Server, serving

CHAT = {"model": "local:tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


def bring_in(server: Server, imports: Path, name: str, files: dict[str, bytes]) -> None:
    """Add a model to the store and put it into service."""
    for path, content in files.items():
        target = imports / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    job = server.post(f"/api/v1/models/add/?model_id=local:{name}").json()["id"]
    within(lambda: server.get(f"/api/v1/jobs/{job}/status").json()["status"] == "FINISHED", f"{name} is in the store")
    answer = server.post("/api/v1/deploy/", {"model_id": f"local:{name}"})
    assert answer.status == 200, answer.text


def within(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)


def is_ready(server: Server, task: str) -> bool:
    return bool(server.get(f"/api/v1/deploy/?task={task}").json().get("state") == "READY")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a generating and an embedding model in service."""
    folder = tmp_path_factory.mktemp("health")
    imports = folder / "imports"
    imports.mkdir()
    settings = {
        "MODELYARD_ENGINE_PYTHON": str(ENGINE_PYTHON),
        "MODELYARD_IMPORT_DIR": str(imports),
        "MODELYARD_DISK_RESERVE_GIB": "0",
        "MODELYARD_ENGINE_STOP_TIMEOUT_S": "1",
    }
    with serving(folder / "data", **settings) as server:
        bring_in(server, imports, "tiny", repositories.llama())
        bring_in(server, imports, "vectors", repositories.embedder())
        for task in ("generate", "embed"):
            within(functools.partial(is_ready, server, task), f"{task} is in service")
        yield server


def samples(server: Server) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Read the figures as Prometheus does; fail if a sample is there twice or a family in two places."""
    answer = server.get("/metrics")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = {}
    families = []
    for family in text_string_to_metric_families(answer.text):
        families.append(family.name)
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, key
            found[key] = sample.value
    assert len(families) == len(set(families))
    return found


def test_health_says_that_it_is_alive_and_which_version(server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok", "version": modelyard.__version__}


def test_readiness_is_ready_with_models_in_service(server: Server) -> None:
    answer = server.get("/ready")
    assert (answer.status, answer.json()) == (200, {"ready": True, "reasons": []})


def test_the_figures_are_the_servers_and_each_engines_told_apart_by_their_deployment(server: Server) -> None:
    found = samples(server)
    names = {name for name, _ in found}
    assert {"process_resident_memory_bytes", "python_info", "modelyard_gateway_requests_in_flight"} <= names
    by_engine: dict[str, set[str]] = {}
    for name, labels in found:
        deployment = dict(labels).get("deployment")
        if deployment is not None:
            by_engine.setdefault(deployment, set()).add(name)
        else:
            assert not name.startswith("vllm:")
    assert by_engine.keys() == {"local:tiny", "local:vectors"}
    assert by_engine["local:tiny"] == by_engine["local:vectors"]
    assert all(name.startswith("vllm:") for name in by_engine["local:tiny"])


def test_a_request_is_counted_once_with_its_endpoint_model_and_status(server: Server) -> None:
    key = (
        "modelyard_gateway_requests_total",
        frozenset({("endpoint", "chat/completions"), ("model", "local:tiny"), ("status", "200")}),
    )
    before = samples(server).get(key, 0.0)
    assert server.post("/v1/chat/completions", CHAT).status == 200
    within(lambda: samples(server).get(key) == before + 1, "it is counted")
    assert samples(server)["modelyard_gateway_requests_in_flight", frozenset()] == 0


async def test_storage_that_is_gone_is_a_reason_not_to_be_ready(tmp_path: Path) -> None:
    store = tmp_path / "objects"
    with serving(tmp_path / "data", MODELYARD_STORAGE_URL=f"file://{store}") as server:
        assert server.get("/ready").status == 200
        store.rename(tmp_path / "aside")
        await eventually(lambda: server.get("/ready").status == 503, "not ready")
        (reason,) = server.get("/ready").json()["reasons"]
        assert str(store) in reason
        assert server.get("/health").status == 200
        (tmp_path / "aside").rename(store)
        await eventually(lambda: server.get("/ready").status == 200, "ready again")


def test_a_locked_database_is_told_as_such_and_so_is_one_whose_disk_is_full(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        path = tmp_path / "data" / "modelyard.db"
        assert server.get("/ready").status == 200
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        answer = server.get("/ready")
        assert time.monotonic() - began < 6
        assert (answer.status, answer.json()["reasons"][0].split(":")[0]) == (503, "database_locked")
        assert "backup" in answer.text
        refused = server.post("/api/v1/models/add/?model_id=org/tiny")
        assert (refused.status, refused.error_code) == (503, "database_locked")
        holder.execute("ROLLBACK")
        assert server.get("/ready").status == 200

        holder.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        holder.close()
        # The kernel's own refusal, as of a full disk.
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, hard))
        answer = server.get("/ready")
        assert (answer.status, answer.json()["reasons"][0].split(":")[0]) == (503, "database_full")
        refused = server.post("/api/v1/models/add/?model_id=org/tiny")
        assert (refused.status, refused.error_code) == (503, "database_full")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert server.get("/ready").status == 200


@pytest.mark.s3
def test_readiness_and_an_upload_are_answered_in_time_while_the_store_hangs(
    tmp_path: Path, s3_server: S3Server
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, and never says a word
        settings = {
            "MODELYARD_STORAGE_URL": f"s3://{s3_server.bucket}/hanging",
            "MODELYARD_S3_ENDPOINT_URL": f"http://127.0.0.1:{mute.getsockname()[1]}",
            "MODELYARD_STORAGE_TIMEOUT_S": "3",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        with serving(tmp_path / "data", **settings) as server:
            for _ in range(3):
                began = time.monotonic()
                answer = server.get("/ready")
                assert answer.status == 503
                assert "storage does not answer" in answer.text or "cannot be reached" in answer.text
                assert time.monotonic() - began < 6
            row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
            form = f'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{row}\r\n--x--\r\n'
            began = time.monotonic()
            answer = server.request(
                "POST", "/api/v1/datasets/upload/", body=form.encode(),
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            )  # fmt: skip
            assert (answer.status, answer.error_code) == (503, "storage_unavailable")
            assert time.monotonic() - began < 15
