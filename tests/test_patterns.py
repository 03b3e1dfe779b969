"""No pattern takes more than linear time on a hostile text, and the causes of failures are found fast and once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from modelyard import evidence
from modelyard.deploy.attempt_routes import _cause
from modelyard.engine import attempts
from modelyard.engine.failures import explain
from modelyard.processes import Outcome
from tests.patterns import AnyPattern, all_patterns, unseen

SIZE = 256 * 1024
REPEATED = ["a", "0", " ", "\n", "/", "(", '"', "'", "-", ".", "a.", "/a"]
#: Patterns that are made when their module works; each is held, or tried below.
MADE = {"modelyard.engine.failure_table", "modelyard.http", "modelyard.trainer.rendering"}
FAILED = Outcome(exit_code=1, signal=None)


def seconds(pattern: AnyPattern, text: str) -> float:
    """Return the processor time of the slowest use of a pattern on a text."""
    found = 0.0
    for use in ("search", "fullmatch"):
        given = text.encode()[:SIZE] if isinstance(pattern.pattern, bytes) else text
        before = time.thread_time()
        getattr(pattern, use)(given)
        found = max(found, time.thread_time() - before)
    return found


@pytest.mark.slow
def test_every_pattern_of_the_project_takes_linear_time() -> None:
    patterns = all_patterns()
    assert len(patterns) > 100
    texts = [(one * (SIZE // len(one) + 1))[:SIZE] for one in REPEATED]
    slow = {
        (name, text[:2]): round(took, 2)
        for name, pattern in patterns.items()
        for text in texts
        if (took := seconds(pattern, text)) > 0.1
    }
    assert not slow


@pytest.mark.slow
def test_no_pattern_is_made_where_the_test_does_not_see_it() -> None:
    assert {place.partition(":")[0] for place in unseen()} <= MADE


@pytest.mark.parametrize("word", [*REPEATED, "http://a", "site-packages/", "://a@", "Worker proc ", "token=", "(a: "])
def test_a_log_of_one_long_word_is_explained_at_once(word: str) -> None:
    text = (word * SIZE)[: attempts.TAIL_BYTES // 3]
    log = f"ERROR 11-20 21:00:03 [core.py:1] {text}\nValueError: {text}\nOSError: \x1b{text}"
    before = time.thread_time()
    failure = explain(log, FAILED)
    assert time.thread_time() - before < 1
    assert len(failure.message) < 1000
    assert sum(len(line) for line in failure.evidence) <= evidence.BYTES


def test_a_secret_in_a_long_line_is_not_shown_either() -> None:
    text = "x" * 300 + " hf_abcdefghijklmnop " + "y" * SIZE
    assert "hf_abc" not in evidence.redacted(text)
    assert "hf_abc" not in "".join(evidence.clipped([text]))


def test_the_cause_of_an_attempt_that_ended_is_found_once(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    attempts.begin_log(log, 1, ["python", "-m", "vllm"])
    with log.open("a") as file:
        file.write("ValueError: No available memory for the cache blocks.\n")
    [attempt] = attempts.listing(tmp_path, log)
    _cause.cache_clear()
    for _ in range(5):
        assert _cause(log, attempt.start, attempt.end, FAILED).code == "not_enough_memory"
    assert (_cause.cache_info().misses, _cause.cache_info().hits) == (1, 4)


def test_attempts_are_found_wherever_their_lines_lie_in_a_large_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "BLOCK_BYTES", 256)
    monkeypatch.setattr(attempts, "HEAD_BYTES", 128)
    log = tmp_path / "log.txt"
    for gap in range(230, 300):
        log.unlink(missing_ok=True)
        for number in (1, 2, 3):
            attempts.begin_log(log, number, ["python", str(number)])
            with log.open("a") as file:
                file.write(f"not === attempt 9\n{'x' * gap}\n")
        found = attempts.listing(tmp_path, log)
        assert [(one.number, one.command) for one in found] == [(number, f"python {number}") for number in (1, 2, 3)]
        assert [attempts.log_of(log, one) for one in found] == [f"not === attempt 9\n{'x' * gap}\n"] * 3
