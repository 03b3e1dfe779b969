"""Which files of a repository are fetched."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import JobFailure
from modelyard.models.file_names import is_configuration, is_safe_path
from modelyard.models.selection import MAX_TOLD, Selection, choose, select
from modelyard.models.shards import check_tensors, promised
from tests.models.repositories import adapter, as_json, embedder, llama, sharded

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def chosen_of(files: Mapping[str, bytes] | list[str]) -> Selection:
    contents = files if isinstance(files, Mapping) else dict.fromkeys(files, b"{}")
    return choose(list(contents), contents.__getitem__)


def index(*names: str) -> bytes:
    return as_json({"weight_map": {f"w{number}": name for number, name in enumerate(names)}})


def told(chosen: Selection) -> dict[str, str]:
    return {name: one.reason for one in chosen.left_out for name in one.files}


def refused(files: Mapping[str, bytes] | list[str]) -> JobFailure:
    with pytest.raises(JobFailure) as caught:
        chosen_of(files)
    assert caught.value.hint
    return caught.value


def test_a_model_comes_with_configuration_tokenizer_and_template() -> None:
    chosen = chosen_of(llama())
    assert set(chosen.configuration) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert chosen.weights == ("model.safetensors",)
    assert not chosen.adapter


def test_shards_win_over_the_same_weights_in_another_form() -> None:
    chosen = chosen_of(sharded())
    assert list(chosen.weights) == SHARDS
    assert INDEX in chosen.configuration
    assert "params.json" not in chosen.configuration
    assert list(chosen_of({**sharded(), "model.safetensors": b""}).weights) == SHARDS


def test_a_second_set_of_shards_that_the_index_does_not_name_is_neither_fetched_nor_unsaid() -> None:
    stale = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    chosen = chosen_of({**sharded(), **dict.fromkeys(stale, b"")})
    assert list(chosen.weights) == SHARDS
    assert set(stale) < set(told(chosen))


def test_a_model_in_one_shard_keeps_the_index_by_which_transformers_finds_it() -> None:
    shard = "model-00001-of-00001.safetensors"
    chosen = chosen_of({"config.json": b"{}", shard: b"", INDEX: index(shard, shard)})
    assert chosen.weights == (shard,)
    assert INDEX in chosen.configuration
    assert chosen.weight_map == {"w0": shard, "w1": shard}


def test_an_index_may_name_weights_with_names_of_their_own() -> None:
    names = ["weights_a.safetensors", "weights_b.safetensors"]
    chosen = chosen_of(
        {"config.json": b"{}", **dict.fromkeys([*names, "other.safetensors"], b""), INDEX: index(*names)}
    )
    assert list(chosen.weights) == names


@pytest.mark.parametrize("missing", SHARDS)
def test_a_half_uploaded_model_is_refused_with_the_name_of_the_missing_shard(missing: str) -> None:
    files = {
        name: content for name, content in sharded().items() if name != missing and name != "consolidated.safetensors"
    }
    failure = refused(files)
    assert failure.code == "bad_index"
    assert missing in failure.message
    assert "3 files" in failure.message


def test_a_shard_in_a_folder_or_with_an_impossible_name_counts_as_missing() -> None:
    for name in ("sub/model-00001-of-00001.safetensors", "../x.safetensors", "/etc/passwd", "a\0.safetensors"):
        files = {"config.json": b"{}", "y.safetensors": b"", name: b"", INDEX: index(name)}
        assert refused(files).code == "bad_index"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"\xff",
                                     b'{"weight_map": {}}', b"[" * 100_000])  # fmt: skip
def test_a_malformed_index_is_refused_unless_the_whole_model_is_there_too(content: bytes) -> None:
    files = {"config.json": b"{}", **dict.fromkeys(SHARDS, b""), INDEX: content}
    assert refused(files).code in ("bad_index", "bad_configuration")
    chosen = chosen_of({**files, "model.safetensors": b""})
    assert chosen.weights == ("model.safetensors",)
    assert INDEX not in chosen.configuration, "vLLM would look for what it names"
    assert INDEX in told(chosen)


def test_shards_without_their_index_are_not_taken_for_a_model_that_is_there_whole() -> None:
    assert chosen_of(["config.json", "model.safetensors", *SHARDS]).weights == ("model.safetensors",)


def test_shards_without_an_index_are_taken_when_their_names_say_that_all_are_there() -> None:
    assert list(chosen_of(["config.json", *SHARDS]).weights) == SHARDS
    failure = refused(["config.json", *SHARDS[1:]])
    assert failure.code == "incomplete_weights"
    assert SHARDS[1] in failure.message


def test_of_two_sets_of_shards_without_an_index_the_whole_one_is_taken_and_two_whole_ones_are_refused() -> None:
    others = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert list(chosen_of(["config.json", *SHARDS, others[0]]).weights) == SHARDS
    assert refused(["config.json", *SHARDS, *others]).code == "ambiguous_weights"


def test_consolidated_weights_are_taken_when_there_are_no_others() -> None:
    chosen = chosen_of(["params.json", "tekken.json", "consolidated.safetensors"])
    assert chosen.weights == ("consolidated.safetensors",)
    assert set(chosen.configuration) == {"params.json", "tekken.json"}


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "model (1).safetensors", "modèle.safetensors",
                                  "[final] model{2}.safetensors", "模型.safetensors",
                                  "model's #1 & best!.safetensors"])  # fmt: skip
def test_weights_under_another_name_are_taken_when_there_are_no_others(name: str) -> None:
    assert chosen_of(["config.json", name]).weights == (name,)


@pytest.mark.parametrize("name", ["model\n.safetensors", "..model.safetensors", ".hidden.safetensors",
                                  "a\\b.safetensors", "x" * 300 + ".safetensors",
                                  "mod\u202eel.safetensors"])  # fmt: skip
def test_weights_whose_name_cannot_be_a_files_are_refused_by_name(name: str) -> None:
    failure = refused(["config.json", name])
    assert failure.code == "no_weights"
    assert repr(name[:80]) in failure.message
    named = {*told(chosen_of([*llama(), name]))}
    assert {name[:120], repr(name[:120])[1:-1]} & named or name.startswith(".")
    assert all(one.isprintable() for one in named)


def test_weights_whose_names_differ_in_case_only_are_refused() -> None:
    failure = refused(["config.json", "a.safetensors", "A.safetensors"])
    assert failure.code == "ambiguous_weights"


def test_modules_of_an_embedding_model_come_along_as_safetensors_only() -> None:
    chosen = chosen_of(embedder())
    assert set(chosen.weights) == {"model.safetensors", "2_Dense/model.safetensors"}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "vocab.txt"} <= set(chosen.configuration)


@pytest.mark.parametrize("missing", ["2_Dense/model.safetensors", "2_Dense/config.json"])
def test_a_layer_that_an_embedding_model_names_and_does_not_have_is_refused(missing: str) -> None:
    # vLLM would serve the model without it, and give other vectors.
    failure = refused({name: content for name, content in embedder().items() if name != missing})
    assert failure.code == "missing_module"
    assert missing in failure.message


def test_an_adapter_is_told_from_a_model_by_whose_weights_are_there() -> None:
    assert chosen_of(adapter()).adapter
    assert "adapter_config.json" in chosen_of(adapter()).configuration
    assert chosen_of({**adapter(), "config.json": b"{}"}).adapter
    assert not chosen_of({**llama(), "adapter_config.json": b"{}"}).adapter


@pytest.mark.parametrize(
    "beside",
    [
        "value_head.safetensors",
        "v_head.safetensors",
        "classifier.safetensors",
        "optimizer.safetensors",
        "adapter.safetensors",
    ],
)
def test_weights_of_a_training_beside_an_adapter_make_it_no_model_and_are_said_to_be_left_out(beside: str) -> None:
    chosen = chosen_of({**adapter(), beside: b""})
    assert chosen.adapter
    assert chosen.weights == ("adapter_model.safetensors",)
    assert [(one.files, one.reason) for one in chosen.left_out] == [
        ((beside,), "an adapter is served without it, such as a value head of its training")
    ]


@pytest.mark.parametrize(
    "model",
    [
        ["model.safetensors"],
        ["model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        ["consolidated.safetensors", "params.json"],
    ],
)
def test_a_model_beside_an_adapter_is_the_model(model: list[str]) -> None:
    assert not select([*adapter(), "config.json", *model]).adapter


@pytest.mark.parametrize("state", [[], ["law/optimizer.pt", "law/training_args.bin", "law/scheduler.pt"]])
def test_adapters_in_folders_of_their_own_are_said_with_their_names(state: list[str]) -> None:
    files = [f"{folder}/{name}" for folder in ("law", "poems") for name in adapter()]
    with pytest.raises(JobFailure) as caught:
        select(["README.md", *files, *state])
    assert caught.value.code == "adapters_in_folders"
    assert "'law', 'poems'" in caught.value.message
    assert "subfolder=law" in caught.value.hint


@pytest.mark.parametrize("folder", ["final adapter", "a--b", "a/b/c"])
def test_no_folder_is_advised_that_would_be_refused_for_its_name(folder: str) -> None:
    with pytest.raises(JobFailure) as caught:
        select([f"{folder}/{name}" for name in adapter()])
    assert caught.value.code == "adapters_in_folders"
    assert repr(folder) in caught.value.message
    assert "subfolder=" not in caught.value.hint
    assert "under another name" in caught.value.hint
    with pytest.raises(JobFailure) as caught:
        select([f"{one}/{name}" for one in (folder, "zoo") for name in adapter()])
    assert "subfolder=zoo," in caught.value.hint


def test_an_adapters_configuration_beside_a_model_is_left_out() -> None:
    # transformers would load the model that it names, with this one as an adapter on top.
    assert "adapter_config.json" not in chosen_of({**llama(), "adapter_config.json": b"{}"}).configuration


NEVER = [
    "modeling_x.py", "pytorch_model.bin", "model.pt", "model.gguf", "onnx/model.onnx", "original/params.json",
    "trainer_state.json", "optimizer.pt", "checkpoint-5/model.safetensors", "../../etc/passwd.json", "/etc/x.json",
    "a/../b.json", ".hidden.json", "runs/events", "README.md", "x\n.json", "README.json", "train_sample.json",
    "deepspeed_config.json", "params.json", "all_results.json", "pytorch_model.bin.index.json", "model_index.json",
    "training_args.json", "ds_config.json", "tokenizer_old.json", "1_Pooling/../config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_what_nobody_needs_is_never_fetched(name: str) -> None:
    chosen = chosen_of([*llama(), name])
    assert name not in (*chosen.configuration, *chosen.weights)


MANY = range(30_000)
CROWDS = {
    "sets that are not whole": [f"s{n}-00001-of-999999.safetensors" for n in MANY],
    "sets of one": [f"s{n}-00001-of-00001.safetensors" for n in MANY],
    "two sets of each": [f"s{n}-00001-of-0000{total}.safetensors" for n in MANY for total in (1, 2)],
    "loose weights": [f"w{n}.safetensors" for n in MANY],
    "templates": ["model.safetensors", *(f"t{n}.jinja" for n in MANY)],
    "names in upper and lower case": [f"{name}{n}.safetensors" for n in MANY for name in "aA"],
    "notes": ["model.safetensors", *(f"n{n}.json" for n in MANY)],
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_a_crowd_of_files_is_judged_in_seconds(crowd: str) -> None:
    began = time.process_time()
    outcome: Selection | JobFailure
    try:
        outcome = choose(["config.json", *CROWDS[crowd]], lambda _: b"{}")
    except JobFailure as failure:
        outcome = failure
    if isinstance(outcome, Selection):
        assert len(outcome.weights) == 1
    else:
        assert outcome.code in ("incomplete_weights", "ambiguous_weights", "too_many_files")
        assert len(outcome.message) < 1000
    assert time.process_time() - began < 5


def test_an_index_of_a_million_names_is_checked_in_seconds() -> None:
    names = [f"model-{n:05d}-of-01000.safetensors" for n in range(1, 1001)]
    weight_map = {f"w{n}": names[n % 1000] for n in range(1_000_000)}
    began = time.process_time()
    promise = promised(weight_map)
    for name in names:
        check_tensors(promise[name], name, promise[name])
    assert time.process_time() - began < 5


def test_what_was_left_out_is_told_with_its_reason_in_bounded_words() -> None:
    notes = [f"notes-{number:05d}.json" for number in range(5000)]
    chosen = chosen_of([*llama(), *notes, "README.json", "model-00001-of-00002.safetensors", "x\n.safetensors"])
    reasons = {one.reason: one for one in chosen.left_out}
    assert len(told(chosen)) <= MAX_TOLD * len(reasons)
    assert reasons["no engine, tokenizer or trainer reads it"].count == 5001
    assert "pytorch_model.bin" in told(chosen)
    assert "model-00001-of-00002.safetensors" in told(chosen)
    assert "x\\n.safetensors" in told(chosen)
    assert not {"README.md", ".gitattributes"} & set(told(chosen)), "nobody misses these"


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
        (["config.json", "sub/model.safetensors", "sub/optimizer.pt"], "no_weights"),
        (["config.json", "training_args.bin"], "no_weights"),
        (["config.json", "MODEL.SAFETENSORS"], "no_weights"),
    ],
)
def test_a_repository_without_usable_weights_is_refused(files: list[str], code: str) -> None:
    assert refused(files).code == code


def test_every_vocabulary_that_transformers_tokenizers_name_is_fetched() -> None:
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not installed")
    source = "\n".join(path.read_text() for path in Path(spec.origin).parent.glob("models/*/tokenization_*.py"))
    tables = "".join(re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{[^}]*\}", source))
    names = set(re.findall(r'_file": "([^"]+)"', tables))
    assert len(names) > 20
    assert {name for name in names if not is_configuration(name)} == set()


@pytest.mark.parametrize(
    "path", ["a.json", "1_Pooling/config.json", "a b.json", "a/b/c/d.json", "x+y@2.json", "é/(1).json"]
)
def test_ordinary_paths_are_safe(path: str) -> None:
    assert is_safe_path(path)


@pytest.mark.parametrize(
    "path", ["", "/a", "a//b", "a/../b", "..", ".git/config", "a/.b", "a\\b", "a\0b", "a/b/c/d/e.json", "x" * 256, "a/",
             "~/x", "-rf", "a ", " a", "a.", "\udc80", "é" * 128, "a\u2028b", "a\u202eb"]
)  # fmt: skip
def test_other_paths_are_not(path: str) -> None:
    assert not is_safe_path(path)


@given(st.text(max_size=300) | st.text(alphabet="./\\a~- \0", max_size=12))
def test_a_safe_path_stays_below_the_folder_that_it_is_joined_to(path: str) -> None:
    if is_safe_path(path):
        joined = Path("/store", path)
        assert str(joined) == f"/store/{path}"
        assert Path("/store") in joined.parents
        assert ".." not in joined.parts


@given(st.lists(st.text(max_size=40) | st.sampled_from([*NEVER, *SHARDS, INDEX, "config.json", "model.safetensors"])),
       st.binary(max_size=60))  # fmt: skip
def test_a_choice_or_a_refusal_comes_of_whatever_a_listing_names(paths: list[str], content: bytes) -> None:
    try:
        chosen = choose(paths, lambda _: content)
    except JobFailure:
        return
    assert {*chosen.configuration, *chosen.weights} <= set(paths)
    assert all(is_safe_path(path) for path in (*chosen.configuration, *chosen.weights))


@pytest.mark.parametrize(
    ("paths", "code", "said"),
    [
        (["config.json", "Model.Safetensors"], "no_weights", "'Model.Safetensors'"),
        (["config.json", "model.safetensors "], "no_weights", "'model.safetensors '"),
        (["adapter_config.json", "adapter_model (1).safetensors"], "no_weights", "'adapter_model (1).safetensors'"),
        (["adapter_config.json", "lora.safetensors"], "no_weights", "adapter_model.safetensors, and that is not there"),
        (["adapter_model.safetensors", "README.md"], "missing_configuration", "no adapter_config.json"),
        (["config.json", "adapter_model.safetensors"], "missing_configuration", "no adapter_config.json"),
    ],
)
def test_weights_under_a_name_that_is_not_looked_for_are_named(paths: list[str], code: str, said: str) -> None:
    failure = refused(paths)
    assert failure.code == code
    assert said in failure.message


def test_a_model_beside_whose_weights_an_adapter_lacks_its_own_is_a_model() -> None:
    chosen = chosen_of({**llama(), "adapter_config.json": b"{}"})
    assert (chosen.adapter, chosen.weights) == (False, ("model.safetensors",))
    chosen = chosen_of(["consolidated.safetensors", "params.json", "tekken.json", "adapter_config.json"])
    assert (chosen.adapter, chosen.weights) == (False, ("consolidated.safetensors",))
