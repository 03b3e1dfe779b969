"""The supervisor's decisions, as a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelyard.deploy.steps import ChildState, Facts, Step, next_step
from modelyard.deploy.tables import DeploymentState as State
from modelyard.deploy.tables import Wanted

NEW = Facts(
    wanted=Wanted.UP,
    state=State.STARTING,
    child=ChildState.NONE,
    was_ready=False,
    restarts=0,
    max_restarts=3,
    room=True,
    delay_over=True,
)
SERVING = replace(NEW, state=State.READY, child=ChildState.ALIVE, was_ready=True)
DIED = replace(SERVING, child=ChildState.ENDED)


@pytest.mark.parametrize(
    ("facts", "step"),
    [
        (NEW, Step.START),
        (replace(NEW, room=False), Step.WAIT_FOR_ROOM),
        (replace(NEW, child=ChildState.ALIVE), Step.PROBE),
        # An engine that never worked will not work the second time either.
        (replace(NEW, child=ChildState.ENDED), Step.GIVE_UP),
        (SERVING, Step.CHECK_HEALTH),
        (DIED, Step.BACK_OFF),
        (replace(DIED, restarts=2), Step.BACK_OFF),
        (replace(DIED, restarts=3), Step.GIVE_UP),
        (replace(DIED, max_restarts=0), Step.GIVE_UP),
        (replace(DIED, state=State.STARTING, restarts=1), Step.BACK_OFF),
        (replace(DIED, state=State.BACKOFF, child=ChildState.NONE, delay_over=False), Step.WAIT),
        (replace(DIED, state=State.BACKOFF, child=ChildState.NONE), Step.START),
        # Whatever the state, what is not wanted is stopped first and then finished.
        (replace(NEW, wanted=Wanted.DOWN), Step.FINISH),
        (replace(NEW, wanted=Wanted.DOWN, child=ChildState.ALIVE), Step.STOP),
        (replace(SERVING, wanted=Wanted.DOWN), Step.STOP),
        (replace(DIED, wanted=Wanted.DOWN), Step.FINISH),
        (replace(SERVING, state=State.STOPPING), Step.STOP),
        (replace(SERVING, state=State.STOPPING, child=ChildState.NONE), Step.FINISH),
        (replace(DIED, state=State.BACKOFF, child=ChildState.NONE, wanted=Wanted.DOWN, delay_over=False), Step.FINISH),
    ],
)
def test_next_step(facts: Facts, step: Step) -> None:
    assert next_step(facts) == step
