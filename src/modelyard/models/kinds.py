"""What kinds of models there are. Apart from the table, so that the download child needs no database library."""

from __future__ import annotations

from enum import StrEnum


class Task(StrEnum):
    """What a model is for."""

    #: It continues text.
    GENERATE = "generate"
    #: It turns text into vectors.
    EMBED = "embed"


class Source(StrEnum):
    """Where a model came from."""

    #: Downloaded from the hub.
    HUB = "hub"
    #: Copied from the import directory.
    IMPORT = "import"
    #: Trained by this server.
    TRAINING = "training"
