"""A hub that is hostile: no folder but the model's own is touched, and no other host sees the token."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelyard.jobs.tables import JobStatus
from modelyard.models.listing import MAX_LISTING_BYTES
from tests.models.repositories import llama
from tests.models.yard import Yard, failure_of, files_below, make_settings, open_yard
from tests.servers.hub import Hub, XetStore

TINY = "acme/tiny"
WEIGHTS = "model.safetensors"

Lie = Callable[[dict[str, Any]], object]


def with_sha(sha: object) -> Lie:
    return lambda listing: {**listing, "sha": sha}


def renamed(name: object) -> Lie:
    def lie(listing: dict[str, Any]) -> object:
        siblings = [{**one, "rfilename": name} if one["rfilename"] == WEIGHTS else one for one in listing["siblings"]]
        return {**listing, "siblings": siblings}

    return lie


def with_size(size: object) -> Lie:
    def lie(listing: dict[str, Any]) -> object:
        siblings = [{**one, "size": size} if one["rfilename"] == "config.json" else one for one in listing["siblings"]]
        return {**listing, "siblings": siblings}

    return lie


def with_digest(digest: object) -> Lie:
    def lie(listing: dict[str, Any]) -> object:
        siblings = [{**one, "lfs": {"size": 9, "sha256": digest}} for one in listing["siblings"]]
        return {**listing, "siblings": siblings}

    return lie


LIES: dict[str, Lie] = {
    "a commit that leads to the datasets": with_sha("../../objects"),
    "a commit that is an absolute path": with_sha("/HOME/precious"),
    "a commit that is empty": with_sha(""),
    "a commit that is a list": with_sha(["c" * 40]),
    "a name that leads out": renamed("../../../objects/model.safetensors"),
    "an absolute name": renamed("/tmp/model.safetensors"),
    "a name that ends early": renamed("model.safetensors\0.json"),
    "a name of half a letter": renamed("\ud800.safetensors"),
    "a name that is no text": renamed({"a": 1}),
    "a size below nought": with_size(-(10**15)),
    "a size that is a truth value": with_size(True),
    "a size without end": with_size(10**400),
    "a digest that leads out": with_digest("../../../objects/" + "a" * 47),
    "the same name twice": lambda listing: {**listing, "siblings": listing["siblings"] * 2},
    "a list": lambda listing: [listing],
}


async def safe_failure(yard: Yard, hub: Hub) -> tuple[str, str]:
    """Bring the model, which fails, and see that nothing else in the data folder was touched."""
    precious = {name: yard.settings.data_dir / name / "data" for name in ("objects", "precious", "models/acme--other")}
    for path in precious.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    failure = failure_of(await yard.bring(TINY))
    assert all(path.read_text() == "precious" for path in precious.values())
    assert not (yard.models_dir / "acme--tiny").exists()
    assert not yard.partial(TINY).exists() or not any(yard.partial(TINY).rglob("*.part"))
    assert await yard.model(TINY) is None
    return failure.code, failure.message


@pytest.mark.parametrize("lie", LIES)
async def test_a_listing_that_lies_is_refused_and_touches_nothing(lie: str, hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama())
    said = json.dumps(LIES[lie](hub.listing(TINY))).replace("/HOME", str(tmp_path))
    hub.say(TINY, said.encode())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        code, message = await safe_failure(yard, hub)
    assert code == "bad_hub"
    assert TINY in message


BOMB = gzip.compress(b" " * (MAX_LISTING_BYTES + 1), 1)
ANSWERS: dict[str, tuple[bytes, dict[str, str], int]] = {
    "a bomb": (BOMB, {"Content-Encoding": "gzip"}, 200),
    "an encoding that was not asked for": (b"{}", {"Content-Encoding": "br"}, 200),
    "damaged compression": (BOMB[:-900], {"Content-Encoding": "gzip"}, 200),
    "an error with a bomb": (BOMB, {"Content-Encoding": "gzip"}, 418),
    "an error with a list": (b"[]", {"Content-Type": "application/json"}, 418),
    "an error with odd errors": (b'{"errors": 7}', {"Content-Type": "application/json"}, 418),
    "a redirect to nowhere": (b"", {"Location": "http://[::1"}, 302),
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_an_answer_that_is_no_listing_is_refused_and_touches_nothing(
    answer: str, hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, llama())
    body, headers, status = ANSWERS[answer]
    hub.say(TINY, body, headers, status=status)
    async with open_yard(make_settings(tmp_path, hub.endpoint, download_attempts=1)) as yard:
        code, _ = await safe_failure(yard, hub)
    assert code in ("bad_hub", "connection_lost")


@pytest.mark.parametrize("size", ["-5", "1e9", "9" * 40, ""])
async def test_a_size_that_the_listing_lacks_and_a_files_headers_lie_about_is_refused(
    size: str, hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, llama(), sizes=False)
    hub.file_headers[TINY] = {"X-Linked-Size": size}
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        code, _ = await safe_failure(yard, hub)
    assert code == "bad_hub"


async def test_a_digest_in_a_files_headers_that_is_none_reaches_no_path(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(), sizes=False)
    hub.file_headers[TINY] = {"X-Linked-ETag": '"../../../objects/' + "a" * 47 + '"'}
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED, yard.log(job.id)
        model = await yard.model(TINY)
        assert model is not None
        assert files_below(yard.folder(model))[WEIGHTS] == llama()[WEIGHTS]
        assert not (tmp_path / "objects").exists()


async def test_a_listing_that_is_redirected_to_another_host_leaves_the_token_behind(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama())
    hub.say(TINY, b"", {"Location": f"{hub.cdn}/stolen"}, status=307)
    async with open_yard(make_settings(tmp_path, hub.endpoint, HF_TOKEN="hf_secret")) as yard:
        await safe_failure(yard, hub)
    assert (hub.strayed, hub.leaked_tokens) == (1, 0)


@pytest.mark.parametrize("header", ["X-Xet-Refresh-Route", "Link"])
async def test_a_token_for_the_storage_is_asked_for_at_the_hub_only(
    header: str, hub: Hub, tmp_path: Path, xet: XetStore
) -> None:
    content = llama()
    xet.put(content[WEIGHTS])
    hub.add(TINY, content, xet=xet, gated=True, approved=frozenset({"hf_secret"}))
    stolen = f"{hub.cdn}/stolen"
    hub.file_headers[TINY] = {header: stolen if header != "Link" else f'<{stolen}>; rel="xet-auth"'}
    async with open_yard(make_settings(tmp_path, hub.endpoint, HF_TOKEN="hf_secret")) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED, yard.log(job.id)
        model = await yard.model(TINY)
        assert model is not None
        assert files_below(yard.folder(model))[WEIGHTS] == content[WEIGHTS], "by plain HTTP"
    assert xet.requests == 0
    assert hub.leaked_tokens == 0
    assert hub.strayed == 1, "the weights themselves"


WHERE = """
import json, sys
from modelyard.models.hub_source import is_at, is_xet_storage
cases = json.load(sys.stdin)
print(json.dumps([[is_xet_storage(url, endpoint) for url, endpoint in cases["storage"]],
                  [is_at(url, endpoint) for url, endpoint in cases["at"]]]))
"""
HUGGING_FACE, HERE = "https://huggingface.co", "http://127.0.0.1:5000"
STORAGE = [
    ("https://cas-server.xethub.hf.co", HUGGING_FACE, True),
    ("http://10.0.0.1", HUGGING_FACE, False),
    ("local:///etc", HUGGING_FACE, False),
    ("local:///srv/data", "https://mirror.example", False),
    ("local:///tmp/x", "https://127.0.0.1.evil.example", False),
    ("local:///tmp/x", HERE, True),
    ("memory://", HERE, False),
    ("/etc", HERE, False),
]
AT = [
    ("https://huggingface.co/api/x", HUGGING_FACE, True),
    ("https://huggingface.co:443/api/x", HUGGING_FACE, True),
    ("http://huggingface.co/api/x", HUGGING_FACE, False),
    ("https://huggingface.co.evil.example/api", HUGGING_FACE, False),
    ("https://huggingface.co@evil.example/api", HUGGING_FACE, False),
    ("https://huggingface.co:444/api", HUGGING_FACE, False),
    ("/api/x", HUGGING_FACE, False),
    ("https://[::1", HUGGING_FACE, False),
]


def test_where_the_storage_is_and_where_the_token_goes_is_decided_by_scheme_and_host() -> None:
    # In a process of its own: the server's must not import the hub's client.
    cases = {"storage": [case[:2] for case in STORAGE], "at": [case[:2] for case in AT]}
    done = subprocess.run(
        [sys.executable, "-c", WHERE], input=json.dumps(cases), capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == [[case[2] for case in STORAGE], [case[2] for case in AT]]
