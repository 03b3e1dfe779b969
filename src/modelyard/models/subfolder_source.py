"""A folder of a repository as a source of files of its own, such as one of several adapters that lie side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from modelyard.errors import JobFailure
from modelyard.models.ids import is_folder_name
from modelyard.models.transfer import Source, SourceFile

MAX_TOLD = 5


class SubfolderSource:
    """The files of one folder of another source, by their names below that folder."""

    def __init__(self, source: Source, folder: str) -> None:
        self._source = source
        self._folder = folder

    def resolve(self, revision: str) -> tuple[str, list[str]]:
        """Return the commit of the whole, and the names of the files in the folder."""
        commit, paths = self._source.resolve(revision)
        found = [path.removeprefix(f"{self._folder}/") for path in paths if path.startswith(f"{self._folder}/")]
        if not found:
            above = {path.rpartition("/")[0] for path in paths if "/" in path}
            folders = sorted(folder for folder in above if is_folder_name(folder))
            named = ", ".join(f"'{one[:80]}'" for one in folders[:MAX_TOLD]) or "none"
            raise JobFailure(
                "unknown_model",
                f"The repository has no folder '{self._folder}'; it has {named}.",
                "Correct the folder's name (capitals count), or leave it out for what is at the top.",
            )
        return commit, found

    def describe(self, path: str) -> SourceFile:
        """Return size and digest of a file."""
        return replace(self._source.describe(f"{self._folder}/{path}"), path=path)

    @contextmanager
    def open(self, file: SourceFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Open a file at an offset."""
        with self._source.open(replace(file, path=f"{self._folder}/{file.path}"), offset) as content:
            yield content
