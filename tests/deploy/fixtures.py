"""Fixtures of deployments, for the tests of all rooms.

Tests may run on each database: `pytestmark = pytest.mark.usefixtures("on_each_database")`. Those of REST share one
whole server of their worker (`live`).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.live import LiveYard, live_yard


@pytest.fixture
def on_each_database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open the test's yards on a fresh database, once of each kind."""
    monkeypatch.setattr("tests.deploy.yard.DATABASE_URL", database_url)


@pytest.fixture(scope="session")
def running_yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveYard]:
    with live_yard(tmp_path_factory.mktemp("live")) as yard:
        yield yard


@pytest.fixture
def live(running_yard: LiveYard) -> LiveYard:
    """A whole server with models and adapters in its store, nothing in service and no alias."""
    running_yard.clear()
    return running_yard
