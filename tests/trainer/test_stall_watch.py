"""A tokenizer or chat template that stalls at one row of a dataset ends the trainer with that row's line."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from modelyard import trainer
from modelyard.errors import JobFailure
from modelyard.trainer import stall_watch
from modelyard.trainer.stall_watch import StallWatch
from tests.eventually import PATIENCE_S
from tests.hostile_tokenizers import doubling, tokenizer
from tests.trainer.runs import Trainers, make_run, rows

RARE = "\u2603"
#: Doublings of a letter that take some seconds, and no more memory than a test may take.
SLOW = 23


class Told:
    """Keeps the failure, as the trainer would before it ends."""

    def __init__(self) -> None:
        self.failures: list[JobFailure] = []
        self.came = threading.Event()

    def __call__(self, failure: JobFailure) -> None:
        self.failures.append(failure)
        self.came.set()


def encoder(content: bytes) -> Callable[[str], Any]:
    native = Tokenizer.from_str(content.decode())
    return lambda text: native.encode_batch([text], add_special_tokens=False)


def watched(work: Callable[[StallWatch], object], silence_s: float = 0.5) -> JobFailure:
    """Return the failure that is told while the work still goes on."""
    told = Told()
    thread = threading.Thread(target=work, args=(StallWatch("org/odd", told, silence_s),), daemon=True)
    thread.start()
    assert told.came.wait(PATIENCE_S)
    return told.failures[0]


def test_a_text_that_stalls_among_others_is_named_by_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_watch, "ROW_S", 1.0)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    encode = encoder(doubling(SLOW, RARE))
    places = [
        (f"line {number} of the dataset", ["river x", f"a {RARE}" if number == 7 else "a"]) for number in range(9)
    ]

    def batch(watch: StallWatch) -> None:
        with watch.tokenizing(places, encode):
            encode(f"a {RARE}")

    failure = watched(batch)
    assert failure.code == "tokenizer_stalled"
    assert failure.message == "The tokenizer of org/odd did not go on within 0.5 s at line 7 of the dataset."
    assert "Leave that row out." in failure.hint


def test_a_text_that_takes_memory_without_end_is_ended_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_watch, "GROWTH_BYTES", 16 * 1024**2)
    encode = encoder(doubling(SLOW, RARE))

    def one(watch: StallWatch) -> None:
        with watch.tokenizing([("line 3 of the dataset", [RARE])], encode):
            encode(RARE)

    failure = watched(one, silence_s=600)
    assert failure.code == "tokenizer_stalled"
    assert "MiB of memory, and more, at line 3 of the dataset." in failure.message


def test_a_chat_template_that_does_not_end_is_named_as_such() -> None:
    def render(watch: StallWatch) -> None:
        with watch.rendering("line 2 of the dataset"):
            time.sleep(PATIENCE_S)

    failure = watched(render)
    assert failure.code == "template_stalled"
    assert "The chat template of org/odd" in failure.message
    assert failure.message.endswith("at line 2 of the dataset.")


def test_work_that_ends_in_time_is_no_stall_however_much_of_it_there_is() -> None:
    told = Told()
    watch = StallWatch("org/good", told, 0.4)
    encode = encoder(tokenizer())
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        with watch.rendering("line 1 of the dataset"):
            time.sleep(0.01)
        with watch.tokenizing([("line 1 of the dataset", ["a river"])], encode):
            encode("a river")
    time.sleep(0.8)  # between two texts nothing is watched
    assert not told.failures


def test_the_trainer_calls_the_library_only_where_other_threads_run() -> None:
    sources = {path.name: path.read_text("utf-8") for path in Path(trainer.__file__).parent.glob("*.py")}
    del sources["default_template.py"]  # what the trial before the start has done already
    holding = [name for name, text in sources.items() if "okens.encode(" in text or "okenizer.decode(" in text]
    assert not holding


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_trainer_whose_tokenizer_stalls_at_a_row_fails_with_its_line(
    tmp_path: Path, tiny_llama: Path, trainers: Trainers
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    path = model / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["normalizer"] = json.loads(doubling(60, RARE))["normalizer"]
    path.write_text(json.dumps(content), "utf-8")
    lines = rows(12)
    lines[6]["messages"][0]["content"] += f" {RARE}"
    run = make_run(tmp_path / "run", model, lines=lines)
    began = time.monotonic()
    assert trainers.run(run) == 1
    failure = run.failure()
    assert failure["code"] == "tokenizer_stalled"
    assert "at line 7 of the dataset" in failure["message"]
    assert time.monotonic() - began < 90
