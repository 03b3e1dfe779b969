"""Checkpoints as files: what is whole is taken, what is not is passed over, and a full disk takes none away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.trainer.checkpoints import Checkpoints
from modelyard.trainer.reports import Reports
from tests.trainer.runs import needs_training

pytestmark = pytest.mark.slow


@pytest.fixture
def report(tmp_path: Path) -> Reports:
    needs_training()
    return Reports(tmp_path / "progress.jsonl")


def save(checkpoints: Checkpoints, step: int, numbers: int = 8) -> Path:
    import torch

    tensors = {"adapter_model.safetensors": {"a": torch.full((numbers,), float(step))}}
    return checkpoints.save(step, tensors, {"adapter_config.json": "{}"}, {"step": step})


def notes(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "progress.jsonl").read_text("utf-8").splitlines()
    return [each for each in map(json.loads, lines) if each["kind"] == "note"]


def test_the_newest_of_the_last_two_is_taken_with_what_was_in_it(tmp_path: Path, report: Reports) -> None:
    checkpoints = Checkpoints(tmp_path, "ours", 0, report)
    assert checkpoints.newest() is None
    for step in (2, 10, 9):
        save(checkpoints, step)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-10", "step-9"]
    found = Checkpoints(tmp_path, "ours", 0, report).newest()
    assert found is not None
    assert found.step == 10
    assert found.state == {"step": 10}
    assert found.tensors("adapter_model.safetensors")["a"].tolist() == [10.0] * 8
    assert checkpoints.written == 3
    assert checkpoints.seconds > 0


@pytest.mark.parametrize("damage", ["shorter", "flipped", "missing", "no_manifest", "garbage", "not_a_folder"])
def test_a_damaged_checkpoint_is_passed_over_with_a_note(tmp_path: Path, report: Reports, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, "ours", 0, report)
    save(checkpoints, 1)
    newer = save(checkpoints, 2)
    path = newer / "adapter_model.safetensors"
    if damage == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "flipped":
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    elif damage == "missing":
        path.unlink()
    elif damage == "no_manifest":
        (newer / "manifest.json").unlink()
    elif damage == "garbage":
        (newer / "manifest.json").write_text("[1, 2", "utf-8")
    else:
        shutil.rmtree(newer)
        newer.write_text("what is this", "utf-8")
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    assert "step 2 is damaged" in notes(tmp_path)[-1]["message"]


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path, report: Reports) -> None:
    checkpoints = Checkpoints(tmp_path, "ours", 0, report)
    folder = save(checkpoints, 1)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["files"]["../../progress.jsonl"] = {"size": 0, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert checkpoints.newest() is None


def test_a_checkpoint_of_another_training_is_not_taken(tmp_path: Path, report: Reports) -> None:
    save(Checkpoints(tmp_path, "theirs", 0, report), 5)
    assert Checkpoints(tmp_path, "ours", 0, report).newest() is None
    assert "other rows or settings" in notes(tmp_path)[-1]["message"]


def test_what_a_killed_attempt_left_half_written_goes_and_is_never_taken(tmp_path: Path, report: Reports) -> None:
    checkpoints = Checkpoints(tmp_path, "ours", 0, report)
    save(checkpoints, 1)
    shutil.copytree(checkpoints.folder / "step-1", checkpoints.folder / ".step-2.partial")
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    checkpoints.discard_unusable(found)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-1"]
    checkpoints.discard_unusable(None)
    assert list(checkpoints.folder.iterdir()) == []


def test_a_disk_without_room_says_the_numbers_and_keeps_what_is_there(tmp_path: Path, report: Reports) -> None:
    save(Checkpoints(tmp_path, "ours", 0, report), 1)
    reserve = 2 * shutil.disk_usage(tmp_path).free
    checkpoints = Checkpoints(tmp_path, "ours", reserve, report)
    with pytest.raises(JobFailure) as caught:
        save(checkpoints, 2)
    assert caught.value.code == "disk_full"
    assert "GiB free, of which" in caught.value.message
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 1


def test_a_disk_that_fills_up_in_the_midst_of_a_checkpoint_leaves_the_one_before(report: Reports) -> None:
    """On a file system in memory: the reserve is what is free but a little, and then another file takes that."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("no file system in memory")
    import tempfile

    with tempfile.TemporaryDirectory(dir=shared) as folder:
        free = shutil.disk_usage(folder).free
        checkpoints = Checkpoints(Path(folder), "ours", free - 40 * 1024 * 1024, report)
        save(checkpoints, 1)
        save(checkpoints, 2, numbers=4 * 1024 * 1024)
        # 16 MiB fit beside the older of two, 48 MiB do not: the older one goes first, in vain.
        with pytest.raises(JobFailure) as caught:
            save(checkpoints, 3, numbers=12 * 1024 * 1024)
        assert caught.value.code == "disk_full"
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-2"]
        found = checkpoints.newest()
        assert found is not None
        assert found.step == 2
