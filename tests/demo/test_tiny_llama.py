"""The models that are made on the spot: whole, the same for the same seed, and loadable by what serves them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from modelyard.demo import tiny_llama
from modelyard.models import scan, selection
from tests.servers.programs import Programs


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modelyard.demo.tiny_llama", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_same_seed_makes_the_same_files_and_another_seed_other_weights(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert make(str(tmp_path / name), "--seed", seed).returncode == 0
    first, second, third = (files(tmp_path / name) for name in "abc")
    assert first == second
    assert {name for name in first if first[name] != third[name]} == {"model.safetensors"}


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    done = make(str(tmp_path / "mine"))
    assert done.returncode != 0
    assert done.stderr.startswith(f"tiny_llama: {tmp_path / 'mine'} is there already")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_what_fails_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llama, "CORPUS", tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError):
        tiny_llama.make_llama(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_store_would_take_every_file_of_it(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_llama.make_llama(folder) if kind == "llama" else tiny_llama.make_bert(folder)
    chosen = selection.select(files(folder).keys())
    assert {*chosen.configuration, *chosen.weights} == set(files(folder))
    for name in chosen.configuration:
        scan.scan_configuration(name, (folder / name).read_bytes())


def test_the_tokenizer_brings_any_text_back_and_knows_the_ends_of_turns(tmp_path: Path) -> None:
    tiny_llama.make_llama(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    config = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    text = "Déjà vu: Привет, 你好, 🙂!\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 2048
    assert tokenizer.token_to_id(tiny_llama.END) == config["eos_token_id"]


@pytest.mark.engine
def test_transformers_loads_the_llama_whole_and_its_chat_template_ends_each_turn(
    vllm_programs: Programs, tmp_path: Path
) -> None:
    tiny_llama.make_llama(tmp_path / "model")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loading.values()), loading
assert model.dtype == torch.bfloat16 and model.get_output_embeddings().weight is model.get_input_embeddings().weight
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
assert text == "<|begin|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>", text
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
assert ids["input_ids"][0].tolist().count(tokenizer.eos_token_id) == 2
assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
"""
    done = vllm_programs.run(code, str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.engine
def test_transformers_loads_the_bert_whole(vllm_programs: Programs, tmp_path: Path) -> None:
    tiny_llama.make_bert(tmp_path / "model")
    code = """
import sys
from transformers import AutoModel, AutoTokenizer
model, loading = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loading.values()), loading
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
encoded = tokenizer("How are you?", return_tensors="pt")
tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]"), tokens
assert model(**encoded).last_hidden_state.shape[-1] == 128
"""
    done = vllm_programs.run(code, str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr[-2000:]
