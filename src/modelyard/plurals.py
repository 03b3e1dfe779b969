"""Counts with their nouns, for messages: 1 row, 2 rows. Imports nothing."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun in the right number, thousands set apart; `plural` where an s does not make it."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
