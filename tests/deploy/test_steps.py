"""The supervisor's decisions, as a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelyard.deploy.steps import Facts, Room, Step, next_step
from modelyard.deploy.tables import DeploymentState as State
from modelyard.deploy.tables import Wanted
from modelyard.engine.child_state import ChildState

NEW = Facts(
    wanted=Wanted.UP,
    state=State.STARTING,
    child=ChildState.NONE,
    has_served=False,
    restarts=0,
    max_restarts=3,
)
SERVING = replace(NEW, state=State.READY, child=ChildState.ALIVE, has_served=True)
DIED = replace(SERVING, child=ChildState.ENDED)
RESTING = replace(SERVING, state=State.IDLE, child=ChildState.NONE)


@pytest.mark.parametrize(
    ("facts", "step"),
    [
        (NEW, Step.START),
        (replace(NEW, room=Room.COMING), Step.WAIT_FOR_ROOM),
        (replace(NEW, room=Room.TO_BE_MADE), Step.MAKE_ROOM),
        (replace(NEW, child=ChildState.ALIVE), Step.PROBE),
        # An engine that never worked will not work the second time either.
        (replace(NEW, child=ChildState.ENDED), Step.GIVE_UP),
        (SERVING, Step.CHECK_HEALTH),
        (DIED, Step.BACK_OFF),
        (replace(DIED, restarts=2), Step.BACK_OFF),
        (replace(DIED, restarts=3), Step.GIVE_UP),
        (replace(DIED, max_restarts=0), Step.GIVE_UP),
        # It was ended because it did not answer: no death of its own.
        (replace(DIED, restarts=3, forgiven=True), Step.BACK_OFF),
        (replace(DIED, has_served=False, forgiven=True), Step.GIVE_UP),
        (replace(DIED, state=State.STARTING, restarts=1), Step.BACK_OFF),
        (replace(DIED, state=State.BACKOFF, child=ChildState.NONE, delay_over=False), Step.WAIT),
        (replace(DIED, state=State.BACKOFF, child=ChildState.NONE), Step.START),
        # In service, adapters change first; nobody's requests are waited for where none comes.
        (replace(SERVING, adapters_differ=True, unasked=True), Step.CHANGE_ADAPTERS),
        (replace(SERVING, unasked=True), Step.DRAIN),
        (replace(SERVING, state=State.DRAINING), Step.DRAIN),
        (replace(SERVING, state=State.DRAINING, drained=True), Step.REST),
        (replace(SERVING, state=State.DRAINING, drained=True, awaited=True), Step.RESUME),
        (replace(DIED, state=State.DRAINING), Step.BACK_OFF),
        (RESTING, Step.WAIT_FOR_REQUEST),
        (replace(RESTING, awaited=True), Step.WAKE),
        (replace(RESTING, wanted=Wanted.DOWN, awaited=True), Step.FINISH),
        # What leaves lets its requests end; what does not serve has none.
        (replace(SERVING, wanted=Wanted.DRAINED, adapters_differ=True), Step.DRAIN),
        (replace(SERVING, wanted=Wanted.DRAINED, state=State.DRAINING), Step.DRAIN),
        (replace(SERVING, wanted=Wanted.DRAINED, state=State.DRAINING, awaited=True), Step.DRAIN),
        (replace(SERVING, wanted=Wanted.DRAINED, state=State.DRAINING, drained=True), Step.STOP),
        (replace(NEW, wanted=Wanted.DRAINED, child=ChildState.ALIVE), Step.STOP),
        (replace(DIED, wanted=Wanted.DRAINED), Step.FINISH),
        (replace(RESTING, wanted=Wanted.DRAINED), Step.FINISH),
        (replace(SERVING, wanted=Wanted.DOWN, state=State.DRAINING), Step.STOP),
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
