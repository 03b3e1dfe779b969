"""The graph of a job's states."""

from __future__ import annotations

from modelyard.jobs.tables import ACTIVE, MOVES, JobStatus
from modelyard.states import drawn_moves


def test_the_drawn_graph_is_the_table_of_moves() -> None:
    assert JobStatus.__doc__ is not None
    drawn = drawn_moves(JobStatus.__doc__)
    assert drawn == {str(state): {str(to) for to in targets} for state, targets in MOVES.items() if targets}


def test_exactly_the_active_states_can_be_left() -> None:
    assert {state for state, targets in MOVES.items() if targets} == set(ACTIVE)
    assert set(MOVES) == set(JobStatus)
