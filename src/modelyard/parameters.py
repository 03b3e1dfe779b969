"""Refusals of parameters that a route does not have, that are given twice, and of ids that are none. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from modelyard import errors

#: Characters of what a client made up.
SHOWN = 100


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def not_an_id(source: str, name: str, value: object) -> errors.Unprocessable:
    """Return the refusal of a value that is no UUID where an id is wanted; `source` is path, query or body."""
    return errors.Unprocessable(
        f"{source} {name}: '{_shown(str(value))}' is not an id: that is a UUID, such as "
        "3f2b8a94-5c1d-4e6f-9a70-b1c2d3e4f506.",
        param=name,
    )


def check_query(given: Iterable[tuple[str, str]], known: Mapping[str, bool]) -> None:
    """Refuse query parameters that are not among the known ones, each with True if it may be given several times.

    Raises:
        Unprocessable: `unknown_parameter` or `repeated_parameter`, naming it.
    """
    seen = set()
    for name, _ in given:
        shown = _shown(name)
        if name not in known:
            there = f"there are {', '.join(known)}" if len(known) > 1 else f"there is {', '.join(known)}"
            there = there if known else "this path takes none"
            raise errors.Unprocessable(
                f"There is no query parameter '{shown}' here; {there}.", param=shown, code="unknown_parameter"
            )
        if name in seen and not known[name]:
            raise errors.Unprocessable(
                f"The query parameter '{shown}' is given more than once: say which value is meant.",
                param=shown,
                code="repeated_parameter",
            )
        seen.add(name)
