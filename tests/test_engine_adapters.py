"""Adapters on real vLLM, through the whole server: PEFT made them, and PEFT says what they must answer.

One server and one engine for the module, in the order of the tests: each goes on with what the one before left.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from modelyard.demo import tiny_llama
from modelyard.engine.client import EngineClient
from tests.fixtures import missing
from tests.models.test_adapter_checks import pair, write_tensors
from tests.peft_adapters import PROMPT, TOKENS
from tests.server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

START_S = 600.0
MODEL = "local:tiny-llama"
KINDS = ("plain", "another", "patterns", "dora", "idle", "weak")
#: Those that say how they were trained, so that they are checked.
TRAINED = ("trained", "foreign", "idle", "weak")
#: Copies of the plain one, with other parts in the names of all layers, or of the second.
ODD_NAMES = {
    "inside": ("model.model.layers", "model.language_model.model.layers"),
    "half": (".layers.1.", "._orig_mod.layers.1."),
}
#: What the trained ones were asked, as their folders say.
QUESTIONS = ("Who are you?", "Name a river.", "What is 7 times 6?")
#: Of float32, so that greedy answers are the same in two libraries.
OPTIONS = {"dtype": "float32"}


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama, adapters of it, one that vLLM refuses when it loads it, and greedy answers."""
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("peft") is None:
        missing("engine", "vLLM or PEFT is not installed: make test installs them")
    folder = tmp_path_factory.mktemp("imports")
    base = str(folder / "tiny-llama")
    subprocess.run([sys.executable, "-m", "modelyard.demo.tiny_llama", base], check=True)
    make = [sys.executable, "-W", "ignore", "-m", "tests.peft_adapters", base, str(folder), *KINDS]
    subprocess.run(make, check=True, capture_output=True)
    for kind in KINDS:
        config = folder / kind / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "base_model_name_or_path": MODEL}))
    # What has 'experts' in its name is left to the engine, and this model has none.
    shutil.copytree(folder / "plain", folder / "odd")
    write_tensors(folder / "odd" / "adapter_model.safetensors", pair("model.layers.0.mlp.experts", 8))
    for name, parts in ODD_NAMES.items():
        shutil.copytree(folder / "plain", folder / name)
        rename_layers(folder / name / "adapter_model.safetensors", *parts)
    shutil.copytree(folder / "idle", folder / "sleepy")
    for kind in ("trained", "foreign"):
        shutil.copytree(folder / "plain", folder / kind)
    for kind in TRAINED:
        probes = {"probes": [probe(folder / "tiny-llama", text) for text in QUESTIONS], "template_source": "model"}
        (folder / kind / "probes.json").write_text(json.dumps(probes))
    foreign = json.loads((folder / "foreign" / "probes.json").read_text("utf-8"))
    foreign["probes"][1]["token_ids"][3] += 1
    (folder / "foreign" / "probes.json").write_text(json.dumps(foreign))
    return folder


def rename_layers(path: Path, part: str, other: str) -> None:
    """Put another part into the names of weights, as trainings inside other models do."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(
        {name.replace(part, other): entry for name, entry in json.loads(content[8 : 8 + length]).items()}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def probe(base: Path, question: str) -> dict[str, Any]:
    """Return a probe as a training writes it; the prompt is what the tiny Llama's chat template makes of a question."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    prompt = f"{tiny_llama.BEGIN}<|user|>{question}{tiny_llama.END}<|assistant|>"
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    return {"messages": [{"role": "user", "content": question}], "tools": None, "token_ids": ids}


@pytest.fixture(scope="module")
def greedy(imports: Path) -> dict[str, list[int]]:
    """The tokens that PEFT continues the prompt with, for the base ('') and each adapter."""
    found: dict[str, list[int]] = json.loads((imports / "greedy.json").read_text("utf-8"))
    assert found[""] != found["plain"] != found["another"] != found["patterns"]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, imports: Path) -> Iterator[Server]:
    settings = {"MODELYARD_IMPORT_DIR": str(imports), "MODELYARD_ENGINE_MAX_RESTARTS": "2"}
    with serving(tmp_path_factory.mktemp("yard") / "data", **settings) as found:
        names = dict.fromkeys(["tiny-llama", *KINDS, *TRAINED, *ODD_NAMES, "odd", "sleepy"])
        for name in names:
            assert found.post(f"/api/v1/models/add/?model_id=local:{name}").status == 200
        until(lambda: len(found.get("/api/v1/models/").json()) == len(names), "all are in the store", found)
        make_trained(found, imports)
        yield found


def make_trained(server: Server, imports: Path) -> None:
    """Have the store say of some adapters that they were trained here: only of those are probes read."""
    with closing(sqlite3.connect(server.data_dir / "modelyard.db")) as database, database:
        for kind in TRAINED:
            query = "SELECT path FROM models WHERE model_id = ?"
            (path,) = database.execute(query, (f"local:{kind}",)).fetchone()
            shutil.copy(imports / kind / "probes.json", server.data_dir / "models" / path)
            query = "UPDATE models SET model_id = ?, source = 'training' WHERE model_id = ?"
            database.execute(query, (f"ft:{kind}", f"local:{kind}"))


@pytest.fixture(scope="module")
def job_id(server: Server) -> str:
    """The job of the engine, which serves the base."""
    found: str = deploy(server)
    until(
        lambda: deployment(server).get("state", "FAILED") in ("READY", "FAILED"), "the engine is ready", server, START_S
    )
    assert deployment(server)["state"] == "READY", server.get(f"/api/v1/jobs/{found}/status/").text
    return found


def until(condition: Callable[[], Any], what: str, server: Server, within_s: float = 120.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{server.log[-3000:]}"
        time.sleep(0.05)
    return value


def deploy(server: Server, *adapter_ids: str) -> str:
    answer = server.post("/api/v1/deploy/", {"model_id": MODEL, "adapter_ids": adapter_ids, "options": OPTIONS})
    assert answer.status == 200, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def deployment(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/api/v1/deploy/").json()
    return found


def serves(server: Server, *adapter_ids: str) -> None:
    """Wait until requests may name these adapters and no others."""
    until(lambda: deployment(server)["served_adapter_ids"] == [*adapter_ids], f"{adapter_ids} are in service", server)


def body(model: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **more}  # fmt: skip


def tokens_of(server: Server, model: str) -> list[int]:
    answer = server.post("/v1/completions", body(model, TOKENS))
    assert answer.status == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


@dataclass
class Stream:
    """A stream that a thread reads to its end."""

    tokens: list[int] = field(default_factory=list)
    is_whole: bool = False
    error: str = ""
    begun: threading.Event = field(default_factory=threading.Event)

    def read(self, server: Server, model: str, tokens: int) -> None:
        try:
            with server.opened("POST", "/v1/completions", json_body=body(model, tokens, stream=True)) as response:
                for line in response:
                    if line.startswith(b"data: {"):
                        said = json.loads(line[6:])
                        if "error" in said:
                            self.error = str(said)
                            return
                        self.tokens += said["choices"][0].get("token_ids") or []
                        self.begun.set()
                    self.is_whole |= line.startswith(b"data: [DONE]")
        except Exception as error:  # whatever it was, the test must say it  # noqa: BLE001
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.begun.set()


@contextmanager
def streams(server: Server, models: Sequence[str], tokens: int, *, again: bool = False) -> Iterator[list[Stream]]:
    """Have streams open during the block; afterwards all of them must have ended whole.

    With `again` others follow those that have ended, so that some are in the middle at every moment of the block,
    however quick the engine is beside what the block waits for.
    """
    found = [Stream() for _ in models]
    left = threading.Event()

    def read(stream: Stream, model: str) -> None:
        stream.read(server, model, tokens)
        while again and not left.is_set():
            stream = Stream()
            found.append(stream)
            stream.read(server, model, tokens)

    threads = [
        threading.Thread(target=read, args=(stream, model), daemon=True)
        for stream, model in zip(found, models, strict=True)
    ]
    for thread in threads:
        thread.start()
    for stream in found:
        assert stream.begun.wait(60), "a stream did not begin"
    try:
        yield found
    finally:
        left.set()
    for thread in threads:
        thread.join(300)
    for stream in found:
        assert (stream.error, stream.is_whole, len(stream.tokens)) == ("", True, tokens)


def engine_url(server: Server) -> str:
    """Return where the engine itself listens."""
    [path] = {command.split(" --uds ")[1].split()[0] for command in server.processes().values() if " --uds " in command}
    return f"unix:{path}"


def engine_names(server: Server) -> list[str]:
    """Return what the engine itself says that it serves."""

    async def ask() -> list[str] | None:
        client = EngineClient(engine_url(server))
        try:
            return await client.names()
        finally:
            await client.close()

    names = asyncio.run(ask())
    assert names is not None
    return names


def test_an_adapter_joins_the_running_engine_and_eight_streams_go_on(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    assert tokens_of(server, MODEL) == greedy[""]
    with streams(server, [MODEL] * 8, 400, again=True) as open_streams:
        assert deploy(server, "local:plain") == job_id, "the engine is changed, not exchanged"
        serves(server, "local:plain")
        assert tokens_of(server, "local:plain") == greedy["plain"]
        assert tokens_of(server, MODEL) == greedy[""]
    assert all(stream.tokens[:TOKENS] == greedy[""] for stream in open_streams)
    assert {model["id"] for model in server.get("/v1/models").json()["data"]} >= {MODEL, "local:plain"}


def test_another_adapter_takes_its_place_and_what_it_had_begun_ends_whole(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    with streams(server, ["local:plain"] * 2, 400) as open_streams:
        assert deploy(server, "local:another") == job_id
        serves(server, "local:another")
        assert tokens_of(server, "local:another") == greedy["another"]
        answer = server.post("/v1/completions", body("local:plain", 1))
        assert (answer.status, answer.error_code) == (404, "model_not_found")
    assert all(stream.tokens[:TOKENS] == greedy["plain"] for stream in open_streams)
    until(lambda: engine_names(server) == [MODEL, "local:another@1"], "the first one is unloaded", server)


def test_several_adapters_and_their_base_answer_side_by_side(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    # With the one that left, all four slots are taken: see `engine.plugins.lora` for what the base then answered.
    adapter_ids = ["local:another", "local:plain", "local:patterns"]
    assert deploy(server, *adapter_ids) == job_id
    serves(server, *adapter_ids)
    with streams(server, [MODEL, *adapter_ids] * 2, 200) as open_streams:
        pass
    for stream, kind in zip(open_streams, ["", "another", "plain", "patterns"] * 2, strict=True):
        assert stream.tokens[:TOKENS] == greedy[kind]


def test_an_adapter_that_vllm_cannot_serve_is_refused_and_nothing_changes(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    before, names = deployment(server), engine_names(server)
    wanted = {"model_id": MODEL, "adapter_ids": ["local:plain", "local:dora"], "options": OPTIONS}
    answer = server.post("/api/v1/deploy/", wanted)
    assert (answer.status, answer.error_code) == (422, "unsupported_adapter")
    assert "'local:dora' is a DoRA" in answer.text
    assert deployment(server) == before
    assert engine_names(server) == names
    assert tokens_of(server, "local:another") == greedy["another"]


def test_an_adapter_that_the_engine_does_not_load_is_taken_back_with_the_engines_words(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    before, names = deployment(server), engine_names(server)
    assert deploy(server, "local:odd") == job_id
    failure = until(lambda: deployment(server)["adapter_failure"], "the failure is told", server)
    assert (failure["adapter_id"], failure["code"]) == ("local:odd", "adapter_not_loaded")
    assert "expected target modules" in failure["message"]
    assert deployment(server)["adapter_ids"] == before["adapter_ids"]
    assert deployment(server)["served_adapter_ids"] == before["served_adapter_ids"]
    assert engine_names(server) == names
    assert tokens_of(server, "local:another") == greedy["another"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_layers_that_the_engine_would_pass_over_are_refused_by_the_server_and_by_the_engine_itself(
    server: Server, job_id: str, imports: Path, name: str
) -> None:
    wanted = {"model_id": MODEL, "adapter_ids": [f"local:{name}"], "options": OPTIONS}
    answer = server.post("/api/v1/deploy/", wanted)
    assert (answer.status, answer.error_code) == (422, "unsupported_adapter")
    assert "a name that its base does not have" in answer.text
    # Of a model that also sees only the engine knows the names.
    said = asyncio.run(load_directly(server, name, imports / name))
    lacking = 14 if name == "inside" else 7
    assert f"of the adapter's 14 layers the model lacks {lacking}, which would be passed over" in said
    assert name not in engine_names(server)


async def load_directly(server: Server, name: str, path: Path) -> str:
    client = EngineClient(engine_url(server))
    try:
        return await client.load_adapter(name, path, 60)
    finally:
        await client.close()


def test_a_prompts_log_probabilities_are_those_of_the_adapter_that_was_asked(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    models = [MODEL, *deployment(server)["served_adapter_ids"]]
    assert len(models) == 4, "all slots are taken"
    alone = [prompt_logprobs(server, model) for model in models]
    assert len({tuple(one) for one in alone}) == len(models)
    with streams(server, models, 200), ThreadPoolExecutor(8) as pool:
        # Each beside the streams, and eight at the same time.
        together = list(pool.map(lambda model: prompt_logprobs(server, model), models * 2))
    for one, other in zip(alone * 2, together, strict=True):
        assert other == pytest.approx(one, abs=1e-3)


def prompt_logprobs(server: Server, model: str) -> list[float]:
    answer = server.post("/v1/completions", body(model, 1, echo=True, logprobs=0))
    assert answer.status == 200, answer.text
    found: list[float] = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    return found


def test_a_trained_adapter_is_checked_before_it_is_named_and_a_weak_one_acts_too(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    before = deployment(server)["adapter_ids"]
    assert greedy["idle"] == greedy[""]
    with streams(server, [MODEL, *before] * 2, 300):  # a busy engine is no reason to refuse either of them
        assert deploy(server, *before, "ft:trained", "ft:weak") == job_id
        serves(server, *before, "ft:trained", "ft:weak")
    checks = deployment(server)["adapter_checks"]
    assert set(checks) == {*before, "ft:trained", "ft:weak"}
    assert checks["local:plain"]["changed_answers"] == checks["local:plain"]["prompts"] == 2
    assert "tokens_equal" not in checks["local:plain"], "of those from elsewhere nothing tells"
    trained, weak = checks["ft:trained"], checks["ft:weak"]
    assert (trained["tokens_equal"], trained["acts"], trained["prompts"]) == (True, True, len(QUESTIONS) + 3)
    assert trained["changed_answers"] == trained["prompts"]
    assert weak["acts"] is True
    assert weak["changed_answers"] < weak["prompts"]
    assert 1e-4 < weak["largest_logprob_change"] < 1
    assert tokens_of(server, "ft:trained") == greedy["plain"]
    deploy(server, *before)
    serves(server, *before)


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("idle", "adapter_does_not_act", "answers 6 prompts just as without it"),
        ("foreign", "tokens_differ", "prompt 2 ('Name a river.') differs at position 3"),
    ],
)
def test_one_that_does_not_pass_its_checks_is_taken_back(
    server: Server, job_id: str, kind: str, code: str, said: str
) -> None:
    before = deployment(server)["adapter_ids"]
    assert deploy(server, *before, f"ft:{kind}") == job_id
    failure = until(lambda: deployment(server)["adapter_failure"], "the failure is told", server)
    assert (failure["adapter_id"], failure["code"]) == (f"ft:{kind}", code)
    assert said in failure["message"]
    assert deployment(server)["served_adapter_ids"] == before
    assert f"ft:{kind}@1" not in engine_names(server)


def test_one_from_elsewhere_that_does_not_act_is_taken_back(server: Server, job_id: str) -> None:
    before = deployment(server)["adapter_ids"]
    assert deploy(server, *before, "local:sleepy") == job_id
    failure = until(lambda: deployment(server)["adapter_failure"], "the failure is told", server)
    assert (failure["adapter_id"], failure["code"]) == ("local:sleepy", "adapter_does_not_act")
    assert "answers 2 prompts just as without it" in failure["message"]
    assert deployment(server)["served_adapter_ids"] == before


def test_an_alias_leads_to_an_adapter_and_moves_to_another(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    for kind in ("another", "plain"):
        assert server.request("PUT", "/api/v1/aliases/poet", json_body={"target": f"local:{kind}"}).status == 200
        assert tokens_of(server, "poet") == greedy[kind]
    assert server.delete("/api/v1/aliases/poet").status in (200, 204)


def test_a_server_that_was_killed_finds_the_engine_with_its_adapters(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    names = engine_names(server)
    server.kill()
    server.start()
    until(lambda: deployment(server)["state"] == "READY", "the deployment is back", server)
    assert engine_names(server) == names, "nothing was loaded twice"
    assert tokens_of(server, "local:plain") == greedy["plain"]


def test_an_engine_that_was_killed_comes_back_with_its_adapters(
    server: Server, job_id: str, greedy: dict[str, list[int]]
) -> None:
    before = deployment(server)["adapter_ids"]
    [core] = [
        pid for pid in server.processes() if Path(f"/proc/{pid}/comm").read_text("utf-8").startswith("VLLM::Engine")
    ]
    os.kill(core, signal.SIGKILL)
    until(lambda: deployment(server)["state"] != "READY", "the death was seen", server)
    until(lambda: deployment(server)["state"] == "READY", "the engine is back", server, START_S)
    serves(server, *before)
    for kind in ("another", "plain", "patterns"):
        assert tokens_of(server, f"local:{kind}") == greedy[kind]
