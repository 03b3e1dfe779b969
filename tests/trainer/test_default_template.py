"""A model without a chat template gets one by its files, the same in training and in service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from modelyard.demo.tiny_llama import make_llama
from modelyard.models.chat_template import has_chat_template
from modelyard.trainer.default_template import (
    CHATML_TEMPLATE,
    default_template,
    processors_template,
)
from modelyard.trainer.model_files import PLAIN_TEMPLATE, stop_ids_of

CHATML, PLAIN = CHATML_TEMPLATE.replace("{BOS}", ""), PLAIN_TEMPLATE.replace("{BOS}", "")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with everything but a chat template."""
    make_llama(tmp_path / "tiny")
    (tmp_path / "tiny" / "chat_template.jinja").unlink()
    return tmp_path / "tiny"


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), "utf-8")


def add_tokens(model: Path, *tokens: str) -> list[int | None]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(model / "tokenizer.json"))
    return [tokenizer.token_to_id(token) for token in tokens]


def test_it_is_plain_text_without_chatmls_tokens(model: Path) -> None:
    assert default_template(model) == PLAIN


def test_it_is_chatml_where_the_model_knows_its_tokens_and_stops_at_one(model: Path) -> None:
    _, end = add_tokens(model, "<|im_start|>", "<|im_end|>")
    assert default_template(model) == PLAIN  # it would not stop
    change(model / "generation_config.json", eos_token_id=[2, end])
    assert default_template(model) == CHATML
    change(model / "generation_config.json", eos_token_id=2)
    change(model / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    assert default_template(model) == CHATML


def test_it_begins_with_the_first_token_that_the_tokenizer_puts_there(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    tokenizer.save(str(model / "tokenizer.json"))
    assert default_template(model) == "{{ bos_token }}" + PLAIN


def test_it_is_one_line_as_a_command_takes_it() -> None:
    assert "\n" not in CHATML + PLAIN


@pytest.mark.parametrize("bad", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_that_cannot_be_read_make_it_plain(model: Path, bad: str) -> None:
    (model / bad).write_text("[" * 100_000)
    assert default_template(model) == PLAIN
    (model / bad).unlink()
    assert default_template(model) == PLAIN


def test_a_template_in_the_processors_file_alone_is_the_models_own(model: Path) -> None:
    assert processors_template(model) is None
    for other in ("[", "[1]", "{}", '{"chat_template": ""}', '{"chat_template": ["x"]}'):
        (model / "chat_template.json").write_text(other)
        assert processors_template(model) is None
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert processors_template(model) == "{{ messages }}"


def test_a_models_own_template_is_seen_wherever_it_is(model: Path) -> None:
    assert not has_chat_template(model)
    for name in ("chat_template.jinja", "chat_template.json"):
        (model / name).write_text("{}")
        assert has_chat_template(model)
        (model / name).unlink()
    change(model / "tokenizer_config.json", chat_template="{{ messages }}")
    assert has_chat_template(model)


def test_stop_tokens_are_the_generation_configs_or_else_the_configs(model: Path) -> None:
    assert stop_ids_of(model) == [2]
    change(model / "generation_config.json", eos_token_id=[2, 5, "no"])
    assert stop_ids_of(model) == [2, 5]
    (model / "generation_config.json").unlink()
    change(model / "config.json", eos_token_id=None, text_config={"eos_token_id": 7})
    assert stop_ids_of(model) == [7]
    (model / "config.json").unlink()
    assert stop_ids_of(model) == []
