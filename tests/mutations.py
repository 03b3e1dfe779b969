"""Hypothesis strategies that bend a valid file a little: another value, a lost, doubled or moved part, a bent byte."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

#: What stands where something else belongs, in files that people and attackers have made.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, -4, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "",
    "many", "64", "../../etc/passwd", "/etc/passwd", "\ud800", "\x00", "a" * 300, "hf://a/b", [], [[]], [1, -1], {},
    {"a": {}}, ["\ud800"], [None], [[[[[[]]]]]], {"": 0},
]  # fmt: skip
odd = st.sampled_from(ODD) | st.integers() | st.text(max_size=20) | st.floats()


@st.composite
def bent_values(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """Return a JSON value with up to `most` places bent."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(draw(odd))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        how = draw(st.sampled_from(["odd", "odd", "lost", "nested", "long", "doubled"]))
        if how == "lost":
            del holder[key]
        elif how == "nested":
            deep: Any = holder[key]
            for _ in range(draw(st.sampled_from([1, 70, 500]))):
                deep = [deep]
            holder[key] = deep
        elif how == "long" and isinstance(holder[key], list) and len(holder[key]) < 10:
            holder[key] = holder[key] * draw(st.sampled_from([2, 50]))
        elif how == "doubled" and isinstance(holder, list):
            # Not a copy: one of two nestings would be deeper than a copy goes. Whoever bends one bends both.
            holder.insert(key, holder[key])
        else:
            holder[key] = copy.deepcopy(draw(odd))
    return value


@st.composite
def bent_json(draw: st.DrawFn, value: Any) -> bytes:
    """Return the bytes of a bent JSON value, of which at times some are bent as well."""
    content = json.dumps(draw(bent_values(value))).encode()
    return draw(bent_bytes(content)) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def bent_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a file's bytes, cut, with others in their place, or with a part twice."""
    at = draw(st.integers(0, len(content)))
    piece = draw(st.binary(max_size=8) | st.sampled_from([b"9" * 5000, b"[" * 5000, b'"', b"\\ud800", b"NaN", b","]))
    how = draw(st.sampled_from(["cut", "in", "over", "twice"]))
    if how == "cut":
        return content[:at]
    if how == "twice":
        return content[:at] + content[max(0, at - 40) : at] + content[at:]
    return content[:at] + piece + content[at + (len(piece) if how == "over" else 0) :]


def _places(value: Any) -> Any:
    """Yield every holder and key of a JSON value."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        pairs = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, item in pairs:
            yield one, key
            waiting.append(item)
