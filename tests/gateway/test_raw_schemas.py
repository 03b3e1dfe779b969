"""The numbers that a request may send are those that the settings take, and those that are documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le

from modelyard.gateway.raw_routes import GENERATION_CONFIG
from modelyard.gateway.raw_schemas import CONFIG_FIELDS, RANGES, Config, Range
from modelyard.settings import Settings
from tests.gateway.lane import settings_of


@pytest.mark.parametrize("name", RANGES)
def test_the_settings_take_the_same_numbers_as_a_request(name: str) -> None:
    rules: dict[type, Any] = {type(rule): rule for rule in Settings.model_fields[f"generate_{name}"].metadata}
    is_above = Gt in rules
    least = rules[Gt].gt if is_above else rules[Ge].ge
    assert Range(RANGES[name].kind, least, rules[Le].le, is_above) == RANGES[name]


def test_every_field_of_the_configuration_is_documented_and_has_a_default(tmp_path: Path) -> None:
    assert set(GENERATION_CONFIG["properties"]) == set(CONFIG_FIELDS)
    defaults = Config.of_settings(settings_of(tmp_path))
    assert defaults.stored() == {
        "num_beams": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "max_new_tokens": 2048,
        "repetition_penalty": 1.0, "length_penalty": 1.0,
    }  # fmt: skip


def test_a_configuration_is_stored_and_read_again_even_with_fields_of_another_version(tmp_path: Path) -> None:
    defaults = Config.of_settings(settings_of(tmp_path, generate_top_k=3))
    stored = {**defaults.stored(), "temperature": 0.5, "of_the_future": 1}
    del stored["top_k"]
    read = Config.of_kept(stored, defaults)
    assert (read.temperature, read.top_k) == (0.5, 3)
