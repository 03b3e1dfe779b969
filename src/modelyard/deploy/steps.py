"""The next step of a deployment's supervisor: one pure function, tested as a table with no process.

The supervisor gathers the facts, asks `next_step`, does what it says, and asks again when something happened.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from modelyard.deploy.tables import DeploymentState, Wanted
from modelyard.engine.child_state import ChildState


class Room(StrEnum):
    """True if an engine may be started now."""

    #: It fits, or nothing could be done about it.
    THERE = "there"
    #: Others are about to give their memory back.
    COMING = "coming"
    #: Others must leave first, although they serve.
    TO_BE_MADE = "to be made"


class Step(StrEnum):
    """One thing to do."""

    #: Wait until another deployment has given its memory back.
    WAIT_FOR_ROOM = "wait for room"
    #: Have those leave that this deployment replaces: both don't fit.
    MAKE_ROOM = "make room"
    #: Start an engine.
    START = "start"
    #: Ask whether it generates.
    PROBE = "probe"
    #: Load and unload adapters.
    CHANGE_ADAPTERS = "change adapters"
    #: Ask whether it is well.
    CHECK_HEALTH = "check health"
    #: Note that it died, and wait before the next start.
    BACK_OFF = "back off"
    #: Wait until the delay has passed.
    WAIT = "wait"
    #: Keep new requests away and let those that it has end.
    DRAIN = "drain"
    #: Let requests in again.
    RESUME = "resume"
    #: End the engine until the next request.
    REST = "rest"
    #: Wait for that request.
    WAIT_FOR_REQUEST = "wait for a request"
    #: A request is there: start again.
    WAKE = "wake"
    #: End the engine.
    STOP = "stop"
    #: Nothing runs and nothing is wanted: the end.
    FINISH = "finish"
    #: Note the cause: the end.
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Facts:
    """Facts that the supervisor knows.

    `has_served`: an engine of it, or of what it brings back, has generated a token. `drained`: it has had no request
    for a moment, or time is up. `unasked`: nobody asked for as long as its idle timeout. `awaited`: a request waits
    for it. `forgiven`: the engine was ended because it did not answer, which is no death of its own.
    """

    wanted: Wanted
    state: DeploymentState
    child: ChildState
    has_served: bool
    restarts: int
    max_restarts: int
    room: Room = Room.THERE
    delay_over: bool = True
    adapters_differ: bool = False
    drained: bool = False
    unasked: bool = False
    awaited: bool = False
    forgiven: bool = False


def next_step(facts: Facts) -> Step:
    """Return what to do. An engine that dies before its first token fails at once: trying again would not help it."""
    if facts.wanted == Wanted.DOWN or facts.state == DeploymentState.STOPPING:
        return Step.STOP if facts.child == ChildState.ALIVE else Step.FINISH
    if facts.wanted == Wanted.DRAINED:
        return _leave(facts)
    if facts.child == ChildState.ENDED:
        if not facts.has_served or (facts.restarts >= facts.max_restarts and not facts.forgiven):
            return Step.GIVE_UP
        return Step.BACK_OFF
    if facts.child == ChildState.ALIVE:
        return _tend(facts)
    if facts.state == DeploymentState.IDLE:
        return Step.WAKE if facts.awaited else Step.WAIT_FOR_REQUEST
    if facts.state == DeploymentState.BACKOFF and not facts.delay_over:
        return Step.WAIT
    return {Room.THERE: Step.START, Room.COMING: Step.WAIT_FOR_ROOM, Room.TO_BE_MADE: Step.MAKE_ROOM}[facts.room]


def _leave(facts: Facts) -> Step:
    if facts.child != ChildState.ALIVE:
        return Step.FINISH
    serves = facts.state in {DeploymentState.READY, DeploymentState.DRAINING}
    return Step.DRAIN if serves and not facts.drained else Step.STOP


def _tend(facts: Facts) -> Step:
    if facts.state == DeploymentState.DRAINING:
        if facts.awaited:
            return Step.RESUME
        return Step.REST if facts.drained else Step.DRAIN
    if facts.state != DeploymentState.READY:
        return Step.PROBE
    if facts.adapters_differ:
        return Step.CHANGE_ADAPTERS
    return Step.DRAIN if facts.unasked else Step.CHECK_HEALTH
