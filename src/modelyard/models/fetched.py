"""The files of a repository that have arrived for a download, each scanned and checked as it arrives.

Configuration files come one by one, weights several at a time; what is refused ends the download by a `JobFailure`.
Nothing here decides which files a model needs (`selection`), or puts them into the store (`download_child`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from modelyard.models import scan, transfer
from modelyard.models.selection import ADAPTER_WEIGHTS
from modelyard.models.shards import INDEX, check_tensors, index_of
from modelyard.models.transfer import Progress, Source, SourceFile
from modelyard.paths import below

CONNECTIONS = 4


class Fetched:
    """The files that have arrived, by their path in the repository, each looked at as it arrives."""

    def __init__(self, source: Source, commit: str, blobs: Path, progress: Progress) -> None:
        #: Where the content of each file lies.
        self.blobs: dict[str, Path] = {}
        #: The tensors that an index promises of each file.
        self.promised: dict[str, set[str]] = {}
        self._source = source
        self._commit = commit
        self._folder = blobs
        self._progress = progress

    def read(self, path: str) -> bytes:
        """Fetch one configuration file ahead of the others, and return what it holds."""
        file = transfer.patiently(lambda: self._source.describe(path))
        self._fetch_configuration(file)
        self._progress.update(done=-file.size)  # it is counted when it comes with the others
        return self.blobs[path].read_bytes()

    def keep(self, paths: Collection[str]) -> None:
        """Forget what was read ahead and is none of these: a bad index beside a whole model must not be published."""
        self.blobs = {path: blob for path, blob in self.blobs.items() if path in paths}

    def configuration(self, files: Iterable[SourceFile]) -> None:
        """Fetch configuration files and scan each."""
        for file in files:
            self._fetch_configuration(file)
            scan.scan_configuration(file.path, self.blobs[file.path].read_bytes())

    def weights(self, files: list[SourceFile]) -> None:
        """Fetch weights, several at a time, and check each one's header. The first failure ends all."""
        pool = ThreadPoolExecutor(CONNECTIONS)
        try:
            # Not a `with`: after a failure nobody waits for the other downloads; the process ends, they resume later.
            # The smallest first: a pointer in the place of weights is seen before gigabytes have arrived.
            distinct = sorted(_shared_once(files, self._commit), key=lambda file: file.size)
            for future in as_completed([pool.submit(self._fetch_weights, file) for file in distinct]):
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for file in files:
            if file.path not in self.blobs:
                self.blobs[file.path] = below(self._folder, transfer.blob_name(file, self._commit))
                self._scan_weights(file.path)

    def index(self, paths: Iterable[str]) -> None:
        """Make the index that these weights came without."""
        blob = self._folder / "made-index"
        blob.write_bytes(index_of({path: scan.scan_safetensors(self.blobs[path], path) for path in paths}))
        self.blobs[INDEX] = blob

    def json(self, path: str) -> dict[str, Any]:
        """Return a configuration file that holds an object; empty if there is none."""
        blob = self.blobs.get(path)
        return scan.read_json(path, blob.read_bytes()) if blob is not None else {}

    def any_json(self, path: str) -> Any:
        """Return what a configuration file holds; None if there is none."""
        blob = self.blobs.get(path)
        return scan.parse(path, blob.read_bytes()) if blob is not None else None

    def _fetch_configuration(self, file: SourceFile) -> None:
        if file.size > scan.MAX_CONFIG_BYTES:
            raise JobFailure(
                "bad_configuration",
                f"{file.path} has {file.size} bytes: too many for a configuration file.",
                "Tell the model's authors, or try another revision.",
            )
        self._fetch(file)

    def _fetch_weights(self, file: SourceFile) -> None:
        self._fetch(file)
        self._scan_weights(file.path)

    def _scan_weights(self, path: str) -> None:
        most = scan.MAX_ADAPTER_HEADER_BYTES if path == ADAPTER_WEIGHTS else scan.MAX_HEADER_BYTES
        check_tensors(self.promised.get(path, ()), path, scan.scan_safetensors(self.blobs[path], path, most))

    def _fetch(self, file: SourceFile) -> None:
        blob = transfer.fetch(self._source, file, self._commit, self._folder, self._progress)
        scan.refuse_pointer(blob, file.path)
        self.blobs[file.path] = blob


def _shared_once(files: list[SourceFile], commit: str) -> list[SourceFile]:
    """Leave out files with the same content as another: two threads must not write one part file."""
    return list({transfer.blob_name(file, commit): file for file in files}.values())
