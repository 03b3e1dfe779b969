"""Watchdog of a model's own code in the trainer: its tokenizer, which is native code, and its chat template.

Both come with the model, and may stall at one row of a dataset although they passed the trial before the start
(`tokenizer_trial`): a normaliser that doubles a rare character, a loop in a template. What does not return within its
time, or takes memory without end, cannot be stopped inside a process: the failure is written down with the line, and
the process ends.

The thread can watch because the library lets others run while it works on a batch (`encode_batch`, `decode_batch`; not
in `encode` and `decode`). Where something holds the interpreter all the same, faulthandler ends the process, without
a result but with the place in its log.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from modelyard.errors import JobFailure
from modelyard.trainer import memory

MIB = 1024**2
#: Silence after which a text counts as stalled, and what more each so many characters may take.
SILENCE_S = 60.0
CHARACTERS_PER_S = 100_000
#: Memory that a batch may take beside what its characters account for.
GROWTH_BYTES = 1024 * MIB
BYTES_PER_CHARACTER = 400
POLL_S = 0.25
#: Time that one row of a stalled batch has to show that it is not the cause.
ROW_S = 5.0

TOKENIZER = "tokenizer"
TEMPLATE = "chat template"

#: Texts of one place: the words for where they come from, and the texts.
Place = tuple[str, Sequence[str]]


@dataclass(frozen=True)
class _Work:
    what: str
    places: Sequence[Place]
    try_again: Callable[[str], object] | None
    since: float

    @property
    def characters(self) -> int:
        return sum(len(text) for _, texts in self.places for text in texts)


class StallWatch:
    """Watches what is done inside `tokenizing`, `decoding` and `rendering`; one at a time, from one thread.

    `give_up` is told the failure, in another thread; the trainer's (`results.leave`) does not return.
    """

    def __init__(self, model_id: str, give_up: Callable[[JobFailure], object], silence_s: float = SILENCE_S) -> None:
        self._model_id = model_id
        self._give_up = give_up
        self._silence_s = silence_s
        self._work: _Work | None = None
        self._has_thread = False

    @contextmanager
    def tokenizing(self, places: Sequence[Place], encode: Callable[[str], object]) -> Iterator[None]:
        """Watch texts that are tokenised together; `encode` does so with one of them, to find which one stalls."""
        with self._watched(_Work(TOKENIZER, places, encode, time.monotonic())):
            yield

    @contextmanager
    def decoding(self, place: str) -> Iterator[None]:
        """Watch tokens that become a text again."""
        with self._watched(_Work(TOKENIZER, [(place, ())], None, time.monotonic())):
            yield

    @contextmanager
    def rendering(self, place: str) -> Iterator[None]:
        """Watch the chat template at one row."""
        with self._watched(_Work(TEMPLATE, [(place, ())], None, time.monotonic())):
            yield

    @contextmanager
    def _watched(self, work: _Work) -> Iterator[None]:
        outer, self._work = self._work, work
        if not self._has_thread:
            self._has_thread = True
            threading.Thread(target=self._watch, name="stall watch", daemon=True).start()
        try:
            yield
        finally:
            self._work = outer

    def _watch(self) -> None:
        seen: _Work | None = None
        resident_bytes = before_bytes = memory.resident_bytes()
        while True:
            time.sleep(POLL_S)
            work = self._work
            # Memory is looked at here alone: a look for each row would take a tenth of what short rows take.
            last_bytes, resident_bytes = resident_bytes, memory.resident_bytes()
            if work is not seen:
                seen, before_bytes = work, last_bytes
            if work is None:
                faulthandler.cancel_dump_traceback_later()
                continue
            with suppress(OSError, ValueError, RuntimeError, AttributeError):
                faulthandler.dump_traceback_later(2 * self._patience_s(work), exit=True, file=2)
            reason = self._stalled(work, resident_bytes - before_bytes)
            if reason is not None and self._work is work:
                faulthandler.cancel_dump_traceback_later()
                self._give_up(self._failure(work, reason))
                return

    def _patience_s(self, work: _Work) -> float:
        return self._silence_s + work.characters / CHARACTERS_PER_S

    def _stalled(self, work: _Work, grown: int) -> str | None:
        """Return what is wrong with the work that goes on, in words; None: nothing. `grown` is memory in bytes."""
        patience_s = self._patience_s(work)
        if time.monotonic() - work.since > patience_s:
            return f"did not go on within {self._silence_s:g} s"
        if grown > GROWTH_BYTES + BYTES_PER_CHARACTER * work.characters:
            return f"took {grown / MIB:.0f} MiB of memory, and more,"
        return None

    def _failure(self, work: _Work, reason: str) -> JobFailure:
        place = _culprit(work)
        return JobFailure(
            f"{work.what.split()[-1]}_stalled",
            f"The {work.what} of {self._model_id} {reason} at {place}.",
            f"Leave that row out. If its text is an ordinary one, the model's {work.what} is damaged or made to "
            "deceive: tell the model's authors, or try another revision.",
        )


def _culprit(work: _Work) -> str:
    """Return the words for the place that stalls: of several, the first whose texts do not come back by themselves."""
    if len(work.places) == 1 or work.try_again is None:
        return work.places[0][0]
    # The library's own threads are those that hang: whatever follows is done by the thread that asks.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with suppress(RuntimeError, MemoryError):
        for place, texts in work.places:
            done = threading.Event()
            threading.Thread(target=_try, args=(work.try_again, texts, done), daemon=True).start()
            if not done.wait(ROW_S + sum(map(len, texts)) / CHARACTERS_PER_S):
                return place
    return f"a row from {work.places[0][0]} to {work.places[-1][0]}"


def _try(encode: Callable[[str], object], texts: Sequence[str], done: threading.Event) -> None:
    try:
        for text in texts:
            encode(text)
    finally:
        done.set()
