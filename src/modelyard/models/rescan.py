"""The second look at a model's configuration, by the rules of today, before an engine or a trainer loads it.

A model is scanned when it is added, by the rules of that day, and lies in the store for years; what is found later to
run code or to load from elsewhere must not be served only because it was there before. Adapters are looked at when
their facts are asked for (`stored_adapters`). Blocks on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from modelyard.errors import JobFailure
from modelyard.models import scan

#: More than this in all is parsed in a child, which keeps nobody waiting.
SMALL_BYTES = 4 * 1024**2
_LOOKED_AT = (".json", ".jinja")


def is_small(folder: Path) -> bool:
    """True if all that is looked at can be parsed at once, in a thread."""
    return sum(path.stat().st_size for path in _files(folder)) <= SMALL_BYTES


def check(model_id: str, folder: Path) -> None:
    """Scan the configuration files of a model in the store again.

    Raises:
        JobFailure: `remote_code`, `loads_from_elsewhere` or `bad_configuration`, as when a model is added.
    """
    for path in _files(folder):
        try:
            if path.stat().st_size > scan.MAX_CONFIG_BYTES:
                raise JobFailure("bad_configuration", f"{path.name} is too large for a configuration file.", "")
            scan.scan_configuration(path.relative_to(folder).as_posix(), path.read_bytes())
        except JobFailure as failure:
            raise JobFailure(
                failure.code,
                f"{model_id} was added before this was looked for, and is not used any more: {failure.message}",
                f"Delete it: DELETE /api/v1/models/{model_id}. {failure.hint}".rstrip(),
            ) from None


def main(model_id: str, folder: str) -> None:
    """Print what is wrong with a model as JSON, `{"failure"}`; for a child with limits (`tokenizer_child`)."""
    try:
        check(model_id, Path(folder))
    except JobFailure as failure:
        print(json.dumps({"failure": [failure.code, failure.message, failure.hint]}))  # noqa: T201  # that is its answer
    else:
        print("{}")  # noqa: T201  # that is its answer


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        # Of a vocabulary the scan reads nothing but whether it can be parsed.
        is_data = path.relative_to(folder).as_posix() in scan.VOCABULARIES
        if path.name.endswith(_LOOKED_AT) and not is_data and path.is_file():
            yield path
