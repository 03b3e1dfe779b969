"""The one result of a trainer: a file that is moved into its place when it is whole (`spec` says what is in it)."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any, NoReturn

from modelyard.errors import JobFailure
from modelyard.trainer import memory, ranks
from modelyard.trainer.reports import finite
from modelyard.trainer.spec import Spec

log = logging.getLogger(__name__)


def write_result(spec: Spec, result: dict[str, Any]) -> None:
    """Put the result in its place when it is whole. Of several processes that failed the first one tells why."""
    if ranks.count() > 1 and os.path.exists(spec.result):
        return
    beside = f"{spec.result}.{os.getpid()}.new"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(finite(result), file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, spec.result)


def failed(failure: JobFailure) -> dict[str, Any]:
    """Return the result of a trainer that failed."""
    evidence = list(failure.evidence)
    return {
        "failure": {"code": failure.code, "message": failure.message, "hint": failure.hint, "evidence": evidence},
    }  # fmt: skip


def leave(spec: Spec, failure: JobFailure) -> NoReturn:
    """Write a failure down and end this process at once, from whichever thread."""
    memory.let_go()
    log.error("failed: %s", failure.message)
    write_result(spec, failed(failure))
    sys.stderr.flush()
    os._exit(1)
