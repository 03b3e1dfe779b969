"""A model or an adapter as a zip, over REST: whole, the same each time, and one that PEFT and transformers load."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import PATIENCE_S
from tests.finetune.yard import MODEL, add_model, until
from tests.peft_adapters import PROMPT, TOKENS
from tests.server import Answer, Server, serving

ADAPTER = "local:plain"
MERGE_S = 240.0
#: Run as the user would, on another machine: no part of Modelyard.
LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompt, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
if adapter:
    from peft import PeftConfig, PeftModel
    assert PeftConfig.from_pretrained(adapter).base_model_name_or_path == "local:tiny-llama"
    model = PeftModel.from_pretrained(model, adapter)
ids = AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt").input_ids
model.eval()
model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
print(json.dumps(said[0, ids.shape[1]:].tolist()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, imports: Path) -> Path:
    """An import directory with the tiny Llama in float32, an adapter of it, and PEFT's answers (`greedy.json`)."""
    found = tmp_path_factory.mktemp("exports")
    shutil.copytree(imports / "tiny-llama", found / "tiny-llama")
    in_float32 = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; "
        "A.from_pretrained(sys.argv[1], dtype=torch.float32).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", in_float32, str(found / "tiny-llama")], check=True, capture_output=True)
    subprocess.run(
        [sys.executable, "-m", "tests.peft_adapters", str(found / "tiny-llama"), str(found), "plain"],
        check=True, capture_output=True,
    )  # fmt: skip
    path = found / "plain/adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": MODEL}))
    shutil.copytree(found / "plain", found / "orphan")
    (found / "orphan/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "acme/gone"}))
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Server]:
    settings = {"MODELYARD_IMPORT_DIR": str(folder), "OMP_NUM_THREADS": "1", "MODELYARD_DISK_RESERVE_GIB": "0"}
    with serving(tmp_path_factory.mktemp("store") / "data", **settings) as server:
        for model_id in (MODEL, ADAPTER, "local:orphan"):
            add_model(server, model_id)
        yield server


def export(server: Server, model_id: str, query: str = "", **headers: str) -> Answer:
    return server.request("GET", f"/api/v1/models/{model_id}/export{query}", headers=headers, timeout_s=MERGE_S)


def unpacked(answer: Answer, target: Path) -> Path:
    assert answer.status == 200, answer.text
    assert len(answer.body) == int(answer.headers["content-length"])
    with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
        assert archive.testzip() is None
        archive.extractall(target)
    return target


def continued(base: Path, adapter: Path | None) -> list[int]:
    """Return how a process that knows nothing of Modelyard continues the prompt."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(base), str(adapter or ""), PROMPT, str(TOKENS)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def leftovers(server: Server) -> list[Path]:
    errands = server.data_dir / "jobs/errands"
    return list(errands.iterdir()) if errands.exists() else []


@pytest.mark.slow
def test_peft_loads_an_adapter_that_was_exported_and_it_answers_as_before(
    store: Server, folder: Path, tmp_path: Path
) -> None:
    known = json.loads((folder / "greedy.json").read_text("utf-8"))
    answer = export(store, ADAPTER)
    assert answer.headers["content-type"] == "application/zip"
    assert 'filename="local-plain.zip"' in answer.headers["content-disposition"]
    assert known["plain"] != known[""]
    assert continued(folder / "tiny-llama", unpacked(answer, tmp_path / "plain")) == known["plain"]


@pytest.mark.slow
def test_a_merged_model_needs_neither_peft_nor_the_adapter_and_nothing_of_it_stays(
    store: Server, folder: Path, tmp_path: Path
) -> None:
    known = json.loads((folder / "greedy.json").read_text("utf-8"))
    answer = export(store, ADAPTER, "?merged=true")
    found = unpacked(answer, tmp_path / "merged")
    assert 'filename="local-plain-merged.zip"' in answer.headers["content-disposition"]
    assert continued(found, None) == known["plain"]
    assert not list(found.glob("adapter*"))
    until(lambda: not leftovers(store), "the merge's folder is gone")
    # With the tag in hand there is nothing to merge, so that this answer is quick.
    tag = answer.headers["etag"]
    assert tag.startswith('W/"')
    assert export(store, ADAPTER, "?merged=true", **{"If-None-Match": tag}).status == 304


@pytest.mark.slow
def test_the_same_adapter_is_the_same_zip_and_its_tag_saves_the_download(store: Server) -> None:
    first, second = export(store, ADAPTER), export(store, ADAPTER, "/")
    assert first.body == second.body
    tag = first.headers["etag"]
    assert second.headers["etag"] == tag
    again = export(store, ADAPTER, **{"If-None-Match": tag})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert export(store, MODEL).headers["etag"] != tag


@pytest.mark.slow
def test_a_model_is_exported_as_it_is(store: Server, folder: Path, tmp_path: Path) -> None:
    found = unpacked(export(store, MODEL), tmp_path / "model")
    names = {path.name for path in (folder / "tiny-llama").iterdir()}
    assert {path.name for path in found.iterdir()} == names
    for name in names:
        assert (found / name).read_bytes() == (folder / "tiny-llama" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "status", "code", "says"),
    [
        ("no/such/export", 404, "model_not_found", "There is no model 'no/such'"),
        (f"{MODEL}/export?merged=true", 422, "not_an_adapter", "there is nothing to merge"),
        ("local:orphan/export?merged=true", 409, "base_missing", "acme/gone"),
        (f"{ADAPTER}/export?merged=perhaps", 422, "invalid_value", "merged"),
    ],
)
def test_what_cannot_be_exported_says_why(store: Server, path: str, status: int, code: str, says: str) -> None:
    answer = store.get(f"/api/v1/models/{path}")
    assert (answer.status, answer.error_code) == (status, code)
    assert says in answer.json()["error"]["message"]


@pytest.mark.slow
def test_an_adapter_without_its_base_is_exported_alone(store: Server, tmp_path: Path) -> None:
    found = unpacked(export(store, "local:orphan"), tmp_path / "orphan")
    config = json.loads((found / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "acme/gone"


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Server]:
    """A server whose disk must keep more free than it has, with the models in place by its database."""
    data = tmp_path_factory.mktemp("cramped") / "data"
    with serving(data, MODELYARD_IMPORT_DIR=str(folder), MODELYARD_DISK_RESERVE_GIB="0") as server:
        for model_id in (MODEL, ADAPTER):
            add_model(server, model_id)
    with serving(data, MODELYARD_IMPORT_DIR=str(folder), MODELYARD_DISK_RESERVE_GIB="1000000") as server:
        yield server


@pytest.mark.slow
def test_a_merge_for_which_the_disk_has_no_room_is_refused_with_the_numbers_before_it_begins(cramped: Server) -> None:
    answer = export(cramped, ADAPTER, "?merged=true")
    assert (answer.status, answer.error_code) == (503, "disk_full")
    assert "GiB" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]
    assert not leftovers(cramped)


SLOW_TRAINER = """#!{python}
import os, signal, sys, time
open(os.environ["HOME"] + "/started", "a").write(f"{{os.getpid()}}\\n")
{act}
"""


def imitation(tmp_path: Path, act: str) -> Path:
    """Return a Python that runs no trainer but does something else."""
    path = tmp_path / "python"
    path.write_text(SLOW_TRAINER.format(python=sys.executable, act=act))
    path.chmod(0o755)
    return path


@pytest.fixture
def with_trainer(tmp_path: Path, folder: Path) -> Any:
    """Start a server on a store with the adapter, whose trainer acts as is said."""

    def start(act: str) -> Any:
        trainer = imitation(tmp_path, act)
        settings = {
            "MODELYARD_IMPORT_DIR": str(folder), "MODELYARD_DISK_RESERVE_GIB": "0", "HOME": str(tmp_path),
            "MODELYARD_TRAINER_PYTHON": str(trainer), "MODELYARD_GRACE_S": "2",
        }  # fmt: skip
        return serving(tmp_path / "data", **settings)

    return start


def pids(tmp_path: Path) -> list[int]:
    path = tmp_path / "started"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_a_client_that_goes_away_ends_its_merge_and_leaves_nothing(with_trainer: Any, tmp_path: Path) -> None:
    with with_trainer("time.sleep(600)") as server:
        for model_id in (MODEL, ADAPTER):
            add_model(server, model_id)
        with pytest.raises(TimeoutError):
            server.request("GET", f"/api/v1/models/{ADAPTER}/export?merged=true", timeout_s=3.0)
        until(lambda: pids(tmp_path), "the merge was begun")
        until(lambda: is_gone(pids(tmp_path)[0]) and not leftovers(server), "the merge was ended")
        # Its turn has passed on: the next one begins.
        with pytest.raises(TimeoutError):
            server.request("GET", f"/api/v1/models/{ADAPTER}/export?merged=true", timeout_s=3.0)
        until(lambda: len(pids(tmp_path)) == 2 and is_gone(pids(tmp_path)[1]), "another merge was begun and ended")
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_merges_take_turns_and_a_server_that_stops_ends_them(with_trainer: Any, tmp_path: Path) -> None:
    with with_trainer("time.sleep(600)") as server:
        for model_id in (MODEL, ADAPTER):
            add_model(server, model_id)

        answers: list[Answer] = []

        def ask() -> None:
            answers.append(export(server, ADAPTER, "?merged=true"))

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for one in asking:
            one.start()
        until(lambda: pids(tmp_path), "one was begun")
        until(lambda: len(leftovers(server)) == 2, "the other waits")
        assert server.stop() == 0
        for one in asking:
            one.join()
        assert [(one.status, one.error_code) for one in answers] == [(503, "stopped")] * 2
        assert len(pids(tmp_path)) == 1
        assert is_gone(pids(tmp_path)[0])
        assert not leftovers(server)
        server.start()


@pytest.mark.slow
def test_what_a_killed_server_left_is_ended_and_swept_by_the_next(with_trainer: Any, tmp_path: Path) -> None:
    with with_trainer("time.sleep(600)") as server:
        for model_id in (MODEL, ADAPTER):
            add_model(server, model_id)

        def ask() -> None:
            with pytest.raises(OSError):
                server.request("GET", f"/api/v1/models/{ADAPTER}/export?merged=true", timeout_s=PATIENCE_S)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: pids(tmp_path), "it was begun")
        server.kill()
        asking.join()
        server.start()
        assert is_gone(pids(tmp_path)[0])
        assert not leftovers(server)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "status", "code"),
    [
        ("print('no such module'); sys.exit(3)", 502, "trainer_failed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 503, "out_of_memory"),
    ],
)
def test_a_merge_that_dies_is_an_answer_with_its_end(
    with_trainer: Any, tmp_path: Path, act: str, status: int, code: str
) -> None:
    with with_trainer(act) as server:
        for model_id in (MODEL, ADAPTER):
            add_model(server, model_id)
        answer = export(server, ADAPTER, "?merged=true")
        assert (answer.status, answer.error_code) == (status, code)
        assert "ended before its work was done" in answer.json()["error"]["message"]
        assert not leftovers(server)


@pytest.mark.slow
@pytest.mark.parametrize(("read", "model_id"), [("adapter_dir", ADAPTER), ("model_dir", MODEL)])
def test_what_is_deleted_while_it_is_merged_is_not_found(with_trainer: Any, read: str, model_id: str) -> None:
    act = f"import json, shutil; shutil.rmtree(json.load(open(sys.argv[-1]))['{read}']); sys.exit(3)"
    with with_trainer(act) as server:
        for each in (MODEL, ADAPTER):
            add_model(server, each)
        answer = export(server, ADAPTER, "?merged=true")
        assert (answer.status, answer.error_code) == (404, "model_not_found")
        assert model_id in answer.json()["error"]["message"]
        assert "deleted while" in answer.json()["error"]["message"]
