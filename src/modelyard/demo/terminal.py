"""The demo's output: steps, commands, and a sign of life every few seconds, on a terminal and without one."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.text import Text

STILL_THERE_EVERY_S = 4.0


class Terminal:
    """Where the demo writes. Wide commands are not folded, so that they can be pasted."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def step(self, text: str) -> None:
        self.console.print(Text(f"\n{text}", style="bold"))

    def command(self, curl: str) -> None:
        self.console.print(Text(f"  $ {curl}", style="cyan"))

    def note(self, text: str, style: str = "") -> None:
        self.console.print(Text(f"  {text}", style=style))

    def piece(self, text: str) -> None:
        """Write a piece of an answer as it arrives."""
        self.console.print(Text(text), end="")

    def failure(self, text: str) -> None:
        self.console.print(Text(f"\nThe demo failed: {text}", style="bold red"))


class Waiting:
    """Shows that something goes on, and for how long: a spinner on a terminal, else a line every few seconds."""

    def __init__(self, terminal: Terminal, what: str) -> None:
        self._terminal = terminal
        self._what = what
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)
        self._status = terminal.console.status(what) if terminal.console.is_terminal else None

    def say(self, what: str) -> None:
        """Change what is being waited for."""
        self._what = what

    def __enter__(self) -> Waiting:
        if self._status is not None:
            self._status.start()
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._status is not None:
            self._status.stop()

    def _tell(self) -> None:
        while not self._ended.wait(0.2 if self._status is not None else STILL_THERE_EVERY_S):
            text = f"{self._what} ... {time.monotonic() - self._started:.0f} s"
            if self._status is not None:
                self._status.update(Text(text))
            else:
                self._terminal.note(text)
