"""Tests of deployments may run on each database: `pytestmark = pytest.mark.usefixtures("on_each_database")`."""

from __future__ import annotations

import pytest


@pytest.fixture
def on_each_database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open the test's yards on a fresh database, once of each kind."""
    monkeypatch.setattr("tests.deploy.yard.DATABASE_URL", database_url)
