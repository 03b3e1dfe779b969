"""Adapters with a chat template or a tokenizer of their own: what differs from their base is found, kept and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from modelyard.jobs.schemas import EventOut
from modelyard.models.adapter_rendering import TEMPLATE, TOKENIZER, differences, template_of
from modelyard.models.tokenizer_child import TokenizerChildren
from tests.models.repositories import adapter, as_json, llama
from tests.models.yard import Yard, make_settings, open_yard

OURS = "{% for message in messages %}{{ message.content }}{% endfor %}"


def tokenizer(*more: str) -> bytes:
    found = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.add_special_tokens(["</s>", *more])
    return found.to_str().encode()


def put(folder: Path, **files: bytes | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({}, ()),
        ({"chat_template__jinja": OURS}, ()),
        ({"chat_template__jinja": f"\n{OURS}\r\n"}, ()),
        ({"tokenizer_config__json": json.dumps({"chat_template": OURS})}, ()),
        ({"tokenizer_config__json": json.dumps({"chat_template": None})}, ()),
        ({"tokenizer_config__json": "[" * 100_000}, ()),
        ({"chat_template__jinja": OURS + "!"}, (TEMPLATE,)),
        ({"chat_template__json": json.dumps({"chat_template": "other"})}, (TEMPLATE,)),
        (
            {"tokenizer_config__json": json.dumps({"chat_template": [{"name": "default", "template": "x"}]})},
            (TEMPLATE,),
        ),
        ({"tokenizer__json": tokenizer()}, ()),
        ({"tokenizer__json": json.dumps(json.loads(tokenizer()), indent=3)}, ()),
        ({"tokenizer__json": tokenizer("<pad>")}, (TOKENIZER,)),
        ({"tokenizer__json": b"{}"}, (TOKENIZER,)),
        ({"tokenizer__json": tokenizer("<pad>"), "chat_template__jinja": "other"}, (TEMPLATE, TOKENIZER)),
    ],
)
async def test_what_an_adapter_has_otherwise_than_its_base_is_found(
    own: dict[str, bytes | str], wanted: tuple[str, ...], tmp_path: Path
) -> None:
    base = put(tmp_path / "base", chat_template__jinja=OURS, tokenizer__json=tokenizer())
    found = await differences(TokenizerChildren(), "acme/lora", put(tmp_path / "lora", **own), base)
    assert found == wanted


async def test_a_base_without_a_template_differs_from_a_strangers_adapter_alone(tmp_path: Path) -> None:
    base, lora = put(tmp_path / "base"), put(tmp_path / "lora", chat_template__jinja=OURS, tokenizer__json=tokenizer())
    assert await differences(TokenizerChildren(), "acme/lora", lora, base) == (TEMPLATE,)
    assert await differences(TokenizerChildren(), "ft:mine", lora, base) == ()


def test_the_templates_are_read_in_the_order_of_transformers(tmp_path: Path) -> None:
    assert template_of(tmp_path) is None
    put(tmp_path, chat_template__json=as_json({"chat_template": "third"}))
    assert template_of(tmp_path) == "third"
    put(tmp_path, tokenizer_config__json=as_json({"chat_template": "second"}))
    assert template_of(tmp_path) == "second"
    put(tmp_path, chat_template__jinja="first")
    assert template_of(tmp_path) == "first"


def told(events: list[EventOut]) -> list[str]:
    return [event.message for event in events if event.data.get("code") == "adapter_renders_otherwise"]


async def arrive(yard: Yard, model_id: str) -> list[str]:
    job = await yard.bring(model_id)
    assert job.status == "FINISHED", job.failure
    return told(await yard.events(job.id))


async def test_whichever_of_adapter_and_base_comes_last_is_told_and_the_record_says_so(tmp_path: Path) -> None:
    imports = tmp_path / "imports"
    for name, files in {"tiny": llama(), "same": adapter("local:tiny"), "other": adapter("local:tiny")}.items():
        for file, content in files.items():
            if "/" not in file:
                put(imports / name, **{file.replace(".", "__"): content})
    put(imports / "same", chat_template__jinja=llama()["chat_template.jinja"])
    put(imports / "other", chat_template__jinja="{{ messages[0] }}")
    async with open_yard(make_settings(tmp_path / "data", "http://127.0.0.1:1", import_dir=imports)) as yard:
        assert await arrive(yard, "local:other") == []
        before = await yard.model("local:other")
        assert before is not None
        assert before.differs_from_base is None
        [said] = await arrive(yard, "local:tiny")
        assert said.startswith("local:other carries a chat template of its own, other than its base's.")
        assert "served" in said or "serves" in said
        assert await arrive(yard, "local:same") == []
        for model_id, wanted in {"local:tiny": None, "local:same": [], "local:other": [TEMPLATE]}.items():
            model = await yard.model(model_id)
            assert model is not None
            assert model.differs_from_base == wanted
