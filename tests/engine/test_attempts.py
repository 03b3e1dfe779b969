"""Attempts are counted as numbers, and each has its own part of the log."""

from __future__ import annotations

from pathlib import Path

from modelyard.engine import attempts


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


def attempted(folder: Path, *texts: str) -> Path:
    log = folder / "log.txt"
    for number, text in enumerate(texts, 1):
        attempts.begin_log(log, number, ["python", str(number)])
        with log.open("a") as file:
            file.write(text)
    return log


def test_each_attempt_has_its_own_lines(tmp_path: Path) -> None:
    log = attempted(tmp_path, "one\nmore\n", "", "three, unfinished")
    found = attempts.listing(tmp_path, log)
    assert [(one.number, one.command) for one in found] == [(1, "python 1"), (2, "python 2"), (3, "python 3")]
    assert [attempts.log_of(log, one) for one in found] == ["one\nmore\n", "", "three, unfinished"]
    assert all(one.outcome is None for one in found)


def test_how_an_attempt_ended_is_what_its_keeper_wrote(tmp_path: Path) -> None:
    log = attempted(tmp_path, "one\n")
    (tmp_path / "attempt-1").mkdir()
    (tmp_path / "attempt-1" / "outcome.json").write_text(
        '{"exit_code": 3, "signal": null, "stopped": false, "abandoned": false}'
    )
    [found] = attempts.listing(tmp_path, log)
    assert found.outcome is not None
    assert found.outcome.describe() == "exit code 3"


def test_an_engine_that_writes_such_a_heading_begins_no_attempt(tmp_path: Path) -> None:
    log = attempted(tmp_path, "=== attempt 7, 2026-01-01 00:00:00 UTC: rm\n  === attempt 2, x\n", "two\n")
    assert [one.number for one in attempts.listing(tmp_path, log)] == [1, 2]
    assert "attempt 7" in attempts.log_of(log, attempts.listing(tmp_path, log)[0])


def test_of_a_long_attempt_the_end_is_read_from_a_whole_line_on(tmp_path: Path) -> None:
    log = attempted(tmp_path, "".join(f"line {number}\n" for number in range(1000)))
    [found] = attempts.listing(tmp_path, log)
    assert attempts.log_of(log, found, limit=20) == "line 998\nline 999\n"


def test_without_a_log_there_are_no_attempts(tmp_path: Path) -> None:
    assert attempts.listing(tmp_path, tmp_path / "log.txt") == []
    (tmp_path / "log.txt").touch()
    assert attempts.listing(tmp_path, tmp_path / "log.txt") == []
