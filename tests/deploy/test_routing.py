"""Names find engines, and what changed is seen at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from modelyard.errors import EngineStarting, ModelNotFound
from tests.deploy.yard import deploy_yard


async def test_with_nothing_deployed_every_name_is_unknown(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        for name in ("org/a", "default", None):
            with pytest.raises(ModelNotFound) as refusal:
                await yard.routing.resolve(name, "generate")
            assert refusal.value.param == "model"
        assert await yard.routing.listing() == []
        assert await yard.routing.ready_engines() == []


async def test_an_unknown_name_is_told_what_is_in_service(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.becomes(await yard.deploy("org/a"), "READY")
        with pytest.raises(ModelNotFound, match=r"'org/b'.*Compressa-LLM, default, org/a"):
            await yard.routing.resolve("org/b", "generate")


async def test_the_listing_has_models_adapters_and_aliases(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a")
        await yard.add_model("org/poems", adapter=True, base_model_id="org/a")
        await yard.add_model("org/e", task="embed")
        await yard.becomes(await yard.deploy("org/a", ["org/poems"]), "READY")
        await yard.becomes(await yard.deploy("org/e"), "READY")
        listing = {served.name: (served.model_id, served.root) for served in await yard.routing.listing()}
        assert listing == {
            "org/a": ("org/a", None),
            "org/poems": ("org/a", "org/a"),
            "org/e": ("org/e", None),
            "default": ("org/e", "org/e"),
            "Compressa-LLM": ("org/a", "org/a"),
            "Compressa-Embedding": ("org/e", "org/e"),
        }
        assert {model_id for model_id, _ in await yard.routing.ready_engines()} == {"org/a", "org/e"}


async def test_a_name_in_use_by_a_starting_engine_is_asked_to_come_back(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"start_delay_s": 60})
        await yard.deploy("org/a")
        for name in ("org/a", "default", "Compressa-LLM", None):
            with pytest.raises(EngineStarting) as refusal:
                await yard.routing.resolve(name, "generate")
            assert refusal.value.retry_after_s > 0
        assert await yard.routing.listing() == []


async def test_a_change_during_a_read_is_not_missed(tmp_path: Path) -> None:
    """A snapshot taken while something changes must not be taken for fresh afterwards."""
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"start_delay_s": 60})
        for _ in range(20):
            yard.routing.changed()
            asking = asyncio.create_task(yard.routing.listing())
            await asyncio.sleep(0)
            yard.routing.changed()
            await asking
            assert not yard.routing._is_fresh()
