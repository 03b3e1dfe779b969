"""Facts of adapters are kept with their rows and believed from there, on both databases."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import InvalidRequestError

from modelyard.db import Sessions
from modelyard.models import actions, adapter_facts
from modelyard.models.adapter_facts import AdapterFacts, Layer
from modelyard.models.stored_adapters import with_facts
from modelyard.models.tables import Model
from tests.models.repositories import as_json
from tests.models.test_actions import opened, result

PATH = "acme--lora/c0ffee"
MODULE = "model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, rank: int = 8, *, name: str = MODULE, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_bytes(as_json(said))
    header, end = {}, 0
    for matrix, shape in (("A", [rank, 16]), ("B", [32, rank])):
        size = 4 * shape[0] * shape[1]
        header[f"base_model.model.{name}.lora_{matrix}.weight"] = {
            "dtype": "F32", "shape": shape, "data_offsets": [end, end + size]
        }  # fmt: skip
        end += size
    raw = as_json(header)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))


async def added(sessions: Sessions, **values: Any) -> Model:
    async with sessions.begin() as session:
        return await actions.add(session, "acme/lora", "main", result(adapter=True, **{"path": PATH, **values}))


async def kept(sessions: Sessions, model: Model) -> AdapterFacts | None:
    async with sessions.read() as session:
        return (await actions.adapter_facts_of(session, [model])).get(model.path)


async def asked(sessions: Sessions, models_dir: Path) -> AdapterFacts:
    async with sessions.read() as session:
        row = await actions.get(session, "acme/lora")
    (one,) = await with_facts(sessions, models_dir, [row])
    assert (one.adapter_id, one.path) == ("acme/lora", models_dir / row.path)
    return one.facts


def spoil(folder: Path) -> None:
    """Leave nothing of an adapter but the size of its weights."""
    (folder / "adapter_config.json").write_bytes(b"{")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)


async def test_facts_that_came_with_a_row_are_believed_without_its_files(database_url: str, tmp_path: Path) -> None:
    folder = tmp_path / PATH
    write_adapter(folder)
    facts = adapter_facts.read(folder)
    assert (facts.rank, facts.target_modules, facts.refusal) == (8, ("q_proj",), None)
    assert facts.layers == (Layer(MODULE, 16, 32),)
    async with opened(database_url) as sessions:
        model = await added(sessions, adapter_facts=adapter_facts.as_json(facts))
        assert await kept(sessions, model) == facts
        spoil(folder)
        assert await asked(sessions, tmp_path) == facts


async def test_an_adapter_from_before_rows_had_facts_is_read_once(database_url: str, tmp_path: Path) -> None:
    folder = tmp_path / PATH
    write_adapter(folder)
    facts = adapter_facts.read(folder)
    async with opened(database_url) as sessions:
        model = await added(sessions)
        assert await kept(sessions, model) is None
        assert await asked(sessions, tmp_path) == facts
        assert await kept(sessions, model) == facts
        spoil(folder)
        assert await asked(sessions, tmp_path) == facts


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "is a DoRA, which vLLM cannot serve"),
        ({"peft_type": "\ud800\0"}, "is of type \ud800\0, and only LORA can be served"),
    ],
    ids=["dora", "a type that is no text"],
)
async def test_what_cannot_be_served_is_known_from_the_row_too(
    database_url: str, tmp_path: Path, config: dict[str, Any], what: str
) -> None:
    folder = tmp_path / PATH
    write_adapter(folder, **config)
    async with opened(database_url) as sessions:
        await added(sessions)
        facts = await asked(sessions, tmp_path)
        assert facts.refusal is not None
        assert facts.refusal.what == what
        spoil(folder)
        assert await asked(sessions, tmp_path) == facts


async def test_weights_of_another_size_are_read_again(database_url: str, tmp_path: Path) -> None:
    folder = tmp_path / PATH
    write_adapter(folder)
    async with opened(database_url) as sessions:
        model = await added(sessions)
        await asked(sessions, tmp_path)
        write_adapter(folder, rank=16)
        assert (await asked(sessions, tmp_path)).rank == 16
        (folder / "adapter_model.safetensors").unlink()
        for _ in range(2):
            facts = await asked(sessions, tmp_path)
            assert facts.refusal is not None
            assert facts.refusal.what == "has no adapter_model.safetensors"
        write_adapter(folder)
        assert (await asked(sessions, tmp_path)).rank == 8
        assert (await kept(sessions, model)) == adapter_facts.read(folder)


async def test_what_is_said_of_a_folder_that_is_not_whole_is_forgotten_when_it_is(
    database_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / PATH
    write_adapter(folder)
    (folder / "adapter_config.json").unlink()
    async with opened(database_url) as sessions:
        await added(sessions)
        facts = await asked(sessions, tmp_path)
        assert facts.refusal is not None
        assert facts.refusal.what == "has no adapter_config.json"
        write_adapter(folder)
        assert (await asked(sessions, tmp_path)).refusal is None


async def test_facts_by_other_rules_are_read_again(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / PATH
    write_adapter(folder)
    async with opened(database_url) as sessions:
        model = await added(sessions, adapter_facts={"version": "of another time"})
        assert await kept(sessions, model) is None
        await asked(sessions, tmp_path)
        monkeypatch.setattr(adapter_facts, "VERSION", adapter_facts.VERSION + 1)
        assert await kept(sessions, model) is None
        assert (await asked(sessions, tmp_path)).version == adapter_facts.VERSION
        assert await kept(sessions, model) is not None


async def test_what_was_read_of_one_commit_is_not_written_to_a_row_that_has_gone_on(
    database_url: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path / PATH)
    async with opened(database_url) as sessions:
        before = await added(sessions)
        now = await added(sessions, path="acme--lora/decade")
        async with sessions.begin() as session:
            old = Model(model_id=before.model_id, path=PATH)
            await actions.keep_adapter_facts(session, old, adapter_facts.read(tmp_path / PATH))
        assert await kept(sessions, now) is None


async def test_a_list_of_models_does_not_bring_facts(database_url: str) -> None:
    async with opened(database_url) as sessions:
        await added(sessions)
        async with sessions.read() as session:
            (model,) = await actions.all_models(session)
            with pytest.raises(InvalidRequestError, match="raiseload"):
                _ = model.adapter_facts


def test_facts_never_fill_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_facts, "MOST_LAYERS", 0)
    for name, said in (
        (MODULE, "adapts 1 layers, and 0 are the most"),
        (f"{'x' * 400}.{MODULE}", "has weights whose name no layer has"),
        (f"\0.{MODULE}", "has weights whose name no layer has"),
        (f"\ud800.{MODULE}", "has weights whose name no layer has"),
    ):
        write_adapter(tmp_path / "a", name=name)
        facts = adapter_facts.read(tmp_path / "a")
        assert facts.layers == ()
        assert facts.refusal is not None
        assert facts.refusal.what.startswith(said)


def test_an_adapter_that_todays_rules_refuse_is_not_served(tmp_path: Path) -> None:
    write_adapter(tmp_path, auto_mapping={"parent_library": "os.path", "base_model_class": "x"})
    refusal = adapter_facts.read(tmp_path).refusal
    assert refusal is not None
    assert refusal.code == "remote_code"
    assert "auto_mapping" in refusal.what
