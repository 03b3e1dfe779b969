"""Objects in a bucket of an S3-compatible store, through boto3, which is imported with the first request."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping
from contextlib import aclosing, suppress
from threading import Lock
from typing import Any

from modelyard import tasks
from modelyard.errors import ModelyardError, ObjectNotFound, StorageUnavailable, TooLarge
from modelyard.evidence import in_words
from modelyard.storage.protocol import (
    ListedObject,
    SignedUpload,
    StoredObject,
    checked_key,
    checked_prefix,
    checked_range,
    checked_upload,
)
from modelyard.storage.streams import BLOCK_BYTES, THREADS, TIMEOUT_S, StorageAway, T, Threads, blocks, to_the_end

#: Parts of one size, since some stores want that; S3 allows 10,000 of them, which makes 156 GiB.
PART_BYTES = 16 * 1024 * 1024
MAX_PARTS = 10_000
PARTS_IN_FLIGHT = 2
CONNECT_TIMEOUT_S = 5
ATTEMPTS = 3
#: `check` is a question of a moment: it neither waits long nor asks again.
CHECK_TIMEOUT_S = 5


class S3Storage:
    """Objects in a bucket, below `prefix`, through boto3. See `Storage`.

    `credentials` are arguments of `boto3.Session`; what is not among them comes from boto3's own settings.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | None = None,
        credentials: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.bucket = bucket
        self.endpoint_url = endpoint_url
        self._prefix = f"{prefix}/" if prefix else ""
        self._timeout_s = timeout_s
        self._threads = Threads(timeout_s, work_is_bounded=True)
        self._aborting: set[asyncio.Task[None]] = set()
        self._credentials: dict[str, Any] = dict(credentials or {})
        self._made: dict[bool, Any] = {}
        self._making = Lock()

    async def check(self) -> None:
        await self._threads.run(
            self._attempt,
            lambda: self._client(is_hasty=True).list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1),
        )

    async def put(self, key: str, chunks: AsyncIterable[bytes], *, max_bytes: int | None = None) -> StoredObject:
        where, digest = self._where(key), hashlib.sha256()
        async with aclosing(blocks(chunks, PART_BYTES, max_bytes)) as parts:
            first = await anext(parts, bytearray())
            if len(first) == PART_BYTES:
                total = await self._put_parts(where, first, parts, digest)
            else:
                await self._threads.run(digest.update, first)
                await self._send("put_object", first, **where)
                total = len(first)
        return StoredObject(key, total, digest.hexdigest())

    async def _put_parts(
        self, where: Mapping[str, str], first: bytearray, parts: AsyncGenerator[bytearray], digest: Any
    ) -> int:
        """Upload in parts, some in flight while the next one is read, and return the size of all."""
        upload_id: str = await self._threads.acquire(
            lambda: self._request("create_multipart_upload", **where)["UploadId"],
            lambda upload_id: self._request("abort_multipart_upload", UploadId=upload_id, **where),
        )
        etags: dict[int, str] = {}
        total = 0

        async def upload(number: int, part: bytearray) -> None:
            answer = await self._send("upload_part", part, UploadId=upload_id, PartNumber=number, **where)
            etags[number] = answer["ETag"]

        in_flight: set[asyncio.Task[None]] = set()
        try:
            part, number = first, 1
            while part:
                if number > MAX_PARTS:
                    raise TooLarge(f"An object in S3 is at most {MAX_PARTS * PART_BYTES} bytes long here.")
                await self._threads.run(digest.update, part)
                total += len(part)
                if len(in_flight) == PARTS_IN_FLIGHT:
                    done, in_flight = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.gather(*done)
                in_flight.add(asyncio.create_task(upload(number, part), name=f"storage part {number}"))
                part, number = await anext(parts, bytearray()), number + 1
            await asyncio.gather(*in_flight)
            listed = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
            await self._call(
                "complete_multipart_upload", UploadId=upload_id, MultipartUpload={"Parts": listed}, **where
            )
        except BaseException as error:
            # A part that arrives after the abort would stay and cost money: wait for those in flight first.
            for task in in_flight:
                task.cancel()
            await to_the_end(asyncio.gather(*in_flight, return_exceptions=True))
            if isinstance(error, StorageAway):
                # Whoever waits has waited long enough.
                aborting = tasks.spawn("abort of an upload", self._abort(upload_id, where))
                self._aborting.add(aborting)
                aborting.add_done_callback(self._aborting.discard)
            else:
                await self._abort(upload_id, where)
            raise
        return total

    async def _abort(self, upload_id: str, where: Mapping[str, str]) -> None:
        with suppress(ModelyardError):  # the first error says more
            await self._call("abort_multipart_upload", UploadId=upload_id, **where)

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> AsyncGenerator[bytes]:
        checked_range(start, length)
        where = self._where(key)
        if length == 0:
            await self.size(key)  # S3 knows no empty range
            return
        if start or length is not None:
            where["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        body = await self._threads.acquire(lambda: self._opened(where), lambda body: body and body.close())
        if body is None:
            return
        try:
            while block := await self._threads.run(self._attempt, functools.partial(body.read, BLOCK_BYTES)):
                yield block
        finally:
            body.close()

    async def size(self, key: str) -> int:
        answer = await self._call("head_object", **self._where(key))
        return int(answer["ContentLength"])

    async def list(self, prefix: str = "") -> AsyncGenerator[ListedObject]:
        pages = {"Bucket": self.bucket, "Prefix": self._prefix + checked_prefix(prefix)}
        while True:
            answer = await self._call("list_objects_v2", **pages)
            for found in answer.get("Contents", ()):
                yield ListedObject(found["Key"].removeprefix(self._prefix), found["Size"])
            if not answer.get("IsTruncated"):
                return
            pages["ContinuationToken"] = answer["NextContinuationToken"]

    async def delete(self, key: str) -> None:
        with suppress(ObjectNotFound):
            await self._call("delete_object", **self._where(key))

    async def remove_unfinished(self, prefix: str) -> None:
        pages = {"Bucket": self.bucket, "Prefix": self._prefix + checked_prefix(prefix)}
        while True:
            answer = await self._call("list_multipart_uploads", **pages)
            for found in answer.get("Uploads", ()):
                if found["Key"].startswith(pages["Prefix"]):
                    with suppress(ObjectNotFound):
                        where = {"Bucket": self.bucket, "Key": found["Key"]}
                        await self._call("abort_multipart_upload", UploadId=found["UploadId"], **where)
            if not answer.get("IsTruncated"):
                return
            pages |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    async def signed_upload_url(
        self, key: str, *, content_type: str, max_bytes: int, expires_s: int = 3600
    ) -> SignedUpload:
        checked_upload(content_type, max_bytes, expires_s)
        params = {**self._where(key), "ContentType": content_type}
        expires_at = int(time.time()) + expires_s
        url = await self._threads.run(
            self._attempt,
            lambda: self._client().generate_presigned_url("put_object", Params=params, ExpiresIn=expires_s),
        )
        return SignedUpload(url, expires_at, {"Content-Type": content_type})

    async def close(self) -> None:
        await tasks.end(*self._aborting)
        await self._threads.close()
        for client in self._made.values():
            client.close()

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._prefix + checked_key(key)}

    async def _call(self, operation: str, **arguments: Any) -> Any:
        return await self._threads.run(self._request, operation, **arguments)

    async def _send(self, operation: str, body: bytearray, **arguments: Any) -> Any:
        # Summed in the thread as well: 16 MiB would hold the loop up for some 30 ms.
        return await self._threads.run(lambda: self._request(operation, Body=body, ContentMD5=_md5(body), **arguments))

    def _request(self, operation: str, **arguments: Any) -> Any:
        return self._attempt(lambda: getattr(self._client(), operation)(**arguments), arguments.get("Key", ""))

    def _opened(self, where: Mapping[str, str]) -> Any:
        """Return the body of an object, or None for a range that begins behind its end."""
        try:
            return self._request("get_object", **where)["Body"]
        except _RangeBehindTheEnd:
            return None

    def _client(self, *, is_hasty: bool = False) -> Any:
        """Return the client, which boto3 allows threads to share; made at the first call. A hasty one is for checks."""
        with self._making:
            if is_hasty not in self._made:
                import boto3
                from botocore.config import Config

                session = boto3.Session(**self._credentials)
                config = Config(
                    connect_timeout=CONNECT_TIMEOUT_S,
                    # All attempts together are what the setting bounds.
                    read_timeout=CHECK_TIMEOUT_S if is_hasty else self._timeout_s / ATTEMPTS,
                    retries={"mode": "standard", "max_attempts": 1 if is_hasty else ATTEMPTS},
                    max_pool_connections=THREADS,
                    signature_version="s3v4",
                    # Host names of buckets need DNS, which a store of one's own seldom has.
                    s3={"addressing_style": "path" if self.endpoint_url else "auto"},
                    # Checksums in trailers are Amazon's; Content-MD5 is understood everywhere.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                )
                region = session.region_name or "us-east-1"
                self._made[is_hasty] = session.client(
                    "s3", region_name=region, endpoint_url=self.endpoint_url, config=config
                )
            return self._made[is_hasty]

    def _attempt(self, function: Callable[[], T], key: str = "") -> T:
        """Call boto3, in a thread, and turn its errors into ours."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return function()
        except (BotoCoreError, ClientError) as error:
            raise self._domain_error(error, key.removeprefix(self._prefix)) from error

    def _domain_error(self, error: Any, key: str) -> Exception:
        where = f"The S3 store at {self.endpoint_url or 'Amazon'}"
        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"):
            return StorageUnavailable(
                f"There are no credentials for {where[4:]}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        answer = getattr(error, "response", None)
        if answer is None:
            return StorageAway(f"{where} cannot be reached ({in_words(error)}): is MODELYARD_S3_ENDPOINT_URL right?")
        code = str(answer.get("Error", {}).get("Code", ""))
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code == "NoSuchBucket":
            return StorageUnavailable(
                f"{where} has no bucket '{self.bucket}': make it, or correct MODELYARD_STORAGE_URL."
            )
        if key and (code == "NoSuchKey" or status == 404):
            return ObjectNotFound(key)
        if code == "InvalidRange" or status == 416:
            return _RangeBehindTheEnd()
        if status in (401, 403):
            return StorageUnavailable(
                f"{where} refuses this server ({code}) for the bucket '{self.bucket}': check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and what they may do."
            )
        return StorageUnavailable(f"{where} answered {code or status} for the bucket '{self.bucket}'.")


class _RangeBehindTheEnd(Exception):
    """The store's way to say that a range is empty."""


def _md5(block: bytearray) -> str:
    return base64.b64encode(hashlib.md5(block, usedforsecurity=False).digest()).decode()
