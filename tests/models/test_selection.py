"""Which files of a repository are fetched."""

from __future__ import annotations

import pytest

from modelyard.errors import JobFailure
from modelyard.models.selection import check_index, is_safe_path, select
from tests.models.repositories import adapter, embedder, llama, sharded

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def test_a_model_comes_with_configuration_tokenizer_and_template() -> None:
    chosen = select(llama())
    assert set(chosen.configuration) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert chosen.weights == ("model.safetensors",)
    assert not chosen.adapter


def test_shards_win_over_the_same_weights_in_another_form() -> None:
    chosen = select(sharded())
    assert list(chosen.weights) == SHARDS
    assert "model.safetensors.index.json" in chosen.configuration
    assert "params.json" not in chosen.configuration


def test_shards_without_their_index_are_not_taken_for_a_model_that_is_there_whole() -> None:
    assert select(["config.json", "model.safetensors", *SHARDS]).weights == ("model.safetensors",)


def test_consolidated_weights_are_taken_when_there_are_no_others() -> None:
    chosen = select(["params.json", "tekken.json", "consolidated.safetensors"])
    assert chosen.weights == ("consolidated.safetensors",)
    assert set(chosen.configuration) == {"params.json", "tekken.json"}


def test_weights_under_another_name_are_taken_when_there_are_no_others() -> None:
    assert select(["config.json", "gptq_model-4bit-128g.safetensors"]).weights == ("gptq_model-4bit-128g.safetensors",)


def test_modules_of_an_embedding_model_come_along_as_safetensors_only() -> None:
    chosen = select(embedder())
    assert set(chosen.weights) == {"model.safetensors", "2_Dense/model.safetensors"}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "vocab.txt"} <= set(chosen.configuration)


def test_an_adapter_is_told_from_a_model_by_whose_weights_are_there() -> None:
    assert select(adapter()).adapter
    assert select({**adapter(), "config.json": b"{}"}).adapter
    assert not select({**llama(), "adapter_config.json": b"{}"}).adapter


NEVER = [
    "modeling_x.py", "pytorch_model.bin", "model.pt", "model.gguf", "onnx/model.onnx", "original/params.json",
    "trainer_state.json", "optimizer.pt", "checkpoint-5/model.safetensors", "../../etc/passwd.json", "/etc/x.json",
    "a/../b.json", ".hidden.json", "runs/events", "README.md", "x\n.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_what_nobody_needs_is_never_fetched(name: str) -> None:
    chosen = select([*llama(), name])
    assert name not in (*chosen.configuration, *chosen.weights)


@pytest.mark.parametrize(
    ("files", "code"),
    [
        (["config.json", "pytorch_model.bin"], "pickle_only"),
        (["adapter_config.json", "adapter_model.bin"], "pickle_only"),
        (["config.json", "tf_model.h5"], "pickle_only"),
        (["config.json", "model.Q4_K_M.gguf"], "unsupported_format"),
        (["README.md"], "no_weights"),
        ([], "no_weights"),
        (["model.safetensors"], "missing_configuration"),
        (["config.json", "sub/model.safetensors"], "no_weights"),
    ],
)
def test_a_repository_without_usable_weights_is_refused(files: list[str], code: str) -> None:
    with pytest.raises(JobFailure) as caught:
        select(files)
    assert caught.value.code == code
    assert caught.value.hint


def test_an_index_must_name_files_that_are_there() -> None:
    check_index({"a": SHARDS[0], "b": SHARDS[1]}, SHARDS)
    malformed: list[object] = [{"a": 1}, None, []]
    for weight_map in (*malformed, {"a": "model-00009-of-00009.safetensors"}, {"a": "../../x"}):
        with pytest.raises(JobFailure) as caught:
            check_index(weight_map, SHARDS)
        assert caught.value.code == "bad_index"


@pytest.mark.parametrize("path", ["a.json", "1_Pooling/config.json", "a b.json", "a/b/c/d.json", "x+y@2.json"])
def test_ordinary_paths_are_safe(path: str) -> None:
    assert is_safe_path(path)


@pytest.mark.parametrize(
    "path", ["", "/a", "a//b", "a/../b", "..", ".git/config", "a/.b", "a\\b", "a\0b", "a/b/c/d/e.json", "x" * 256, "a/"]
)
def test_other_paths_are_not(path: str) -> None:
    assert not is_safe_path(path)
