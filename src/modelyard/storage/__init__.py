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

from pathlib import Path
from urllib.parse import unquote, urlsplit

from modelyard.errors import StartRefused
from modelyard.settings import Settings
from modelyard.storage.folder import FolderStorage, UploadGrant
from modelyard.storage.protocol import KEY_RULE, ListedObject, SignedUpload, Storage, StoredObject, is_key
from modelyard.storage.s3 import S3Storage

__all__ = [
    "FolderStorage",
    "ListedObject",
    "S3Storage",
    "SignedUpload",
    "Storage",
    "StoredObject",
    "UploadGrant",
    "delete_prefix",
    "open_storage",
]


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
    url = urlsplit(settings.storage_url)
    if url.query or url.fragment:
        raise StartRefused(f"MODELYARD_STORAGE_URL={settings.storage_url}: a '?' or '#' has no meaning here.")
    if url.scheme == "s3":
        if not url.netloc:
            raise StartRefused(
                f"MODELYARD_STORAGE_URL={settings.storage_url}: the bucket is missing (s3://BUCKET/PREFIX)."
            )
        prefix = url.path.strip("/")
        if prefix and not is_key(prefix):
            raise StartRefused(f"MODELYARD_STORAGE_URL={settings.storage_url}: {KEY_RULE}.")
        return S3Storage(url.netloc, prefix, settings.s3_endpoint_url)
    folder = Path(unquote(url.path)) if url.path else settings.data_dir / "objects"
    if folder == Path("/"):
        raise StartRefused(f"MODELYARD_STORAGE_URL={settings.storage_url}: the folder is missing (file:///PATH).")
    try:
        return FolderStorage(folder, settings.data_dir / "upload.key")
    except OSError as error:
        raise StartRefused(f"Objects cannot be kept in {folder}: {error.strerror} ({error.filename}).") from error
