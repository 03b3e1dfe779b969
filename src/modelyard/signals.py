"""Signals: those who wait for a change are called when the transaction that made it has committed.

A table declares the topics of its rows (`Base.TOPICS`). `db.Sessions` collects them from all that a transaction writes,
rows and statements alike, and notifies after its commit; a transaction that is rolled back notifies nobody. So no route
and no action calls anybody, and none can forget to.

A signal holds no facts: whoever is called reads them in the database. One may be lost (another process wrote, or the
connection broke off within the commit), so that each subscriber also looks by itself, every few seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from uuid import UUID

#: Called in the event loop, between a commit and the return of its connection: it must neither block nor fail.
Callback = Callable[[], None]
#: The execution option of a statement that declares itself what it notifies, as pairs of topic and row, in place of all
#: topics of its table: `execution_options={NOTIFIES: ((Topic.JOB_NEWS, job_id),)}`, or () for what nobody waits for.
NOTIFIES = "modelyard_notifies"
#: The execution option of a statement that writes only the row with this id.
ROW_ID = "modelyard_row_id"


class Topic(StrEnum):
    """The subjects that somebody waits for."""

    #: A deployment was written: what is in service, or what is wanted there.
    DEPLOYMENTS = "deployments"
    #: An alias was written.
    ALIASES = "aliases"
    #: Memory was promised to a job, or is free again.
    MEMORY = "memory"
    #: A job was created or written: one may be due, or is to stop.
    JOBS = "jobs"
    #: Of one job, whose id is the row: another event, its progress or its status.
    JOB_NEWS = "job_news"


#: The topics of a table, each with the column that has the row's id in signals; None: the topic has no rows.
Topics = tuple[tuple[Topic, str | None], ...]


class Signals:
    """The subscribers of one server."""

    def __init__(self) -> None:
        self._subscribers: dict[tuple[Topic, UUID | None], list[Callback]] = {}

    def subscribe(self, topic: Topic, callback: Callback, row_id: UUID | None = None) -> None:
        """Have `callback` called at each signal of the topic; of a topic with rows, at those of one row."""
        self._subscribers.setdefault((topic, row_id), []).append(callback)

    def unsubscribe(self, topic: Topic, callback: Callback, row_id: UUID | None = None) -> None:
        """Stop calling. Safe to repeat."""
        callbacks = self._subscribers.get((topic, row_id), [])
        if callback in callbacks:
            callbacks.remove(callback)
        if not callbacks:
            self._subscribers.pop((topic, row_id), None)

    def has_subscribers(self, topic: Topic, row_id: UUID | None = None) -> bool:
        """True if anybody waits for the topic, or for one of its rows."""
        return any(row_id in (None, row) for subject, row in self._subscribers if subject == topic)

    def notify(self, topic: Topic, row_id: UUID | None = None) -> None:
        """Call the subscribers of a row; without one those of the whole topic, whichever row they wait for."""
        if row_id is not None:
            found = [*self._subscribers.get((topic, row_id), ())]
        else:
            found = [one for (subject, _), them in self._subscribers.items() if subject == topic for one in them]
        for callback in found:
            callback()
