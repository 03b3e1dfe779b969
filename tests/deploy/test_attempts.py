"""Attempts are counted as numbers, and each has its own part of the log."""

from __future__ import annotations

from pathlib import Path

from modelyard.deploy import attempts


def test_the_tenth_attempt_follows_the_ninth(tmp_path: Path) -> None:
    assert attempts.newest(tmp_path) is None
    assert attempts.following(tmp_path) == (1, tmp_path / "attempt-1")
    for number in range(1, 11):
        (tmp_path / f"attempt-{number}").mkdir()
    assert attempts.newest(tmp_path) == tmp_path / "attempt-10"
    assert attempts.following(tmp_path) == (11, tmp_path / "attempt-11")


def test_a_cause_is_looked_for_in_the_newest_attempt_only(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert attempts.newest_log(log) == ""
    attempts.begin_log(log, 1, ["python", "-m", "vllm"])
    with log.open("a") as file:
        file.write("ValueError: an old sorrow\n")
    attempts.begin_log(log, 2, ["python", "--lora-modules", '{"name": "a b"}'])
    with log.open("a") as file:
        file.write("all is well\n")
    newest = attempts.newest_log(log)
    assert "old sorrow" not in newest
    assert newest.endswith('python --lora-modules \'{"name": "a b"}\'\nall is well\n')


def test_of_a_long_log_the_end_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("x" * 1_000_000 + "the end")
    assert attempts.newest_log(log).endswith("the end")
    assert len(attempts.newest_log(log)) == attempts.TAIL_BYTES
