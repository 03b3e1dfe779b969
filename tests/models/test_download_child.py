"""The download child by itself: its lock, its disk, its end."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelyard.models import download_child, store
from modelyard.models.download_spec import Spec
from tests.eventually import eventually
from tests.models.repositories import llama
from tests.servers.hub import Fault, Hub

TINY = "acme/tiny"
WEIGHTS = "model.safetensors"
SIZE = 1_000_000


def start(hub: Hub, folder: Path, number: int = 1, **changes: Any) -> subprocess.Popen[bytes]:
    """Start a child as the server does, without its keeper."""
    models = folder / "models"
    spec = Spec(
        **{
            "model_id": TINY,
            "revision": "main",
            "models_dir": str(models),
            "partial_dir": str(store.partial_dir(models, TINY)),
            "progress": str(folder / f"progress-{number}"),
            "result": str(folder / f"result-{number}"),
            "reserve_bytes": 0,
            "quota_bytes": None,
            "import_dir": None,
            **changes,
        }
    )
    spec.write(folder / f"spec-{number}")
    argv = [sys.executable, "-m", "modelyard.models.download_child", str(folder / f"spec-{number}")]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")}
    with (folder / f"log-{number}").open("wb") as log:
        return subprocess.Popen(argv, env=environment, stderr=log)


def result_of(folder: Path, number: int = 1) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"result-{number}").read_text())
    return result


async def test_two_children_of_one_model_take_turns(hub: Hub, tmp_path: Path) -> None:
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("slow", bytes_per_s=1_000_000))
    children = [start(hub, tmp_path, number) for number in (1, 2)]
    for child in children:
        assert await asyncio.to_thread(child.wait, 60) == 0
    assert result_of(tmp_path, 1) == result_of(tmp_path, 2)
    assert hub.sent(TINY, WEIGHTS) == len(content[WEIGHTS])


async def test_sigterm_ends_it_at_once_and_what_arrived_stays(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(SIZE))
    hub.misbehave(TINY, WEIGHTS, Fault("stall", after=400_000))
    child = start(hub, tmp_path)
    await eventually(lambda: store.bytes_below(tmp_path / "models") >= 400_000, "400,000 bytes on disk")
    child.terminate()
    assert await asyncio.to_thread(child.wait, 5) == -signal.SIGTERM
    assert store.bytes_below(tmp_path / "models") >= 400_000
    assert not (tmp_path / "result-1").exists()


async def test_a_disk_that_fails_mid_file_is_said_and_what_arrived_stays(hub: Hub, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for a disk that takes no more."""
    hub.add(TINY, llama(SIZE))
    hub.misbehave(TINY, WEIGHTS, Fault("slow", bytes_per_s=2_000_000))
    child = start(hub, tmp_path)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
    assert await asyncio.to_thread(child.wait, 60) == 1
    failure = result_of(tmp_path)["failure"]
    assert failure["code"] == "disk_failed"
    assert "File too large" in failure["message"]
    assert any("[Errno 27]" in line for line in failure["evidence"]), failure["evidence"]
    assert not failure["transient"]
    assert store.bytes_below(tmp_path / "models") >= 300_000
    hub.behave()
    assert await asyncio.to_thread(start(hub, tmp_path, 2).wait, 60) == 0
    assert hub.starts(TINY, WEIGHTS) == [0, 300_000]


async def test_a_model_that_was_damaged_in_the_store_is_brought_again(hub: Hub, tmp_path: Path) -> None:
    content = llama(SIZE)
    hub.add(TINY, content)
    assert await asyncio.to_thread(start(hub, tmp_path).wait, 60) == 0
    weights = tmp_path / "models" / result_of(tmp_path)["path"] / WEIGHTS
    os.truncate(weights, 10)
    (weights.parent / "chat_template.jinja").unlink()
    folder, sent = weights.parent.stat().st_ino, hub.sent(TINY, "tokenizer.json")
    # An engine may run on it: nothing is taken away, and what is whole is neither fetched nor replaced.
    whole = (weights.parent / "tokenizer.json").stat().st_ino
    with open(weights, "rb") as held:
        assert await asyncio.to_thread(start(hub, tmp_path, 2).wait, 60) == 0
        assert held.read() == content[WEIGHTS][:10]
    assert weights.read_bytes() == content[WEIGHTS]
    assert (weights.parent / "chat_template.jinja").read_bytes() == content["chat_template.jinja"]
    assert weights.parent.stat().st_ino == folder
    assert (weights.parent / "tokenizer.json").stat().st_ino == whole
    assert hub.sent(TINY, "tokenizer.json") == sent
    assert result_of(tmp_path, 2) == result_of(tmp_path)
    assert [path.name for path in weights.parents[1].iterdir()] == [weights.parent.name]


def test_the_lock_is_had_by_one_and_free_when_its_holder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_child, "LOCK_WAIT_S", 0.1)
    path = tmp_path / "partial" / "lock"
    held = download_child.take_lock(path)
    assert held is not None
    assert download_child.take_lock(path) is None
    os.close(held)
    again = download_child.take_lock(path)
    assert again is not None
    os.close(again)


def test_a_lock_whose_folder_was_deleted_meanwhile_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race: open the lock file, its holder finishes and deletes the folder, the lock on the dead file is free."""
    path = tmp_path / "partial" / "lock"
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(path.parent)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    held = download_child.take_lock(path)
    assert held is not None
    assert os.path.samestat(os.fstat(held), path.stat())
    os.close(held)
