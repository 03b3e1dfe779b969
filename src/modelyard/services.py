"""The services that routes share: made once, when the application starts, and kept in `app.state.services`.

Routes of a room get theirs by way of `http.services_of`, with its type; rooms know this module by type alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from modelyard.datasets.intake import Uploads
from modelyard.db import Sessions
from modelyard.finetune.errands import Errands
from modelyard.gateway.raw import RawLane
from modelyard.gateway.relay import Gateway
from modelyard.health.checks import Checks
from modelyard.jobs.runner import JobRunner
from modelyard.models.lost import Backups
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.routing.router import Routing
from modelyard.settings import Settings
from modelyard.storage import Storage


@dataclass(frozen=True)
class Services:
    """The services of one running server."""

    settings: Settings
    sessions: Sessions
    storage: Storage
    runner: JobRunner
    tokenizers: TokenizerChildren
    #: Trained adapters, kept in the storage.
    backups: Backups
    #: Places for datasets that are being uploaded.
    uploads: Uploads
    routing: Routing
    gateway: Gateway
    raw_lane: RawLane
    #: Plans and merges.
    errands: Errands
    checks: Checks
    registry: CollectorRegistry
    #: Why the server itself is not ready, in sentences.
    complaints: Callable[[], Sequence[str]]

    def hang_up(self) -> None:
        """End what clients follow without end: the server stops. Safe to repeat."""
        self.runner.feeds.end()
        self.errands.end()
