"""Checkpoints: all that a training needs to go on as if nothing had happened; whole, or not there.

    <work_dir>/checkpoints/step-<n>/
        adapter_model.safetensors  adapter_config.json    the adapter as it was
        optimizer.safetensors  random.safetensors         and whatever else is made of tensors
        state.json                                        numbers: the step, losses, tokens
        manifest.json                                     size and SHA-256 of each file, and whose checkpoint it is

A checkpoint is written under another name, brought to the disk, and moved: a kill at any moment leaves the one before.
The newest whose files are those of its manifest is taken; one of other rows or settings (its fingerprint) never is.
Nothing is pickled: reading a checkpoint runs no code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.trainer.failures import disk_full
from modelyard.trainer.reports import Reports

KEPT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
VERSION = 1
_NAME = re.compile(r"step-(\d+)")
_READ_BYTES = 1024**2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole."""

    step: int
    folder: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Any]:
        """Return the tensors of one of its files."""
        from safetensors.torch import load_file

        return dict(load_file(self.folder / name))


class Checkpoints:
    """The checkpoints of one training. `seconds` is what writing them took, `written` how many there were."""

    def __init__(self, work_dir: Path, fingerprint: str, reserve_bytes: int, report: Reports) -> None:
        self.folder = work_dir / "checkpoints"
        self.seconds = 0.0
        self.written = 0
        self.fingerprint = fingerprint
        self._reserve = reserve_bytes
        self._report = report

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str], state: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint and drop those before the last two. A step that has one already is left as it is.

        Raises:
            JobFailure: `disk_full`, with the numbers; what was there stays.
        """
        began = time.monotonic()
        target = self.folder / f"step-{step}"
        if not (target / MANIFEST).is_file():
            texts = {**texts, STATE: json.dumps(state)}
            expected = sum(_tensor_bytes(group) for group in tensors.values()) + sum(map(len, texts.values()))
            self._write(target, expected, tensors, texts, step)
            self.written += 1
        self._drop_old()
        self.seconds += time.monotonic() - began
        self._report.checkpoint(step, target)
        return target

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and of this training, after noting those that are not."""
        for step, folder in self._there():
            try:
                manifest = _verified(folder)
                if manifest["fingerprint"] != self.fingerprint:
                    self._report.note(
                        f"The checkpoint of step {step} is of other rows or settings and is not used.", "WARNING"
                    )
                    continue
                return Checkpoint(step, folder, json.loads((folder / STATE).read_text("utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self._report.note(
                    f"The checkpoint of step {step} is damaged and is not used: {str(error)[:200]}", "WARNING"
                )
        return None

    def discard_unusable(self, keep: Checkpoint | None) -> None:
        """Remove what a training that goes on from `keep` has no use for: half-written ones, damaged ones."""
        if not self.folder.is_dir():
            return
        for entry in self.folder.iterdir():
            is_step = _NAME.fullmatch(entry.name) is not None
            newer = is_step and (keep is None or int(entry.name.removeprefix("step-")) > keep.step)
            if newer or entry.name.endswith(".partial"):
                shutil.rmtree(entry, ignore_errors=True)

    def _write(
        self, target: Path, expected: int, tensors: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str], step: int
    ) -> None:
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_room(expected)
        try:
            write_folder(partial, tensors, texts, {"fingerprint": self.fingerprint, "step": step})
            os.rename(partial, target)
            sync(self.folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if is_full(error):
                free = shutil.disk_usage(self.folder).free
                raise disk_full(f"The checkpoint of step {step}", expected, free, self._reserve) from error
            raise

    def _make_room(self, expected: int) -> None:
        """Drop the older of two checkpoints early if the disk would not take a third."""
        for keep in (KEPT, 1):
            free = shutil.disk_usage(self.folder).free
            if expected + self._reserve <= free:
                return
            self._drop_old(keep)
        free = shutil.disk_usage(self.folder).free
        if expected + self._reserve > free:
            raise disk_full("A checkpoint", expected, free, self._reserve)

    def _drop_old(self, keep: int = KEPT) -> None:
        for _, folder in self._there()[keep:]:
            # A name that nobody reads first, since a folder goes file by file.
            aside = folder.with_name(f".{folder.name}.partial")
            os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _there(self) -> list[tuple[int, Path]]:
        """Return the checkpoints by name, the newest first."""
        try:
            found = [(match, entry) for entry in self.folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
        except FileNotFoundError:
            return []
        return sorted(((int(match[1]), entry) for match, entry in found), reverse=True)


def write_folder(
    folder: Path, tensors: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    """Write files of tensors and texts with a manifest into a new folder, and bring all of it to the disk."""
    from safetensors.torch import save_file

    folder.mkdir(mode=0o700)
    for name, group in tensors.items():
        save_file(dict(group), folder / name, metadata={"format": "pt"})
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    files = {name: described(folder / name) for name in (*tensors, *texts)}
    manifest = {"version": VERSION, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    for name in (*tensors, *texts, MANIFEST, "."):
        sync(folder / name)


def described(path: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full(error: BaseException) -> bool:
    """Return whether an error says that the disk, or the user's part of it, is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors tells of the system's errors in words.
    text = str(error)
    return type(error).__name__ == "SafetensorError" and any(
        f"os error {number}" in text for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )


def _verified(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest. Raises ValueError where its files are not those that it lists."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    if manifest["version"] != VERSION:
        raise ValueError(f"it is of version {manifest['version']}")
    for name, facts in manifest["files"].items():
        if "/" in name or described(folder / name) != facts:
            raise ValueError(f"{name[:80]} is not as it was written")
    return manifest


def _tensor_bytes(group: Mapping[str, Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() + 200 for tensor in group.values())
