"""The gateway's metrics, per request and never per chunk: an answer of a thousand tokens costs as much as one of ten.

The registry is the application's; nothing is kept in module state, so that a test may have its own.
"""

from __future__ import annotations

import functools
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

FIRST_BYTE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The gateway's series in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "modelyard_gateway_requests",
            "Requests to engines that have ended, by how. 499: the client went away. 599: the engine broke off.",
            ["endpoint", "model", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "modelyard_gateway_requests_in_flight", "Requests to engines that have not ended.", registry=registry
        )
        self.first_byte = Histogram(
            "modelyard_gateway_first_byte_seconds",
            "Time from a request's arrival to the first byte of its answer's body.",
            ["endpoint"],
            buckets=FIRST_BYTE_BUCKETS_S,
            registry=registry,
        )
        self.continuations_unwritten = Gauge(
            "modelyard_continuations_unwritten",
            "Raw-prompt texts that wait in memory until the database takes them.",
            registry=registry,
        )
        self.continuations_lost = Counter(
            "modelyard_continuations_lost",
            "Raw-prompt texts that cannot be continued, since the database was away for too long.",
            registry=registry,
        )
        # The library looks a series up under a lock, with its labels made to text: here once for each.
        self.ended = functools.cache(self.requests.labels)
        self.began = functools.cache(self.first_byte.labels)


class Passage:
    """The count of one request, from its arrival to its end."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._arrived_at = perf_counter()
        self.model = ""
        metrics.in_flight.inc()

    def end(self, status: int, first_byte_at: float = 0.0) -> None:
        """Count the request as ended. Call it once; `first_byte_at` is on `perf_counter`'s clock, 0 for none."""
        self._metrics.in_flight.dec()
        # The model is a deployed one or empty: a label that any client could choose would grow without end.
        self._metrics.ended(self._endpoint, self.model, status).inc()
        if first_byte_at:
            self._metrics.began(self._endpoint).observe(first_byte_at - self._arrived_at)
