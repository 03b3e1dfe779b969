"""Why an engine did not start or died, from the end of its log.

vLLM's own last words ('Engine core initialization failed. See root cause above.') say nothing; the cause stands
further up, and `failure_table` knows most of them. A failure that no row knows shows its telling lines as evidence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from modelyard import evidence
from modelyard.engine.failure_table import KILLED_HINT, TABLE
from modelyard.errors import JobFailure
from modelyard.processes import Outcome

#: vLLM's farewells when one of its processes ended without a word of its own.
SILENT = re.compile(
    r"WorkerProc initialization failed due to an exception in a background process"
    r"|Worker proc \S+ died unexpectedly \(exit code: None\)|RuntimeError: Executor failed\."
)
#: What vLLM's logger and its processes put before each line.
PREFIX = re.compile(
    r"^(?:\([\w.: -]+?(?: pid=\d+)?\) )*(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]+\] ?)?"
)
#: Lines that are worth showing: the ends of tracebacks, what a validation says, deaths.
TELLING = re.compile(
    r"^(?:\w+(?:\.\w+)*(?:Error|Exception|Interrupt|Exit|Killed)\b(?!\w|\()"
    r"|Value error, |\S+: error: |Fatal Python error|Segmentation fault|terminate called|Worker proc .* died)"
)
FRAME = re.compile(r'^File "')
NOISE = (
    "Engine core initialization failed",
    "EngineDeadError",
    "See root cause above",
    "See stack trace for root cause",
    "died unexpectedly (exit code: None)",
    "RuntimeError: Executor failed.",
    "validation error for ",
    "For further information visit",
)
#: What pydantic puts after each complaint: the beginning of all that it was given.
TAIL = re.compile(r" \[type=\w+, input_value=.*$")
#: Frames shown with the cause of an unknown failure, each of a line that says where and one that says what.
FRAMES = 3


def explain(log: str, outcome: Outcome | None) -> JobFailure:
    """Return why the engine that wrote this log failed; `outcome` is None if it still ran. Blocks."""
    log = evidence.cut(log)
    for row in TABLE:
        found = row.pattern.search(log) if row.needs in log else None
        if found:
            groups = {
                name: (value or "").strip().removesuffix(".0").replace("torch.", "")
                for name, value in found.groupdict().items()
            }
            lines = log[log.rfind("\n", 0, found.start()) + 1 : (log.find("\n", found.end()) + 1 or len(log) + 1) - 1]
            return JobFailure(
                row.code,
                evidence.redacted(row.message.format(**groups)).strip(),
                evidence.redacted(row.hint.format(**groups)),
                evidence.clipped(_unique([*map(_bare, lines.splitlines()), *telling_lines(log)])),
            )
    shown = evidence.clipped(telling_lines(log, frames=FRAMES))
    line = telling_line(log)
    if outcome is not None and outcome.signal == 9 and not line:
        message = "The engine was killed by SIGKILL, most often by the system because memory ran out."
        return JobFailure("engine_killed", message, KILLED_HINT, shown or _last_words(log))
    if not line and SILENT.search(log):
        message = "A process of the engine ended without a word, most often killed by the system as memory ran out."
        farewells = _unique(_bare(one) for one in log.splitlines() if SILENT.search(one))
        return JobFailure("engine_killed", message, KILLED_HINT, evidence.clipped(farewells))
    ended = f"ended with {outcome.describe()}" if outcome is not None else "did not get ready"
    message = f"The engine {ended}" + (f": {line}" if line else ".")
    hint = "GET /api/v1/jobs/<id>/log has all that it wrote."
    return JobFailure("engine_failed", message, hint, shown or _last_words(log))


def _last_words(log: str) -> tuple[str, ...]:
    """Return the end of a log in which nothing tells: better than nothing."""
    return evidence.clipped(_unique(map(_bare, log.splitlines()[-10:])))


def telling_line(log: str) -> str:
    """Return the line of an unknown failure that says most: the last error that is not vLLM's farewell."""
    found = telling_lines(evidence.cut(log))
    return evidence.redacted(found[-1])[:300] if found else ""


def telling_lines(log: str, frames: int = 0) -> list[str]:
    """Return each line of a log that tells of an error, once, without its prefix; vLLM's farewells are left out.

    With `frames` the last one is led by so many of its traceback's innermost frames.
    """
    found: list[str] = []
    stack: list[str] = []
    where: list[str] = []
    previous = ""
    for text in filter(None, log.splitlines()):
        bare = _bare(text)
        if FRAME.match(bare):
            stack.append(bare)
        elif FRAME.match(previous) and stack:
            stack[-1] += f"\n  {bare}"
        elif TELLING.match(bare):
            if not any(noise in bare for noise in NOISE):
                if bare not in found:
                    where = stack[-frames:] if frames else []
                found.append(bare)
            stack = []
        previous = bare
    lines = _unique(found)
    return [*lines[:-1], *(line for frame in where for line in frame.split("\n")), *lines[-1:]]


def _bare(line: str) -> str:
    return TAIL.sub("", PREFIX.sub("", line.strip(), count=1)).strip()


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, lines)))


def not_started(error: RuntimeError) -> JobFailure:
    """Return the failure of an engine of which not even the process came to be."""
    return JobFailure(
        "engine_not_started",
        f"The engine's process could not be started: {error}.",
        "Look whether the machine has memory and processes left, and deploy again.",
    )
