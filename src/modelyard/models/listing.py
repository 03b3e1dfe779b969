"""A hub's answer about a repository, read by types: what is not as the hub's protocol says refuses the whole answer.

Everything that becomes a path, a size or a comparison later passes here: the commit and the files' digests are
hexadecimal digits of their length, sizes are whole numbers, names are what a git tree can hold. Pure.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from modelyard.errors import JobFailure

#: A listing with more bytes, after decompression, is no repository's. Hugging Face's largest have some 40 MiB.
MAX_LISTING_BYTES = 64 * 1024 * 1024
MAX_FILES = 200_000
MAX_NAME_BYTES = 4096
#: 16 TiB: no hub stores a larger file.
MAX_FILE_BYTES = 1 << 44

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One file as listed. `digest` is `sha256:...` or git's blob id, `git:...`; None where the hub does not say."""

    size: int | None
    digest: str | None
    large: bool


@dataclass(frozen=True)
class Listing:
    """A commit and its files."""

    commit: str
    files: dict[str, Entry]


class BadListing(ValueError):
    """The answer is not what a hub says; the text tells where."""


def parse(content: bytes) -> Listing:
    """Return what a hub's answer to `/api/models/NAME/revision/REVISION?blobs=true` says.

    Raises:
        BadListing: a part of it cannot be.
    """
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        raise BadListing("it is not JSON") from None
    if not isinstance(answer, dict):
        raise BadListing("it is not a JSON object")
    commit, siblings = answer.get("sha"), answer.get("siblings")
    if not is_commit(commit):
        raise BadListing(f"its commit (sha) is {_shown(commit)}, not 40 hexadecimal digits")
    if not isinstance(siblings, list):
        raise BadListing("it has no list of files (siblings)")
    if len(siblings) > MAX_FILES:
        raise BadListing(f"it lists {len(siblings)} files, more than {MAX_FILES}")
    files: dict[str, Entry] = {}
    for sibling in siblings:
        name, entry = _entry(sibling)
        if name in files:
            raise BadListing(f"it lists {_shown(name)} twice")
        files[name] = entry
    for name in files:
        parent = name.rpartition("/")[0]
        if parent and parent in files:
            raise BadListing(f"{_shown(parent)} is a file and a folder in it")
    return Listing(str(commit), files)


def is_commit(value: object) -> bool:
    """True if a value names a git commit: 40 hexadecimal digits."""
    return isinstance(value, str) and _COMMIT.fullmatch(value) is not None


def is_size(value: object) -> bool:
    """True if a value can be a file's size: a whole number from 0, and no truth value."""
    return type(value) is int and 0 <= value <= MAX_FILE_BYTES


def decompressed(blocks: Iterable[bytes], encoding: str, most: int = MAX_LISTING_BYTES) -> bytes:
    """Return the content of an answer, of at most so many bytes however few of them are sent.

    Raises:
        BadListing: there are more, or it is encoded as was not asked for.
    """
    if encoding not in ("", "identity", "gzip"):
        raise BadListing(f"it is encoded as {encoding[:40]!r}, which was not asked for")
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 16) if encoding == "gzip" else None
    content, received = bytearray(), 0
    for block in blocks:
        received += len(block)
        try:
            content += decoder.decompress(block, most - len(content) + 1) if decoder is not None else block
        except zlib.error:
            raise BadListing("its compression is damaged") from None
        if max(len(content), received) > most:
            raise BadListing(f"it has more than {most} bytes")
        if decoder is not None and decoder.eof:
            break
    if decoder is not None and not decoder.eof:
        raise BadListing("its compression is damaged")
    return bytes(content)


def _entry(sibling: object) -> tuple[str, Entry]:
    if not isinstance(sibling, dict):
        raise BadListing(f"an entry of its files is {_shown(sibling)}")
    name = sibling.get("rfilename")
    if not isinstance(name, str) or not _is_git_path(name):
        raise BadListing(f"a file's name is {_shown(name)}")
    size, blob_id, lfs = sibling.get("size"), sibling.get("blobId"), sibling.get("lfs")
    if lfs is None:
        if blob_id is not None and not is_commit(blob_id):
            raise BadListing(f"the digest (blobId) of {_shown(name)} is {_shown(blob_id)}")
        digest = None if blob_id is None else f"git:{blob_id}"
    else:
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
        if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
            raise BadListing(f"the digest (lfs.sha256) of {_shown(name)} is {_shown(sha256)}")
        size, digest = lfs.get("size"), f"sha256:{sha256}"
    if size is not None and not is_size(size):
        raise BadListing(f"the size of {_shown(name)} is {_shown(size)}")
    return name, Entry(size, digest, large=lfs is not None)


def _is_git_path(name: str) -> bool:
    """True if a git tree can hold the name. Whether it may be a file's name here is for `file_names` to say."""
    try:
        raw = name.encode()
    except UnicodeEncodeError:  # half a surrogate
        return False
    parts = name.split("/")
    return len(raw) <= MAX_NAME_BYTES and "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def _shown(value: object) -> str:
    return ascii(value)[:80]


def refused(error: BadListing, endpoint: str, model_id: str) -> JobFailure:
    """Return the failure of a download whose hub gave such an answer."""
    return JobFailure(
        "bad_hub",
        f"{endpoint} does not answer like a Hugging Face hub about {model_id}: {error}.",
        "Check HF_ENDPOINT; a captive portal or a proxy may be answering in the hub's place.",
    )
