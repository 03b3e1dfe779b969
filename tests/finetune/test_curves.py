"""The rows of a curve: each step once, what was said last, and the thinning; on both databases."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from modelyard.finetune import curves
from tests.finetune.rows import add_dataset, database, start


def test_what_is_no_number_is_left_out_of_a_point() -> None:
    report = {"step": 3, "loss": math.nan, "grad_norm": math.inf, "tokens": 7.0, "epoch": 1, "validation_loss": "low"}
    assert curves.point_of(report | {"learning_rate": True, "colour": 1}) == {"step": 3, "tokens": 7, "epoch": 1.0}
    for step in (None, -1, "3", 1.5, True):
        assert curves.point_of({"step": step, "loss": 1.0}) is None


async def test_a_step_that_is_measured_again_is_one_row_with_what_was_said_last(
    database_url: str, tmp_path: Path
) -> None:
    async with database(database_url, tmp_path) as sessions:
        row = await start(sessions, await add_dataset(sessions))
        async with sessions.begin() as session:
            await curves.write(session, row.id, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "tokens": 2**40}])
        async with sessions.begin() as session:
            await curves.write(session, row.id, [{"step": 2, "validation_loss": 2.5}, {"step": 2, "loss": 1.0}])
            await curves.write(session, row.id, [])
        async with sessions.read() as session:
            points, total = await curves.read(session, row.id, 100)
        assert total == 2
        assert [(point.step, point.loss, point.validation_loss, point.tokens) for point in points] == [
            (1, 3.0, None, None), (2, 1.0, 2.5, 2**40),
        ]  # fmt: skip


@pytest.mark.parametrize(("total", "most"), [(1, 2), (2, 2), (3, 2), (1000, 7), (10, 10), (11, 10)])
async def test_a_thinned_curve_has_so_many_points_evenly_and_both_ends(
    total: int, most: int, database_url: str, tmp_path: Path
) -> None:
    async with database(database_url, tmp_path) as sessions:
        row = await start(sessions, await add_dataset(sessions))
        async with sessions.begin() as session:
            await curves.write(session, row.id, ({"step": 5 * step, "loss": 1.0} for step in range(1, total + 1)))
        async with sessions.read() as session:
            points, count = await curves.read(session, row.id, most)
        steps = [point.step for point in points]
        assert (count, len(steps)) == (total, min(total, most))
        assert (steps[0], steps[-1]) == (5, 5 * total)
        gaps = [after - before for before, after in itertools.pairwise(steps)]
        assert not gaps or max(gaps) - min(gaps) <= 5
