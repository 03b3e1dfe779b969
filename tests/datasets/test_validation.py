"""One pass over a file ends in a report that counts everything, however the bytes were cut into blocks."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.datasets import validation
from modelyard.datasets.lines import rows_of
from modelyard.datasets.validation import LISTED_PROBLEMS, Duplicates, Validation
from modelyard.errors import InvalidDataset
from tests.datasets.forms import bad_at, chat, jsonl, questions

KIB, MIB = 1024, 1024 * 1024


def report_of(blocks: Iterable[bytes], max_line_bytes: int = MIB) -> dict[str, Any]:
    read = Validation(max_line_bytes)
    try:
        for block in blocks:
            read.feed(block)
        return read.finish()
    finally:
        read.close()


def refusal(data: bytes) -> InvalidDataset:
    with pytest.raises(InvalidDataset) as caught:
        report_of([data])
    return caught.value


def cut(data: bytes, seed: int, longest: int) -> Iterable[bytes]:
    chance = random.Random(seed)
    while data:
        length = chance.randint(1, longest)
        yield data[:length]
        data = data[length:]


def test_everything_in_a_file_is_counted() -> None:
    data = jsonl(
        chat("a", "bc"),
        {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]},  # type: ignore[misc]
        {"prompt": "a", "completion": "b" * 1000},
        chat("a", "bc"),
        {"messages": [{"role": role, "content": text} for role, text in (
            ("assistant", "b"), ("user", ""), ("assistant", "b"), ("user", "a"))]},
    )  # fmt: skip
    report = report_of([data + b"\n \n"])
    assert (report["format"], report["formats"]) == ("mixed", {"messages": 4, "prompt_completion": 1})
    assert (report["rows"], report["lines"], report["blank_lines"], report["bad_lines"]) == (5, 7, 2, 0)
    assert (report["turns"], report["roles"]) == (13, {"assistant": 6, "system": 1, "user": 6})
    assert report["duplicates"] == {"rows": 1, "lines": [4], "is_exact": True}
    assert report["characters"] == {
        "total": 3 + 3 + 1001 + 3 + 3,
        "shortest": 3,
        "longest": 1001,
        "histogram": [{"below": 4, "rows": 4}, {"below": 1024, "rows": 1}],
    }
    assert report["warnings"] == [
        {"kind": "empty_content", "rows": 1, "lines": [5]},
        {"kind": "ends_without_answer", "rows": 1, "lines": [5]},
        {"kind": "starts_with_assistant", "rows": 1, "lines": [5]},
    ]


@pytest.mark.parametrize("longest", [1, 7, 100, 5000])
def test_how_the_bytes_are_cut_changes_nothing(longest: int) -> None:
    data = b"\xef\xbb\xbf" + bad_at([3, 40], 60).replace(b"\n", b"\r\n") + b"\n" + "{é}\n".encode() + questions(3)[:-1]
    assert report_of(cut(data, longest, longest)) == report_of([data])


@given(st.lists(st.binary(max_size=30) | st.just(b'{"prompt":"a","completion":"b"}'), max_size=12), st.integers(1, 40))
def test_any_bytes_have_a_report_or_a_refusal_and_the_rows_are_those_that_it_counts(
    lines: list[bytes], longest: int
) -> None:
    data = b"\n".join(lines)
    try:
        report = report_of(cut(data, 1, longest), 32)
    except InvalidDataset as error:
        assert error.code in ("dataset_empty", "not_jsonl")  # noqa: PT017
        return
    assert report["lines"] == data.count(b"\n") + (not data.endswith(b"\n"))
    assert report["lines"] == report["rows"] + report["bad_lines"] + report["blank_lines"]
    assert len(list(rows_of(cut(data, 2, longest), 32))) == report["rows"]


LINES = st.sampled_from(
    [
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}',
        b'{"messages":[{"role":"user","content":"\xd0\xb9"},{"role":"assistant","content":"bc"}],"note":1}',
        b' {"messages":[{"content":"a","role":"user"},{"role":"assistant","content":"b","name":"n"}],"tools":null} ',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\r',
        b'{"messages":[{"role":"assistant","content":"b"}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":" "}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":"c"}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","tool_calls":[]}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"tool","content":"b"}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","name":3}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"tools":[{}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"note":"\xff"}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]} {"messages":[]}',
        b'{"messages":[{"role":"user","content":"a"},',
        b'{"role":"assistant","content":"b"}]}',
        b'{"messages":[]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"note":1,"n":null}',
        b'{"messages":[{"role":"user","content":"a","x":1},{"role":"assistant","content":"b"}],"n":2}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"label":false}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"label":3}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","train":false}]}',
        b'{"messages":null,"prompt":"a","completion":"b"}',
        b'{"prompt":"a","completion":"b"}',
        b"",
    ]
)


@given(st.lists(LINES, max_size=12))
def test_lines_that_are_read_at_once_are_read_as_one_by_one(lines: list[bytes]) -> None:
    lines = [b'{"prompt":"a","completion":"b"}', *lines]
    whole = b"\n".join(lines) + b"\n"
    assert report_of(line + b"\n" for line in lines) == report_of([whole])


def test_a_mark_at_the_beginning_ends_of_lines_as_on_windows_and_blank_lines_are_no_problem() -> None:
    report = report_of([b"\xef\xbb\xbf" + questions(2).replace(b"\n", b"\r\n\r\n")])
    assert (report["rows"], report["blank_lines"], report["byte_order_mark"], report["crlf_lines"]) == (2, 2, True, 4)
    assert report["problems"]["total"] == 0


def test_a_line_that_is_too_long_is_one_problem_and_what_comes_after_it_is_read() -> None:
    for length, end in ((MIB + 1, b"\n"), (5 * MIB, b"\n"), (5 * MIB, b"")):
        data = questions(2) + b"x" * length + end + (questions(1) if end else b"")
        report = report_of(cut(data, 3, 300 * KIB))
        assert report["problems"]["kinds"] == {"line_too_long": 1}
        assert report["problems"]["listed"][0]["line"] == 3
        assert report["rows"] == (3 if end else 2)
    fits = b'{"prompt":"a","completion":"' + b"b" * (MIB - 30) + b'"}'
    assert len(fits) == MIB
    assert report_of([fits + b"\r\n"])["rows"] == report_of(cut(fits, 1, KIB))["rows"] == 1


def test_problems_are_listed_up_to_a_cap_and_all_counted() -> None:
    report = report_of([bad_at(range(1, 1501), 1600)])
    problems = report["problems"]
    assert (problems["total"], len(problems["listed"]), problems["unlisted"]) == (1500, LISTED_PROBLEMS, 500)
    assert problems["kinds"] == {"wrong_value": 1500}
    assert report["bad_lines"] == 1500


def test_bytes_that_are_no_text_are_found_by_line_and_place_even_where_nobody_reads() -> None:
    bad = b'{"prompt": "a", "completion": "b", "note": "\xff"}\n'
    problem = report_of([questions(3) + bad])["problems"]["listed"][0]
    assert (problem["line"], problem["kind"]) == (4, "not_utf8")
    assert "byte 0xff at position 45" in problem["reason"]


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train.jsonl", "{}")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (zipped(), "zip archive"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
        (questions(3).decode().encode("utf-16"), "UTF-16, not UTF-8; convert it: iconv"),
        (questions(3).decode().encode("utf-16-le"), "UTF-16"),
        (json.dumps(chat("a", "b"), indent=2).encode(), "several lines"),
        (b"<html>", "HTML"),
    ],
)
def test_another_kind_of_file_is_told_by_its_beginning(data: bytes, said: str) -> None:
    error = refusal(data)
    assert error.code == "not_jsonl"
    assert said in error.message


@pytest.mark.parametrize(
    ("data", "said"), [(b"", "is empty"), (b"\xef\xbb\xbf", "empty"), (b"\n \r\n", "2 blank lines")]
)
def test_a_file_with_nothing_in_it_says_so(data: bytes, said: str) -> None:
    error = refusal(data)
    assert error.code == "dataset_empty"
    assert said in error.message


def test_many_different_orders_of_roles_are_counted_right() -> None:
    chance = random.Random(4)
    rows, turns = [], 0
    for _ in range(6000):
        count = chance.randint(2, 12)
        spoken = [{"role": "user" if number == count - 1 else chance.choice(["user", "assistant"]), "content": "a"}
                  for number in range(count)]  # fmt: skip
        spoken.append({"role": "assistant", "content": "b"})
        turns += count + 1
        rows.append({"messages": spoken})
    report = report_of([jsonl(*rows)])
    assert (report["turns"], report["rows"]) == (turns, 6000)
    assert sum(report["roles"].values()) == turns


def test_duplicates_are_exact_among_many() -> None:
    seen = Duplicates()
    rows = [b"row %d" % (number % 150_000) for number in range(200_000)]
    for first in range(0, 200_000, 1000):
        seen.see(rows[first : first + 1000], range(first, first + 1000))
    assert (seen.rows, seen.lines[0]) == (50_000, 150_000)
    seen.close()


def test_memory_stays_small_however_long_file_and_lines_are() -> None:
    program = """
import resource
from modelyard.datasets.validation import Validation
from tests.datasets.forms import questions
block = questions(8000)
line = b'x' * (1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
validation = Validation(1 << 24)
for number in range(60):
    validation.feed(block)
for number in range(200):
    validation.feed(line)
report = validation.finish()
assert report['rows'] == 480000 and report['problems']['total'] == 1, report
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 64 * 1024


HOSTILE = {
    "lines of a letter": b"x\n" * (2 * MIB),
    "empty objects": b"{}\n" * MIB,
    "unknown keys": b'{"a":1}\n' * (MIB // 2),
    "bytes that are no text": b"\xff\n" * (2 * MIB),
    "a line with a million faults": b'{"messages":[' + b",".join([b'{"role":1}'] * (MIB // 3)) + b"]}\n",
    "a line with a million wrong roles": b'{"messages":['
    + b",".join([b'{"role":"system","content":"a"}'] * (MIB // 9))
    + b"]}\n",
    "a line with a million unknown speakers": b'{"conversations":['
    + b",".join([b'{"from":"x","value":"a"}'] * (MIB // 7))
    + b"]}\n",
    "a long key above a long list": b'{"' + b"k" * MIB + b'":[' + b"1," * MIB + rb'"\ud800"]}' + b"\n",
    "long keys around half a character": (b'{"messages":[{"' + b"k" * 4000 + rb'":"\ud800"}]}' + b"\n") * 1000,
    "bad lines of a mebibyte": (b'{"messages":[' + b'"x",' * (MIB // 4) + b"1]}\n") * 80,
    "blank lines": b"\n" * (4 * MIB),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_is_wrong_with_a_file_its_problems_cost_little_to_find_and_to_tell(name: str) -> None:
    """Measured as processor time, which a busy machine does not lengthen; some took more than a minute."""
    read = Validation(4 * MIB)
    began = time.process_time()
    try:
        read.feed(HOSTILE[name])
        told: Any = read.finish()
    except InvalidDataset as refused:
        told = refused.envelope()
    finally:
        read.close()
    assert time.process_time() - began < 10.0
    assert len(json.dumps(told)) < MIB


def test_a_file_with_too_many_problems_is_refused_with_what_was_found_so_far() -> None:
    good = questions(20_000).splitlines(keepends=True)
    data = b"".join(line + b"x\n" for line in good)
    refused = refusal(data)
    assert "Too much is wrong with it: 10,001 problems up to line 20,002." in str(refused)
    assert refused.report is not None
    assert (refused.report["stopped_at_line"], refused.report["lines"], refused.report["rows"]) == (20002, 20002, 10001)
    assert refused.report["problems"]["total"] == 10001
    just = b"".join(good) + b"x\n" * 10_000
    report = report_of([just])
    assert (report["stopped_at_line"], report["bad_lines"], report["rows"]) == (None, 10_000, 20_000)


def test_a_line_with_many_faults_tells_a_hundred_of_them() -> None:
    line = b'{"messages":[' + b",".join([b'{"role":1}'] * 5000) + b"]}\n"
    report = report_of([line])
    assert (report["bad_lines"], report["problems"]["total"]) == (1, 100)


def test_conversations_of_many_roles_in_many_orders_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither their orders nor what follows from these is kept for ever."""
    monkeypatch.setattr(validation, "MOST_SHAPE_ROLES", 100_000)
    chance = random.Random(7)
    read = Validation(MIB)
    tracemalloc.start()
    for _ in range(30):
        roles = chance.choices(["user", "assistant"], k=20_000)
        messages = ",".join(f'{{"role":"{role}","content":"a"}}' for role in roles)
        read.feed(f'{{"messages":[{messages}]}}\n'.encode())
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    report = read.finish()
    read.close()
    assert (report["rows"], report["turns"]) == (30, 600_000)
    assert kept < 2.5 * MIB


def test_keys_that_mean_nothing_are_counted_with_their_places_and_first_lines() -> None:
    plain = [chat(str(number), "b") | {"id": number} for number in range(50)]
    plain[7]["messages"][0]["avatar"] = "x"  # type: ignore[index]
    other: list[Any] = [
        {"prompt": "a", "completion": "b", "id": "x", "tags": []},
        {"prompt": "a", "completion": "b", "id": None},
        {"text": "a", "meta": {"x": 1}},
    ]
    report = report_of([jsonl(*plain), jsonl(*other)])
    assert report["bad_lines"] == 0
    assert report["ignored_keys"] == [
        {"key": "id", "rows": 51, "lines": list(range(1, 21))},
        {"key": "messages[].avatar", "rows": 1, "lines": [8]},
        {"key": "meta", "rows": 1, "lines": [53]},
        {"key": "tags", "rows": 1, "lines": [51]},
    ]


def test_many_different_keys_are_told_together_and_cost_little() -> None:
    rows = [chat("a", str(number)) | {f"key {number}": 1, f"{number}" * 5000: 2} for number in range(2000)]
    data = jsonl(*rows)
    began = time.process_time()
    report = report_of([data])
    assert time.process_time() - began < 5.0
    keys = report["ignored_keys"]
    assert 100 <= len(keys) <= 101
    assert keys[0] == {"key": "*", "rows": 2000, "lines": list(range(1, 21))}
    assert len(json.dumps(keys)) < 20_000
