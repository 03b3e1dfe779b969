"""Keys that mean something are read for what they mean, or the row is refused with the reason."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from modelyard.datasets.canonical import canonical_json
from modelyard.datasets.conversations import examine
from modelyard.datasets.faults import Faults
from modelyard.datasets.forms import RowReader
from modelyard.datasets.row_forms import FORMS, MARKS, MEDIA, PREFERENCES, REASONING, ROLES, SPEAKERS
from tests.manual import TEXTS

PARAMETERS = {"type": "object", "properties": {"zone": {"type": "string"}}}
BARE = {"name": "tide", "description": "Does tide.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": BARE}
ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TWO = [ASK, ANSWER]
#: The same as a call in the canonical form.
CALL = {"function": {"name": "tide", "arguments": {"zone": "north"}}}
CALL_TEXT = json.dumps({"name": "tide", "arguments": {"zone": "north"}})
THOUGHT = {"type": "reasoning", "value": "t"}
OLD_CALL = {"name": "tide", "arguments": '{"zone": "north"}'}


def called(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return called({"function": {"name": "tide", "arguments": arguments}, **more})


def read(row: dict[str, Any]) -> tuple[dict[str, Any], list[str], tuple[str, ...]]:
    """Return a row in the canonical form, the keys that mean nothing in it, and what is warned of."""
    form, found = RowReader().read(json.dumps(row).encode())
    _, _, warnings = examine(found, form)
    return json.loads(canonical_json(found)), [f"{place}.{key}".lstrip(".") for place, key in found.ignored], warnings


def test_a_part_that_is_a_call_but_no_json_is_refused() -> None:
    with pytest.raises(Faults, match="is a call, but not JSON text"):
        read({"messages": [ASK, {"role": "assistant", "content": [{"type": "tool_call", "value": "tide"}]}]})


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"system": "s", "messages": TWO}, [{"role": "system", "content": "s"}, *TWO]),
        ({"system_prompt": "s", "messages": TWO}, [{"role": "system", "content": "s"}, *TWO]),
        ({"system": "s", "prompt": "a", "completion": "b"}, [{"role": "system", "content": "s"}, *TWO]),
        ({"system": "s", "instruction": "a", "output": "b"}, [{"role": "system", "content": "s"}, *TWO]),
        ({"system": "", "messages": TWO}, TWO),
        ({"messages": [{"role": "developer", "content": "s"}, *TWO]}, [{"role": "system", "content": "s"}, *TWO]),
        (
            {"instruction": "a", "input": "", "output": "b", "history": [["q", "r"]]},
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}, *TWO],
        ),
        ({"instruction": "a", "output": "b", "history": []}, TWO),
        ({"query": "a", "response": "b"}, TWO),
        ({"instruction": "a", "context": "c", "response": "b"}, [{"role": "user", "content": "a\n\nc"}, ANSWER]),
        ({"prompt": [ASK], "completion": [ANSWER]}, TWO),
        ({"prompt": [*TWO, ASK], "completion": [ANSWER]}, [ASK, {**ANSWER, "weight": 0}, *TWO]),
        ({"conversations": TWO}, TWO),
        ({"prompt": "a", "completion": "b", "label": True}, TWO),
        ({"messages": TWO, "images": [], "image": None, "videos": [[]]}, TWO),
        ({"messages": [ASK, {**ANSWER, "reasoning_content": "t"}]}, [ASK, {**ANSWER, "reasoning_content": "t"}]),
        ({"messages": [ASK, {**ANSWER, "reasoning": "t"}]}, [ASK, {**ANSWER, "reasoning_content": "t"}]),
        (
            {"messages": [ASK, {**ANSWER, "content": [THOUGHT, {"type": "text", "value": "b"}]}]},
            [ASK, {**ANSWER, "reasoning_content": "t"}],
        ),
        (
            {"messages": [ASK, {"role": "assistant", "content": [{"type": "tool_call", "value": CALL_TEXT}] * 2}]},
            [ASK, called(CALL, CALL)],
        ),
        ({"messages": [ASK, {**ANSWER, "thinking": "t"}]}, [ASK, {**ANSWER, "reasoning_content": "t"}]),
        (
            {"messages": [ASK, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, "b"]}]},
            [ASK, {**ANSWER, "reasoning_content": "t"}],
        ),
        ({"messages": [ASK, {"role": "assistant", "function_call": OLD_CALL}]}, [ASK, called(CALL)]),
        (
            {"messages": [ASK, {**ANSWER, "function_call": OLD_CALL}, {"role": "function", "content": "x"}]},
            [ASK, {**ANSWER, "tool_calls": [CALL]}, {"role": "tool", "content": "x"}],
        ),
        ({"messages": [ASK, called(OLD_CALL)]}, [ASK, called(CALL)]),
        ({"messages": [ASK, call(json.dumps('{"zone": "north"}'))]}, [ASK, called(CALL)]),
        ({"messages": [ASK, call("")]}, [ASK, call({})]),
        ({"messages": [ASK, call('{"zone": null}')]}, [ASK, call({"zone": None})]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": CALL_TEXT},
                               {"from": "observation", "value": "x"}, {"from": "gpt", "value": "b"}]},
            [ASK, called(CALL), {"role": "tool", "content": "x"}, ANSWER],
        ),
        (
            {"messages": [ASK, {"role": "tool_call", "content": CALL_TEXT}, {"role": "tool_call", "content": CALL_TEXT},
                          {"role": "tool_response", "content": "x"}, ANSWER]},
            [ASK, called(CALL, CALL), {"role": "tool", "content": "x"}, ANSWER],
        ),
    ],
)  # fmt: skip
def test_a_key_is_read_for_what_it_means(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert read(row) == ({"messages": messages}, [], read(row)[2])


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_an_answer_that_is_marked_as_bad_is_never_learnt(name: str, value: float) -> None:
    if name in ("label", "loss", "kto_tag", "weight", "loss_weight", "loss_scale"):
        value = False if name in ("label", "loss", "kto_tag") else value + 0
    bad = {"role": "assistant", "content": "bad", name: value}
    if name in ("train_detail", "loss_mask"):
        assert refused({"messages": [ASK, bad]})[0][1] == f"$.messages[1].{name}"
        return
    found, ignored, _ = read({"messages": [ASK, bad, *TWO]})
    assert found == {"messages": [ASK, {"role": "assistant", "content": "bad", "weight": 0}, *TWO]}
    assert ignored == []
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "bad", name: value}]
    assert refused({"conversations": turns})[0][0] == "nothing_to_learn"
    for row in ({"messages": TWO}, {"prompt": "a", "completion": "b"}, {"text": "a"}):
        (fault,) = refused({**row, name: value})
        assert fault[:2] == ("nothing_to_learn", f"$.{name}")
        assert "marked as not to be learnt" in fault[2]


@pytest.mark.parametrize("name", sorted({*MARKS} - {"train_detail", "loss_mask"}))
def test_an_answer_that_is_marked_as_good_is_learnt(name: str) -> None:
    value = 1 if "weight" in name or "scale" in name else True
    found, ignored, _ = read({"messages": [ASK, {**ANSWER, name: value}], name: value})
    assert found == {"messages": [ASK, {**ANSWER, "weight": 1} if name == "weight" else ANSWER]}
    assert ignored == []


def test_a_label_that_is_a_class_means_nothing_and_is_counted() -> None:
    assert read({"prompt": "a", "completion": "b", "label": 3, "loss": 1.37})[1] == ["label", "loss"]


@pytest.mark.parametrize(
    ("tools", "key"), [([BARE], "tools"), ([TOOL], "tools"), (json.dumps([BARE]), "tools"), ([BARE], "functions")]
)
@pytest.mark.parametrize("row", [{"messages": TWO}, {"conversations": TWO}, {"prompt": "a", "completion": "b"}])
def test_tools_are_read_bare_wrapped_as_text_and_by_their_older_name(tools: Any, key: str, row: dict[str, Any]) -> None:
    assert read({**row, key: tools})[0] == {"messages": TWO, "tools": [TOOL]}


def test_other_ways_to_write_a_tool_are_read() -> None:
    anthropic = {"name": "tide", "description": "Does tide.", "input_schema": PARAMETERS}
    responses = {"type": "function", **BARE}
    as_text = {**BARE, "parameters": json.dumps(PARAMETERS)}
    for tool in (anthropic, responses, as_text):
        assert read({"messages": TWO, "tools": [tool]})[0]["tools"] == [TOOL]
    assert read({"messages": TWO, "tools": [{**BARE, "returns": "x"}]})[1] == ["tools[].function.returns"]


def test_nulls_that_arrow_writes_are_taken_out_and_said() -> None:
    padded = {"zone": "north", "city": None, "at": {"day": 1, "hour": None}, "list": [None]}
    row = {"messages": [ASK, call(padded, id=None, type="function")], "tools": [
        {"type": "function", "function": {**BARE, "strict": None, "parameters": {
            **PARAMETERS, "required": None, "properties": {"zone": {"type": "string", "default": None}, "city": None}}}}
    ]}  # fmt: skip
    found, ignored, warnings = read(row)
    arguments = found["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"zone": "north", "at": {"day": 1}, "list": [None]}
    properties = {"zone": {"type": "string", "default": None}}
    assert found["tools"] == [{"type": "function", "function": {
        **BARE, "parameters": {"type": "object", "properties": properties}}}]  # fmt: skip
    assert (ignored, "null_padding" in warnings) == ([], True)
    assert "null_padding" not in read({"messages": [ASK, call({"zone": "north"})], "tools": [TOOL]})[2]
    nulls = {"chosen": None, "weight": None, "images": None, "label": None, "id": None}
    assert read({"messages": [ASK, {**ANSWER, **nulls}], **nulls})[:2] == ({"messages": TWO}, [])


def refused(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    with pytest.raises(Faults) as caught:
        read(row)
    return [(str(fault.kind), fault.path, fault.reason) for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("row", "kind", "path", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", None, "preference row"),
        ({"messages": TWO, "rejected_response": "c"}, "preference", "$.rejected_response", "better answer and a worse"),
        ({"conversations": TWO, "chosen": {"from": "gpt"}, "rejected": {}}, "preference", None, "preference row"),
        ({"chosen_messages": TWO, "rejected_messages": TWO}, "preference", None, "preference row"),
        ({"messages": TWO, "images": ["a.png"]}, "wrong_value", "$.images", "only text can be learnt"),
        ({"conversations": TWO, "image": "a.png"}, "wrong_value", "$.image", "only text can be learnt"),
        ({"messages": [{**ASK, "images": ["x"]}, ANSWER]}, "wrong_value", "$.messages[0].images", "only text"),
        ({"messages": TWO, "context": "c"}, "wrong_value", "$.context", "put it into the message"),
        ({"messages": TWO, "weight": 0.5}, "wrong_value", "$.weight", "is 0.5, but must be 0 or 1"),
        ({"messages": [ASK, {**ANSWER, "loss_weight": 0.5}]}, "wrong_value", "$.messages[1].loss_weight", "0 or 1"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "wrong_value", "$.messages[1].weight", "is 0.5, but"),
        ({"messages": [ASK, {**ANSWER, "train": "no"}]}, "wrong_value", "$.messages[1].train", "true or false"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "wrong_value", "$.history[0]", "must be an array"),
        ({"instruction": "a", "input": "c", "context": "d", "output": "b"}, "wrong_value", "$.context", "the same"),
        ({"messages": TWO, "tools": [BARE], "functions": [BARE]}, "wrong_value", "$.functions", "beside 'tools'"),
        ({"messages": TWO, "tools": [{"description": "x"}]}, "wrong_value", "$.tools[0].name", "the function's name"),
        ({"messages": TWO, "functions": [{"x": 1}]}, "wrong_value", "$.functions[0].name", "the function's name"),
        ({"messages": TWO, "tools": ["tide"]}, "wrong_value", "$.tools[0]", "is no function"),
        ({"messages": TWO, "tools": [{"type": "web_search"}]}, "wrong_value", "$.tools[0].type", "'web_search'"),
        ({"messages": TWO, "tools": "tide"}, "wrong_value", "$.tools", "no JSON array"),
        ({"messages": [ASK, call("x")]}, "wrong_value", "$.messages[1].tool_calls[0].function.arguments", "no JSON"),
        ({"messages": [ASK, call({}, type="custom")]}, "wrong_value", "$.messages[1].tool_calls[0].type", "'custom'"),
        ({"messages": [{**ASK, "reasoning_content": "t"}, ANSWER]}, "wrong_value", "$.messages[0].reasoning_content",
         "only for messages of the assistant"),
        ({"messages": [ASK, {**ANSWER, "thinking": "t", "reasoning": "u"}]}, "wrong_value", None, "another thought"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "tide!"}]},
         "wrong_value", "$.conversations[1].value", "JSON text of"),
        ({"messages": [ANSWER]}, "nothing_to_learn", "$.messages", '{"text": ...}'),
        ({"messages": [{"role": "system", "content": "s"}, ANSWER]}, "nothing_to_learn", "$.messages", "no user says"),
        ({"conversations": [{"from": "gpt", "value": "b"}]}, "nothing_to_learn", "$.conversations", "no user says"),
        ({"system": "s", "messages": [ASK, {"role": "assistant", "content": 5}]}, "wrong_value",
         "$.messages[1].content", "is a number"),
        ({"system": "s", "messages": [ASK, {"role": "assistant", "content": None}]}, "wrong_value",
         "$.messages[1].content", "is null"),
        ({"text": " "}, "nothing_to_learn", "$.text", "is empty"),
        ({"text": ["a"]}, "wrong_value", "$.text", "must be text"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_with_its_place(
    row: dict[str, Any], kind: str, path: str | None, reason: str
) -> None:
    (fault,) = refused(row)
    assert fault[0] == kind
    assert path is None or fault[1] == path
    assert reason in fault[2]


def test_arguments_that_are_nested_without_end_are_refused() -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    for arguments in ({"a": deep}, json.dumps({"a": deep})):
        assert refused({"messages": [ASK, call(arguments)]})[0][0] == "too_deep"


def test_the_manual_names_every_key_of_the_table() -> None:
    names = {name for form in FORMS for name in form.keys} | {*MARKS, *MEDIA, *PREFERENCES, *REASONING}
    names |= {*ROLES, *SPEAKERS}
    told = set(re.findall(r"[`\"](\w+)[`\"]", TEXTS["docs/datasets.md"]))
    assert sorted(names - told) == []
