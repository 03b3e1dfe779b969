"""What a deployment's supervisor does next: one pure function, tested as a table with no process.

The supervisor gathers the facts, asks `next_step`, does what it says, and asks again when something happened.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from modelyard.deploy.tables import DeploymentState, Wanted


class ChildState(StrEnum):
    """What is known of the engine process of this deployment."""

    #: There is none.
    NONE = "none"
    #: It runs.
    ALIVE = "alive"
    #: It ended by itself, and its end has not been dealt with.
    ENDED = "ended"


class Step(StrEnum):
    """One thing to do."""

    #: Wait until an older deployment has given its memory back.
    WAIT_FOR_ROOM = "wait for room"
    #: Start an engine.
    START = "start"
    #: Ask whether it generates.
    PROBE = "probe"
    #: Ask whether it is well.
    CHECK_HEALTH = "check health"
    #: Note that it died, and wait before the next start.
    BACK_OFF = "back off"
    #: Wait until the delay has passed.
    WAIT = "wait"
    #: End the engine.
    STOP = "stop"
    #: Nothing runs and nothing is wanted: the end.
    FINISH = "finish"
    #: Note the cause: the end.
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Facts:
    """What the supervisor knows. `was_ready`: an engine of this deployment has generated a token before."""

    wanted: Wanted
    state: DeploymentState
    child: ChildState
    was_ready: bool
    restarts: int
    max_restarts: int
    room: bool
    delay_over: bool


def next_step(facts: Facts) -> Step:
    """Return what to do. An engine that dies before its first token fails at once: trying again would not help it."""
    if facts.wanted == Wanted.DOWN or facts.state == DeploymentState.STOPPING:
        return Step.STOP if facts.child == ChildState.ALIVE else Step.FINISH
    if facts.child == ChildState.ENDED:
        if not facts.was_ready or facts.restarts >= facts.max_restarts:
            return Step.GIVE_UP
        return Step.BACK_OFF
    if facts.child == ChildState.ALIVE:
        return Step.CHECK_HEALTH if facts.state == DeploymentState.READY else Step.PROBE
    if facts.state == DeploymentState.BACKOFF and not facts.delay_over:
        return Step.WAIT
    return Step.START if facts.room else Step.WAIT_FOR_ROOM
