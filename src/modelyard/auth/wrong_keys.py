"""Delays of the answers to wrong keys: the longer, the more of them came from the same address.

Only wrong keys wait. A right one is never slowed, from whatever address, so that nobody can lock out the owner. What
is remembered is bounded: of more addresses than `MAX_ADDRESSES` the one that was seen first is forgotten.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from modelyard.retry import Backoff

MAX_ADDRESSES = 4096
#: Mistakes that cost nothing: a client may try its old key before its new one.
FREE = 5
FIRST_DELAY_S = 0.05
FORGOTTEN_AFTER_S = 600.0


class WrongKeys:
    """The wrong keys of late, by address."""

    def __init__(self, longest_delay_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._longest_delay_s = longest_delay_s
        self._now = now
        self._seen: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def another_from(self, address: str) -> float:
        """Note a wrong key, and return for how many seconds its answer is held back."""
        now, network = self._now(), network_of(address)
        count, last_at = self._seen.get(network, (0, now))
        count = count + 1 if now - last_at < FORGOTTEN_AFTER_S else 1
        self._seen[network] = count, now
        self._seen.move_to_end(network)
        if len(self._seen) > MAX_ADDRESSES:
            self._seen.popitem(last=False)
        if count <= FREE:
            return 0.0
        return Backoff(FIRST_DELAY_S, self._longest_delay_s).pause_s(count - FREE)


def network_of(address: str) -> str:
    """Return the key of one caller: an IPv4 address, or an IPv6 network (/64): its owner picks the rest at will."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:100]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
