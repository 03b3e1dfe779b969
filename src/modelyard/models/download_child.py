"""The download child: `python -m modelyard.models.download_child SPEC.json` brings one model into the store.

It resolves the revision, chooses the files, checks the disk, fetches and scans the configuration (so that a bad
model is refused before gigabytes of it arrive), fetches and checks the weights, and moves the whole folder into place
by one rename. It writes progress lines and one result file: `{"commit", "size_bytes", "adapter", "base_model_id",
"task", "chat_template", "path", "left_out", "adapter_facts"}` or `{"failure": {"code", "message", "hint", "evidence",
"transient"}}`.
It never touches the database.

Killing it at any moment loses nothing: what has arrived lies in the partial folder, nothing is buffered here, and the
default action of SIGTERM is the quickest way out. A lock on the partial folder, which the kernel gives back, keeps
a second child from the same files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modelyard import evidence
from modelyard.errors import JobFailure
from modelyard.models import adapter_facts, config_file, ids, kinds, scan, transfer
from modelyard.models.chat_template import source_of
from modelyard.models.download_spec import GIB, Spec
from modelyard.models.fetched import CONNECTIONS, Fetched
from modelyard.models.mistral_format import PARAMS
from modelyard.models.selection import ADAPTER_CONFIG, Selection, choose
from modelyard.models.shards import INDEX, promised
from modelyard.models.subfolder_source import SubfolderSource
from modelyard.models.transfer import Progress, Source, SourceFile, TryAgain
from modelyard.paths import below, inside, remove_tree

log = logging.getLogger("modelyard.download")

LOCK_WAIT_S = 30.0
# Nothing of a model that was refused for one of these is worth keeping for another try.
REFUSALS = frozenset(
    {"remote_code", "bad_configuration", "bad_weights", "bad_index", "pickle_only", "unsupported_format", "no_weights",
     "missing_module", "too_many_files", "incomplete_weights", "ambiguous_weights", "lfs_pointer",
     "missing_configuration", "unsupported_adapter", "unsupported_kind", "loads_from_elsewhere",
     "adapters_in_folders"}
)  # fmt: skip


def download(spec: Spec, progress: Progress) -> dict[str, Any]:
    """Bring the model into the store and return the result; at once if that commit is there.

    Raises:
        JobFailure: with the reason; `TryAgain` if it may pass by itself.
    """
    models, partial = Path(spec.models_dir), Path(spec.partial_dir)
    source = _source(spec, progress)
    progress.update(phase="resolve")
    commit, paths = transfer.patiently(lambda: source.resolve(spec.revision))
    blobs = partial / "files"
    blobs.mkdir(parents=True, exist_ok=True, mode=0o700)
    fetched = Fetched(source, commit, blobs, progress)
    chosen = choose(paths, fetched.read)
    fetched.keep(_all(chosen))
    fetched.promised = promised(chosen.weight_map or {})
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        files = list(pool.map(lambda path: transfer.patiently(lambda: source.describe(path)), _all(chosen)))
    target = below(models, f"{ids.folder_name(spec.model_id)}/{commit}")
    if _is_whole(target, files) and (not chosen.unindexed or (target / INDEX).is_file()):
        _count_all(progress, files)
    else:
        if target.is_dir():
            for file in files:
                transfer.take_over(below(target, file.path), file, commit, blobs, progress)
        _check_space(spec, files, sum(transfer.present_bytes(file, commit, blobs) for file in files))
        progress.update(phase="configuration", total=sum(file.size for file in files))
        fetched.configuration([file for file in files if file.path in chosen.configuration])
        _scan_whole(fetched, chosen)
        progress.update(phase="weights")
        fetched.weights([file for file in files if file.path in chosen.weights])
        if chosen.unindexed:
            fetched.index(chosen.unindexed)
        progress.update(phase="publish")
        if target.is_dir():
            _repair(fetched, partial, inside(models, target))
        else:
            _publish(fetched, partial / "whole", inside(models, target))
    return _describe(target, chosen, files, commit, models)


def _source(spec: Spec, progress: Progress) -> Source:
    if ids.is_local(spec.model_id):
        if spec.import_dir is None:
            raise JobFailure(
                "imports_off",
                "No import directory is configured.",
                "Set MODELYARD_IMPORT_DIR to the folder that holds the model's folder, and restart the server.",
            )
        from modelyard.models.folder_source import FolderSource

        return FolderSource(Path(spec.import_dir), spec.model_id.removeprefix(ids.LOCAL), progress)
    # The hub's client takes 0.3 s to import, which an import from a folder need not wait for.
    from modelyard.models.hub_source import HubSource

    repository, folder = ids.repository_of(spec.model_id)
    hub = HubSource(repository, os.environ.get("HF_TOKEN") or None)
    return SubfolderSource(hub, folder) if folder else hub


def _all(chosen: Selection) -> list[str]:
    return [*chosen.configuration, *chosen.weights]


def _scan_whole(fetched: Fetched, chosen: Selection) -> None:
    """Check what takes more than one file to see."""
    if chosen.adapter:
        scan.scan_adapter(fetched.json(ADAPTER_CONFIG))
    else:
        has_config = config_file.CONFIG in fetched.blobs
        name, parse = (config_file.CONFIG, config_file.parse) if has_config else (PARAMS, config_file.parse_params)
        kinds.task_of(parse(fetched.blobs[name].read_bytes()), fetched.any_json)


def _check_space(spec: Spec, files: list[SourceFile], present: int) -> None:
    needed = sum(file.size for file in files) - present
    free = shutil.disk_usage(spec.models_dir).free
    if needed + spec.reserve_bytes > free:
        raise JobFailure(
            "disk_full",
            f"{spec.model_id} needs {_gib(needed)} more and the disk has {_gib(free)} free, of which "
            f"{_gib(spec.reserve_bytes)} stay in reserve.",
            "Delete models that are not needed (DELETE /api/v1/models/NAME), or move MODELYARD_DATA_DIR to a larger "
            "disk.",
        )
    if spec.quota_bytes is not None:
        used = _used_bytes(Path(spec.models_dir)) - present
        total = needed + present
        if used + total > spec.quota_bytes:
            raise JobFailure(
                "quota_exceeded",
                f"{spec.model_id} takes {_gib(total)}, and the models in the store already take {_gib(used)} of "
                f"{_gib(spec.quota_bytes)}.",
                "Delete models that are not needed (DELETE /api/v1/models/NAME), or raise MODELYARD_STORE_QUOTA_GIB.",
            )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size / 1024**2:.2f} MiB"


def _used_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # another download has just moved it
    return total


def _is_whole(target: Path, files: list[SourceFile]) -> bool:
    return all(_has(target, file) for file in files)


def _has(target: Path, file: SourceFile) -> bool:
    place = below(target, file.path)
    return place.is_file() and place.stat().st_size == file.size


def _count_all(progress: Progress, files: list[SourceFile]) -> None:
    total = sum(file.size for file in files)
    progress.update(phase="publish", total=total, done=total)


def _repair(fetched: Fetched, partial: Path, target: Path) -> None:
    """Put whole files in the place of those that are missing or damaged in a folder of the store, one rename each.

    The folder stays where it is, since an engine may run on it: what that has open, it keeps.
    """
    beside = partial / "repaired"
    for path, blob in fetched.blobs.items():
        place = below(target, path)
        if place.is_file() and place.stat().st_size == blob.stat().st_size:
            continue
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside.unlink(missing_ok=True)
        os.chmod(blob, 0o600)
        os.link(blob, beside)
        os.rename(beside, inside(target, place))
        _fsync_folder(place.parent)


def _publish(fetched: Fetched, whole: Path, target: Path) -> None:
    """Build the model's folder beside and move it into place by one rename, with everything on disk before."""
    remove_tree(whole.parent, whole)
    folders = {whole}
    for path, blob in fetched.blobs.items():
        place = below(whole, path)
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folders.add(place.parent)
        os.chmod(blob, 0o600)
        os.link(blob, place)
    for folder in folders:
        _fsync_folder(folder)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.rename(whole, target)
    _fsync_folder(target.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(target: Path, chosen: Selection, files: list[SourceFile], commit: str, models: Path) -> dict[str, Any]:
    def config(name: str) -> dict[str, Any]:
        path = target / name
        return scan.read_json(name, path.read_bytes()) if path.is_file() else {}

    made = (target / INDEX).stat().st_size if chosen.unindexed else 0
    base, task, template, facts = None, kinds.Task.GENERATE, None, None
    if chosen.adapter:
        base = scan.scan_adapter(config(ADAPTER_CONFIG))
        facts = adapter_facts.as_json(adapter_facts.read(target))
    else:
        task = kinds.task_of(config_file.read(target), kinds.reader(target))
        if task == kinds.Task.GENERATE:
            template = str(source_of(target, has_mistral_tokenizer=chosen.has_mistral_tokenizer))
    return {
        "commit": commit,
        "size_bytes": sum(file.size for file in files) + made,
        "adapter": chosen.adapter,
        "base_model_id": base,
        "task": str(task),
        "chat_template": template,
        "path": str(target.relative_to(models)),
        "left_out": [asdict(one) for one in chosen.left_out],
        "adapter_facts": facts,
    }


def take_lock(path: Path) -> int | None:
    """Wait for the lock of the partial folder and return its descriptor; None if another child keeps it."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have deleted the folder with this file, and a third one made a new one.
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
        os.close(descriptor)
        time.sleep(0.05)


def _result(spec: Spec, progress: Progress) -> dict[str, Any]:
    partial = Path(spec.partial_dir)
    if take_lock(partial / "lock") is None:
        return _failure(TryAgain("busy", f"Another download of {spec.model_id} has not ended yet.", "Try again."))
    try:
        result = download(spec, progress)
    except JobFailure as failure:
        if failure.code in REFUSALS or not any((partial / "files").glob("*")):
            _forget(partial)
        return _failure(failure)
    except OSError as error:
        log.exception("the disk failed")
        return _failure(_disk_failure(error, spec), error)
    except Exception as error:  # the edge of the process: whatever a repository holds, the job says that it ended
        log.exception("the download failed inside Modelyard itself")
        return _failure(
            JobFailure(
                "internal_error",
                f"The download of {spec.model_id} failed inside Modelyard itself.",
                "Its cause is in the job's log; report it as a bug.",
            ),
            error,
        )
    shutil.rmtree(partial, ignore_errors=True)
    return result


def _forget(partial: Path) -> None:
    """Delete what has arrived, from under the threads that still fetch: after the rename they find no folder."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(partial / "files", partial / "refused")
    for _ in range(3):
        shutil.rmtree(partial, ignore_errors=True)


def _disk_failure(error: OSError, spec: Spec) -> JobFailure:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(spec.models_dir).free
        return JobFailure(
            "disk_full",
            f"The disk filled up while {spec.model_id} arrived ({_gib(free)} free).",
            "Make room, then add the model again: it goes on where it stopped.",
        )
    where = error.filename or spec.models_dir
    return JobFailure(
        "disk_failed", f"{where}: {error.strerror or error}.", "Check the data folder's owner, rights and disk."
    )


def _failure(failure: JobFailure, cause: BaseException | None = None) -> dict[str, Any]:
    return {
        "failure": {
            "code": failure.code,
            "message": failure.message,
            "hint": failure.hint,
            "evidence": evidence.clipped(_words_of(cause or failure.__cause__)),
            "transient": isinstance(failure, TryAgain),
        }
    }


def _words_of(error: BaseException | None) -> list[str]:
    """Return what an exception says, and what caused it."""
    lines: list[str] = []
    while error is not None:
        said = "".join(traceback.format_exception_only(error)).splitlines()
        lines += [line for line in said if line.strip()]
        error = error.__cause__
    return lines


def main(argv: list[str]) -> None:
    """Run, write the result file, and leave at once with 0, or 1 after a failure."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    spec = Spec.read(Path(argv[0]))
    result = _result(spec, Progress(Path(spec.progress)))
    beside = f"{spec.result}.new"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(result, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, spec.result)
    log.info("%s", result)
    sys.stderr.flush()
    # Threads that still wait for a server that says nothing must not keep the process.
    os._exit(1 if "failure" in result else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
