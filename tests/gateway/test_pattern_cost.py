"""What a schema costs an engine, by our estimate beside what was measured; none that is accepted takes more than 5 s.

Measured were seconds of one processor (AVX2) with xgrammar 0.2 and a vocabulary of 49,152 tokens, one thread.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from modelyard.errors import BadRequest
from modelyard.gateway.limits import DEFAULT_LIMITS
from modelyard.gateway.pattern_cost import (
    ANY_MS,
    CLASS_MS,
    ENDLESS,
    FEW_MS,
    LOOSE_PARTS,
    LOOSE_STATES,
    ONE_MS,
    grammar_ms,
    pattern_ms,
)
from modelyard.gateway.schema_cost import Cost
from tests.gateway.test_limits import Json, wide

#: What an engine may be made to work for one schema, in seconds.
BEARABLE_S = 5.0
A_MINUTE_S = 60.0


def optional(count: int, **more: Any) -> Json:
    return {**wide(count), "required": [], **more}


def pattern(text: str) -> Json:
    return {"type": "string", "pattern": text}


#: Schemas and the seconds that they took; a minute stands for those that were ended.
MEASURED: list[tuple[Json, float]] = [
    (wide(1000), 0.08),
    (optional(500), 0.62),
    (optional(700), 1.33),
    (optional(1000), 3.16),
    ({"anyOf": [optional(700), optional(701)]}, 3.40),
    (optional(100, additionalProperties={"type": "string"}), 0.65),
    (optional(200, additionalProperties={"type": "string"}), 1.32),
    (optional(300, additionalProperties=True), 2.04),
    ({**wide(300), "additionalProperties": {"type": "string"}}, 1.90),
    ({**wide(1000), "additionalProperties": {"type": "string"}}, A_MINUTE_S),
    (wide(1, maxLength=20), 0.13),
    (wide(1, maxLength=100), 0.74),
    (wide(1, maxLength=200), 1.39),
    (wide(1, maxLength=500), 1.44),
    (wide(100, maxLength=500), 1.44),
    ({"anyOf": [{"maxLength": 100}, {"maxLength": 101}]}, 1.54),
    ({"anyOf": [{"maxLength": 249 + number} for number in range(8)]}, 11.43),
    ({"type": "array", "minItems": 50, "maxItems": 100, "items": {"type": "string", "maxLength": 100}}, 0.74),
    (pattern("^.{0,128}$"), 0.55),
    (wide(100, pattern="^.{0,20}$"), 7.77),
    (pattern("^[^x]{0,128}$"), 0.62),
    (pattern("^[ -~]{0,120}$"), 0.50),
    (pattern(r"^\w{0,128}$"), 0.16),
    (pattern("^[a-z]{0,128}$"), 0.11),
    (pattern(f"^{'.' * 500}$"), 1.78),
    (pattern(f"^{'[a-z]' * 400}$"), 0.29),
    (pattern("^(.{16}){16}$"), 0.92),
    (pattern("^(.{0,6}){0,6}$"), 1.58),
    (pattern("^(.{0,8}){0,8}$"), 6.59),
    (pattern("^(.{0,10}){0,10}$"), A_MINUTE_S),
    (pattern("^(.{0,128}){0,2}$"), 3.45),
    (pattern("^(.{0,64}){0,4}$"), 11.38),
    (pattern("^([a-z]{0,8}){0,8}$"), 1.10),
    (pattern(f"^{'.{0,2}' * 16}$"), 1.42),
    (pattern(f"^{'.{0,9}' * 8}$"), A_MINUTE_S),
    (pattern(f"^{'.{0,40}' * 4}$"), A_MINUTE_S),
    (pattern("^((.{0,4}){0,4}){0,4}$"), A_MINUTE_S),
    (pattern("^(.|..|...){0,16}$"), 2.55),
    (pattern("^(ab.){0,60}$"), 0.02),
    (pattern(f"^{'[a-z]*[0-9]*' * 60}$"), 0.02),
    ({"const": "abc def " * 50_000}, 2.74),
    ({"enum": [f"{number:04d}{'value of a choice that is rather long ' * 3}" for number in range(4096)]}, 4.12),
    (pattern("^([a-z]{0,12}){0,12}$"), A_MINUTE_S),
    (pattern("^([a-z]{0,16}){0,16}$"), A_MINUTE_S),
    (pattern("^(.{0,100})*$"), 3.26),
    (pattern("^(.{0,10})*$"), 0.27),
    (pattern(f"^{'.?' * 16}$"), 0.22),
    (pattern(f"^{'.?' * 24}$"), 0.65),
    (pattern(f"^{'.?' * 60}$"), A_MINUTE_S),
    (pattern("^([a-z]{0,40}){0,40}$"), A_MINUTE_S),
    (pattern(r"^[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63}){0,8}$"), 0.70),
    (pattern(r"^(\w{1,20} ){0,10}$"), 0.32),
    (wide(20, pattern="^([0-9a-f]{2}:){5}[0-9a-f]{2}$"), 0.01),
    (wide(100, pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}$"), 0.02),
    ({"enum": [f"{number} value of a choice that is rather long as choices go" for number in range(4096)]}, 1.33),
]


def is_accepted(schema: Json) -> bool:
    try:
        Cost(DEFAULT_LIMITS.schemas).add("response_format", json.dumps(schema).encode())
    except BadRequest:
        return False
    return True


@pytest.mark.parametrize("schema", [schema for schema, seconds in MEASURED if seconds > 1.1 * BEARABLE_S])
def test_a_schema_that_took_long_is_refused(schema: Json) -> None:
    assert not is_accepted(schema)


@pytest.mark.parametrize(("schema", "seconds"), [each for each in MEASURED if each[1] < 0.8])
def test_a_schema_that_took_little_is_accepted(schema: Json, seconds: float) -> None:
    assert is_accepted(schema)


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("", 0), ("^$", 0), ("abc", 3 * ONE_MS), ("a+b*c?", 3 * ONE_MS), (".", ANY_MS), (".*", ANY_MS),
        ("[a-z]", CLASS_MS), ("[0-9]", FEW_MS), ("[0-9a-f]", FEW_MS), ("[^0-9]", ANY_MS), ("[ -~]", ANY_MS),
        ("[a-zA-Z0-9_]", CLASS_MS), (r"[\w-]", CLASS_MS), (r"[\W]", ANY_MS), (r"[\]]", FEW_MS), ("[]a]", FEW_MS),
        (r"\d{4}", 4 * FEW_MS), (r"\w{4}", 4 * CLASS_MS), (r"\S{3,}", 3 * ANY_MS), (r"\{9}", 4 * ONE_MS - ONE_MS),
        (r"\p{L}{3}", 3 * ANY_MS), (".{0,5000}", 200 * ANY_MS), (".{0," + "9" * 5000 + "}", 200 * ANY_MS),
        (".{,7}", 7 * ANY_MS), ("(ab){5}", 10 * ONE_MS), ("(a|.{2}){3}", 3 * (ONE_MS + 2 * ANY_MS) * 9 * LOOSE_STATES),
        ("(?:.{4}){5}", 20 * ANY_MS), ("(.{0,4}){5}", 20 * ANY_MS * 20 * LOOSE_STATES),
        (".{0,4}.{0,4}", 8 * ANY_MS * 8 * LOOSE_STATES),
        (".{0,9}(x)?" * 4, 36 * ANY_MS * min(4 * LOOSE_PARTS, 40 * LOOSE_STATES)),
        (".{0,99}.{0,99}", 198 * ANY_MS * 2 * LOOSE_PARTS), ("(.{0,4},){5}", 20 * ANY_MS + 5 * ONE_MS),
        (".?" * 10, 10 * ANY_MS * 10 * LOOSE_STATES), (".?," * 10, 10 * (ANY_MS + ONE_MS)), (".*" * 9, 9 * ANY_MS),
        ("(.{0,9})*", ENDLESS * 9 * ANY_MS), ("((.{0,2}){3}){4}", 24 * ANY_MS * 24 * LOOSE_STATES),
        ("(.{2}", 2 * ANY_MS), (".{2})", 2 * ANY_MS + ONE_MS), ("[", FEW_MS), ("\\", ONE_MS),
    ],
)  # fmt: skip
def test_a_pattern_costs_by_its_states(text: str, ms: float) -> None:
    assert pattern_ms(text) == pytest.approx(ms, rel=0.01, abs=0.011)


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ('root ::= [a-z]{0,20} "x"', 20), ('root ::= "x"{3} [0-9]{1,4}', 7), ("start: /[a-z]/ ~ 0..400", 200),
        ("root ::= [^b]{0,1900}", 200), ('root ::= "a" | "b"', 0),
    ],
)  # fmt: skip
def test_a_grammar_costs_by_its_repeats(text: str, times: int) -> None:
    assert grammar_ms(text) == pytest.approx(ANY_MS * times)


@pytest.mark.parametrize(
    "part", ["(", ")", "[", "[a-", "[^", "{", "{1", "a{9}", "\\", "\\p{", "(a{2}", "|", "]", ".*", "~ 1", "~", " "]
)
def test_the_cost_is_counted_in_one_pass(part: str) -> None:
    began = time.process_time()
    pattern_ms(part * (8192 // len(part)))
    grammar_ms("{" + part * (200_000 // len(part)))
    assert time.process_time() - began < 2.0
