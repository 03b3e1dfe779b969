"""The Hugging Face hub as a source of files: the only module that imports huggingface_hub, in the child only.

The client's own `hf_hub_download` starts a file over in each process, so this uses the parts below it:
`get_hf_file_metadata` for a file, its session for the listing (which `listing` reads) and for content, with a range.
Files in xet storage come through hf_xet's ordered stream at an offset, and by plain HTTP after the first failure of
that or with HF_HUB_DISABLE_XET=1. Endpoint, proxies and certificates are the client's business (HF_ENDPOINT and so on).

A hub's word is not taken for a path, a place or a number unseen. The token goes to the endpoint and nowhere else.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from huggingface_hub.utils._runtime import is_xet_available
from huggingface_hub.utils._xet import is_valid_xet_hash

from modelyard.errors import JobFailure
from modelyard.evidence import in_words
from modelyard.models.listing import BadListing, Entry, decompressed, is_size, parse, refused
from modelyard.models.transfer import NETWORK_HINT, SourceFile, TryAgain
from modelyard.plurals import counted

log = logging.getLogger(__name__)

# Headers of an error answer that tell what is wrong.
_ERROR_HEADERS = ("X-Error-Code", "X-Error-Message", "X-Request-Id")
TIMEOUT_S = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 20.0)


class HubSource:
    """One repository on the hub. Safe to use from several threads once it is resolved."""

    def __init__(self, model_id: str, token: str | None) -> None:
        self._model_id = model_id
        self._token = token
        self._commit: str = ""
        self._listed: dict[str, Entry] = {}
        self._xet = is_xet_available() and not constants.HF_HUB_DISABLE_XET
        self._xet_lock = threading.Lock()
        self._xet_group: Any = None
        log.info("%s from %s, xet: %s", model_id, constants.ENDPOINT, "on" if self._xet else "off")

    def resolve(self, revision: str) -> tuple[str, list[str]]:
        """Return the commit and the names of its files, from one request."""
        # Not HfApi.model_info, which decompresses without a bound and believes every type.
        url = f"{constants.ENDPOINT}/api/models/{self._model_id}/revision/{quote(revision, safe='')}"
        headers = build_hf_headers(token=self._token or False) | {"Accept-Encoding": "gzip"}
        stream = get_session().stream("GET", url, params={"blobs": "true"}, headers=headers, timeout=TIMEOUT_S)
        try:
            with self._explained(revision), stream as response:
                _raise_for_status(response)
                encoding = response.headers.get("Content-Encoding", "").strip().lower()
                listing = parse(decompressed(response.iter_raw(), encoding))
        except BadListing as error:
            raise refused(error, constants.ENDPOINT, self._model_id) from error
        self._commit, self._listed = listing.commit, listing.files
        return self._commit, list(self._listed)

    def describe(self, path: str) -> SourceFile:
        """Return size and digest as listed; a file's own headers tell what the listing (of some mirrors) does not."""
        entry = self._listed[path]
        size, digest = entry.size, entry.digest
        if size is not None and digest is not None and not (self._xet and entry.large):
            return SourceFile(path, size, digest)
        with self._explained(self._commit, path):
            found = get_hf_file_metadata(self._url(path), token=self._token or False, timeout=TIMEOUT_S)
        size = found.size if size is None else size
        if size is None or not is_size(size):
            raise JobFailure("bad_hub", f"{constants.ENDPOINT} does not tell the size of {path}.", "Check HF_ENDPOINT.")
        handle = found.xet_file_data if self._xet and _is_trusted(found.xet_file_data) else None
        return SourceFile(path, size, digest or _digest_from_etag(found.etag), handle)

    @contextmanager
    def open(self, file: SourceFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Open a file at an offset. A server that knows no ranges starts at 0."""
        if self._xet and file.handle is not None:
            yield offset, self._xet_blocks(file, offset)
            return
        headers = build_hf_headers(token=self._token or False)
        headers["Accept-Encoding"] = "identity"
        if offset:
            headers["Range"] = f"bytes={offset}-"
        # The session follows the redirect to the storage, and leaves the token behind when the host changes.
        stream = get_session().stream("GET", self._url(file.path), headers=headers, timeout=TIMEOUT_S)
        with self._explained(self._commit, file.path), stream as response:
            _raise_for_status(response)
            if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
                raise JobFailure(
                    "bad_hub", f"The hub sends {file.path} compressed, which was not asked for.", "Check HF_ENDPOINT."
                )
            yield _start_of(response, offset), response.iter_raw()

    def _url(self, path: str) -> str:
        return str(hf_hub_url(self._model_id, path, revision=self._commit))

    def _xet_blocks(self, file: SourceFile, offset: int) -> Iterator[bytes]:
        from hf_xet import XetFileInfo  # type: ignore[import-untyped]

        missing = file.size - offset
        try:
            stream = self._open_xet(file).download_stream(XetFileInfo(file.handle.file_hash, file.size), start=offset)
            for block in stream:
                missing -= len(block)
                yield block
            # Some of its failures are an end without an error.
            if missing > 0:
                raise EOFError(f"the last {counted(missing, 'byte')} did not come")
        except Exception as error:  # hf_xet raises what it likes, and there is another way
            log.warning("xet failed for %s (%s): going on by plain HTTP", file.path, error)
            self._xet = False
            raise TryAgain("connection_lost", f"The xet storage broke off {file.path}.", NETWORK_HINT) from error

    def _open_xet(self, file: SourceFile) -> Any:
        from huggingface_hub.utils._xet import get_xet_session, refresh_xet_connection_info, xet_headers_without_auth

        with self._xet_lock:
            if self._xet_group is None:
                headers = build_hf_headers(token=self._token or False)
                info = refresh_xet_connection_info(file_data=file.handle, headers=headers)
                if not is_xet_storage(info.endpoint, constants.ENDPOINT):
                    raise ValueError(f"the hub names {info.endpoint[:80]!r} as the place of its storage")
                self._xet_group = get_xet_session().new_download_stream_group(
                    endpoint=info.endpoint,
                    token=info.access_token,
                    token_expiry_unix_secs=info.expiration_unix_epoch,
                    token_refresh_url=file.handle.refresh_route,
                    token_refresh_headers=headers,
                    custom_headers=xet_headers_without_auth(headers),
                )
            return self._xet_group

    @contextmanager
    def _explained(self, revision: str, path: str = "") -> Iterator[None]:
        """Turn the client's exceptions into one sentence and what to do."""
        try:
            yield
        except hub_errors.HTTPError as error:
            log.warning("%s %s: %s", self._model_id, path, error)
            raise explain(error, self._model_id, revision, has_token=self._token is not None) from error


def explain(error: Exception, model_id: str, revision: str, *, has_token: bool) -> JobFailure:
    """Return what a failed request means to the user."""
    if isinstance(error, hub_errors.GatedRepoError):
        return _gated(model_id, has_token)
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return _unknown(model_id, has_token)
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return JobFailure(
            "unknown_revision",
            f"{model_id} has no revision '{revision}'.",
            f"Look at the branches and tags on {constants.ENDPOINT}/{model_id}, or leave revision out for main.",
        )
    if isinstance(error, hub_errors.DisabledRepoError):
        return JobFailure("repository_disabled", f"The hub has disabled {model_id}.", "Choose another model.")
    if isinstance(error, hub_errors.HfHubHTTPError):
        return _status(error.response.status_code, model_id, has_token)
    name = type(error).__name__
    if "Connect" in name or "Proxy" in name:
        return TryAgain("no_network", f"{constants.ENDPOINT} cannot be reached ({in_words(error)}).", NETWORK_HINT)
    return TryAgain("connection_lost", f"The connection to the hub was lost ({in_words(error)}).", NETWORK_HINT)


def _gated(model_id: str, has_token: bool) -> JobFailure:
    page = f"{constants.ENDPOINT}/{model_id}"
    if has_token:
        return JobFailure(
            "gated_repository",
            f"{model_id} is gated, and the account of HF_TOKEN has no access to it.",
            f"Ask for access on {page} with that account, then add the model again.",
        )
    return JobFailure(
        "gated_repository",
        f"{model_id} is gated, and no token was sent.",
        f"Accept its terms on {page}, set HF_TOKEN, restart the server, and add the model again.",
    )


def _unknown(model_id: str, has_token: bool) -> JobFailure:
    hint = "Check the spelling (org/name, case matters)."
    if has_token:
        return JobFailure("unknown_model", f"The hub has no model {model_id} that HF_TOKEN may see.", hint)
    return JobFailure(
        "unknown_model", f"The hub has no public model {model_id}.", f"{hint} For a private one set HF_TOKEN."
    )


def _status(status: int, model_id: str, has_token: bool) -> JobFailure:
    if status == 401 and has_token:
        return JobFailure("bad_token", "The hub does not accept HF_TOKEN.", "Set a valid token, restart, add again.")
    if status == 401:
        return _unknown(model_id, has_token)
    if status == 403:
        return JobFailure(
            "forbidden", f"The hub refuses access to {model_id}.", "Check what HF_TOKEN is allowed to do."
        )
    if status == 404:
        return JobFailure("unknown_model", f"The hub lacks a file of {model_id}.", "Try again, or another revision.")
    if status == 429:
        return TryAgain("hub_busy", "The hub asks for fewer requests (429).", "Set HF_TOKEN, or wait some minutes.")
    if status >= 500 or status in (408, 416):
        return TryAgain("hub_failed", f"The hub answers with status {status}.", "Wait, then add the model again.")
    return JobFailure("bad_hub", f"The hub answers with status {status}.", "Check HF_ENDPOINT.")


def _digest_from_etag(etag: str | None) -> str | None:
    if etag is not None and all(letter in "0123456789abcdef" for letter in etag):
        return {40: f"git:{etag}", 64: f"sha256:{etag}"}.get(len(etag))
    return None


def _start_of(response: Any, asked: int) -> int:
    """Return where the answer's bytes start: where they were asked for, or at 0."""
    if response.status_code != 206:
        return 0
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    if start not in ("0", str(asked)):
        raise JobFailure(
            "bad_hub", f"Asked for bytes from {asked}, the hub sends others ({start[:20]!r}).", "Check HF_ENDPOINT."
        )
    return int(start)


def _raise_for_status(response: Any) -> None:
    """Raise the client's exception for an error answer, by its status and headers; its body is not read.

    The client itself would decompress the body without a bound, and trip over JSON that is no object.
    """
    if response.status_code >= 400:
        headers = {name: response.headers[name] for name in _ERROR_HEADERS if name in response.headers}
        hf_raise_for_status(type(response)(response.status_code, headers=headers, json={}, request=response.request))


def _is_trusted(handle: Any) -> bool:
    """True if a file's place in xet storage is a hash, and is looked up at the hub itself, which gets the token."""
    return (
        handle is not None and is_valid_xet_hash(handle.file_hash) and is_at(handle.refresh_route, constants.ENDPOINT)
    )


def is_at(url: str, endpoint: str) -> bool:
    """True if a URL leads to the scheme, host and port of the endpoint."""
    one, other = _origin(url), _origin(endpoint)
    return one is not None and one == other


def is_xet_storage(url: str, endpoint: str) -> bool:
    """True if a hub may name this as the servers of its storage.

    The client also takes `local://FOLDER`, and makes and reads that folder: only a hub on this machine may name one.
    """
    if url.startswith("https://"):
        return True
    found = _origin(endpoint)
    return (
        url.startswith(("http://", "local://")) and found is not None and found[1] in ("127.0.0.1", "::1", "localhost")
    )


def _origin(url: str) -> tuple[str, str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname or "", port) if parts.hostname else None
