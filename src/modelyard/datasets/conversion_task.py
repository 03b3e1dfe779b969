"""The task of a child that converts a file, which crosses from `conversion` to `converter`."""

from __future__ import annotations

from msgspec import Struct


class Conversion(Struct):
    """The task of a child. `scratch` is a folder for what cannot be read as a stream."""

    max_bytes: int
    max_line_bytes: int
    mapping: dict[str, str] | None
    scratch: str
