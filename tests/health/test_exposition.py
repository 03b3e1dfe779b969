"""Several expositions become one that Prometheus reads: each family once, each sample with whose it is."""

from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from modelyard.health.exposition import merge

OWN = "# HELP up Up.\n# TYPE up gauge\nup 1.0\n"


def read(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return every sample as Prometheus reads it; fail if one is there twice."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def engine(requests: int) -> str:
    """Return what an engine with some of everything measures."""
    registry = CollectorRegistry()
    counter = Counter("vllm:requests", "Requests.", ["model_name"], registry=registry)
    counter.labels("m").inc(requests)
    Counter("vllm:nothing_yet", "Labelled, and never counted.", ["reason"], registry=registry)
    Gauge("vllm:running", "Running now.", registry=registry).set(2)
    times = Histogram("vllm:time_seconds", "Time.", ["model_name"], buckets=(0.1, 1.0), registry=registry)
    for value in (0.05, 0.5, 5.0):
        times.labels("m").observe(value * requests)
    return generate_latest(registry).decode()


def test_a_family_of_two_engines_is_described_once_and_its_samples_stand_together() -> None:
    merged = merge(OWN, [("one", engine(1)), ("two", engine(2))])
    for family in ("vllm:requests_total", "vllm:running", "vllm:time_seconds", "up"):
        for kind in ("HELP", "TYPE"):
            assert len(re.findall(rf"^# {kind} {family} ", merged, re.MULTILINE)) == 1, (kind, family)
    # Prometheus wants all lines of a family in one group.
    families = [re.sub(r"^# \w+ (\S+).*|^([a-z:_]+?)(_bucket|_sum|_count)?[{ ].*", r"\1\2", line)
                for line in merged.splitlines()]  # fmt: skip
    groups = [name for name, before in zip(families, [None, *families], strict=False) if name != before]
    assert len(groups) == len(set(groups)), groups


def test_every_sample_of_every_engine_is_there_with_its_own_value_and_whose_it_is() -> None:
    merged = read(merge(OWN, [("one", engine(1)), ("two", engine(2))]))
    expected = {("up", frozenset[tuple[str, str]]()): 1.0}
    for name, requests in (("one", 1), ("two", 2)):
        for (sample, labels), value in read(engine(requests)).items():
            expected[sample, labels | {("deployment", name)}] = value
    created = {key for key in expected if key[0].endswith("_created")}
    assert merged.keys() == expected.keys()
    assert {key: value for key, value in merged.items() if key not in created} == {
        key: value for key, value in expected.items() if key not in created
    }
    assert (
        merged["vllm:time_seconds_bucket", frozenset({("le", "+Inf"), ("model_name", "m"), ("deployment", "two")})] == 3
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a 1", 'a{deployment="m"} 1'),
        ("a{} 1", 'a{deployment="m"} 1'),
        ('a{b="c"} 1.5e-07', 'a{deployment="m",b="c"} 1.5e-07'),
        ('a{b="c",} NaN', 'a{deployment="m",b="c"} NaN'),
        ('a{b="c"} +Inf', 'a{deployment="m",b="c"} +Inf'),
        ('a{b="c"} -1 1395066363000', 'a{deployment="m",b="c"} -1 1395066363000'),
        (r'a{b="a \"quoted\" } 1"} 2', r'a{deployment="m",b="a \"quoted\" } 1"} 2'),
        (r'a{b="back\\slash",c="line\nbreak"} 2', r'a{deployment="m",b="back\\slash",c="line\nbreak"} 2'),
        ('a{b="{x}",c="} 7"} 2', 'a{deployment="m",b="{x}",c="} 7"} 2'),
        ('a{b="one\u2028two\x85three"} 2', 'a{deployment="m",b="one\u2028two\x85three"} 2'),
        ("vllm:a_total 1", 'vllm:a_total{deployment="m"} 1'),
    ],
)
def test_a_sample_gets_the_label_and_keeps_all_else(line: str, expected: str) -> None:
    merged = merge("", [("m", line + "\n")])
    assert merged == expected + "\n"
    assert len(read(merged)) == 1


@pytest.mark.parametrize(
    "name", ["openchat/openchat-3.5", 'with "quotes"', "back\\slash", "two\nlines", "brace}", "ü🙂"]
)
def test_the_name_of_a_deployment_is_read_back_as_it_is(name: str) -> None:
    (key,) = read(merge("", [(name, 'a{b="c"} 1\n')]))
    assert dict(key[1]) == {"deployment": name, "b": "c"}


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "<html><body>502 Bad Gateway</body></html>", '{"error": {"message": "no"}}', "Internal Server Error",
     "a", "a ", 'a{b="c', 'a{b="c"}', "a one", "a 1x", "a 1 2 3", "# EOF", "# a comment\n"],
)  # fmt: skip
def test_what_is_no_exposition_is_left_out(text: str) -> None:
    assert merge(OWN, [("m", text)]) == OWN
    assert merge("", [("m", text)]) == ""


def test_a_family_that_the_first_engine_has_only_described_is_described_once() -> None:
    described = "# HELP a A.\n# TYPE a counter\n"
    merged = merge(described, [("one", described), ("two", f'{described}a{{b="c"}} 1\n')])
    assert merged == f'{described}a{{deployment="two",b="c"}} 1\n'


def test_a_name_that_a_histogram_declared_before_could_have_stays_its_own_family() -> None:
    text = '# TYPE jobs histogram\n# TYPE jobs_count gauge\njobs_count 3\njobs_bucket{le="+Inf"} 1\n'
    assert "# TYPE jobs_count gauge\njobs_count 3\n" in merge(text, [])


def test_a_name_that_only_looks_like_part_of_a_histogram_stays_its_own_family() -> None:
    text = (
        '# TYPE jobs_count gauge\njobs_count 3\n# TYPE jobs histogram\njobs_bucket{le="+Inf"} 1\njobs_count_total 1\n'
    )
    merged = merge(text, [])
    assert merged.index("# TYPE jobs_count gauge\njobs_count 3\n") == 0
    assert '# TYPE jobs histogram\njobs_bucket{le="+Inf"} 1\n' in merged
