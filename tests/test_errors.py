"""The tree of errors is what its drawing says, and each has an answer that OpenAI's clients understand."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import pytest

from modelyard import errors
from modelyard.errors import (
    SHOWN_NAMES,
    EngineStarting,
    JobFailure,
    ModelNotFound,
    ModelyardError,
    StartRefused,
    Unavailable,
)

TYPES = {"authentication_error", "permission_error", "invalid_request_error", "server_error"}
LINE = re.compile(r"^    ((?:[│ ]   )*)(?:[├└]── )?(\w+) +(\d{3}) (\w+)(?: +\(.*\))?$")


@dataclass(frozen=True)
class Drawn:
    name: str
    parent: str | None
    status: int
    code: str


def drawn() -> list[Drawn]:
    """Read the tree in the docstring; a line's depth is where its name begins."""
    found: list[Drawn] = []
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        depth = (match.start(2) - 4) // 4
        above[depth] = match.group(2)
        found.append(Drawn(match.group(2), above.get(depth - 1), int(match.group(3)), match.group(4)))
    return found


CLASSES: list[type[ModelyardError]] = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, ModelyardError)
]


def test_every_error_is_drawn_under_its_parent_with_its_status_and_code() -> None:
    real = {
        Drawn(
            kind.__name__,
            kind.__bases__[0].__name__ if kind is not ModelyardError else None,
            kind.status,
            kind.code,
        )
        for kind in CLASSES
    }
    assert set(drawn()) == real
    assert len(drawn()) == len(CLASSES) > 10


def test_no_two_errors_share_a_code() -> None:
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_answers_in_the_envelope_of_openai(kind: type[ModelyardError]) -> None:
    required: list[Any] = [
        7 if parameter.annotation == "int" else f"<{name}>"
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    error = kind(*required)
    body = error.envelope()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["code"] == kind.code
    assert body["type"] in TYPES
    assert (body["type"] == "server_error") == (error.status >= 500)
    assert body["message"] == str(error)
    # The message is built from what it was given.
    assert all(str(value) in str(error) for value in required)


def test_the_family_follows_the_status() -> None:
    families = {kind.status: kind("message").type for kind in (errors.Unauthorized, errors.Forbidden, errors.NotFound)}
    assert families == {401: "authentication_error", 403: "permission_error", 404: "invalid_request_error"}


def test_one_error_may_carry_a_narrower_code_and_the_field_at_fault() -> None:
    error = errors.Unprocessable("message", param="options.dtype", code="unknown_option")
    assert (error.code, error.param) == ("unknown_option", "options.dtype")
    assert errors.Unprocessable("message").code == "invalid_value"


def test_what_is_not_there_now_says_when_to_come_back() -> None:
    assert Unavailable("message").retry_after_s == 5
    assert EngineStarting("message", retry_after_s=30).retry_after_s == 30


def test_a_model_that_is_not_found_is_told_from_those_that_are() -> None:
    error = ModelNotFound("a/b", where="in service", known=["c/d", "e"], hint="Deploy it.")
    assert error.message == "There is no model 'a/b' in service; there are: c/d, e. Deploy it."
    assert error.param == "model"
    assert ModelNotFound("a/b").message == "There is no model 'a/b' in the store; there are none."
    assert ModelNotFound("a/b").param == "model_id"
    many = [f"acme/{number}" for number in range(SHOWN_NAMES + 1)]
    assert ModelNotFound("a/b", known=many[:-1]).message.endswith("acme/19.")
    assert ModelNotFound("a/b", known=many).message.endswith("acme/19 and others.")
    assert errors.AliasNotFound("a", known=many).message.endswith("acme/19 and others.")


def test_what_ends_a_job_or_a_start_is_no_answer_to_a_request() -> None:
    failure = JobFailure("no_disk", "The disk is full.", "Free some.")
    assert (failure.code, failure.message, failure.hint) == ("no_disk", "The disk is full.", "Free some.")
    for beside in (JobFailure, StartRefused):
        assert not issubclass(beside, ModelyardError)


def test_a_name_of_24_kilobytes_is_not_repeated_in_full() -> None:
    assert len(ModelNotFound("a" * 24_000).message) < 400
