"""Rows in their four forms become one, and whatever is wrong with a line is said with its place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from modelyard.datasets.canonical import canonical_json
from modelyard.datasets.conversations import examine
from modelyard.datasets.faults import Fault, Faults, Kind
from modelyard.datasets.forms import Form, Row, RowReader, read_row
from modelyard.datasets.row_forms import MARKS, MEDIA, REASONING, ROLES, SPEAKERS
from modelyard.datasets.row_reading import object_of, read_fields

LIKELY = list(Form)


def canonical(row: object) -> Any:
    form, found = read_row(json.dumps(row).encode())
    examine(found, form)
    return json.loads(canonical_json(found))


def read_and_examine(line: bytes, likely: Form = Form.MESSAGES) -> tuple[Form, Row]:
    form, row = read_row(line, likely)
    examine(row, form)
    return form, row


def faults(line: bytes | object) -> list[tuple[str, str, str]]:
    """Return kind, place and reason of all that is wrong, which does not depend on what was tried first."""
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    found = []
    for likely in LIKELY:
        with pytest.raises(Faults) as caught:
            read_and_examine(data, likely)
        found.append([(str(fault.kind), fault.path, fault.reason) for fault in caught.value.faults])
    assert all(other == found[0] for other in found)
    return found[0]


def says(*pairs: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


TWO = says(("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        (TWO, Form.MESSAGES, TWO),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, Form.SHAREGPT, TWO),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "a"}, {"from": "Assistant", "value": "b"}]},
            Form.SHAREGPT,
            says(("system", "s"), ("user", "a"), ("assistant", "b")),
        ),
        ({"prompt": "a", "completion": "b"}, Form.PROMPT_COMPLETION, TWO),
        ({"text": "a"}, Form.TEXT, {"text": "a"}),
        ({"text": "x", "instruction": "a", "output": "b"}, Form.INSTRUCTION, TWO),
        ({"instruction": "a", "output": "b"}, Form.INSTRUCTION, TWO),
        ({"instruction": "a", "input": "", "output": "b"}, Form.INSTRUCTION, TWO),
        (
            {"instruction": "a", "input": "c", "output": "b"},
            Form.INSTRUCTION,
            says(("user", "a\n\nc"), ("assistant", "b")),
        ),
        ({"prompt": "x", "completion": "y", **TWO}, Form.MESSAGES, TWO),
        ({"instruction": "x", "output": "y", "prompt": "a", "completion": "b"}, Form.PROMPT_COMPLETION, TWO),
        ({"messages": None, "prompt": "a", "completion": "b", "id": 7}, Form.PROMPT_COMPLETION, TWO),
        ({"instruction": "a", "output": "b", "prompt": "only half"}, Form.INSTRUCTION, TWO),
    ],
)
@pytest.mark.parametrize("likely", LIKELY)
def test_a_row_is_read_by_its_own_form_whatever_was_before_it(
    row: dict[str, object], form: Form, expected: object, likely: Form
) -> None:
    found, canonical_row = read_row(json.dumps(row).encode(), likely)
    examine(canonical_row, found)
    assert found == form
    assert json.loads(canonical_json(canonical_row)) == expected


def test_text_in_parts_stays_in_parts_which_the_models_template_joins() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row: Any = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]}
    assert canonical(row) == row
    row["messages"][0]["content"] = [{"type": "input_text", "text": "a"}, "b"]
    assert canonical(row)["messages"][0]["content"] == parts
    for one in ([{"type": "text", "value": "a"}], [{"text": "a", "cache_control": 1}], ["a"], [parts[0]]):
        row["messages"][0]["content"] = one
        assert canonical(row) == says(("user", "a"), ("assistant", "c"))


def test_calls_of_tools_have_their_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {
        "messages": [
            {"role": "user", "content": "one and one?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            {"role": "assistant", "content": "Two."},
        ],
        "tools": tools,
    }
    found = canonical(row)
    assert found["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert found["messages"][2]["tool_call_id"] == "1"
    assert found["tools"] == tools
    assert canonical(found) == found


@pytest.mark.parametrize(
    ("row", "kind", "path", "reason"),
    [
        (says(("human", "a"), ("assistant", "b")), "wrong_value", "$.messages[0].role", "'human', but must be one of"),
        ({"messages": [{"content": "a"}]}, "missing_field", "$.messages[0].role", "is missing"),
        ({"messages": [{"role": "user"}, TWO["messages"][1]]}, "missing_field", "$.messages[0].content", "missing"),  # type: ignore[index]
        ({"messages": [{"role": "user", "content": 5}]}, "wrong_value", "$.messages[0].content", "is a number, but"),
        ({"messages": "x"}, "wrong_value", "$.messages", "is text, but must be an array"),
        ({"messages": []}, "nothing_to_learn", "$.messages", "is empty"),
        (says(("user", "a")), "nothing_to_learn", "$.messages", "no message of the assistant"),
        (says(("user", "a"), ("assistant", " ")), "nothing_to_learn", "$.messages", "every message"),
        (says(("user", "a"), ("system", "s"), ("assistant", "b")), "wrong_order", "$.messages[1].role", "be the first"),
        (says(("tool", "a"), ("assistant", "b")), "wrong_order", "$.messages[0].role", "no call"),
        (says(("user", "a"), ("assistant", "b"), ("tool", "c")), "wrong_order", "$.messages[2].role", "no tool_calls"),
        ({"conversations": [{"from": "alien", "value": ""}]}, "wrong_value", "$.conversations[0].from", "'alien'"),
        ({"conversations": [{"from": "human"}]}, "missing_field", "$.conversations[0].value", "is missing"),
        (
            {"system": "s", "conversations": [{"from": "system", "value": "t"}, {"from": "gpt", "value": "b"}]},
            "wrong_order", "$.conversations[0].from", "only be the first",
        ),
        ({"prompt": "a", "completion": ""}, "nothing_to_learn", "$.completion", "nothing to learn"),
        ({"prompt": "a"}, "missing_field", "$.completion", "beside 'prompt'"),
        ({"prompt": 1, "completion": "b"}, "wrong_value", "$.prompt", "is a number, but must be text"),
        ({"words": "a"}, "unknown_form", "$", "has the keys 'words'; a row is"),
        ([1], "unknown_form", "$", "is not an object"),
        ("text", "unknown_form", "$", "is not an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(row: object, kind: str, path: str, reason: str) -> None:
    found = faults(row)
    assert [(found_kind, found_path) for found_kind, found_path, _ in found] == [(kind, path)]
    assert reason in found[0][2]


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        (b'{"messages": [', "not_json", "expecting value at character 15"),
        (b'{"messages": []} x', "not_json", "extra data at character 18"),
        (b"hello", "not_json", "at character 1"),
        (b'{"messages": NaN}', "not_a_number", "has NaN"),
        (b'{"x": -Infinity, "messages": []}', "not_a_number", "has -Infinity"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not_utf8", "byte 0xff at position 44"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep", "nested too deeply"),
        (rb'{"x": "\ud800"}', "lone_surrogate", "half of a surrogate pair"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep", "nested too deeply"),
        (b"[" * 100_000, "unknown_form", "is not an object"),
        (b'{"messages": [], "n": 1' + b"0" * 5000 + b"}", "nothing_to_learn", "is empty"),
    ],
)
def test_what_is_no_json_is_said_in_words_of_its_own(line: bytes, kind: str, reason: str) -> None:
    found = faults(line)
    assert found[0][0] == kind
    assert reason in found[0][2]


def test_half_of_a_surrogate_pair_is_found_where_it_is() -> None:
    line = rb'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83d"}]}'
    assert faults(line)[0][:2] == ("lone_surrogate", "$.messages[1].content")
    whole = line.replace(rb"\ud83d", rb"\ud83d\ude00")
    assert read_row(whole)[1].messages[1].content == "😀"


def test_every_wrong_message_of_a_line_is_said() -> None:
    row = {
        "messages": [{"role": "x", "content": "a"}, {"role": "user", "content": "b"}, {"role": "user", "content": 1}]
    }
    assert [path for _, path, _ in faults(row)] == ["$.messages[0].role", "$.messages[2].content"]


@pytest.mark.parametrize(
    ("row", "paths"),
    [
        (
            {"messages": [{"role": "human", "content": 5}, {"role": "assistant"}, "text"], "tools": 3},
            ["$.messages[0].role", "$.messages[0].content", "$.messages[1].content", "$.messages[2]", "$.tools"],
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]},
         ["$.messages[0].tool_calls[0].function.name"]),
        ({"conversations": [{"from": 1}, {"value": "a"}], "system": 2},
         ["$.conversations[0].from", "$.conversations[0].value", "$.conversations[1].from", "$.system"]),
        ({"prompt": 1, "completion": []}, ["$.prompt", "$.completion"]),
        ({"instruction": 1, "output": 2, "input": 3}, ["$.instruction", "$.input", "$.output"]),
    ],
)  # fmt: skip
def test_every_wrong_field_of_a_line_is_said(row: object, paths: list[str]) -> None:
    assert sorted(path for _, path, _ in faults(row)) == sorted(paths)


def test_a_message_of_weight_0_is_not_learnt_from() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    assert faults(row)[0][0] == Kind.NOTHING_TO_LEARN
    row["messages"].append({"role": "assistant", "content": "c", "weight": 1})
    assert canonical(row) == row


texts = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return values of which some are anything."""
    return st.integers(0, 30).flatmap(lambda number: good if number else json_values)


def some(strategies: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Return objects with a few of these keys."""
    return st.lists(st.sampled_from(sorted(strategies)), max_size=2).flatmap(
        lambda keys: st.fixed_dictionaries({key: strategies[key] for key in keys})
    )


def both(one: dict[str, st.SearchStrategy[Any]], other: dict[str, st.SearchStrategy[Any]]) -> Any:
    return st.tuples(st.fixed_dictionaries(one), some(other)).map(lambda pair: pair[1] | pair[0])


words = st.text("ab", min_size=1, max_size=3)
arguments = st.dictionaries(
    words, st.none() | words | st.dictionaries(words, st.none() | words, max_size=2), max_size=2
)
functions = both(
    {"name": mostly(words)},
    {"arguments": mostly(arguments | arguments.map(json.dumps)), "x": words, "parameters": arguments, "strict": words},
)
calls = functions | both({"function": functions}, {"id": words, "type": mostly(st.just("function")), "index": words})
tools = st.lists(mostly(functions | both({"function": functions}, {"type": st.just("function")})), max_size=2)
parts = st.lists(
    words | both({"type": mostly(st.sampled_from(["text", "input_text"])), "text": words}, {"cache": words}),
    max_size=3,
)
flags = {key: st.booleans() | st.none() | st.sampled_from([0, 1]) for key in MARKS}
nothing: dict[str, Any] = {key: st.none() | st.just([]) for key in MEDIA}
marked = flags | nothing | {
    "name": words, "id": words, "tool_call_id": st.none() | words, "loss_mask": st.none(),
    "tool_calls": mostly(st.none() | st.lists(calls, max_size=2)), "function_call": st.none() | functions,
    "weight": mostly(st.sampled_from([0, 1, 1.0, 0.0, None])),
} | {key: st.none() | words for key in REASONING}  # fmt: skip
contents = mostly(words | parts)
messages = st.lists(both({"role": mostly(st.sampled_from([*ROLES, "user", "assistant"])), "content": contents}, marked),
                    min_size=1, max_size=4)  # fmt: skip
talks = st.lists(
    st.tuples(
        both({"role": st.just("user"), "content": contents}, {"name": words, "x": words}),
        both({"role": st.just("assistant"), "content": contents}, marked),
    ),
    min_size=1, max_size=3,
).map(lambda pairs: [one for pair in pairs for one in pair])  # fmt: skip
turns = st.lists(
    both(
        {"from": mostly(st.sampled_from(sorted(SPEAKERS))), "value": mostly(words | functions.map(json.dumps))}, marked
    )
    | messages.map(lambda said: said[0]),
    min_size=1, max_size=5,
)  # fmt: skip
beside = flags | nothing | {
    "context": mostly(st.none() | words), "id": words, "source": words, "system": mostly(words), "chosen": st.none(),
    "tools": mostly(tools | tools.map(json.dumps)), "functions": tools, "input": mostly(words),
    "history": mostly(st.lists(st.tuples(words, words), max_size=2)), "text": words,
}  # fmt: skip
rows = st.one_of(
    both({"messages": mostly(talks)}, beside),
    both({"messages": mostly(messages)}, beside),
    both({"conversations": mostly(turns)}, beside),
    both({"prompt": mostly(words), "completion": mostly(words)}, beside),
    both({"prompt": mostly(messages), "completion": mostly(talks)}, beside),
    both({"instruction": mostly(words), "output": mostly(words)}, beside),
    both({"query": mostly(words), "response": words}, beside),
    both({"text": mostly(words)}, beside),
    json_values,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.binary(max_size=60) | rows.map(lambda row: json.dumps(row).encode()), st.sampled_from(LIKELY))
def test_any_line_is_a_row_or_has_faults_with_places_and_a_row_means_the_same_again(line: bytes, likely: Form) -> None:
    wrong: tuple[Fault, ...] = ()
    try:
        form, row = read_and_examine(line, likely)
    except Faults as error:
        wrong = error.faults
        event("has faults")
    if wrong:
        assert all(fault.path.startswith("$") and fault.reason for fault in wrong)
        return
    once = canonical_json(row)
    if form is Form.SHAREGPT and b'"role":"tool"' in once:
        return  # its calls may be in the text of the turn before, which the messages form does not take
    again, same = read_and_examine(once)
    assert canonical_json(same) == once
    assert again == (Form.TEXT if form is Form.TEXT else Form.MESSAGES)
    assert read_row(line, Form.MESSAGES)[0] == form


@given(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=6), st.integers(0, 5))
def test_the_place_of_a_wrong_role_is_its_place(roles: list[str], at: int) -> None:
    spoken = [{"role": role, "content": "a"} for role in roles]
    spoken.insert(min(at, len(roles)), {"role": "alien", "content": "a"})
    assert faults({"messages": spoken})[0][1] == f"$.messages[{min(at, len(roles))}].role"


def read(line: bytes, reader: RowReader | None) -> object:
    """Return all that a line comes to, read by a reader or key by key."""
    try:
        if reader is None:
            form, fields = object_of(line)
            row = read_fields(line, form, fields)
        else:
            form, row = reader.read(line)
        _, characters, warnings = examine(row, form)
    except Faults as error:
        return [(fault.kind, fault.path, fault.reason) for fault in error.faults]
    return form, canonical_json(row), characters, sorted(warnings), sorted(set(row.ignored))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(rows, min_size=1, max_size=6))
def test_rows_that_are_read_at_speed_are_read_as_key_by_key(several: list[Any]) -> None:
    reader = RowReader()
    for row in several * 2:
        line = json.dumps(row).encode()
        assert read(line, reader) == read(line, None)


def test_keys_that_mean_nothing_are_known_after_the_first_row_and_still_told() -> None:
    reader = RowReader()
    row = {"id": 7, **says(("user", "a"), ("assistant", "b"))}
    row["messages"][0]["avatar"] = None  # type: ignore[index]
    row["messages"][1]["avatar"] = "x"  # type: ignore[index]
    for _ in range(3):
        assert set(reader.read(json.dumps(row).encode())[1].ignored) == {("", "id"), ("messages[]", "avatar")}
    assert list(reader.plain_rows([json.dumps(row).encode()])), "known keys do not make a row less plain"
    del row["id"]
    assert reader.read(json.dumps(row).encode())[1].ignored == (("messages[]", "avatar"),)
