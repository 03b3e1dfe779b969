"""Parts of the server that the tasks of all deployments share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from modelyard.db import Sessions
from modelyard.deploy.open_requests import OpenRequests
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.processes import Children
from modelyard.settings import Settings


@dataclass(frozen=True)
class Shared:
    """The parts of the server that all deployments use."""

    settings: Settings
    sessions: Sessions
    children: Children
    open_requests: OpenRequests
    tokenizers: TokenizerChildren
    #: Held from the look at free memory until an engine's share is written down.
    sharing_memory: asyncio.Lock
