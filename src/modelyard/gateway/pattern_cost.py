"""The cost of a regular expression or a grammar for an engine that compiles it, in milliseconds of one processor.

Measured with xgrammar 0.2 and a vocabulary of 49,000 tokens: each repeat is a state, and each state is held against the
whole vocabulary. A state that takes any character costs the most. Repeats within repeats multiply. Where parts of
varying length follow one another with nothing between, as in `(.{0,8}){0,8}` and `.?.?.?`, the same text can be read in
many ways, and they cost many times more. An estimate, rather too high than too low; it takes one pass and judges no
syntax.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: More repeats of one thing cost no more than so many: they are compiled another way.
COUNTED_REPEATS = 200
#: A state that takes any character, those of a class such as `[a-z]`, a few, or one.
ANY_MS, CLASS_MS, FEW_MS, ONE_MS = 7.0, 1.3, 0.1, 0.01
#: What parts of varying length in a run take more: so much for each part, and for each state, whichever is less.
LOOSE_PARTS, LOOSE_STATES = 2.5, 0.25
#: What an endless repeat of parts that vary takes more.
ENDLESS = 5.0

_ESCAPES = dict.fromkeys("DWSpP", ANY_MS) | {"w": CLASS_MS, "d": FEW_MS, "s": FEW_MS}
_QUANTIFIER = re.compile(r"\{(\d*)(,?)(\d*)\}")
#: Classes of so many characters cost as few, and of more than so many as any.
FEW_CHARACTERS, MANY_CHARACTERS = 24, 70
# Nothing is tried twice: a brace and many spaces would take their number to the third power.
_GRAMMAR_REPEATS = re.compile(r"\{\s*+(\d*+)\s*+,?+\s*+(\d*+)\s*+\}|~\s*+(\d++)(?:\.\.(\d++))?")


@dataclass
class _Part:
    """A group, or one atom: its cost and states, how many parts in it vary, and whether a character separates it."""

    ms: float = 0.0
    states: int = 1
    varying: int = 0
    separates: bool = False

    @property
    def loose_ms(self) -> float:
        """Its cost where more than one part of it varies with nothing between."""
        if self.varying < 2:
            return self.ms
        return self.ms * max(1.0, min(LOOSE_PARTS * self.varying, LOOSE_STATES * self.states))


class _Group:
    """An open group: its parts so far, of which the run of those that vary is counted at its end."""

    def __init__(self) -> None:
        self._ms = 0.0
        self._states = 0
        self._varying = 0
        self._run = _Part(states=0)
        self._separates = False
        self._branches: list[bool] = []

    def add(self, part: _Part | None) -> None:
        """Take a part into the present branch."""
        if part is None:
            return
        if part.separates:
            self._end_run()
            self._ms += part.loose_ms
            self._separates = True
        else:
            self._run.ms += part.ms
            self._run.varying += part.varying
            self._run.states += part.states
        self._states += part.states

    def next_branch(self) -> None:
        """Begin another branch."""
        self._end_run()
        self._branches.append(self._separates)
        self._separates = False

    def closed(self) -> _Part:
        """Return the group as a part."""
        if not self._branches and not self._ms:  # one run, which may go on beside it
            return _Part(self._run.ms, self._states, self._run.varying, self._separates)
        self.next_branch()
        separates = all(self._branches)
        # Branches may be of different lengths.
        varying = max(self._varying, len(self._branches) > 1)
        return _Part(self._ms, self._states, 0 if separates else varying, separates)

    def _end_run(self) -> None:
        self._ms += self._run.loose_ms
        self._varying += self._run.varying
        self._run = _Part(states=0)


def pattern_ms(pattern: str) -> float:
    """Return what a regular expression costs."""
    groups = [_Group()]
    last: _Part | None = None
    at, end = 0, len(pattern)
    while at < end:
        char = pattern[at]
        if char == "{" and last is not None and (found := _QUANTIFIER.match(pattern, at)):
            least, most = _number(found[1]), _number(found[3])
            last = _repeated(last, max(least, most), least, varies=bool(found[2]) and least != most)
            at = found.end()
            continue
        if char in "*+?" and last is not None:
            is_endless = char != "?" and last.varying and not last.separates
            # `.*` twice is `.*` once.
            varying = last.varying if char == "*" or last.separates else max(last.varying, 1)
            last = _Part(last.ms * (ENDLESS if is_endless else 1), last.states, varying, last.separates and char == "+")
            at += 1
            continue
        groups[-1].add(last)
        last = None
        if char == "(":
            groups.append(_Group())
            at += 1
            if pattern.startswith("?", at):  # what kind of group it is
                at += 2
        elif char == ")":
            last = _closed(groups)
            at += 1
        elif char == "|":
            groups[-1].next_branch()
            at += 1
        else:
            last, at = _atom(pattern, at)
    groups[-1].add(last)
    while len(groups) > 1:
        groups[-2].add(_closed(groups))
    return groups[0].closed().loose_ms


def grammar_ms(text: str) -> float:
    """Return what a grammar costs: of it only the repeats are counted, as if each took any character."""
    found = (max(map(_number, one.groups())) for one in _GRAMMAR_REPEATS.finditer(text))
    return ANY_MS * sum(min(times, COUNTED_REPEATS) for times in found)


def _repeated(part: _Part, most: int, least: int, *, varies: bool) -> _Part:
    times = min(max(most, 1), COUNTED_REPEATS)
    separates = part.separates and least > 0
    varying = 0 if part.separates else max(part.varying * times, varies)
    return _Part(part.ms * times, part.states * times, varying, separates)


def _closed(groups: list[_Group]) -> _Part:
    if len(groups) == 1:
        return _Part(ONE_MS)  # closed and never opened: the engine refuses it
    return groups.pop().closed()


def _atom(pattern: str, at: int) -> tuple[_Part, int]:
    """Return what one character, class or escape costs, and where it ends."""
    char = pattern[at]
    if char == "\\":
        kind = pattern[at + 1 : at + 2]
        # A property's name stands in braces, as do some code points: no numbers of repeats.
        braced = kind in ("p", "P", "u", "x") and pattern[at + 2 : at + 3] == "{"
        closed = pattern.find("}", at + 2) if braced else -1
        ms = _ESCAPES.get(kind, ONE_MS)
        return _Part(ms, separates=ms == ONE_MS), closed + 1 if closed >= 0 else at + 2
    if char == "[":
        end = _end_of_class(pattern, at)
        return _Part(_class_ms(pattern[at + 1 : end - 1])), end
    if char == ".":
        return _Part(ANY_MS), at + 1
    if char in "^$":
        return _Part(states=0), at + 1
    return _Part(ONE_MS, separates=True), at + 1


def _class_ms(inside: str) -> float:
    if inside[:1] == "^" or any(kind in inside for kind in ("\\D", "\\W", "\\S", "\\p", "\\P", "\\u", "\\x")):
        return ANY_MS
    characters = 63 * inside.count("\\w") + len(inside)
    for dash in re.finditer(r"(?<=.)-(?=.)", inside, re.DOTALL):
        characters += max(0, ord(inside[dash.end()]) - ord(inside[dash.start() - 1]))
        if characters > MANY_CHARACTERS:
            return ANY_MS
    return FEW_MS if characters <= FEW_CHARACTERS else CLASS_MS


def _end_of_class(pattern: str, at: int) -> int:
    at += 1
    if pattern[at : at + 1] == "^":
        at += 1
    if pattern[at : at + 1] == "]":
        at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1


def _number(digits: str | None) -> int:
    return 0 if not digits else int(digits) if len(digits) < 10 else COUNTED_REPEATS
