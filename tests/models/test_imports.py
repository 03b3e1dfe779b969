"""Models from the import directory: copied by the real child, with the same scan and verification."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.jobs.tables import JobStatus
from modelyard.models.shards import INDEX
from tests.models.repositories import adapter, as_json, llama
from tests.models.yard import failure_of, files_below, make_settings, open_yard
from tests.servers.hub import Hub, sha256_of

NOWHERE = "http://127.0.0.1:1"
SHARD = "model-00001-of-00002.safetensors"


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


async def test_a_folder_is_copied_scanned_and_left_as_it_was(tmp_path: Path) -> None:
    files = llama(300_000)
    source = put(tmp_path / "imports" / "mine", files)
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        job = await yard.bring("local:mine")
        assert job.status == JobStatus.FINISHED, yard.log(job.id)
        assert job.name == "DOWNLOAD_local:mine"
        model = await yard.model("local:mine")
        assert model is not None
        assert (model.source, model.revision, model.adapter, model.task) == ("import", "local", False, "generate")
        copied = files_below(yard.folder(model))
        assert copied["model.safetensors"] == files["model.safetensors"]
        assert "pytorch_model.bin" not in copied
        weights = yard.folder(model) / "model.safetensors"
        assert not weights.samefile(source / "model.safetensors")
        assert weights.stat().st_nlink == 1
    assert files_below(source) == files


async def test_a_folder_that_changed_is_taken_again_and_one_that_did_not_is_not_copied(tmp_path: Path) -> None:
    source = put(tmp_path / "imports" / "mine", llama())
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        await yard.bring("local:mine")
        first = await yard.model("local:mine")
        await yard.bring("local:mine")
        same = await yard.model("local:mine")
        put(source, llama(seed="retrained"))
        await yard.bring("local:mine")
        changed = await yard.model("local:mine")
        assert first is not None
        assert same is not None
        assert changed is not None
        assert first.commit == same.commit != changed.commit
        assert (yard.folder(changed) / "model.safetensors").read_bytes() == llama(seed="retrained")["model.safetensors"]


@pytest.mark.parametrize("index", [as_json({"weight_map": {"w": SHARD}}), b"{", b"[]", b'{"weight_map": []}'])
async def test_a_whole_model_beside_a_bad_index_is_taken_without_it(index: bytes, hub: Hub, tmp_path: Path) -> None:
    files = {**llama(), INDEX: index}
    put(tmp_path / "imports" / "mine", files)
    hub.add("acme/tiny", files)
    async with open_yard(make_settings(tmp_path / "data", hub.endpoint, import_dir=tmp_path / "imports")) as yard:
        for model_id in ("local:mine", "acme/tiny"):
            job = await yard.bring(model_id)
            assert job.status == JobStatus.FINISHED, yard.log(job.id)
            model = await yard.model(model_id)
            assert model is not None
            assert INDEX not in files_below(yard.folder(model))


async def test_an_imported_adapter_keeps_its_base(tmp_path: Path) -> None:
    put(tmp_path / "imports" / "lora", adapter("local:mine"))
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        assert (await yard.bring("local:lora")).status == JobStatus.FINISHED
        model = await yard.model("local:lora")
        assert model is not None
        assert (model.adapter, model.base_model_id) == (True, "local:mine")


async def test_one_of_several_adapters_in_a_folder_is_imported_by_its_own(tmp_path: Path) -> None:
    for name in ("law", "poems"):
        put(tmp_path / "imports" / "adapters" / name, adapter("acme/tiny"))
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        job = await yard.bring("local:adapters")
        assert job.failure is not None
        assert job.failure.code == "adapters_in_folders"
        assert (await yard.bring("local:adapters/law")).status == JobStatus.FINISHED
        model = await yard.model("local:adapters/law")
        assert model is not None
        assert (model.adapter, model.source) == (True, "import")


async def test_a_link_that_leads_out_of_the_import_directory_is_refused(tmp_path: Path) -> None:
    secret = put(tmp_path / "elsewhere", llama())
    source = put(tmp_path / "imports" / "mine", llama())
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(secret / "tokenizer.json")
    (tmp_path / "imports" / "whole").symlink_to(secret)
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        for name in ("mine", "whole"):
            failure = failure_of(await yard.bring(f"local:{name}"))
            assert failure.code == "outside_import_directory"
            assert await yard.model(f"local:{name}") is None


async def test_a_link_within_the_import_directory_is_followed(tmp_path: Path) -> None:
    blobs = put(tmp_path / "imports" / "blobs", llama())
    source = put(tmp_path / "imports" / "mine", llama())
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(blobs / "model.safetensors")
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        assert (await yard.bring("local:mine")).status == JobStatus.FINISHED
        model = await yard.model("local:mine")
        assert model is not None
        assert not (yard.folder(model) / "model.safetensors").is_symlink()


@pytest.mark.parametrize(("configured", "code"), [(True, "unknown_model"), (False, "imports_off")])
async def test_a_missing_folder_or_setting_says_what_to_do(tmp_path: Path, configured: bool, code: str) -> None:
    import_dir = tmp_path / "imports"
    import_dir.mkdir()
    settings = make_settings(tmp_path / "data", NOWHERE, import_dir=import_dir if configured else None)
    async with open_yard(settings) as yard:
        failure = failure_of(await yard.bring("local:mine"))
        assert failure.code == code
        assert "MODELYARD_IMPORT_DIR" in failure.hint


def put_in_cache_layout(folder: Path, files: dict[str, bytes], commit: str) -> None:
    """Write files as the hub's client keeps them: blobs by their hash, and links to them."""
    for name, content in files.items():
        blob = folder / "blobs" / sha256_of(content)
        link = folder / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(Path(*[".."] * (len(Path(name).parts) + 1), "blobs", blob.name))


OLD, NEW = "0" * 40, "1" * 40


@pytest.mark.parametrize("name", ["models--acme--tiny", "tiny"])
async def test_a_folder_of_the_hubs_cache_is_taken_for_the_snapshot_that_main_names(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "imports" / name
    put_in_cache_layout(folder, {**llama(), "additional_chat_templates/rag.jinja": b"{{ x }}"}, NEW)
    put_in_cache_layout(folder, llama(seed="old"), OLD)
    put(folder, {"refs/main": NEW.encode()})
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        job = await yard.bring(f"local:{name}")
        assert job.status == JobStatus.FINISHED, yard.log(job.id)
        model = await yard.model(f"local:{name}")
        assert model is not None
        copied = files_below(yard.folder(model))
        assert copied["model.safetensors"] == llama()["model.safetensors"]
        assert "additional_chat_templates/rag.jinja" in copied
        assert not any(path.is_symlink() for path in yard.folder(model).rglob("*"))


async def test_an_adapter_in_a_folder_of_the_hubs_cache_is_added_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "imports" / "models--acme--adapters"
    files = {f"{name}/{file}": content for name in ("law", "poems") for file, content in adapter("org/a").items()}
    put_in_cache_layout(folder, files, NEW)
    put(folder, {"refs/main": NEW.encode()})
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        failure = failure_of(await yard.bring("local:models--acme--adapters"))
        assert "subfolder=law" in failure.hint
        job = await yard.bring("local:models--acme--adapters/law")
        assert job.status == JobStatus.FINISHED, yard.log(job.id)
        model = await yard.model("local:models--acme--adapters/law")
        assert model is not None
        assert model.adapter
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files_below(yard.folder(model)))
        failure = failure_of(await yard.bring("local:models--acme--adapters/prose"))
        assert (failure.code, "adapters/prose'" in failure.message) == ("unknown_model", True)


async def test_a_folder_of_the_hubs_cache_that_does_not_say_which_snapshot_is_refused_with_their_names(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "imports" / "tiny"
    put_in_cache_layout(folder, llama(), OLD)
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        assert (await yard.bring("local:tiny")).status == JobStatus.FINISHED, "there is only one"
        put_in_cache_layout(folder, llama(seed="new"), NEW)
        for main in (b"", b"../../../secrets", b"2" * 40):
            put(folder, {"refs/main": main})
            failure = failure_of(await yard.bring("local:tiny"))
            assert failure.code == "ambiguous_snapshot"
            assert OLD in failure.message
            assert NEW in failure.message


async def test_a_link_to_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "imports" / "tiny"
    put_in_cache_layout(folder, llama(), OLD)
    (folder / "blobs" / sha256_of(llama()["model.safetensors"])).unlink()
    async with open_yard(make_settings(tmp_path / "data", NOWHERE, import_dir=tmp_path / "imports")) as yard:
        failure = failure_of(await yard.bring("local:tiny"))
        assert failure.code == "missing_file"
        assert "'model.safetensors' is a link to a file that is not there" in failure.message
