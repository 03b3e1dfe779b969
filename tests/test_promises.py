"""Promises made in words hold: the drawn states, the manual's commands, routes and bounds, words for every module."""

from __future__ import annotations

import ast
import importlib
import re
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.routing import Match

from modelyard.cli import app as command_line
from modelyard.settings import Settings
from modelyard.states import drawn_moves
from tests.manual import TEXTS, WHOLE, section, shell_lines
from tests.walk import application, every_path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "modelyard").rglob("*.py"))


def modules_with_states() -> list[str]:
    """Return the modules that have a table of moves, found by their text so that none is forgotten."""
    return [
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for path in SOURCES
        if re.search(r"^MOVES\b", path.read_text("utf-8"), re.MULTILINE)
    ]


def states_of(module: ModuleType) -> type[StrEnum]:
    kinds = {type(state) for state in module.MOVES}
    assert len(kinds) == 1
    (kind,) = kinds
    assert issubclass(kind, StrEnum)
    return kind


def test_the_rooms_with_states_are_found() -> None:
    assert {"modelyard.jobs.tables", "modelyard.deploy.tables"} <= set(modules_with_states())


@pytest.mark.parametrize("name", modules_with_states())
def test_the_drawing_of_the_states_is_their_table(name: str) -> None:
    module = importlib.import_module(name)
    states = states_of(module)
    assert set(module.MOVES) == set(states), "every state is in the table"
    table = {str(state): {str(target) for target in targets} for state, targets in module.MOVES.items() if targets}
    assert drawn_moves(states.__doc__ or "") == table


@pytest.mark.parametrize("name", modules_with_states())
def test_every_state_but_the_first_can_be_reached_and_has_its_line(name: str) -> None:
    module = importlib.import_module(name)
    states = states_of(module)
    reached = {next(iter(states))}
    while more := {target for state in reached for target in module.MOVES[state]} - reached:
        reached |= more
    assert reached == set(states)
    source = Path(module.__file__ or "").read_text("utf-8")
    for state in states:
        assert re.search(rf'^    #: .+\n    {state.name} = "{state.value}"$', source, re.MULTILINE), state


def test_every_make_target_that_the_manual_names_is_there() -> None:
    named = set(re.findall(r"`make ([a-z-]+)", WHOLE)) | {
        found[1] for line in shell_lines() if (found := re.match(r"(?:\$ )?make ([a-z-]+)", line))
    }
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"demo", "test", "serve"} <= named
    assert named <= targets


def test_every_command_that_the_manual_names_is_there() -> None:
    named = set(re.findall(r"`(?:\.venv/bin/)?modelyard ([a-z]+)", WHOLE))
    known = {command.callback.__name__ for command in command_line.registered_commands if command.callback}
    assert "doctor" in named
    assert named <= known


def test_every_curl_command_of_the_manual_asks_for_a_route_that_is_there() -> None:
    routes = application().routes
    asked = 0
    for line in shell_lines():
        found = re.match(r"curl\b.*?http://[\w.:]+(/[^\s'\"?]*)", line)
        if found is None:
            continue
        method = re.search(r"-X (\w+)", line)
        default = "POST" if re.search(r"\s(-d|--data|--json)\b", line) else "GET"
        path = re.sub("(JOB|FINETUNE)_ID", "00000000-0000-4000-8000-000000000000", found[1])
        scope: dict[str, Any] = {
            "type": "http",
            "method": method[1] if method else default,
            "path": path,
            "headers": [],
        }
        assert any(route.matches(scope)[0] is Match.FULL for route in routes), line
        asked += 1
    assert asked >= 20


def test_the_manual_lists_every_route_of_the_api() -> None:
    listed = set()
    for methods, path in re.findall(
        r"((?:`?\b(?:GET|POST|DELETE|PUT|PATCH)\b`?,? ?)+)`?(/[^`?]*)", TEXTS["docs/rest.md"]
    ):
        for method in re.findall(r"[A-Z]+", methods):
            listed.add((method, re.sub(r"\{\w+\}", "*", path.rstrip("/"))))
    wanted = set()
    for method, path in every_path(application()):
        path = re.sub(r"no/such|7000000|00000000-0000-4000-8000-000000000000", "*", path.rstrip("/"))
        if re.match(r"/api/v1/(models|deploy|aliases|datasets|finetune|jobs)", path):
            wanted.add((method, path))
    assert wanted - listed == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_every_module_and_every_public_function_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"line {node.lineno}: {node.name}"


def test_the_table_of_bounds_has_every_bound_on_a_client_with_its_default() -> None:
    table = section("docs/settings.md", "Bounds")
    rows = re.findall(r"^\| .+ \| (.+) \| `MODELYARD_(\w+)` \| .*\|$", table, re.MULTILINE)
    told = {name.lower(): float(re.findall(r"[\d.]+", default)[0]) for default, name in rows}
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    bounds = {name for name in defaults if name.startswith(("request_max_", "max_")) or "_chars_per_" in name}
    assert bounds - {"max_downloads", "max_finetunes"} <= told.keys()  # of these two, more wait
    assert told == {name: defaults[name] for name in told}
