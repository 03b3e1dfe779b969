"""What one request may ask of an engine that all share: refused with the field, the bound and its setting."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from modelyard.errors import BadRequest
from modelyard.gateway.envelope import parse
from modelyard.gateway.limits import ALWAYS_TOKENISED, DEFAULT_LIMITS, Limits
from modelyard.gateway.schema_cost import OBJECT_PROPERTIES
from modelyard.settings import Settings
from tests.gateway.conftest import Running
from tests.gateway.test_relay import ask, error_of

MESSAGES = [{"role": "user", "content": "Hi"}]
Json = dict[str, Any]


def check(limits: Limits = DEFAULT_LIMITS, **fields: Any) -> None:
    limits.check(parse(json.dumps({"model": "a", **fields}).encode()))


def wide(count: int, **field: Any) -> Json:
    names = [f"p{number}" for number in range(count)]
    return {"type": "object", "properties": {name: {"type": "string", **field} for name in names}, "required": names}


def deep(levels: int) -> Json:
    schema: Json = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


#: A form of words for every place at which a request may hold a schema, and the field that an error names.
PLACES: list[tuple[str, Any]] = [
    ("response_format", lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}),
    ("response_format", lambda schema: {"type": "structural_tag", "structures": [{"begin": "<a>", "schema": schema}]}),
    ("structured_outputs", lambda schema: {"json": schema}),
    ("structured_outputs", lambda schema: {"json": json.dumps(schema)}),
    ("structured_outputs", lambda schema: {"structural_tag": json.dumps({"structures": [{"schema": schema}]})}),
    ("text", lambda schema: {"format": {"type": "json_schema", "schema": schema}}),
    ("output_config", lambda schema: {"format": {"type": "json_schema", "schema": schema}}),
    ("tools", lambda schema: [{"type": "function", "function": {"name": "f", "parameters": schema}}]),
    ("tools", lambda schema: [{"type": "function", "name": "f", "parameters": schema}]),
    ("tools", lambda schema: [{"name": "f", "input_schema": schema}]),
    ("functions", lambda schema: [{"name": "f", "parameters": schema}]),
    ("guided_json", lambda schema: schema),
    ("guided_json", lambda schema: json.dumps(schema)),
]


@pytest.mark.parametrize("place", range(len(PLACES)))
@pytest.mark.parametrize(
    ("schema", "setting"),
    [
        (wide(100, pattern="^[a-z]{0,500}$"), "SCHEMA_MS"),
        (wide(20, pattern="^.{0,5000}$"), "SCHEMA_MS"),
        ({"patternProperties": {f"^[^{char}]{{0,300}}$": {} for char in "bcdefghijk"}}, "SCHEMA_MS"),
        ({"anyOf": [{"type": "string", "maxLength": 300 + number} for number in range(10)]}, "SCHEMA_MS"),
        ({"type": "string", "pattern": "((a{0,50}){0,50}){0,50}"}, "SCHEMA_MS"),
        ({"$defs": {"pattern": {"pattern": "[^a]{0,99}" * 30}}}, "SCHEMA_MS"),
        (wide(1, pattern="^(.{0,16}){0,16}$"), "SCHEMA_MS"),
        ({**wide(900), "additionalProperties": True}, "SCHEMA_MS"),
        ({"items": {"anyOf": [{**wide(800 + number), "required": []} for number in range(3)]}}, "SCHEMA_MS"),
        ({"type": "string", "pattern": "a" * 10_000}, "PATTERN_LENGTH"),
        ({"anyOf": [wide(999)] * 6}, "SCHEMA_PROPERTIES"),
        ({"enum": [f"v{number}" for number in range(5000)]}, "CHOICES"),
        ({"items": {"enum": list(range(3000))}, "contains": {"enum": list(range(3000))}}, "CHOICES"),
        ({"description": "x" * (600 << 10)}, "SCHEMA_KIB"),
    ],
)
def test_a_schema_that_costs_too_much_is_refused_wherever_it_stands(place: int, schema: Json, setting: str) -> None:
    name, put = PLACES[place]
    with pytest.raises(BadRequest, match=rf"MODELYARD_REQUEST_MAX_{setting}\)") as caught:
        check(messages=MESSAGES, **{name: put(schema)})
    assert (caught.value.param, caught.value.status) == (name, 400)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("schema", [wide(1001), {"items": wide(OBJECT_PROPERTIES + 1)}])
def test_an_object_of_too_many_properties_is_refused(schema: Json) -> None:
    for name, put in PLACES:
        with pytest.raises(BadRequest, match="1000 are allowed in one"):
            check(**{name: put(schema)})


def test_a_schema_of_too_many_levels_is_refused() -> None:
    for name, put in PLACES:
        if name not in ("tools", "functions"):  # of tools without patterns the engine counts the levels
            with pytest.raises(BadRequest, match="SCHEMA_DEPTH"):
                check(**{name: put(deep(100))})
    check(response_format=PLACES[0][1](deep(40)))


@pytest.mark.parametrize(
    ("fields", "param", "setting"),
    [
        ({"n": 16384}, "n", "N"),
        ({"n": 10**30}, "n", "N"),
        ({"best_of": 129}, "best_of", "N"),
        ({"prompt": ["a"] * 100, "n": 21}, "n", "PROMPTS"),
        ({"prompt": ["a"] * 2049}, "prompt", "PROMPTS"),
        ({"prompt": [[1, 2]] * 2049}, "prompt", "PROMPTS"),
        ({"input": ["a, b"] * 2049}, "input", "PROMPTS"),
        ({"input": [[1]] * 2049}, "input", "PROMPTS"),
        ({"stop": [",:"] * 65}, "stop", "STOPS"),
        ({"stop_sequences": ["a"] * 65}, "stop_sequences", "STOPS"),
        ({"bad_words": ["a"] * 65}, "bad_words", "STOPS"),
        ({"tools": [{"name": "f"}] * 513}, "tools", "TOOLS"),
        ({"logit_bias": {str(number): 1 for number in range(1025)}}, "logit_bias", "LOGIT_BIASES"),
        ({"structured_outputs": {"choice": [f"c{number}" for number in range(5000)]}}, "structured_outputs", "CHOICES"),
        ({"guided_choice": [f"c{number}" for number in range(5000)]}, "guided_choice", "CHOICES"),
        ({"structured_outputs": {"regex": "[a-z]{0,400}" * 9}}, "structured_outputs", "SCHEMA_MS"),
        ({"structured_outputs": {"regex": "a" * 9000}}, "structured_outputs", "PATTERN_LENGTH"),
        ({"guided_regex": "[a-z]{0,400}" * 9}, "guided_regex", "SCHEMA_MS"),
        (
            {"structured_outputs": {"grammar": "r ::= " + "[a-z]{0,400} " * 9}},
            "structured_outputs",
            "SCHEMA_MS",
        ),
        ({"guided_grammar": "start: " + "/[a-z]/ ~ 0..400 " * 9}, "guided_grammar", "SCHEMA_MS"),
    ],
)
def test_a_request_for_too_much_is_refused(fields: Json, param: str, setting: str) -> None:
    with pytest.raises(BadRequest, match=rf"MODELYARD_REQUEST_MAX_{setting}\)") as caught:
        check(**fields)
    assert caught.value.param == param
    assert f"'{param}'" in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 128, "prompt": "a"},
        {"n": None, "prompt": None, "tools": None, "stop": None, "response_format": None, "logit_bias": None},
        {"prompt": ["a"] * 2048},
        {"prompt": list(range(100_000))},
        {"input": list(range(100_000))},
        {"input": [{"role": "user", "content": "Hi"}] * 5000},
        {"stop": ", ".join("abc" * 100)},
        {"stop": [","] * 64},
        {"logit_bias": {str(number): -100 for number in range(1024)}},
        {"allowed_token_ids": list(range(200_000))},
        {"tools": [{"function": {"name": "f", "description": "d" * 900, "parameters": wide(8)}}] * 120},
        {"response_format": PLACES[0][1](wide(200, maxLength=255, description="{0,999}" * 20))},
        {"response_format": PLACES[0][1](wide(100, maxLength=500, additionalProperties=False))},
        {"response_format": PLACES[0][1]({**wide(100), "additionalProperties": False})},
        {"response_format": PLACES[0][1]({**wide(100), "required": [], "additionalProperties": True})},
        {"tools": [{"function": {"parameters": {**wide(8), "additionalProperties": False}}}] * 120},
        {"response_format": PLACES[0][1](wide(60, pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}$"))},
        {"response_format": PLACES[0][1](wide(1, default={"pattern": "a{0,999}" * 99, "enum": list(range(9999))}))},
        {"structured_outputs": {"choice": [f"label {number}" for number in range(1000)]}},
        {"structured_outputs": {"json": "no JSON"}},
        {"structured_outputs": 5, "tools": 7, "response_format": "text", "stop": 1, "logit_bias": [], "n": "many"},
        {"text": "a title, not a format"},
    ],
)
def test_what_clients_usually_send_passes_and_what_is_no_request_is_left_to_the_engine(fields: Json) -> None:
    check(**fields)


def test_each_bound_is_a_setting() -> None:
    small = Settings(
        _env_file=None, request_max_n=2, request_max_prompts=2, request_max_stops=1, request_max_tools=1,
        request_max_logit_biases=1, request_max_choices=1, request_max_schema_kib=1, request_max_schema_depth=4,
        request_max_schema_properties=1, request_max_schema_ms=1, request_max_pattern_length=1,
    )  # fmt: skip
    broken: list[Json] = [
        {"n": 3}, {"prompt": ["a"] * 3}, {"stop": ["a", "b"]}, {"tools": [{}, {}]}, {"logit_bias": {"1": 1, "2": 2}},
        {"structured_outputs": {"choice": ["a", "b"]}}, {"structured_outputs": {"x": "y" * 2000}},
        {"structured_outputs": {"json": deep(5)}}, {"structured_outputs": {"json": wide(2)}},
        {"structured_outputs": {"regex": "aa"}}, {"structured_outputs": {"json": {"maxLength": 2}}},
    ]  # fmt: skip
    for fields in broken:
        check(**fields)
        with pytest.raises(BadRequest, match="MODELYARD_REQUEST_MAX_"):
            check(Limits.of(small), **fields)


def test_large_fields_are_refused_quickly() -> None:
    bodies = [
        {"logit_bias": {str(number): 1 for number in range(200_000)}},
        {"stop": ["a"] * 300_000},
        {"tools": [{"a": {"b": {}}}] * 30_000},
        {"response_format": {"anyOf": [{"type": "string"}] * 40_000}},
    ]
    for body in map(json.dumps, bodies):
        envelope = parse(body.encode())
        began = time.process_time()
        with pytest.raises(BadRequest):
            DEFAULT_LIMITS.check(envelope)
        assert time.process_time() - began < 1.0


def test_a_text_far_beyond_the_models_length_is_not_tokenised(gateway: Running) -> None:
    engine = gateway.engine()
    length = json.loads(ask(gateway, "/tokenize", {"prompt": "?"})[1])["max_model_len"]
    limit = max(32 * length, ALWAYS_TOKENISED)
    before = len(engine.record("request"))
    for path, fields in (
        ("/tokenize", {"prompt": "x" * (limit + 1)}),
        ("/v1/tokenize", {"messages": [{"role": "user", "content": "x" * (limit + 1)}]}),
        ("/v1/messages/count_tokens", {"system": "x" * (limit + 1), "messages": MESSAGES}),
        ("/v1/detokenize", {"tokens": [1] * (limit + 1)}),
    ):
        status, body, _ = ask(gateway, path, fields)
        assert status == 400, path
        message = json.loads(body)["error"]["message"]
        assert "MODELYARD_TOKENIZE_CHARS_PER_TOKEN" in message
        assert f"{limit} are allowed" in message
    asked = [one["path"] for one in engine.record("request")][before:]
    assert asked == [] or asked == ["/tokenize"], "it was asked how much it takes, and no more than once"
    assert ask(gateway, "/tokenize", {"prompt": "x" * limit})[0] == 200


def test_through_the_gateway_a_refusal_reaches_no_engine(gateway: Running) -> None:
    engine = gateway.engine()
    answer = ask(gateway, "/v1/chat/completions", {"messages": MESSAGES, "n": 129})
    assert error_of(answer) == (400, "bad_request")
    assert not [one for one in engine.record("request") if one["path"] == "/v1/chat/completions"]
