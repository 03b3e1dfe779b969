"""Objects (data sets, logs, results) under keys: a local folder by default, any S3-compatible store by URL.

`open_storage` picks one of two implementations of the one protocol `Storage`. Both take the same keys, answer the
same errors and promise the same: an object is there as a whole or not at all, whatever fails or is cancelled on
the way, and nothing else is left behind. Neither keeps whole objects in memory, and all blocking work is done in
threads of the storage's own.

`protocol` says what a storage promises, `streams` brings streams to threads, `folder` and `s3` are the two stores.
Only `s3` uses boto3, which it imports when its first request goes out. Nothing here knows who may read or write
which key, nor what lies in an object. Models are not kept here: engines want them as files.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from modelyard.errors import StartRefused
from modelyard.settings import Settings
from modelyard.storage.folder import FolderStorage, UploadGrant
from modelyard.storage.protocol import KEY_RULE, ListedObject, SignedUpload, Storage, StoredObject, is_key
from modelyard.storage.s3 import S3Storage
from modelyard.storage.streams import StorageAway

__all__ = [
    "FolderStorage",
    "ListedObject",
    "S3Storage",
    "SignedUpload",
    "Storage",
    "StorageAway",
    "StoredObject",
    "UploadGrant",
    "delete_prefix",
    "open_storage",
]

#: As boto3 has it; it would refuse others at its first request.
BUCKET = re.compile(r"[a-zA-Z0-9.\-_]{1,255}")
SHOWN_CHARACTERS = 500


async def delete_prefix(storage: Storage, prefix: str) -> int:
    """Delete every object below `prefix`, which ends in a slash, and return how many there were. Repeatable."""
    if not prefix.endswith("/"):
        # 'jobs/1' would take 'jobs/12' with it, and '' everything.
        raise ValueError(f"prefix must end in a slash: {prefix!r}")
    keys = [listed.key async for listed in storage.list(prefix)]
    for key in keys:
        await storage.delete(key)
    return len(keys)


def open_storage(settings: Settings) -> Storage:
    """Return the storage that the settings ask for. It does not go to the network: `check` does.

    Raises:
        StartRefused: the URL makes no sense, or the folder cannot be used.
    """
    try:
        url = urlsplit(settings.storage_url)
    except ValueError as error:
        raise _refused(settings.storage_url, f"{error}") from None
    if "@" in url.netloc:
        # Not shown: it may hold the key.
        raise StartRefused(
            "MODELYARD_STORAGE_URL must hold no credentials: write s3://BUCKET/PREFIX and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        )
    if url.query or url.fragment:
        raise _refused(settings.storage_url, "a '?' or '#' has no meaning here")
    if url.scheme == "s3":
        if not url.netloc:
            raise _refused(settings.storage_url, "the bucket is missing (s3://BUCKET/PREFIX)")
        if not BUCKET.fullmatch(url.netloc):
            raise _refused(settings.storage_url, f"'{url.netloc}' is no bucket's name (letters, digits, '.', '-', '_')")
        prefix = url.path.strip("/")
        if prefix and not is_key(prefix):
            raise _refused(settings.storage_url, KEY_RULE)
        return S3Storage(
            url.netloc, prefix, settings.s3_endpoint_url, _credentials(settings), settings.storage_timeout_s
        )
    folder = Path(unquote(url.path)) if url.path else settings.data_dir / "objects"
    if folder == Path("/"):
        raise _refused(settings.storage_url, "the folder is missing (file:///PATH)")
    try:
        return FolderStorage(folder, settings.data_dir / "upload.key", settings.storage_timeout_s)
    except OSError as error:
        raise StartRefused(f"Objects cannot be kept in {folder}: {error.strerror} ({error.filename}).") from error
    except ValueError as error:  # a byte that no path may hold
        raise _refused(settings.storage_url, f"{error}") from None


def _refused(url: str, problem: str) -> StartRefused:
    shown = " ".join(url[:SHOWN_CHARACTERS].split())
    return StartRefused(f"MODELYARD_STORAGE_URL={shown}: {problem[0].lower()}{problem[1:]}.")


def _credentials(settings: Settings) -> dict[str, str]:
    """Return what boto3 is told: of `.env` it knows nothing.

    Raises:
        StartRefused: half a key.
    """
    halves = {"AWS_ACCESS_KEY_ID": settings.aws_access_key_id, "AWS_SECRET_ACCESS_KEY": settings.aws_secret_access_key}
    if len(missing := [name for name, value in halves.items() if value is None]) == 1:
        raise StartRefused(f"{missing[0]} is not set, but its other half is: set both for the S3 store, or neither.")
    named = {
        "aws_access_key_id": settings.aws_access_key_id,
        "aws_secret_access_key": settings.aws_secret_access_key,
        "aws_session_token": settings.aws_session_token,
        "region_name": settings.aws_default_region,
    }
    return {name: value for name, value in named.items() if value is not None}
