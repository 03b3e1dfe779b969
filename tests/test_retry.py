"""Pauses double up to a bound, and work is repeated only as often and after such errors as its caller says."""

from __future__ import annotations

import pytest

from modelyard.retry import Backoff, retry, retry_blocking

BACKOFF = Backoff(0.001, 0.004)


class Work:
    """Work that fails so many times before it succeeds."""

    def __init__(self, failures: int, error: type[Exception] = ConnectionError) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def do(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(self.calls)
        return "done"

    async def do_it(self) -> str:
        return self.do()


@pytest.mark.parametrize(
    ("failures", "pause_s"), [(1, 0.25), (2, 0.5), (3, 1.0), (6, 8.0), (7, 15.0), (10_000_000, 15.0)]
)
def test_each_pause_is_twice_the_one_before_up_to_the_longest(failures: int, pause_s: float) -> None:
    assert Backoff(0.25, 15.0).pause_s(failures) == pause_s
    assert Backoff(0.0, 15.0).pause_s(failures) == 0.0


async def test_work_is_repeated_until_it_succeeds_and_each_failure_is_told_with_its_pause() -> None:
    told: list[tuple[int, float]] = []

    async def tell(error: ConnectionError, pause_s: float) -> None:
        told.append((error.args[0], pause_s))

    work = Work(5)
    assert await retry(work.do_it, ConnectionError, BACKOFF, before_pause=tell) == "done"
    assert told == [(1, 0.001), (2, 0.002), (3, 0.004), (4, 0.004), (5, 0.004)]


@pytest.mark.parametrize(
    ("work", "passes", "calls"),
    [(Work(9), True, 3), (Work(9), False, 1), (Work(9, ValueError), True, 1)],
    ids=["the last try", "an error that does not pass", "an error of another class"],
)
async def test_the_error_is_raised_that_nothing_helps_against(work: Work, passes: bool, calls: int) -> None:
    with pytest.raises(work.error) as raised:
        await retry(work.do_it, ConnectionError, BACKOFF, passes=lambda _: passes, tries=3)
    assert (work.calls, raised.value.args) == (calls, (calls,))


@pytest.mark.parametrize(("failures", "calls"), [(0, 1), (2, 3), (3, 3), (9, 3)])
def test_blocking_work_is_tried_as_often_and_no_oftener(failures: int, calls: int) -> None:
    work = Work(failures)
    if failures < 3:
        assert retry_blocking(work.do, ConnectionError, BACKOFF, tries=3) == "done"
    else:
        with pytest.raises(ConnectionError):
            retry_blocking(work.do, ConnectionError, BACKOFF, tries=3)
    assert work.calls == calls


def test_blocking_work_is_not_repeated_after_an_error_of_another_class() -> None:
    work = Work(9, ValueError)
    with pytest.raises(ValueError, match="1"):
        retry_blocking(work.do, ConnectionError, BACKOFF, tries=3)
    assert work.calls == 1
