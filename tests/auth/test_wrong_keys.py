"""Wrong keys are answered ever later, by address, within bounds."""

from __future__ import annotations

import pytest

from modelyard.auth.wrong_keys import FORGOTTEN_AFTER_S, FREE, MAX_ADDRESSES, WrongKeys, network_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_delay_grows_from_nothing_to_its_bound_and_is_forgotten() -> None:
    clock = Clock()
    keys = WrongKeys(1.0, clock)
    delays = [keys.another_from("192.0.2.1") for _ in range(2000)]
    assert delays[:FREE] == [0.0] * FREE
    assert delays == sorted(delays)
    assert 0 < delays[FREE] < 0.1
    assert delays[-1] == 1.0
    assert keys.another_from("192.0.2.2") == 0.0
    clock.now += FORGOTTEN_AFTER_S
    assert keys.another_from("192.0.2.1") == 0.0


def test_a_delay_of_nothing_stays_nothing() -> None:
    keys = WrongKeys(0.0)
    assert {keys.another_from("192.0.2.1") for _ in range(100)} == {0.0}


def test_a_caller_with_a_whole_network_is_one_caller_and_memory_is_bounded() -> None:
    keys = WrongKeys(1.0)
    delays = [keys.another_from(f"2001:db8:1:2::{number:x}") for number in range(1, 100)]
    assert delays[-1] == 1.0
    for number in range(3 * MAX_ADDRESSES):
        keys.another_from(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(keys._seen) == MAX_ADDRESSES


@pytest.mark.parametrize(
    ("address", "network"),
    [("192.0.2.1", "192.0.2.1"), ("::ffff:192.0.2.1", "192.0.2.1"), ("2001:db8::1", "2001:db8::/64"),
     ("fe80::1%eth0", "fe80::/64"), ("a name", "a name")],
)  # fmt: skip
def test_what_counts_as_one_caller(address: str, network: str) -> None:
    assert network_of(address) == network
