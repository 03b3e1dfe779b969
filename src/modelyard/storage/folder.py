"""Objects as files below a folder, and upload URLs that this server itself answers."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from modelyard.errors import (
    ModelyardError,
    ObjectNotFound,
    StartRefused,
    StorageUnavailable,
    Unprocessable,
    UploadRefused,
)
from modelyard.storage.protocol import (
    ListedObject,
    SignedUpload,
    StoredObject,
    checked_key,
    checked_prefix,
    checked_range,
    checked_upload,
)
from modelyard.storage.streams import BLOCK_BYTES, TIMEOUT_S, P, StorageAway, T, Threads, blocks

UPLOADS_PATH = "/api/v1/uploads/"
#: A leftover of a put that is younger than this may not be locked by its writer yet.
LEFTOVER_AGE_S = 60
#: How much of an object is handed to the disk at once while it arrives; a multiple of the blocks.
WRITE_BACK_BYTES = 16 * BLOCK_BYTES


@dataclass(frozen=True)
class UploadGrant:
    """The upload that a verified URL of a `FolderStorage` allows."""

    key: str
    content_type: str
    max_bytes: int


class FolderStorage:
    """Objects as files below `root`: written beside, flushed to the disk, then renamed. See `Storage`.

    The signed upload URL is a path on this server (`/api/v1/uploads/KEY?...`), whose route asks `verify_upload`. Its
    secret is made once, in `secret_file`.
    """

    def __init__(self, root: Path, secret_file: Path, timeout_s: float = TIMEOUT_S) -> None:
        self.root = root
        self._incoming = root / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._remove_leftovers()
        self._secret = _read_or_make_secret(secret_file)
        self._threads = Threads(timeout_s)

    async def check(self) -> None:
        await self._run(self._check)

    async def put(self, key: str, chunks: AsyncIterable[bytes], *, max_bytes: int | None = None) -> StoredObject:
        target = self.root / checked_key(key)
        digest, total, given_up = hashlib.sha256(), 0, threading.Event()
        temporary = self._incoming / secrets.token_hex(16)
        descriptor = await self._acquire(
            functools.partial(_create, temporary), lambda descriptor: _discard(descriptor, temporary)
        )
        try:
            async with aclosing(blocks(chunks, BLOCK_BYTES, max_bytes)) as stream:
                async for block in stream:
                    await self._run(_append, descriptor, block, digest)
                    total += len(block)
            await self._run(self._publish, descriptor, temporary, target, given_up)
        except StorageAway as away:
            given_up.set()
            away.then(functools.partial(_discard, descriptor, temporary))
            raise
        except BaseException:
            await self._run(_discard, descriptor, temporary)
            raise
        await self._run(_discard, descriptor, temporary)
        return StoredObject(key, total, digest.hexdigest())

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> AsyncGenerator[bytes]:
        checked_range(start, length)
        descriptor = await self._acquire(functools.partial(_open, self.root / checked_key(key), key), os.close)
        try:
            left = length
            while left is None or left > 0:
                wanted = BLOCK_BYTES if left is None else min(left, BLOCK_BYTES)
                block = await self._run(os.pread, descriptor, wanted, start)
                if not block:
                    break
                yield block
                start += len(block)
                left = None if left is None else left - len(block)
        except StorageAway as away:
            away.then(functools.partial(os.close, descriptor))
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)

    async def size(self, key: str) -> int:
        return await self._run(self._size, checked_key(key))

    async def list(self, prefix: str = "") -> AsyncGenerator[ListedObject]:
        for listed in await self._run(self._list, checked_prefix(prefix)):
            yield listed

    async def delete(self, key: str) -> None:
        await self._run(self._delete, checked_key(key))

    async def remove_unfinished(self, prefix: str) -> None:
        checked_prefix(prefix)

    async def signed_upload_url(
        self, key: str, *, content_type: str, max_bytes: int, expires_s: int = 3600
    ) -> SignedUpload:
        checked_key(key)
        checked_upload(content_type, max_bytes, expires_s)
        expires_at = int(time.time()) + expires_s
        signature = self._signature(key, str(expires_at), str(max_bytes), content_type)
        query = {"expires": expires_at, "max": max_bytes, "type": content_type, "signature": signature}
        url = f"{UPLOADS_PATH}{quote(key)}?{urlencode(query)}"
        return SignedUpload(url, expires_at, {"Content-Type": content_type})

    def verify_upload(
        self, key: str, query: Mapping[str, str], *, content_type: str | None, now: float | None = None
    ) -> UploadGrant:
        """Return what the URL of an upload allows; `content_type` is the request's own header.

        Raises:
            UploadRefused: the URL is not one of ours, was changed, has expired, or is for another content type.
        """
        expires, most, signed_type = (query.get(name, "") for name in ("expires", "max", "type"))
        signature = self._signature(checked_key(key), expires, most, signed_type)
        if not hmac.compare_digest(signature.encode(), query.get("signature", "").encode(errors="replace")):
            raise UploadRefused("The signature of this upload URL is wrong: use the URL exactly as it was given.")
        if (time.time() if now is None else now) >= int(expires):
            raise UploadRefused("This upload URL has expired: ask for a new one.", code="upload_expired")
        if content_type != signed_type:
            raise UploadRefused(f"This upload URL is for the content type {signed_type}, and {content_type} was sent.")
        return UploadGrant(key, signed_type, int(most))

    async def close(self) -> None:
        await self._threads.close()

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._acquire(functools.partial(function, *args, **kwargs), lambda _: None)

    async def _acquire(self, function: Callable[[], T], release: Callable[[T], object]) -> T:
        try:
            return await self._threads.acquire(function, release)
        except StorageAway as away:
            away.tell(f"The storage folder {self.root} does not answer: look at its disk or network mount.")
            raise
        except OSError as error:
            raise self._domain_error(error) from error

    def _domain_error(self, error: OSError) -> ModelyardError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return StorageUnavailable(f"There is no room left in {self.root}: free some.", code="storage_full")
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            return Unprocessable("An object cannot lie below another object's key in a folder.", code="invalid_key")
        return StorageUnavailable(f"The storage folder {self.root} cannot be used: {error.strerror}.")

    def _signature(self, key: str, expires: str, most: str, content_type: str) -> str:
        # Neither a key nor a content type holds a newline, so that no two requests read the same.
        message = "\n".join(("PUT", key, expires, most, content_type))
        return hmac.new(self._secret, message.encode(errors="replace"), hashlib.sha256).hexdigest()

    def _check(self) -> None:
        if not os.access(self._incoming, os.W_OK | os.X_OK):
            raise StorageUnavailable(f"The storage folder {self.root} is gone or cannot be written.")

    def _remove_leftovers(self) -> None:
        """Remove what a put left that was killed; the lock of a live one keeps its file."""
        for leftover in self._incoming.iterdir():
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if time.time() - os.fstat(descriptor).st_mtime > LEFTOVER_AGE_S:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    leftover.unlink(missing_ok=True)
            except BlockingIOError:
                continue
            finally:
                os.close(descriptor)

    def _publish(self, descriptor: int, temporary: Path, target: Path, given_up: threading.Event) -> None:
        os.fsync(descriptor)
        if given_up.is_set():
            return  # whoever put it was told that it is not stored
        while True:
            made = [folder for folder in target.parents if not folder.exists()]
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, target)
                break
            except FileNotFoundError:
                # A delete has just removed the folder because it was empty; without our file it is another matter.
                if not temporary.exists():
                    raise
            except FileExistsError:
                # `mkdir` says so, too, where that delete comes between its two looks: then nothing is there now.
                if any(os.path.lexists(folder) and not folder.is_dir() for folder in target.parents):
                    raise
        for folder in [target.parent, *(folder.parent for folder in made)]:
            _fsync_folder(folder)

    def _size(self, key: str) -> int:
        path = self.root / key
        try:
            if path.is_file():
                return path.stat().st_size
        except FileNotFoundError:
            pass
        raise ObjectNotFound(key)

    def _walk(self, prefix: str) -> Iterator[ListedObject]:
        def failed(error: OSError) -> None:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise error

        top = self.root / prefix.rpartition("/")[0]
        for folder, folders, files in os.walk(top, onerror=failed):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        yield ListedObject(key, path.stat().st_size)

    def _list(self, prefix: str) -> tuple[ListedObject, ...]:
        return tuple(sorted(self._walk(prefix), key=lambda listed: listed.key))

    def _delete(self, key: str) -> None:
        path = self.root / key
        try:
            path.unlink(missing_ok=True)
            while (path := path.parent) != self.root:
                path.rmdir()
        except (NotADirectoryError, IsADirectoryError):
            return  # no object has this key
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise


def _create(path: Path) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _append(descriptor: int, block: bytearray, digest: Any) -> None:
    digest.update(block)
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]
    end = os.lseek(descriptor, 0, os.SEEK_CUR)
    if end % WRITE_BACK_BYTES == 0:
        # Linux begins to write these to the disk and does not wait, so that little is left to flush at the end.
        os.posix_fadvise(descriptor, end - WRITE_BACK_BYTES, WRITE_BACK_BYTES, os.POSIX_FADV_DONTNEED)


def _discard(descriptor: int, temporary: Path) -> None:
    os.close(descriptor)
    temporary.unlink(missing_ok=True)


def _open(path: Path, key: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise ObjectNotFound(key) from None
    if path.is_dir():
        os.close(descriptor)
        raise ObjectNotFound(key)
    return descriptor


def _fsync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # a delete came right behind
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_or_make_secret(path: Path) -> bytes:
    """Return the secret in `path`, made at the first call; two servers at the same moment get the same one."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, secrets.token_hex(32).encode())
            os.fsync(descriptor)
            os.link(beside, path)
        except FileExistsError:
            pass  # another one was first, and its secret counts
        finally:
            os.close(descriptor)
            beside.unlink()
    secret = path.read_bytes()
    if len(secret) < 32:
        raise StartRefused(
            f"{path} does not hold a secret: remove it, and a new one is made (upload URLs end with it)."
        )
    return secret
