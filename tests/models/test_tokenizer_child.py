"""A tokenizer is read in a child with limits: a stall, an abort and a panic are refusals, and the server lives on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelyard.errors import JobFailure
from modelyard.filters import Limits
from modelyard.models import rescan, tokenizer_child
from modelyard.models.tokenizer_child import GIB, TokenizerChildren
from tests.hostile_tokenizers import doubling, greedy, panicking, tokenizer

TRIAL = "from modelyard.trainer.tokenizer_trial import main; main({!r})"
QUICK = Limits(memory_bytes=4 * GIB, cpu_s=60, stall_s=4.0)


def model(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "tokenizer.json").write_bytes(content)
    return TRIAL.format(str(tmp_path))


async def refusal(program: str, limits: Limits = QUICK) -> JobFailure:
    before = time.monotonic()
    with pytest.raises(JobFailure) as caught:
        await TokenizerChildren(limits).ask("org/odd", program)
    assert time.monotonic() - before < 20
    assert "org/odd" in caught.value.message
    assert caught.value.hint
    return caught.value


async def test_a_good_tokenizer_is_tried_and_nothing_is_refused(tmp_path: Path) -> None:
    found = await TokenizerChildren().ask("org/good", model(tmp_path, tokenizer()))
    assert set(found) == {"template"}


@pytest.mark.parametrize("when_loaded", [True, False])
async def test_one_that_doubles_a_text_without_end_is_refused_in_bounded_time(
    tmp_path: Path, when_loaded: bool
) -> None:
    failure = await refusal(model(tmp_path, doubling(60, when_loaded=when_loaded)))
    assert failure.code == "bad_tokenizer"
    assert "did not go on within 4 s" in failure.message or "over 4 GiB" in failure.message


async def test_one_that_computes_for_too_long_is_ended_by_the_kernel() -> None:
    failure = await refusal("[0 for _ in iter(int, 1)]", Limits(memory_bytes=GIB, cpu_s=1, stall_s=30.0))
    assert (failure.code, "more than 1 s of processor time" in failure.message) == ("bad_tokenizer", True)


async def test_one_that_asks_for_gigabytes_aborts_its_child_alone(tmp_path: Path) -> None:
    failure = await refusal(model(tmp_path, greedy()))
    assert failure.code == "bad_tokenizer"
    assert "ended the process that read it (killed by SIGABRT): most often it asked for over 4 GiB" in failure.message


async def test_a_panic_is_a_refusal_with_its_words(tmp_path: Path) -> None:
    found = await TokenizerChildren().ask("org/odd", model(tmp_path, panicking()))
    assert found["refusal"].startswith("Precompiled: ")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"version": "9"}', b"[" * 100_000])
async def test_one_that_this_version_cannot_read_is_left_to_the_engine(tmp_path: Path, content: bytes) -> None:
    assert set(await TokenizerChildren().ask("org/odd", model(tmp_path, content))) == {"template"}


async def test_a_child_that_the_system_kills_is_no_fault_of_the_model() -> None:
    failure = await refusal("import os; os.kill(os.getpid(), 9)")
    assert (failure.code, failure.hint) == ("no_process", "Free memory on the server, and try again.")


async def test_an_answer_that_is_none_is_a_refusal() -> None:
    assert (await refusal("print('hello')")).code == "bad_tokenizer"


async def test_a_feed_that_ends_early_is_answered_all_the_same() -> None:
    async def blocks() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1024 * 1024)

    assert await TokenizerChildren().ask("org/good", "import os; os.read(0, 1); print(7)", blocks()) == 7


async def test_two_run_at_a_time_and_others_wait() -> None:
    children = TokenizerChildren()
    program = "import time; time.sleep(0.5); print(time.monotonic())"
    ends = sorted(await asyncio.gather(*(children.ask("org/good", program) for _ in range(4))))
    assert ends[2] - ends[1] > 0.3


@pytest.mark.parametrize("padding", [0, rescan.SMALL_BYTES])
@pytest.mark.parametrize("has_tokenizer", [True, False])
async def test_what_todays_rules_refuse_is_refused_before_the_tokenizer_is_read(
    tmp_path: Path, padding: int, has_tokenizer: bool
) -> None:
    if has_tokenizer:
        (tmp_path / "tokenizer.json").write_bytes(tokenizer())
    (tmp_path / "generation_config.json").write_bytes(b"{}" + b" " * padding)
    await TokenizerChildren().tried("org/old", tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_bytes(b'{"custom_generate": "org/evil"}')
    with pytest.raises(JobFailure) as caught:
        await TokenizerChildren().tried("org/old", tmp_path)
    assert caught.value.code == "remote_code"
    assert "1_Pooling/config.json" in caught.value.message
    assert "DELETE /api/v1/models/org/old" in caught.value.hint


def test_a_server_has_one_of_it_so_that_the_bound_holds_for_all_who_ask() -> None:
    sources = Path(tokenizer_child.__file__).parents[1].rglob("*.py")
    made = [path.name for path in sources if "TokenizerChildren()" in path.read_text("utf-8")]
    assert made == ["app.py"]
