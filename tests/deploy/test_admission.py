"""Adapters that cannot be served are refused before the wish is written, as far as the store and settings tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelyard.deploy import actions, admission
from modelyard.deploy.schemas import DeployIn
from modelyard.deploy.tables import Strategy
from modelyard.errors import ModelNotFound, ModelyardError, Unprocessable
from modelyard.models import actions as models
from tests.deploy.yard import CONFIG, DeployYard, deploy_yard, make_settings

pytestmark = pytest.mark.timeout(60)


async def check(yard: DeployYard, *adapter_ids: str, **options: Any) -> None:
    await admission.check(yard.sessions, yard.settings, actions.Wish("org/a", adapter_ids, options))


async def test_what_a_request_leaves_out_comes_from_the_settings(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, engine_idle_timeout_s=60.0)
    left_out = admission.wish_of(DeployIn(model_id="org/a"), settings)
    assert left_out == actions.Wish("org/a", [], {}, idle_timeout_s=60.0)
    said = DeployIn.model_validate(
        {"model_id": "org/a", "adapter_ids": ["x"], "options": {"seed": 1, "dtype": None}, "strategy": "replace",
         "keep_others": True, "idle_timeout_s": 5}
    )  # fmt: skip
    assert admission.wish_of(said, settings) == actions.Wish("org/a", ["x"], {"seed": 1}, Strategy.REPLACE, True, 5.0)
    assert admission.wish_of(DeployIn(model_id="org/a"), make_settings(tmp_path)).idle_timeout_s is None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, "reranker"),
        ({"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True}, "speech recogniser"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
async def test_a_model_of_a_kind_without_a_path_is_refused_though_it_is_in_the_store(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", config={**CONFIG, **config})
        with pytest.raises(Unprocessable, match=says) as caught:
            await check(yard)
        assert caught.value.code == "unsupported_kind"
        job = await yard.ended(await yard.deploy("org/a"))
        assert job.failure is not None
        assert job.failure.code == "unsupported_kind"
        assert yard.record("org/a", "start") == [], "no engine was started"


async def base_of(yard: DeployYard, adapter_id: str) -> str | None:
    async with yard.sessions.read() as session:
        return (await models.get(session, adapter_id)).base_model_id


@pytest.mark.parametrize("hint", [None, "Org/A", "org/A"])
async def test_an_adapter_that_names_no_other_base_is_taken_on_any_whose_layers_it_fits(
    tmp_path: Path, hint: str | None
) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", hint)
        await check(yard, "org/poems")
        await yard.becomes(await yard.deploy("org/a", ["org/poems"]), "READY")
        assert await base_of(yard, "org/poems") == hint


@pytest.mark.parametrize("base", ["org/a", "local:a"])
async def test_an_adapter_that_names_another_base_is_put_on_the_one_that_the_request_names(
    tmp_path: Path, base: str
) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model(base)
        await yard.add_adapter("org/poems", "org/other")
        wish = actions.Wish(base, ["org/poems"])
        with pytest.raises(Unprocessable, match=f"deploy it with base_model_id '{base}'"):
            await admission.check(yard.sessions, yard.settings, wish)
        for said in ({"model_id": base, "adapter_ids": ["org/poems"]}, {"model_id": "org/poems"}):
            wanted = DeployIn.model_validate({**said, "base_model_id": base})
            wish = admission.wish_of(wanted, yard.settings)
            assert (wish.model_id, list(wish.adapter_ids)) == (base, ["org/poems"])
            await admission.check(yard.sessions, yard.settings, wish)
        assert await base_of(yard, "org/poems") == "org/other", "a question changes nothing"
        job_id = await yard.deploy(base, ["org/poems"], names_base=True)
        deployment = await yard.becomes(job_id, "READY")
        assert [one["adapter_id"] for one in deployment.loaded] == ["org/poems"]
        assert await base_of(yard, "org/poems") == base


async def test_a_base_that_is_named_is_held_against_the_adapters_layers(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", config={**CONFIG, "hidden_size": 8})
        await yard.add_adapter("org/poems", "org/other")
        wish = actions.Wish("org/a", ["org/poems"], names_base=True)
        with pytest.raises(Unprocessable, match="made for another base") as caught:
            await admission.check(yard.sessions, yard.settings, wish)
        assert caught.value.param == "adapter_ids"
        # An adapter that is asked for as a model: the fields are those that the request has it in.
        for sent, param in (("org/a", "model_id"), ("no/such", "base_model_id")):
            asked = DeployIn.model_validate({"model_id": "org/poems", "base_model_id": sent})
            with pytest.raises(ModelyardError) as refused:
                await admission.check(yard.sessions, yard.settings, admission.wish_of(asked, yard.settings))
            assert refused.value.param == param


async def test_adapters_want_room(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_max_loras=0) as yard:
        await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        await check(yard)
        with pytest.raises(Unprocessable, match=r"MODELYARD_ENGINE_MAX_LORAS is 0.*options\.max_loras 1\."):
            await check(yard, "org/poems")
        await check(yard, "org/poems", max_loras=1)
        with pytest.raises(Unprocessable, match=r"^options\.max_loras is 0"):
            await check(yard, "org/poems", max_loras=0)
        with pytest.raises(ModelNotFound):
            await check(yard, "org/nowhere")


async def test_a_running_engine_is_judged_by_its_own_command_and_a_new_one_by_nothing(tmp_path: Path) -> None:
    """The settings may have changed since it was started, and an adapter that it was started with may be gone."""
    async with deploy_yard(tmp_path, engine_max_lora_rank=16) as yard:
        await yard.add_model("org/a")
        for rank in (16, 64, 128):
            await yard.add_adapter(f"org/{rank}", "org/a", rank=rank)
        for rank in (16, 64, 128):
            await check(yard, f"org/{rank}")
        job_id = await yard.deploy("org/a", ["org/64"])
        await yard.becomes(job_id, "READY")
        await yard.deploy("org/a", [])
        await check(yard, "org/16", "org/64")
        with pytest.raises(Unprocessable, match=r"'org/128' has rank 128.* up to 64: .*options\.max_lora_rank 128"):
            await check(yard, "org/16", "org/128")
        await check(yard, "org/128", seed=1)


#: A server that has just started: it is asked twice, and prints which of an adapter's files it opened.
RESTARTED = """
import asyncio, json, sys
from pathlib import Path
from modelyard.db import Sessions, database_url
from modelyard.deploy import actions, admission
from modelyard.deploy.plan import plan
from tests.deploy.yard import make_settings

opened = []


async def ask(data_dir, folder):
    settings = make_settings(data_dir)
    sessions = Sessions(database_url(settings.database_url, data_dir))
    wish = actions.Wish("org/a", ["org/poems"])
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    await admission.check(sessions, settings, wish)
    found = await plan(sessions, settings, wish)
    assert found.failure is None, found.failure
    await sessions.close()
    assert any(one.endswith("config.json") for one in opened), "the hook sees what is opened"
    print(json.dumps([one for one in opened if one.startswith(folder)]))


asyncio.run(ask(Path(sys.argv[1]), sys.argv[2]))
"""


async def test_a_server_that_has_restarted_opens_no_file_of_an_adapter_that_was_read_before(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        folder = await yard.add_adapter("org/poems", "org/a")
        await check(yard, "org/poems")
    command = [sys.executable, "-c", RESTARTED, str(tmp_path), str(folder)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout) == []


async def test_a_model_whose_files_are_broken_is_named(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        folder = await yard.add_model("org/a")
        await yard.add_adapter("org/poems", "org/a")
        (folder / "config.json").write_text("{", "utf-8")
        with pytest.raises(Unprocessable, match=r"org/a cannot be used: its config\.json") as refusal:
            await check(yard, "org/poems")
        assert (refusal.value.code, refusal.value.param) == ("broken_model", "model_id")
