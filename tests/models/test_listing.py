"""A hub's answer is read by types: what is not as the protocol says refuses the whole of it."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.models.listing import MAX_LISTING_BYTES, BadListing, Listing, decompressed, is_commit, is_size, parse

COMMIT, BLOB, SHA256 = "c" * 40, "b" * 40, "a" * 64
LARGE = {"rfilename": "model.safetensors", "size": 9, "blobId": BLOB, "lfs": {"size": 8, "sha256": SHA256}}
SMALL = {"rfilename": "config.json", "size": 7, "blobId": BLOB}


def listing(*siblings: object, sha: object = COMMIT) -> bytes:
    return json.dumps({"id": "acme/tiny", "sha": sha, "siblings": siblings}).encode()


def test_an_honest_answer_tells_sizes_and_digests() -> None:
    found = parse(listing(LARGE, SMALL, {"rfilename": "README.md"}))
    assert found.commit == COMMIT
    assert {name: (entry.size, entry.digest, entry.large) for name, entry in found.files.items()} == {
        "model.safetensors": (8, f"sha256:{SHA256}", True),
        "config.json": (7, f"git:{BLOB}", False),
        "README.md": (None, None, False),
    }
    assert parse(listing()).files == {}


@pytest.mark.parametrize("sha", ["../../objects", "/etc", "..", "", "main", "c" * 39, "c" * 41, "C" * 40, COMMIT + "\n",
                                 "c" * 64, None, 7, [], {}, True, "0" * 39 + "/", "\uff11" * 40])  # fmt: skip
def test_a_commit_is_forty_hexadecimal_digits(sha: object) -> None:
    with pytest.raises(BadListing):
        parse(listing(SMALL, sha=sha))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../b", "", "a//b", "a/", ".", "a\0b", "\ud800",
                                  "x" * 5000, None, 7, ["a"], {"a": 1}, True])  # fmt: skip
def test_a_file_has_a_name_that_a_tree_can_hold(name: object) -> None:
    with pytest.raises(BadListing):
        parse(listing(SMALL, {**SMALL, "rfilename": name}))


@pytest.mark.parametrize("size", [-1, True, 1.0, "7", 1 << 45, 10**400, [], {}, float("nan"), float("inf")])
def test_a_size_is_a_whole_number_from_nought(size: object) -> None:
    for entry in ({**SMALL, "size": size}, {**LARGE, "lfs": {"size": size, "sha256": SHA256}}):
        with pytest.raises(BadListing):
            parse(listing(entry))


@pytest.mark.parametrize("digest", ["../../x", "B" * 40, "b" * 39, "", 7, True, [], BLOB + "\n", "/" + "b" * 39])
def test_digests_have_their_length(digest: object) -> None:
    for entry in ({**SMALL, "blobId": digest}, {**LARGE, "lfs": {"size": 8, "sha256": digest}}):
        with pytest.raises(BadListing):
            parse(listing(entry))


@pytest.mark.parametrize("lfs", [[], {}, "x", True, 7, {"size": 8}, {"sha256": None, "size": 8}])
def test_a_large_file_has_its_digest(lfs: object) -> None:
    with pytest.raises(BadListing):
        parse(listing({**SMALL, "lfs": lfs}))


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"7", b'"x"', b"{", b"[" * 200_000, b"\xff\xfe", b"<html>",
                                     b'{"sha": "' + COMMIT.encode() + b'"}', listing(None), listing([]), listing("a"),
                                     b'{"sha": "' + COMMIT.encode() + b'", "siblings": {}}'])  # fmt: skip
def test_another_shape_is_no_listing(content: bytes) -> None:
    with pytest.raises(BadListing):
        parse(content)


def test_a_name_comes_once_and_is_not_a_folder_as_well() -> None:
    with pytest.raises(BadListing, match="twice"):
        parse(listing(SMALL, SMALL))
    with pytest.raises(BadListing, match="folder"):
        parse(listing(SMALL, {**SMALL, "rfilename": "config.json/x.json"}))


def test_the_number_of_files_is_bounded() -> None:
    with pytest.raises(BadListing, match="200001 files"):
        parse(b'{"sha": "%s", "siblings": [%s0]}' % (COMMIT.encode(), b"0," * 200_000))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([COMMIT, SHA256, "../x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "sha256", "x"]), inner),
    max_leaves=8,
)
SIBLING = st.dictionaries(st.sampled_from(["rfilename", "size", "blobId", "lfs"]), JSON) | JSON


@given(st.fixed_dictionaries({"sha": st.just(COMMIT) | JSON, "siblings": st.lists(SIBLING, max_size=5) | JSON}))
def test_whatever_a_hub_says_is_a_listing_of_the_right_types_or_is_refused(answer: Any) -> None:
    try:
        found = parse(json.dumps(answer).encode())
    except BadListing:
        return
    assert isinstance(found, Listing)
    assert is_commit(found.commit)
    for name, entry in found.files.items():
        assert ".." not in name.split("/")
        assert not name.startswith("/")
        assert entry.size is None or is_size(entry.size)
        assert entry.digest is None or entry.digest.partition(":")[2].isalnum()


def test_a_listing_that_grows_when_it_is_decompressed_is_bounded() -> None:
    bomb = gzip.compress(b" " * (64 * 1024 * 1024), 1)
    most = 8 * 1024 * 1024
    assert most <= MAX_LISTING_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(BadListing, match="more than"):
            decompressed((bomb[at : at + 65536] for at in range(0, len(bomb), 65536)), "gzip", most)
        assert tracemalloc.get_traced_memory()[1] < 3 * most
    finally:
        tracemalloc.stop()


def test_one_that_never_ends_is_bounded_whatever_it_is_encoded_as() -> None:
    def for_ever(block: bytes) -> Any:
        while True:
            yield block

    for encoding, block in (("", b" " * 65536), ("gzip", gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * 9999)):
        with pytest.raises(BadListing):
            decompressed(for_ever(block), encoding, 10_000_000)
    assert decompressed(for_ever(gzip.compress(b"{}")), "gzip") == b"{}"


@pytest.mark.parametrize(("content", "encoding"), [(b"{}", "br"), (b"{}", "gzip"),
                                                   (gzip.compress(b"{}", mtime=0)[:-4], "gzip"),
                                                   (zlib.compress(b"{}"), "gzip"), (b"{}", "gzip, gzip")])  # fmt: skip
def test_an_encoding_that_was_not_asked_for_or_is_damaged_is_refused(content: bytes, encoding: str) -> None:
    with pytest.raises(BadListing):
        decompressed([content], encoding)
