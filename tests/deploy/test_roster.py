"""The deployments that there are: in which order, how they leave, how they wake."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from pathlib import Path

import pytest

from modelyard.deploy import roster
from modelyard.deploy.tables import Wanted
from modelyard.errors import DeploymentEnded, DeploymentNotFound
from modelyard.jobs import actions as jobs
from tests.routing.rows import NOON, Rows, State, rows

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("on_each_database")]


async def leave(table: Rows, deployment_id: uuid.UUID, *, drain: bool) -> str:
    async with table.sessions.begin() as session:
        return (await roster.leave(session, deployment_id, drain=drain)).wanted


async def wake(table: Rows, deployment_id: uuid.UUID) -> bool:
    async with table.sessions.begin() as session:
        await roster.wake(session, deployment_id)
    return (await table.row(deployment_id)).wake_requested


async def test_live_ones_come_as_they_were_last_asked_for_and_all_by_their_age(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        ids = [await table.add(f"org/{number}", State.STOPPED if number == 2 else State.READY) for number in range(5)]
        await table.change(ids[0], current_at=NOON + timedelta(hours=1))
        await table.change(ids[1], current_at=NOON + timedelta(hours=1))  # of the same moment: the newer one first
        async with table.sessions.read() as session:
            live = [one.id for one in await roster.live(session, limit=10)]
            newest = [one.id for one in await roster.newest(session, limit=10)]
            assert live == [ids[1], ids[0], ids[4], ids[3]]
            assert newest == ids[::-1]
            for read, whole in ((roster.live, live), (roster.newest, newest)):
                pages: list[uuid.UUID] = []
                while page := await read(session, limit=1, before=pages[-1] if pages else None):
                    pages += [one.id for one in page]
                assert pages == whole
                with pytest.raises(DeploymentNotFound) as refusal:
                    await read(session, limit=1, before=uuid.uuid4())
                assert refusal.value.param == "before"


async def test_one_leaves_when_drained_or_at_once_and_never_gets_time_again(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        one = await table.add("org/a")
        assert await leave(table, one, drain=True) == Wanted.DRAINED
        async with table.sessions.read() as session:
            assert (await jobs.get(session, (await table.row(one)).job_id)).interrupt_requested
        assert await leave(table, one, drain=True) == Wanted.DRAINED
        assert await leave(table, one, drain=False) == Wanted.DOWN
        assert await leave(table, one, drain=True) == Wanted.DOWN


@pytest.mark.parametrize("state", [State.STOPPED, State.FAILED])
async def test_one_that_has_ended_does_not_leave_again(tmp_path: Path, state: State) -> None:
    async with rows(tmp_path) as table:
        one = await table.add("org/a", state)
        with pytest.raises(DeploymentEnded, match=f"has ended already .{state}"):
            await leave(table, one, drain=True)
        with pytest.raises(DeploymentNotFound):
            await leave(table, uuid.uuid4(), drain=True)


async def test_only_what_is_idle_and_wanted_is_woken(tmp_path: Path) -> None:
    async with rows(tmp_path) as table:
        for state in State:
            one = await table.add("org/a", state)
            assert await wake(table, one) == (state in (State.IDLE, State.DRAINING)), state
        assert not await wake(table, await table.add("org/a", State.DRAINING, wanted=Wanted.DRAINED))
        idle = await table.add("org/a", State.IDLE)
        assert await asyncio.gather(*(wake(table, idle) for _ in range(5))) == [True] * 5
