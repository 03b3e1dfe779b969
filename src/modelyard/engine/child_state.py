"""The state of an engine's process, as far as its supervisor knows it."""

from __future__ import annotations

from enum import StrEnum


class ChildState(StrEnum):
    """The known state of a deployment's engine process."""

    #: There is none.
    NONE = "none"
    #: It runs.
    ALIVE = "alive"
    #: It ended by itself, and its end has not been dealt with.
    ENDED = "ended"
