"""The promises of every storage, and the rules for keys, ranges and upload URLs that all of them share."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from modelyard.errors import Unprocessable

#: S3 takes 1,024 bytes, of which the prefix of a bucket's user may take as many.
MAX_KEY_LENGTH = 500
MAX_UPLOAD_URL_S = 7 * 24 * 3600

# No name begins with a dot: this rules out `..`, and leaves such names to a folder's own use.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.=+@-]{0,199}"
_KEY = re.compile(rf"{_NAME}(/{_NAME})*")
KEY_RULE = "a key has names of ASCII letters, digits and _.=+@- (no dot in front), joined by single slashes"
_PREFIX = re.compile(rf"({_NAME}/)*({_NAME})?")
_CONTENT_TYPE = re.compile(r"^[\w.+-]+/[\w.+-]+(; ?[\w.+-]+=[\w.+-]+)*", re.ASCII)


@dataclass(frozen=True)
class StoredObject:
    """The result of a put; `sha256` is in hexadecimal."""

    key: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ListedObject:
    """One object of a listing."""

    key: str
    size_bytes: int


@dataclass(frozen=True)
class SignedUpload:
    """The means of a client to upload without a key of its own: `method` on `url` with exactly these `headers`.

    A `url` that begins with a slash is a path on this server.
    """

    url: str
    expires_at: int
    headers: Mapping[str, str]
    method: str = "PUT"


class Storage(Protocol):
    """Objects under keys.

    A key is names joined by slashes; a name has ASCII letters, digits and `_.=+@-`, and no dot in front. Every
    method raises `Unprocessable` for another key, and `StorageUnavailable` when the store cannot be reached, refuses
    this server, is misconfigured or full; the message says which.
    """

    async def check(self) -> None:
        """Return if the store is there and would answer us; repeatable, changes nothing."""

    async def put(self, key: str, chunks: AsyncIterable[bytes], *, max_bytes: int | None = None) -> StoredObject:
        """Store a stream under `key`, in the place of what was there.

        On an error, from here or from `chunks`, and on a cancellation everything is as before; only a put that is
        cancelled at its very last step may have taken place, as a whole. Cancelling waits for the request to the
        store that is under way.

        Raises:
            TooLarge: the stream is longer than `max_bytes`.
        """

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> AsyncGenerator[bytes]:
        """Yield the bytes from `start` on, `length` of them at most, in blocks of up to 1 MiB.

        Past the end there is nothing to yield. Close it (`aclosing`) when not reading to the end.

        Raises:
            ObjectNotFound: with the first block.
        """

    async def size(self, key: str) -> int:
        """Return the size in bytes.

        Raises:
            ObjectNotFound: there is none under this key.
        """

    def list(self, prefix: str = "") -> AsyncGenerator[ListedObject]:
        """Yield the objects whose key begins with `prefix` (any string that a key may begin with), sorted by key."""

    async def delete(self, key: str) -> None:
        """Remove the object. Safe to repeat: one that is not there is no error."""

    async def remove_unfinished(self, prefix: str) -> None:
        """Remove what is left of puts below `prefix` whose server was killed; nobody else may be writing there.

        Safe to repeat. A folder removes such files by itself, when it is opened.
        """

    async def signed_upload_url(
        self, key: str, *, content_type: str, max_bytes: int, expires_s: int = 3600
    ) -> SignedUpload:
        """Return a URL that takes one object of one content type, without a key of this server, for a while.

        S3 cannot bind a URL to a maximum: whoever takes the upload into use compares `size` with `max_bytes`.
        """

    async def close(self) -> None:
        """End the threads and connections. Safe to repeat."""


def is_key(text: str) -> bool:
    """True if the text can be the key of an object."""
    return len(text) <= MAX_KEY_LENGTH and _KEY.fullmatch(text) is not None


def checked_key(key: str) -> str:
    """Return the key, or refuse what cannot be one."""
    if not is_key(key):
        raise Unprocessable(f"{key[:100]!r} cannot be the key of an object: {KEY_RULE}.", code="invalid_key")
    return key


def checked_prefix(prefix: str) -> str:
    """Return the prefix, or refuse what no key can begin with."""
    if len(prefix) > MAX_KEY_LENGTH or _PREFIX.fullmatch(prefix) is None:
        raise Unprocessable(f"No key can begin with {prefix[:100]!r}: {KEY_RULE}.", code="invalid_key")
    return prefix


def checked_range(start: int, length: int | None) -> None:
    """Refuse a part of an object that cannot be."""
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"start and length must not be negative: {start}, {length}")


def checked_upload(content_type: str, max_bytes: int, expires_s: int) -> None:
    """Refuse the terms of an upload that cannot be."""
    if _CONTENT_TYPE.fullmatch(content_type) is None:
        raise Unprocessable(
            f"{content_type[:100]!r} is no content type, such as application/jsonl.", param="content_type"
        )
    if max_bytes < 1 or not 1 <= expires_s <= MAX_UPLOAD_URL_S:
        raise ValueError(f"max_bytes {max_bytes} and expires_s {expires_s}: 1 at least, {MAX_UPLOAD_URL_S} s at most")
