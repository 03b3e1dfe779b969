"""A folder under the import directory as a source of files: read, never changed, never linked to.

Nothing outside the import directory is read: a link that leads out of it is refused, whichever part of the path it
is. A folder in the layout of the hub's cache is understood: its files are those of the snapshot. Runs in the download
child only; blocks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelyard.errors import JobFailure
from modelyard.models.scan import MAX_CONFIG_BYTES, refuse_pointer
from modelyard.models.selection import choose
from modelyard.models.shards import listed
from modelyard.models.transfer import BLOCK, Progress, SourceFile, digest_of


class FolderSource:
    """The folder `root/name`, which may be one inside a model's folder. Its commit is a digest of its files."""

    def __init__(self, root: Path, name: str, progress: Progress) -> None:
        self._root = root.resolve()
        # In the hub's cache the folder that is asked for lies below the snapshot.
        self._top, _, self._below = name.partition("/")
        self._folder = root / name
        self._name = name
        self._progress = progress
        self._files: dict[str, SourceFile] = {}

    def resolve(self, revision: str) -> tuple[str, list[str]]:
        """Return the commit and the names of the files. Reads every file that is needed once."""
        if not self._inside(self._folder).is_dir():
            snapshot = self._in_cache_layout(self._root / self._top)
            self._folder = snapshot / self._below if snapshot is not None else self._folder
        if not self._inside(self._folder).is_dir():
            raise JobFailure(
                "unknown_model",
                f"The import directory has no folder '{self._name}'.",
                f"Put the model's files into {self._root / self._name}, or check MODELYARD_IMPORT_DIR.",
            )
        self._folder = self._in_cache_layout(self._folder) or self._folder
        digest = hashlib.sha1(usedforsecurity=False)
        names = sorted(self._walk())
        chosen = choose(names, self._read)
        needed = sorted({*chosen.configuration, *chosen.weights})
        for path in needed:
            self._file(path)  # what is missing is said before gigabytes are read
        for path in needed:
            self._files[path] = self._described(path)
            digest.update(f"{path}\0{self._files[path].digest}\n".encode())
        return digest.hexdigest(), names

    def describe(self, path: str) -> SourceFile:
        """Return size and digest of a file."""
        if path not in self._files:  # looked at and not taken, such as a bad index beside a whole model
            self._files[path] = self._described(path)
        return self._files[path]

    @contextmanager
    def open(self, file: SourceFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Open a file at an offset."""
        descriptor = os.open(self._inside(self._folder / file.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as content:
            content.seek(offset)
            yield offset, iter(lambda: content.read(BLOCK), b"")

    def _in_cache_layout(self, folder: Path) -> Path | None:
        """Return the folder of the snapshot, where a folder is one of the hub's cache: blobs/, refs/, snapshots/."""
        snapshots = folder / "snapshots"
        if (folder / "config.json").exists() or not self._inside(snapshots).is_dir():
            return None
        found = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
        main = self._inside(folder / "refs" / "main")
        named = main.read_text("utf-8", "replace").strip()[:64] if main.is_file() else ""
        commit = named if named in found or len(found) != 1 else found[0]
        if commit not in found:
            raise JobFailure(
                "ambiguous_snapshot",
                f"'{folder.name}' is a folder of the hub's cache with {len(found)} snapshots ({listed(found)}), and "
                "its refs/main names none of them.",
                "Put one of the snapshots into the import directory as a folder of its own (cp -L copies what links "
                "point to).",
            )
        return snapshots / commit

    def _described(self, path: str) -> SourceFile:
        file = self._file(path)
        return SourceFile(path, file.stat().st_size, digest_of(file, self._progress))

    def _read(self, path: str) -> bytes:
        file = self._file(path)
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise JobFailure(
                "bad_configuration", f"{path} is too large for a configuration file.", "Look at what it is."
            )
        return file.read_bytes()

    def _file(self, path: str) -> Path:
        file = self._inside(self._folder / path)
        if not file.is_file():
            raise JobFailure(
                "missing_file",
                f"'{path}' is a link to a file that is not there.",
                "Put the file itself in its place (cp -L copies what links point to).",
            )
        refuse_pointer(file, path)
        return file

    def _walk(self) -> Iterator[str]:
        for folder, folders, names in os.walk(self._inside(self._folder), followlinks=False):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                # A link to nothing is named too: where it is needed, that is the reason.
                if not name.startswith(".") and (path.is_file() or path.is_symlink()):
                    yield str(path.relative_to(self._inside(self._folder)))

    def _inside(self, path: Path) -> Path:
        found = path.resolve()
        if not found.is_relative_to(self._root):
            raise JobFailure(
                "outside_import_directory",
                f"'{path.relative_to(self._root)}' leads out of the import directory.",
                "Replace the link by a copy of what it points to.",
            )
        return found
