"""Files as people have them become JSONL: arrays, tables, archives of these, with keys mapped; in little memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from modelyard.datasets.conversion_task import Conversion
from modelyard.datasets.converter import converted
from modelyard.datasets.validator import Found
from tests.datasets.forms import chat, jsonl, questions

MIB = 1024 * 1024
ROWS = [{"prompt": f"How far is mill {number}?", "completion": f'{number} miles;\n"about"'} for number in range(40)]
MAPPING = {"prompt": "question", "completion": "answer"}


def blocks_of(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def convert(
    data: bytes, mapping: dict[str, str] | None = None, *, size: int = 100_000, most: int = 64 * MIB, row: int = MIB
) -> tuple[Found, bytes]:
    pieces: list[bytes] = []
    found = converted(blocks_of(data, size), Conversion(most, row, mapping, "/tmp"), pieces.append)
    return found, b"".join(pieces)


def rows_of(data: bytes, mapping: dict[str, str] | None = None, **more: int) -> list[Any]:
    found, stored = convert(data, mapping, **more)
    assert found.refusal is None, found.refusal
    return [json.loads(line) for line in stored.splitlines() if line]


def refusal(data: bytes, mapping: dict[str, str] | None = None, **more: int) -> tuple[str, str]:
    found, _ = convert(data, mapping, **more)
    assert found.refusal is not None
    return found.refusal


def problems(data: bytes, mapping: dict[str, str] | None = None, **more: int) -> list[dict[str, Any]]:
    found, _ = convert(data, mapping, **more)
    assert found.report is not None, found.refusal
    listed: list[dict[str, Any]] = found.report["problems"]["listed"]
    return listed


def table(*records: tuple[str, ...], separator: str = ",", end: str = "\n") -> bytes:
    def cell(text: str) -> str:
        return f'"{text.replace(chr(34), chr(34) * 2)}"' if any(char in text for char in f'"\r\n{separator}') else text

    return "".join(separator.join(map(cell, record)) + end for record in records).encode()


AS_TABLE = [("prompt", "completion"), *((row["prompt"], row["completion"]) for row in ROWS)]
ARRAY = json.dumps(ROWS).encode()
AS_READ: dict[str, bytes] = {
    "json_array": ARRAY,
    "json_array, indented, with a mark": b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode() + b"\n \n",
    "csv": table(*AS_TABLE),
    "csv of Excel": b"\xef\xbb\xbf" + table(*AS_TABLE, separator=";", end="\r\n"),
    "csv by tabs, no last end": table(*AS_TABLE, separator="\t")[:-1],
    "gzip": gzip.compress(jsonl(*ROWS)),
    "gzip of two": gzip.compress(jsonl(*ROWS[:7])) + gzip.compress(jsonl(*ROWS[7:])) + b"\0" * 512,
    "zstd": zstandard.compress(jsonl(*ROWS)),
    "zstd of two": zstandard.compress(jsonl(*ROWS[:7])) + zstandard.compress(jsonl(*ROWS[7:])),
    "gzip+csv": gzip.compress(table(*AS_TABLE)),
    "zstd+json_array": zstandard.compress(ARRAY),
}


@pytest.mark.parametrize("size", [7, 100_000])
@pytest.mark.parametrize("name", AS_READ)
def test_a_file_as_people_have_it_has_the_rows_that_are_in_it(name: str, size: int) -> None:
    found, stored = convert(AS_READ[name], size=size)
    assert found.report is not None, found.refusal
    assert [json.loads(line) for line in stored.splitlines()] == ROWS
    assert (found.report["rows"], found.report["lines"], found.report["problems"]["total"]) == (40, 40, 0)
    assert found.report["converted_from"] == name.partition(",")[0].partition(" ")[0]
    assert found.index == [(0, 0, 0)]


BEGINS = (b"", b"[", b"[{", b"prompt,completion\n", b"question;answer\n", b'{"question": "', gzip.compress(ARRAY)[:60])


@given(st.sampled_from(BEGINS), st.binary(max_size=200), st.sampled_from([None, MAPPING]), st.integers(1, 40))
def test_any_bytes_are_rows_or_have_a_refusal_in_words(
    begin: bytes, rest: bytes, mapping: dict[str, str] | None, size: int
) -> None:
    found, stored = convert(begin + rest, mapping, size=size)
    if found.refusal is None:
        assert found.report is not None
        assert stored.count(b"\n") >= found.report["lines"] - 1
        assert found.report["rows"] + found.report["bad_lines"] + found.report["blank_lines"] == found.report["lines"]
    else:
        assert found.refusal[1].endswith(".")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=5), st.integers(1, 50), st.booleans())
def test_the_elements_of_any_array_are_what_they_are_however_its_bytes_are_cut(
    values: list[Any], size: int, is_indented: bool
) -> None:
    data = json.dumps(values, ensure_ascii=False, indent=1 if is_indented else None).encode("utf-8", "replace")
    found, stored = convert(data, size=size)
    assert [json.loads(line) for line in stored.splitlines()] == json.loads(data)
    assert found.refusal is None or not values


def test_the_cells_of_any_table_are_what_they_are() -> None:
    compared = []
    texts = st.text(min_size=1)

    @given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.sampled_from(",;\t"))
    def check(cells: list[tuple[str, str]], separator: str) -> None:
        data = table(("prompt", "completion"), *cells, separator=separator)
        found, stored = convert(data.replace(b"\0", b""), size=9)
        whole = [(a.replace("\0", ""), b.replace("\0", "")) for a, b in cells]
        report = found.report
        is_whole = report is not None and report["converted_from"] == "csv" and not report["problems"]["total"]
        compared.append(is_whole)
        if is_whole:
            assert [tuple(json.loads(line).values()) for line in stored.splitlines()] == whole

    check()
    assert sum(compared) > len(compared) / 2, "most tables have nothing that would be refused"


def wrong(number: int, line: str) -> bytes:
    lines = table(*[("prompt", "completion"), *[(f"q{at}", f"a{at}") for at in range(9)]]).decode().splitlines()
    lines[number - 1] = line
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("data", "row", "line", "kind", "reason"),
    [
        (wrong(4, "q,a,more"), 3, 4, "bad_table", "has 3 cells, but the header names 2 columns"),
        (wrong(4, "q"), 3, 4, "bad_table", "has 1 cell, but the header names 2 columns"),
        (wrong(4, '"q" and more,a'), 3, 4, "bad_table", 'a quote within one is written twice ("")'),
        (wrong(8, '"q,a'), 7, 8, "bad_table", "never closed: the rest of the file is in it (lines 8 to 10)"),
        (wrong(4, '"two\nlines",'), 3, 4, "nothing_to_learn", "every message of the assistant is empty"),
        (wrong(4, "q,x\udcff"[:-1]).replace(b"q,x", b"q,x\xff"), 3, 4, "not_utf8", "byte 0xff"),
        (json.dumps([*ROWS[:2], {"prompt": 1, "completion": "a"}]).encode(), 3, None, "wrong_value", "must be text"),
        (b'[{"prompt":"q","completion":"a"}, 5]', 2, None, "unknown_form", "is not an object"),
        (b'[{"prompt":"q","completion":"a"}, {"prompt":"q","completion":NaN}]', 2, None, "not_a_number", "has NaN"),
    ],
)  # fmt: skip
def test_a_bad_row_is_said_by_its_number_and_its_line(
    data: bytes, row: int, line: int | None, kind: str, reason: str
) -> None:
    (problem, *others) = problems(data)
    assert not others
    assert (problem["line"], problem["kind"]) == (row, kind)
    assert problem.get("file_line") == line
    assert reason in problem["reason"]


def test_rows_behind_a_bad_one_keep_their_numbers_in_what_is_stored() -> None:
    found, stored = convert(wrong(4, "q,a,more"))
    assert found.report is not None
    assert (found.report["rows"], found.report["lines"], found.report["bad_lines"]) == (8, 9, 1)
    assert [number for number, line in enumerate(stored.split(b"\n"), 1) if b"a3" in line] == [4]
    assert [number for number, line in enumerate(stored.split(b"\n"), 1) if not line] == [3, 10]


def wide_window(data: bytes) -> bytes:
    wide = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    return packer.compress(data) + packer.flush()


LONG = json.dumps([{"prompt": "q", "completion": "a" * 200_000}] * 3).encode()


def zipped(data: bytes) -> bytes:
    """Return a gzip archive without the time, which would be in a test's name."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (gzip.compress(jsonl(*ROWS))[:-20], "archive_damaged", "The gzip archive ends early"),
        (gzip.compress(jsonl(*ROWS))[:-4] + b"abcd", "archive_damaged", "gzip archive is damaged"),
        (gzip.compress(jsonl(*ROWS)) + b"and more", "archive_damaged", "gzip archive is damaged"),
        (zstandard.compress(jsonl(*ROWS))[:-9], "archive_damaged", "The zstd archive ends early"),
        (zstandard.compress(jsonl(*ROWS)) + b"and more", "archive_damaged", "zstd archive is damaged"),
        (wide_window(jsonl(*ROWS)), "archive_damaged", "needs more than 128 MiB to unpack (--long or --ultra)"),
        (zipped(zipped(b"{}")), "not_jsonl", "In the gzip archive: the file is a gzip file"),
        (zipped(b"%PDF-1.7"), "not_jsonl", "In the gzip archive: the file is a PDF document"),
        (zipped(b""), "dataset_empty", "What is in the gzip archive is empty."),
        (zipped(b"[]"), "dataset_empty", "What is in the gzip archive is a JSON array without elements."),
        (ARRAY[:-9], "array_damaged", "ends early, after 39 whole elements"),
        (ARRAY[:-1], "array_damaged", "ends early, after 40 whole elements"),
        (ARRAY[:-1] + b",]", "array_damaged", "has a comma before its end: take that out (after 40 whole elements)"),
        (ARRAY + ARRAY, "array_damaged", "follows: a file is one array, or one object on each line (after 40"),
        (ARRAY.replace(b'mill 7?"', b'mill 7?', 1), "array_damaged", "is no JSON in element 8"),
        (ARRAY.replace(b"}, {", b"} {", 1), "array_damaged", "has '{' where a comma or its end is due (after 1 whole"),
        (ARRAY.replace(b"mill 7", b"mill \xff"), "array_damaged", "byte 0xff"),
        (b"[" * 100_000, "array_damaged", "nested too deeply"),
        (LONG, "array_damaged", "Element 1 of the JSON array is longer than"),
        (b"[]", "dataset_empty", "The file is a JSON array without elements."),
        (b" [\n] ", "dataset_empty", "The file is a JSON array without elements."),
        (ARRAY.partition(b",")[0] + b"}", "array_damaged", "ends early, after 1 whole element:"),
        (b"a,b,a\n1,2,3\n", "bad_table", "the column 'a' more than once"),
        *[
            (b"prompt,completion" + end, "dataset_empty", "The file is a table with a header and no rows.")
            for end in (b"", b"\n", b"\r\n", b"\n\n")
        ],
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [11, 100_000])
def test_a_file_that_is_not_whole_is_refused_with_the_place(data: bytes, code: str, said: str, size: int) -> None:
    found = refusal(data, size=size, row=2000 if data is LONG else MIB)
    assert found[0] == code
    assert said in found[1]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("inner", [b"\n", b" "])
def test_a_bomb_is_given_up_at_the_bound_of_a_dataset(pack: Callable[[bytes], bytes], inner: bytes) -> None:
    begin = b"[" if inner == b" " else b'{"prompt": "q", "completion": "a"}'
    bomb = pack(begin + inner * (40 * MIB))
    assert len(bomb) < 100_000
    tracemalloc.start()
    code, said = refusal(bomb, most=8 * MIB)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == "dataset_too_large"
    assert "MODELYARD_MAX_DATASET_GIB" in said
    assert peak < 40 * MIB


def test_long_lines_and_long_cells_of_a_table_are_one_problem_each() -> None:
    data = table(("prompt", "completion"), ("q", "a" * 3000), ("q", "a"), ("q\n" * 1500, "a"), ("q", "b"))
    found = problems(data, row=2000, size=500)
    assert [(one["line"], one["kind"]) for one in found][:1] == [(1, "line_too_long")]
    assert {one["kind"] for one in found} <= {"line_too_long", "bad_table"}
    _, stored = convert(data, row=2000, size=500)
    assert next(json.loads(line)["completion"] for line in stored.splitlines() if line) == "a"


def test_keys_are_mapped_in_every_kind_of_file() -> None:
    rows = [{"question": "q", "answer": "a", "source": "x"}, {"question": "r", "answer": "b", "source": "y"}]
    mapped = [{"prompt": "q", "completion": "a", "source": "x"}, {"prompt": "r", "completion": "b", "source": "y"}]
    records = [("question", "answer", "source"), ("q", "a", "x"), ("r", "b", "y")]
    for data in (jsonl(*rows), b"\xef\xbb\xbf" + jsonl(*rows), json.dumps(rows).encode(), table(*records)):
        assert rows_of(data, MAPPING) == mapped
        assert rows_of(gzip.compress(data), MAPPING) == mapped
    found, _ = convert(jsonl(*rows), MAPPING)
    assert found.report is not None
    assert (found.report["converted_from"], found.report["mapping"]) == ("jsonl", MAPPING)


@pytest.mark.parametrize(
    ("row", "mapping", "mapped"),
    [
        ({"r": {"q": "x", "a": ["y"]}}, {"prompt": "r.q", "completion": "r.a.0"}, {"prompt": "x", "completion": "y"}),
        ({"qa.q": "x", "answer": "y"}, {"prompt": "qa.q", "completion": "answer"}, {"prompt": "x", "completion": "y"}),
        ({"question": "x", "completion": "y"}, {"prompt": "question"}, {"prompt": "x", "completion": "y"}),
        (
            {"messages": "of another kind", "question": "x", "answer": "y"},
            {"prompt": "question", "completion": "answer"},
            {"prompt": "x", "completion": "y"},
        ),
        ({"chat": chat("q", "a")["messages"]}, {"messages": "chat"}, chat("q", "a")),
        (
            {"question": "x", "answer": "y", "more": None},
            {"instruction": "question", "output": "answer", "input": "more"},
            {"instruction": "x", "output": "y", "more": None},
        ),
    ],
)  # fmt: skip
def test_a_mapping_takes_what_it_names(row: object, mapping: dict[str, str], mapped: object) -> None:
    assert rows_of(jsonl(row), mapping) == [mapped]


def test_what_a_mapping_does_not_find_is_said() -> None:
    (problem,) = problems(jsonl({"question": "q", "answer": "a"}, {"question": "q", "reply": "a"}), MAPPING)
    assert (problem["line"], problem["kind"], problem["path"]) == (2, "missing_field", "$.answer")
    assert "the mapping takes 'completion' from it; the row has the keys 'question', 'reply'" in problem["reason"]
    code, said = refusal(b"question,reply\nq,a\n", MAPPING)
    assert code == "mapping_needed"
    assert "The mapping names 'answer', but the table has the columns 'question', 'reply'." in said
    kinds = [one["kind"] for one in problems(b'{"question": 1\n[]\n{"question": "q", "answer": "a"}\n', MAPPING)]
    assert kinds == ["not_json", "unknown_form"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"question,answer,x\nq,a,x\n", 'send the form field mapping={"prompt": "question", "completion": "answer"}'),
        (b"Frage;Antwort\nq;a\n", 'such as, the form field mapping={"prompt": "Frage", "completion": "Antwort"}'),
        (b"id,Question,Context,Answer\n", '{"instruction": "Question", "input": "Context", "output": "Answer"}'),
    ],
)  # fmt: skip
def test_a_table_of_other_columns_is_told_the_mapping_to_send(data: bytes, said: str) -> None:
    code, message = refusal(data)
    assert code == "mapping_needed"
    assert said in message


def test_columns_of_json_are_read_as_json() -> None:
    messages = json.dumps(chat("q", "a")["messages"])
    data = table(("messages", "tools"), (messages, ""), (str(chat("q", "a")["messages"]), ""))
    found, stored = convert(data)
    assert found.report is not None
    assert json.loads(stored.splitlines()[0]) == chat("q", "a")
    (problem,) = found.report["problems"]["listed"]
    assert (problem["path"], problem["file_line"]) == ("$.messages", 3)
    assert "write it with json.dumps" in problem["reason"]


def test_marks_of_bad_answers_in_a_table_are_marks() -> None:
    data = table(("prompt", "completion", "label"), ("q", "a", "True"), ("r", "b", "false"), ("s", "c", ""))
    (problem,) = problems(data)
    assert (problem["line"], problem["path"]) == (2, "$.label")
    assert [row.get("label") for row in rows_of(data)] == [True, False, None]


def test_parquet_is_read_where_pyarrow_is_there_and_else_told_how(tmp_path: Path, monkeypatch: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    assert rows_of(file.read_bytes()) == ROWS
    assert refusal(file.read_bytes()[:-30])[0] == "archive_damaged"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, said = refusal(file.read_bytes())
    assert code == "extra_missing"
    assert "requirements/install.py parquet" in said


@pytest.mark.parametrize("kind", ["csv", "array", "gzip"])
def test_memory_stays_small_however_long_the_file_is(kind: str) -> None:
    program = f"""
import gzip, json, resource
from modelyard.datasets.conversion_task import Conversion
from modelyard.datasets.converter import converted
def blocks():
    rows = [("How far is it to the mill? " * 4, "Two miles, said the miller. " * 20)] * 400
    if {kind!r} == "csv":
        yield b"prompt,completion\\n"
        block = "".join(f'"{{q}}","{{a}}"\\n' for q, a in rows).encode()
    elif {kind!r} == "array":
        yield b"["
        block = "".join(json.dumps({{"prompt": q, "completion": a}}) + "," for q, a in rows).encode()
    else:
        block = gzip.compress("".join(json.dumps({{"prompt": q, "completion": a}}) + "\\n" for q, a in rows).encode())
    for number in range(150):
        yield block
        if not number:
            global before
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if {kind!r} == "array":
        yield b'{{"prompt": "q", "completion": "a"}}]'
total = 0
def put(block):
    global total
    total += len(block)
found = converted(blocks(), Conversion(1 << 30, 1 << 24, None, "/tmp"), put)
assert found.refusal is None and found.report["rows"] >= 60000, found.refusal
assert total > 35_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 * 1024


def test_jsonl_within_an_archive_is_stored_byte_for_byte() -> None:
    data = b"\xef\xbb\xbf" + questions(3000).replace(b"\n", b"\r\n")
    found, stored = convert(gzip.compress(data))
    assert stored == data
    assert found.report is not None
    assert (found.report["rows"], found.report["crlf_lines"], found.report["byte_order_mark"]) == (3000, 3000, True)
