"""What strangers cause can be read in the log, and cannot fill it."""

from __future__ import annotations

import logging

import pytest

from modelyard.log_limits import LINES_A_MINUTE, MAX_KINDS, MINUTE_S, RepeatLimit


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def logger_with(clock: Clock) -> tuple[logging.Logger, Lines]:
    logger, lines = logging.Logger("of the test"), Lines()
    logger.addHandler(lines)
    logger.addFilter(RepeatLimit(clock))
    return logger, lines


def test_of_one_kind_so_many_lines_pass_in_a_minute_and_the_rest_is_counted(clock: Clock) -> None:
    logger, lines = logger_with(clock)
    for number in range(1000):
        logger.warning("a wrong key came from %s", number)
    logger.warning("something else")
    assert len(lines.seen) == LINES_A_MINUTE + 1
    clock.now += MINUTE_S
    logger.warning("a wrong key came from %s", "the next minute")
    assert (
        lines.seen[-1]
        == f"a wrong key came from the next minute ({1000 - LINES_A_MINUTE} more such lines were left out)"
    )
    logger.warning("a wrong key came from %s", "the next minute")
    assert "left out" not in lines.seen[-1]


def test_what_is_remembered_is_bounded_even_if_the_text_itself_is_foreign(clock: Clock) -> None:
    logger, _ = logger_with(clock)
    for number in range(10 * MAX_KINDS):
        logger.warning(f"foreign {number}")  # what the bound is for
    [limit] = [one for one in logger.filters if isinstance(one, RepeatLimit)]
    assert len(limit._seen) <= MAX_KINDS
