"""Reports of a trainer, written as rows, events and progress: each line once, however often the server is restarted.

How far the file was read is written in the transaction that writes what was read. Points are held together for a
second, so that a training of quick steps is one small transaction a second; all else is written as it comes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import Sessions, utcnow
from modelyard.finetune import curves
from modelyard.finetune.tables import Finetune, Phase
from modelyard.hardware import GIB
from modelyard.jobs import actions as jobs
from modelyard.jobs import survival
from modelyard.jobs.runner import JobContext
from modelyard.plurals import counted

log = logging.getLogger(__name__)

POINTS_EVERY_S = 1.0
#: The most of the file that one look reads.
READ_BYTES = 1024 * 1024
UNIT_LENGTH = 16
#: Looks at a database that is away, a second apart, before what the trainer said last is given up.
FINISH_TRIES = 20
LEVELS = {"info": "info", "warning": "warning", "error": "error"}

_PHASES = {
    "loading": (Phase.TRAINING, "Loading the model."),
    "tokenizing": (Phase.TRAINING, "Preparing the rows."),
    "training": (Phase.TRAINING, "Training."),
    "evaluating": (Phase.EVALUATING, "Scoring base and adapter on the rows that were held back."),
    "saving": (None, "Writing the adapter."),
}
#: The units of a trainer's progress, in the order in which they come.
_UNITS = ("bytes", "steps", "answers")
_MUST_HAVE: Mapping[str, Mapping[str, type]] = {
    "phase": {"phase": str},
    "note": {"message": str},
    "prepared": {},
    "estimate": {},
    "point": {"step": int},
    "checkpoint": {"step": int, "folder": str},
    "progress": {"done": int, "total": int, "unit": str},
}


class Follower:
    """Reads one attempt's reports from `offset` on. `on_checkpoint` is told of each checkpoint's step and folder.

    `memory_bytes` is the most memory that it has reported.
    """

    def __init__(
        self,
        sessions: Sessions,
        job: JobContext,
        finetune_id: UUID,
        *,
        attempt: int,
        path: Path,
        offset: int,
        on_checkpoint: Callable[[int, Path], None],
    ) -> None:
        self._sessions = sessions
        self._job = job
        self._finetune_id = finetune_id
        self._attempt = attempt
        self._path = path
        self._read_to = offset
        self._on_checkpoint = on_checkpoint
        self._waiting: list[dict[str, Any]] = []
        self._wrote_at = 0.0
        self._said: set[str] = set()
        self.memory_bytes = 0

    async def look(self) -> None:
        """Read what was added, and write down what is due."""
        await self._read()
        now = asyncio.get_running_loop().time()
        urgent = any(report["kind"] not in ("point", "progress") for report in self._waiting)
        if self._waiting and (urgent or now - self._wrote_at >= POINTS_EVERY_S):
            await self._write()

    async def finish(self) -> None:
        """Read to the end and write everything down, within some seconds. For when the trainer is gone."""
        for _ in range(FINISH_TRIES):
            while await self._read():
                await self._write()
            if self._waiting:
                await self._write()
            if not self._waiting:
                return
            await asyncio.sleep(POINTS_EVERY_S)

    async def _read(self) -> bool:
        if len(self._waiting) > 10_000:  # a database that is away: the file keeps the rest
            return False
        lines = await asyncio.to_thread(_whole_lines, self._path, self._read_to)
        self._read_to += len(lines)
        for line in lines.splitlines():
            try:
                report = json.loads(line)
            except (ValueError, RecursionError):
                log.warning("a report of training %s cannot be read: %r", self._finetune_id, line[:200])
                continue
            if _is_sound(report):
                self._waiting.append(report)
                if report["kind"] == "checkpoint":
                    self._on_checkpoint(report["step"], Path(report["folder"]))
        return bool(lines)

    async def _write(self) -> None:
        reports, self._waiting = self._waiting, []
        said = set(self._said)
        self._wrote_at = asyncio.get_running_loop().time()
        try:
            async with self._sessions.begin() as session:
                is_further = await self._write_reports(session, reports)
        except SQLAlchemyError as error:
            # What is late is no reason to end a training: it is tried again with what comes next.
            log.warning("reports of training %s could not be written yet: %s", self._finetune_id, error)
            self._waiting, self._said = reports + self._waiting, said
            return
        if is_further:
            self._job.is_at_risk = False

    async def _write_reports(self, session: AsyncSession, reports: list[dict[str, Any]]) -> bool:
        """Write reports, and that the job survives if it came further than ever before; return whether it did."""
        values: dict[str, Any] = {"followed": {"attempt": self._attempt, "offset": self._read_to}}
        points: list[dict[str, Any]] = []
        progress: dict[str, Any] | None = None
        for report in reports:
            kind = report["kind"]
            if kind == "point":
                if (point := curves.point_of(report)) is not None:
                    points.append(point)
                    self.memory_bytes = max(self.memory_bytes, point.get("memory_bytes", 0))
            elif kind == "progress":
                progress = report
            elif kind in ("prepared", "estimate"):
                facts = {key: value for key, value in report.items() if key != "kind"}
                values[kind] = facts
                message = _prepared(facts) if kind == "prepared" else _expected(facts)
                await jobs.append_event(session, self._job.id, message, data={kind: facts})
            elif kind == "phase":
                phase, message = _PHASES.get(report["phase"], (None, ""))
                if phase is not None:
                    values["phase"] = phase
                # The trainer loads the tokenizer before it reads the rows, and the base after: once is enough to say.
                if message and report["phase"] not in self._said:
                    self._said.add(report["phase"])
                    await self._say_points(session, points)
                    points = []
                    await jobs.append_event(session, self._job.id, message, data={"phase": report["phase"]})
            elif kind == "note":
                level = LEVELS.get(str(report.get("level")).lower(), "info")
                data = report.get("data") if isinstance(report.get("data"), dict) else {}
                await jobs.append_event(session, self._job.id, report["message"], level=level, data=data)
        await self._say_points(session, points)
        if progress is not None:
            unit = progress["unit"][:UNIT_LENGTH]
            await jobs.set_progress(session, self._job.id, progress["done"], progress["total"], unit)
        await session.execute(update(Finetune).where(Finetune.id == self._finetune_id).values(**values))
        job = self._job
        is_further = (
            progress is not None
            and job.is_at_risk
            and _place(progress["unit"], progress["done"]) > _place(job.unit_before, job.done_before)
        )
        if is_further:
            await survival.note_survival(session, [job.id])
        return is_further

    async def _say_points(self, session: AsyncSession, points: list[dict[str, Any]]) -> None:
        if not points:
            return
        await curves.write(session, self._finetune_id, points)
        shown = curves.merged(points)
        last = shown[-1]
        figures = [
            f"{words} {last[name]:.4g}" for name, words in (("loss", "loss"), ("validation_loss", "validation loss"))
            if name in last
        ]  # fmt: skip
        message = f"Step {last['step']}{': ' + ', '.join(figures) if figures else ''}."
        await jobs.append_event(session, self._job.id, message, data={"points": shown})
        if last["step"] > 0:
            first = update(Finetune).where(Finetune.id == self._finetune_id, Finetune.first_step_at.is_(None))
            await session.execute(first.values(first_step_at=utcnow()))


def _place(unit: str | None, done: int) -> tuple[int, int]:
    """Return how far a training is, so that places of different phases compare."""
    return (_UNITS.index(unit) if unit in _UNITS else -1, done)


def _is_sound(report: Any) -> bool:
    """True if a report has what its kind must have; a kind that is not known has not."""
    kind = report.get("kind") if isinstance(report, dict) else None
    wanted = _MUST_HAVE.get(kind) if isinstance(kind, str) else None
    return wanted is not None and all(type(report.get(name)) is what for name, what in wanted.items())


def _prepared(facts: Mapping[str, Any]) -> str:
    counts = (("rows", "to learn from"), ("held_out_rows", "held back"), ("truncated_rows", "truncated"),
              ("left_out_rows", "left out"))  # fmt: skip
    words = [f"{facts[name]} {what}" for name, what in counts if facts.get(name)]
    tokens = f", {counted(facts['tokens'], 'token')}" if facts.get("tokens") else ""
    return f"The rows are prepared: {', '.join(words) or 'none'}{tokens}."


def _expected(facts: Mapping[str, Any]) -> str:
    seconds, memory_bytes = facts.get("seconds"), facts.get("memory_bytes")
    words = [f"{seconds:.0f} s of training"] if isinstance(seconds, int | float) else []
    words += [f"{memory_bytes / GIB:.1f} GiB of memory"] if isinstance(memory_bytes, int | float) else []
    return f"Expected: {', '.join(words) or 'nothing is known'}."


def _whole_lines(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            lines = file.read(READ_BYTES)
    except FileNotFoundError:
        return b""
    end = lines.rfind(b"\n") + 1
    # A line longer than a look is passed over in parts, none of which can be read.
    return lines[:end] if end or len(lines) < READ_BYTES else lines
