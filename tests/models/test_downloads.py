"""Downloads with the real child and the real hub client, against a hub that misbehaves."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from uuid import UUID

import pytest

from modelyard.jobs.tables import JobStatus
from modelyard.models import actions, adapter_facts
from modelyard.models.lost import is_lost
from tests.eventually import eventually
from tests.models.repositories import CONFIG, adapter, as_json, embedder, llama, noise, safetensors, sharded
from tests.models.test_stored_adapters import write_adapter
from tests.models.yard import Yard, child_pid, failure_of, fetched, files_below, make_settings, open_yard
from tests.servers.hub import Fault, Hub, XetStore

TINY = "acme/tiny"
WEIGHTS = "model.safetensors"
SIZE = 2_000_000
MIB_IN_GIB = 1 / 1024


async def said(yard: Yard, job_id: UUID) -> str:
    return " ".join(event.message for event in await yard.events(job_id))


async def test_a_model_arrives_with_what_is_needed_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    files = llama(SIZE)
    commit = hub.add(TINY, files)
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED, yard.log(job.id)
        assert job.name == "DOWNLOAD_acme/tiny"
        model = await yard.model(TINY)
        assert model is not None
        needed = {
            name: files[name]
            for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                         "chat_template.jinja", WEIGHTS)
        }  # fmt: skip
        assert files_below(yard.folder(model)) == needed
        assert (model.commit, model.revision, model.task, model.adapter) == (commit, "main", "generate", False)
        assert model.size_bytes == sum(map(len, needed.values()))
        assert job.progress is not None
        assert (job.progress.done, job.progress.total, job.progress.unit) == (
            model.size_bytes,
            model.size_bytes,
            "bytes",
        )
        assert hub.sent(TINY, "pytorch_model.bin") == 0
        assert not yard.partial(TINY).exists()
        assert not (yard.runner.log_of(job.id).parent / "hub").exists()


async def test_shards_are_fetched_once_and_no_second_format_of_them(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/sharded", sharded())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring("acme/sharded")
        model = await yard.model("acme/sharded")
        assert model is not None
        names = set(files_below(yard.folder(model)))
        assert {name for name in names if name.endswith(".safetensors")} == {
            f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
        }
        assert "model.safetensors.index.json" in names
        assert "params.json" not in names


MISTRAL = {
    "consolidated.safetensors": safetensors(noise(5000)),
    "params.json": as_json({"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 64}),
    "tekken.json": as_json({"config": {}, "vocab": []}),
}


async def test_a_repository_in_both_of_mistrals_forms_keeps_its_tokenizer_without_its_weights_twice(
    hub: Hub, tmp_path: Path
) -> None:
    files = {**llama(), **MISTRAL}
    del files["chat_template.jinja"]
    hub.add("acme/both", files)
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring("acme/both")
        model = await yard.model("acme/both")
        assert model is not None
        assert model.chat_template == "mistral"
        assert "tekken.json" in files_below(yard.folder(model))
        assert hub.sent("acme/both", "consolidated.safetensors") == 0


async def test_a_repository_in_mistrals_form_alone_arrives_whole(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/mistral", MISTRAL)
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring("acme/mistral")
        model = await yard.model("acme/mistral")
        assert model is not None
        assert (model.task, model.chat_template) == ("generate", "mistral")
        assert files_below(yard.folder(model)) == MISTRAL
        assert not is_lost(yard.models_dir, model)


async def test_params_that_cannot_be_believed_are_refused_before_the_weights(hub: Hub, tmp_path: Path) -> None:
    params = {"dim": "wide", "n_layers": 1}
    hub.add("acme/mistral", {**MISTRAL, "params.json": as_json(params)})
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        assert failure_of(await yard.bring("acme/mistral")).code == "bad_configuration"
        assert hub.sent("acme/mistral", "consolidated.safetensors") == 0


@pytest.mark.parametrize("has_template", [True, False])
async def test_a_guessed_chat_template_is_announced(hub: Hub, tmp_path: Path, has_template: bool) -> None:
    hub.add(TINY, {name: content for name, content in llama().items() if has_template or "template" not in name})
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring(TINY)
        model = await yard.model(TINY)
        assert model is not None
        assert model.chat_template == ("own" if has_template else "guessed")
        warnings = [event.message for event in await yard.events(job.id) if event.level == "warning"]
        assert ["brings no chat template" in one for one in warnings] == ([] if has_template else [True])


async def test_a_lora_repository_becomes_an_adapter_with_its_base(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/lora", adapter(TINY))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring("acme/lora")
        model = await yard.model("acme/lora")
        assert model is not None
        assert (model.adapter, model.base_model_id, model.task) == (True, TINY, "generate")


async def test_an_adapters_facts_come_with_it_into_its_row_and_not_into_the_events(hub: Hub, tmp_path: Path) -> None:
    write_adapter(tmp_path / "made")
    hub.add("acme/lora", {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()})
    hub.add("acme/odd", adapter(TINY))
    hub.add(TINY, llama())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        for model_id, refused in (("acme/lora", False), ("acme/odd", True), (TINY, None)):
            job = await yard.bring(model_id)
            model = await yard.model(model_id)
            assert model is not None
            async with yard.sessions.read() as session:
                facts = (await actions.adapter_facts_of(session, [model])).get(model.path)
            assert facts == (None if refused is None else adapter_facts.read(yard.folder(model)))
            assert refused is None or facts is None or (facts.refusal is not None) == refused
            events = await yard.events(job.id)
            assert events
            assert not [event for event in events if "adapter_facts" in (event.data or {})]


async def test_an_adapter_whose_header_has_many_mebibytes_is_refused(hub: Hub, tmp_path: Path) -> None:
    header = {"__metadata__": {"padding": "x" * (17 * 1024**2)}}
    hub.add("acme/lora", {**adapter(TINY), "adapter_model.safetensors": safetensors(b"", header)})
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring("acme/lora")
        assert job.failure is not None
        assert job.failure.code == "bad_weights"
        assert "declares a header of" in job.failure.message


async def test_an_embedding_model_arrives_with_its_modules_and_its_task(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/embedder", embedder())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring("acme/embedder")
        model = await yard.model("acme/embedder")
        assert model is not None
        assert model.task == "embed"
        assert {"1_Pooling/config.json", "2_Dense/model.safetensors"} <= set(files_below(yard.folder(model)))


async def test_a_mirror_that_lists_no_sizes_still_delivers_verified_files(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(SIZE), sizes=False)
    hub.misbehave(TINY, WEIGHTS, Fault("corrupt"))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED
        assert hub.starts(TINY, WEIGHTS) == [0, 0]


async def test_a_commit_that_is_there_finishes_at_once_without_the_network(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(TINY, llama())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring(TINY)
        asked = hub.listings
        job = await yard.bring(TINY, commit)
        assert job.status == JobStatus.FINISHED
        assert hub.listings == asked
        assert not list(yard.runner.log_of(job.id).parent.glob("attempt-*"))


async def test_a_branch_that_is_there_is_asked_about_and_brings_nothing_when_it_has_not_moved(
    hub: Hub, tmp_path: Path
) -> None:
    commit = hub.add(TINY, llama())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring(TINY)
        asked, got = hub.listings, len(hub.requests)
        for revision in (None, "main"):
            job = await yard.bring(TINY, revision)
            assert job.status == JobStatus.FINISHED
            assert f"at commit {commit}: main has not moved" in await said(yard, job.id)
        assert hub.listings == asked + 2
        assert len(hub.requests) == got, "not a byte of a file"


async def test_a_branch_that_has_moved_brings_its_new_commit_and_keeps_the_folder_of_the_old_one(
    hub: Hub, tmp_path: Path
) -> None:
    old_commit = hub.add(TINY, llama())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring(TINY)
        old = await yard.model(TINY)
        assert old is not None
        new_commit = hub.add(TINY, llama(seed="trained on"))
        configurations = len(hub.gets(TINY, "tokenizer.json"))
        job = await yard.bring(TINY)
        model = await yard.model(TINY)
        assert model is not None
        assert (model.commit, model.id) == (new_commit, old.id)
        assert (yard.folder(model) / WEIGHTS).read_bytes() == llama(seed="trained on")[WEIGHTS]
        assert (yard.folder(old) / WEIGHTS).read_bytes() == llama()[WEIGHTS]
        assert f"main has moved on from {old_commit}" in await said(yard, job.id)
        assert len(hub.gets(TINY, "tokenizer.json")) == configurations + 1


@pytest.mark.parametrize("what", ["down", "busy"])
async def test_a_hub_that_does_not_answer_is_no_reason_to_lose_what_is_there(
    what: str, hub: Hub, tmp_path: Path
) -> None:
    commit = hub.add(TINY, llama())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring(TINY)
    endpoint = "http://127.0.0.1:9" if what == "down" else hub.endpoint
    hub.misbehave(TINY, "", Fault("status", times=None, status=503))
    async with open_yard(make_settings(tmp_path, endpoint)) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED
        (told,) = [event for event in await yard.events(job.id) if event.level == "warning"]
        assert commit in told.message
        assert "could not be asked" in told.message
        missing = await yard.bring("acme/other")
        assert failure_of(missing).code in ("no_network", "unknown_model"), "what is not there is not"


async def test_a_branch_that_is_gone_says_so_and_keeps_what_is_there(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(), revision="v1")
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring(TINY, "v1")
        hub.repositories[TINY].revisions = {"main": llama(seed="other")}
        assert failure_of(await yard.bring(TINY, "v1")).code == "unknown_revision"
        model = await yard.model(TINY)
        assert model is not None
        assert (yard.folder(model) / WEIGHTS).is_file()


async def test_another_revision_replaces_the_model_and_shares_nothing_half(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama())
    second = hub.add(TINY, llama(seed="second"), revision="v2")
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        await yard.bring(TINY)
        old = await yard.model(TINY)
        assert old is not None
        await yard.bring(TINY, "v2")
        model = await yard.model(TINY)
        assert model is not None
        assert (model.commit, model.revision) == (second, "v2")
        assert model.id == old.id
        # The old revision may still be in service; it goes when the server starts anew.
        assert yard.folder(old).is_dir()
        async with yard.sessions.read() as session:
            assert await actions.sweep(session, yard.models_dir) == [yard.folder(old)]
        assert yard.folder(model).is_dir()


async def test_the_token_reaches_the_hub_and_never_the_storage_behind_it(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(), gated=True, approved=frozenset({"hf_secret"}))
    async with open_yard(make_settings(tmp_path, hub.endpoint, HF_TOKEN="hf_secret")) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED
        assert hub.leaked_tokens == 0
        assert {request.token for request in hub.gets(TINY, "config.json")} == {True}
        assert "hf_secret" not in yard.log(job.id)


async def test_an_unknown_model_fails_at_once_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring("acme/misspelt")
        failure = failure_of(job)
        assert failure.code == "unknown_model"
        assert "acme/misspelt" in failure.message
        assert "HF_TOKEN" in failure.hint
        assert any("RepositoryNotFoundError" in line for line in failure.evidence), failure.evidence
        assert await yard.model("acme/misspelt") is None
        assert not yard.partial("acme/misspelt").exists()


async def test_an_unknown_revision_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama())
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        failure = failure_of(await yard.bring(TINY, "v9"))
        assert failure.code == "unknown_revision"
        assert "'v9'" in failure.message
        assert any("RevisionNotFoundError" in line for line in failure.evidence), failure.evidence


@pytest.mark.parametrize(("token", "says"), [("", "no token was sent"), ("hf_stranger", "has no access")])
async def test_a_gated_model_says_what_to_do(hub: Hub, tmp_path: Path, token: str, says: str) -> None:
    hub.add(TINY, llama(), gated=True, approved=frozenset({"hf_secret"}))
    async with open_yard(make_settings(tmp_path, hub.endpoint, HF_TOKEN=token)) as yard:
        failure = failure_of(await yard.bring(TINY))
        assert failure.code == "gated_repository"
        assert says in failure.message
        assert any("GatedRepoError" in line for line in failure.evidence), failure.evidence
        assert "hf_stranger" not in str(failure)
        assert hub.sent(TINY, WEIGHTS) == 0


async def test_no_network_is_tried_again_and_then_said(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: every connection is refused
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        async with open_yard(make_settings(tmp_path, endpoint, download_attempts=2)) as yard:
            job = await yard.bring(TINY)
            failure = failure_of(job)
            assert failure.code == "no_network"
            assert endpoint in failure.message
            assert any("ConnectError" in line for line in failure.evidence), failure.evidence
            retries = [event for event in await yard.events(job.id) if event.level == "warning"]
            assert len(retries) == 1


async def test_a_connection_cut_mid_file_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("cut", after=500_000, times=3))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED
        assert hub.starts(TINY, WEIGHTS) == [0, 500_000, 1_000_000, 1_500_000]
        assert hub.sent(TINY, WEIGHTS) == len(content[WEIGHTS])


async def test_a_server_without_ranges_starts_over_and_still_delivers(hub: Hub, tmp_path: Path) -> None:
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("cut", after=500_000))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job_id = await yard.add(TINY)
        await fetched(yard, TINY, 500_000)
        hub.misbehave(TINY, WEIGHTS, Fault("ignore_range"))
        job = await yard.ended(job_id)
        assert job.status == JobStatus.FINISHED
        model = await yard.model(TINY)
        assert model is not None
        assert (yard.folder(model) / WEIGHTS).read_bytes() == content[WEIGHTS]


async def test_a_connection_that_is_always_cut_at_once_is_given_up_with_its_cause(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(SIZE))
    hub.misbehave(TINY, WEIGHTS, Fault("cut", after=0, times=None))
    async with open_yard(make_settings(tmp_path, hub.endpoint, download_attempts=1)) as yard:
        failure = failure_of(await yard.bring(TINY))
        assert failure.code == "connection_lost"
        assert "goes on where it stopped" in failure.hint


@pytest.mark.parametrize(("file", "starts"), [("", [0]), (WEIGHTS, [0, 700_000])])
async def test_a_stalled_server_is_left_and_the_download_goes_on(
    hub: Hub, tmp_path: Path, file: str, starts: list[int]
) -> None:
    """Whoever loses patience first, the child with its connection or the watchdog with the child."""
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, file, Fault("stall", after=700_000))
    async with open_yard(make_settings(tmp_path, hub.endpoint, download_stall_s=3.0)) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED
        assert hub.starts(TINY, WEIGHTS) == starts
        assert hub.sent(TINY, WEIGHTS) == len(content[WEIGHTS])


async def test_a_child_that_hangs_is_ended_by_the_watchdog_and_resumed_without_xet(hub: Hub, tmp_path: Path) -> None:
    content = llama(SIZE)
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("stall", after=700_000))
    async with open_yard(make_settings(tmp_path, hub.endpoint, download_stall_s=3.0)) as yard:
        job_id = await yard.add(TINY)
        await fetched(yard, TINY, 700_000)
        hung = child_pid(yard.runner.log_of(job_id).parent)
        os.kill(hung, signal.SIGSTOP)
        job = await yard.ended(job_id)
        assert job.status == JobStatus.FINISHED
        assert hub.starts(TINY, WEIGHTS) == [0, 700_000]
        warnings = [event for event in await yard.events(job.id) if event.level == "warning"]
        assert [event.data["code"] for event in warnings] == ["stalled"]
        assert yard.log(job_id).count("xet: off") == 1


async def test_a_child_that_dies_shows_its_last_words(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(SIZE))
    hub.misbehave(TINY, WEIGHTS, Fault("stall", after=700_000))
    async with open_yard(make_settings(tmp_path, hub.endpoint, download_attempts=1)) as yard:
        job_id = await yard.add(TINY)
        await fetched(yard, TINY, 700_000)
        hub.misbehave(TINY, WEIGHTS, Fault("stall", after=0))
        folder = yard.runner.log_of(job_id).parent
        os.kill(child_pid(folder), signal.SIGABRT)
        # The first one brought something, so there is a second.
        await eventually((folder / "attempt-2" / "progress.jsonl").exists, "the next attempt")
        os.kill(child_pid(folder), signal.SIGABRT)
        failure = failure_of(await yard.ended(job_id))
        assert failure.code == "download_died"
        assert "SIGABRT" in failure.message
        assert failure.evidence
        assert any("File " in line or "Fatal Python error" in line for line in failure.evidence), failure.evidence


async def test_files_in_xet_storage_come_from_there(hub: Hub, tmp_path: Path, xet: XetStore) -> None:
    content = llama(SIZE)
    xet.put(content[WEIGHTS])
    hub.add(TINY, content, xet=xet)
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED
        assert (hub.starts(TINY, WEIGHTS), xet.requests) == ([], 1)
        assert not (yard.runner.log_of(job.id).parent / "hub").exists()


async def test_what_came_by_http_goes_on_in_xet_storage(hub: Hub, tmp_path: Path, xet: XetStore) -> None:
    content = llama(SIZE)
    xet.put(content[WEIGHTS])
    hub.add(TINY, content)
    hub.misbehave(TINY, WEIGHTS, Fault("stall", after=600_000))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job_id = await yard.add(TINY)
        await fetched(yard, TINY, 600_000)
        await yard.interrupt(job_id)
        assert (await yard.ended(job_id)).status == JobStatus.KILLED
        hub.add(TINY, content, xet=xet)
        assert (await yard.bring(TINY)).status == JobStatus.FINISHED
        assert (hub.starts(TINY, WEIGHTS), hub.sent(TINY, WEIGHTS), xet.requests) == ([0], 600_000, 1)


async def test_xet_storage_that_fails_is_left_for_plain_http(hub: Hub, tmp_path: Path, xet: XetStore) -> None:
    content = llama(SIZE)
    hub.add(TINY, content, xet=xet)
    xet.hashes[content[WEIGHTS]] = "ab" * 32  # the storage has never heard of it
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        job = await yard.bring(TINY)
        assert job.status == JobStatus.FINISHED
        assert (hub.starts(TINY, WEIGHTS), xet.requests) == ([0], 1)
        assert "going on by plain HTTP" in yard.log(job.id)


async def test_wrong_content_is_fetched_once_more(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(SIZE))
    hub.misbehave(TINY, WEIGHTS, Fault("corrupt"))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        assert (await yard.bring(TINY)).status == JobStatus.FINISHED
        assert hub.starts(TINY, WEIGHTS) == [0, 0]


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json"])
async def test_content_that_stays_wrong_never_counts_as_there(hub: Hub, tmp_path: Path, file: str) -> None:
    hub.add(TINY, llama(SIZE))
    hub.misbehave(TINY, file, Fault("corrupt", times=None))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        failure = failure_of(await yard.bring(TINY))
        assert failure.code == "hash_mismatch"
        assert file in failure.message
        assert await yard.model(TINY) is None
        assert not (yard.models_dir / "acme--tiny").exists()


@pytest.mark.parametrize(("status", "code"), [(500, "hub_failed"), (503, "hub_failed"), (429, "hub_busy")])
async def test_a_hub_that_is_down_or_busy_is_tried_again(hub: Hub, tmp_path: Path, status: int, code: str) -> None:
    hub.add(TINY, llama())
    hub.misbehave(TINY, "", Fault("status", status=status, times=None))
    async with open_yard(make_settings(tmp_path, hub.endpoint, download_attempts=50)) as yard:
        job_id = await yard.add(TINY)

        async def told() -> bool:
            return any(event.data.get("code") == code for event in await yard.events(job_id))

        await eventually(told, f"an event {code}")
        hub.behave()
        assert (await yard.ended(job_id)).status == JobStatus.FINISHED


async def test_a_portal_in_the_place_of_the_hub_is_told_from_one(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama())
    hub.misbehave(TINY, "", Fault("html"))
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        failure = failure_of(await yard.bring(TINY))
        assert failure.code == "bad_hub"
        assert hub.endpoint in failure.message


async def test_a_quota_too_small_is_refused_before_anything_arrives(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(SIZE))
    async with open_yard(make_settings(tmp_path, hub.endpoint, store_quota_gib=MIB_IN_GIB)) as yard:
        failure = failure_of(await yard.bring(TINY))
        assert failure.code == "quota_exceeded"
        assert "1.91 MiB" in failure.message
        assert "1.00 MiB" in failure.message
        assert hub.sent(TINY, "config.json") == 0


async def test_a_quota_counts_what_is_in_the_store(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(SIZE))
    hub.add("acme/second", llama(SIZE, seed="second"))
    async with open_yard(make_settings(tmp_path, hub.endpoint, store_quota_gib=3 * MIB_IN_GIB)) as yard:
        assert (await yard.bring(TINY)).status == JobStatus.FINISHED
        assert failure_of(await yard.bring("acme/second")).code == "quota_exceeded"
        assert (await yard.bring(TINY)).status == JobStatus.FINISHED


async def test_a_disk_without_room_is_refused_with_the_numbers(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, llama(SIZE))
    async with open_yard(make_settings(tmp_path, hub.endpoint, disk_reserve_gib=10_000_000.0)) as yard:
        failure = failure_of(await yard.bring(TINY))
        assert failure.code == "disk_full"
        assert "1.91 MiB more" in failure.message
        assert "10000000.00 GiB stay in reserve" in failure.message


HEADER_BEYOND = {"weight": {"dtype": "U8", "shape": [900], "data_offsets": [0, 900]}}
REFUSED: dict[str, tuple[dict[str, bytes | None], str]] = {
    "pickled weights only": ({WEIGHTS: None}, "pickle_only"),
    "auto_map": ({"config.json": as_json({**CONFIG, "auto_map": {"AutoModel": "evil--repo.M"}})}, "remote_code"),
    "attention from the hub": (
        {"config.json": as_json({**CONFIG, "_attn_implementation_internal": "evil/kernel"})},
        "remote_code",
    ),
    "no configuration": ({"config.json": None}, "missing_configuration"),
    "broken configuration": ({"config.json": b"{"}, "bad_configuration"),
    "a cross-encoder": (
        {"config.json": as_json({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}})},
        "unsupported_kind",
    ),
    "a speech recogniser": (
        {"config.json": as_json({"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True})},
        "unsupported_kind",
    ),
    "a reward model": ({"config.json": as_json({"architectures": ["Qwen2ForRewardModel"]})}, "unsupported_kind"),
    "a draft model": ({"config.json": as_json({"architectures": ["EagleLlamaForCausalLM"]})}, "unsupported_kind"),
    "no architecture": ({"config.json": as_json({"model_type": "llama"})}, "unsupported_kind"),
    "a sparse encoder": (
        {
            "config.json": as_json({"architectures": ["BertForMaskedLM"]}),
            "modules.json": as_json([{"type": "sentence_transformers.sparse_encoder.models.MLMTransformer"}]),
        },
        "unsupported_kind",
    ),
    "header beyond its file": ({WEIGHTS: safetensors(noise(100), HEADER_BEYOND)}, "bad_weights"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_bad_model_is_refused_and_nothing_of_it_stays(hub: Hub, tmp_path: Path, name: str) -> None:
    changes, code = REFUSED[name]
    hub.add(TINY, {file: content for file, content in {**llama(), **changes}.items() if content is not None})
    async with open_yard(make_settings(tmp_path, hub.endpoint)) as yard:
        assert failure_of(await yard.bring(TINY)).code == code
        assert hub.sent(TINY, WEIGHTS) == 0 or code == "bad_weights"
        assert await yard.model(TINY) is None
        assert not (yard.models_dir / "acme--tiny").exists()
        assert not yard.partial(TINY).exists()
