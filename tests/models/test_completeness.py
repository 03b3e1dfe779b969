"""A model is what its repository says that it is: whole, and nothing beside it; what is not is refused early."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modelyard.demo import tiny_llama
from modelyard.jobs.tables import JobStatus
from tests.models.repositories import as_json, embedder, llama, noise, safetensors, sharded
from tests.models.yard import failure_of, files_below, make_settings, open_yard
from tests.servers.hub import Hub

NAME = "acme/model"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4096\n"


async def refused(files: dict[str, bytes], hub: Hub, data: Path) -> tuple[str, str]:
    """Bring the files as a model from the hub and as a folder, and return the code and message that both give."""
    hub.add(NAME, files)
    for name, content in files.items():
        path = data / "imports" / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    async with open_yard(make_settings(data / "data", hub.endpoint, import_dir=data / "imports")) as yard:
        first, second = [failure_of(await yard.bring(model_id)) for model_id in (NAME, "local:mine")]
        assert not (yard.models_dir / "acme--model").exists()
        assert await yard.model(NAME) is None
        assert not yard.partial(NAME).exists()
    assert (first.code, first.message) == (second.code, second.message)
    return first.code, first.message


async def test_a_half_uploaded_model_is_refused_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    files = sharded(2)
    del files["consolidated.safetensors"], files["model-00002-of-00002.safetensors"]
    code, message = await refused(files, hub, tmp_path)
    assert code == "bad_index"
    assert "model-00002-of-00002.safetensors" in message
    assert hub.sent(NAME, "model-00001-of-00002.safetensors") == 0


async def test_a_shard_that_lacks_a_tensor_that_the_index_promises_is_refused(hub: Hub, tmp_path: Path) -> None:
    files = sharded()
    files[SHARDS[2]] = safetensors(noise(5000), tensor="another")
    code, message = await refused(files, hub, tmp_path)
    assert code == "bad_index"
    assert SHARDS[2] in message
    assert "'w2'" in message


async def test_two_shards_of_the_same_bytes_must_both_hold_what_is_promised(hub: Hub, tmp_path: Path) -> None:
    files = sharded()
    files[SHARDS[2]] = files[SHARDS[1]]
    code, message = await refused(files, hub, tmp_path)
    assert (code, SHARDS[2] in message) == ("bad_index", True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", INDEX,
                                  SHARDS[1]])  # fmt: skip
async def test_a_git_lfs_pointer_is_named_as_what_it_is(name: str, hub: Hub, tmp_path: Path) -> None:
    files = sharded() if name in (INDEX, SHARDS[1]) else llama()
    code, message = await refused({**files, name: POINTER}, hub, tmp_path)
    assert code == "lfs_pointer"
    assert message == f"{name} is a Git LFS pointer, not the file: run git lfs pull."


def with_stale_shards() -> dict[str, bytes]:
    stale = {f"model-0000{number}-of-00002.safetensors": safetensors(noise(900_000, "stale")) for number in (1, 2)}
    return {**sharded(), **stale}


def with_odd_json() -> dict[str, bytes]:
    odd = {"README.json": "{\"é\": 1}".encode("utf-16"), "train_sample.json": b'{"a": 1}\n{"a": 2}\n',
           "ds_config.json": b"{// a comment\n}", "log.json": b'{"rows": [' + b"0," * 100_000 + b"0]}"}  # fmt: skip
    return {**llama(), **odd}


def in_one_shard() -> dict[str, bytes]:
    files = llama()
    shard = "model-00001-of-00001.safetensors"
    files[shard] = files.pop("model.safetensors")
    return {**files, INDEX: as_json({"weight_map": {"weight": shard}})}


def with_an_odd_name() -> dict[str, bytes]:
    files = llama()
    files["modèle [final] (1).safetensors"] = files.pop("model.safetensors")
    return files


REPOSITORIES: dict[str, tuple[Callable[[], dict[str, bytes]], set[str], set[str]]] = {
    "stale": (with_stale_shards, {*SHARDS, INDEX}, {"model-00001-of-00002.safetensors"}),
    "odd json": (with_odd_json, {"model.safetensors"}, {"README.json", "train_sample.json"}),
    "one shard": (in_one_shard, {"model-00001-of-00001.safetensors", INDEX}, {"pytorch_model.bin"}),
    "odd name": (with_an_odd_name, {"modèle [final] (1).safetensors"}, {"modeling_evil.py"}),
    "embedder": (embedder, {"2_Dense/model.safetensors", "1_Pooling/config.json"}, set()),
}


@pytest.mark.parametrize("kind", REPOSITORIES)
async def test_what_is_needed_is_fetched_and_what_was_left_out_is_said(kind: str, hub: Hub, tmp_path: Path) -> None:
    make, needed, left_out = REPOSITORIES[kind]
    files = make()
    hub.add(NAME, files)
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring(NAME)
        assert job.status == JobStatus.FINISHED, yard.log(job.id)
        model = await yard.model(NAME)
        assert model is not None
        there = files_below(yard.folder(model))
        assert needed <= set(there)
        assert model.size_bytes == sum(map(len, there.values()))
        assert job.progress is not None
        assert job.progress.done == job.progress.total <= model.size_bytes
        made = {INDEX} if kind == "odd name" else set()
        assert {name: files[name] for name in there if name not in made} == {
            name: content for name, content in there.items() if name not in made
        }
        said = [event for event in await yard.events(job.id) if event.message.startswith("Left out: ")]
        for name in left_out:
            assert name in said[0].message
            assert name in json.dumps(said[0].data)
            assert name not in there
            assert not hub.gets(NAME, name)


def without_an_index() -> dict[str, bytes]:
    files = sharded()
    del files[INDEX], files["consolidated.safetensors"]
    return files


def two_odd_files() -> dict[str, bytes]:
    files = llama()
    del files["model.safetensors"]
    return {**files, **{f"model ({n}).safetensors": safetensors(noise(64), tensor=f"w{n}") for n in (1, 2)}}


@pytest.mark.parametrize(
    ("make", "index"),
    [
        (without_an_index, dict(zip(("w0", "w1", "w2"), SHARDS, strict=True))),
        (two_odd_files, {"w1": "model (1).safetensors", "w2": "model (2).safetensors"}),
        (with_an_odd_name, {"weight": "modèle [final] (1).safetensors"}),
    ],
)
async def test_weights_that_came_without_an_index_get_one_by_which_transformers_finds_them(
    make: Callable[[], dict[str, bytes]], index: dict[str, str], hub: Hub, tmp_path: Path
) -> None:
    hub.add(NAME, make())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring(NAME)
        model = await yard.model(NAME)
        assert model is not None
        made = yard.folder(model) / INDEX
        assert json.loads(made.read_bytes())["weight_map"] == index
        made.unlink()
        sent = len(hub.requests)
        assert (await yard.bring(NAME)).status == JobStatus.FINISHED
        assert json.loads(made.read_bytes())["weight_map"] == index
        assert not [one for one in hub.requests[sent:] if one.file.endswith(".safetensors")], "they are there"


async def test_two_files_with_the_same_tensor_and_nothing_to_say_which_are_refused(hub: Hub, tmp_path: Path) -> None:
    files = llama()
    files["model (1).safetensors"] = files.pop("model.safetensors")
    files["model (2).safetensors"] = safetensors(noise(4096, "another"))
    code, message = await refused(files, hub, tmp_path)
    assert code == "ambiguous_weights"
    assert "'weight'" in message


LOADS = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    print(sorted(map(str, info["missing_keys"])), model.num_parameters() > 0)
"""


@pytest.mark.slow
async def test_transformers_loads_what_was_brought_under_any_name(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tiny_llama.make_llama(tmp_path / "llama")
    files = {path.name: path.read_bytes() for path in (tmp_path / "llama").iterdir()}
    weights = files.pop("model.safetensors")
    tensors = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    shard = "model-00001-of-00001.safetensors"
    index = {tensor: shard for tensor in tensors if tensor != "__metadata__"}
    hub.add("acme/shard", {**files, shard: weights, INDEX: as_json({"metadata": {}, "weight_map": index})})
    hub.add("acme/odd", {**files, "model (1).safetensors": weights})
    async with open_yard(make_settings(tmp_path / "data", hub.endpoint)) as yard:
        folders = []
        for name in ("acme/shard", "acme/odd"):
            await yard.bring(name)
            model = await yard.model(name)
            assert model is not None
            folders.append(str(yard.folder(model)))
        argv = [sys.executable, "-c", LOADS, *folders]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split("\n") == ["[] True", "[] True", ""], done.stderr[-2000:]
