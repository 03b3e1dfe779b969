"""A client that goes away ends what waits for it, and nothing else."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from modelyard.client_watch import ClientGone, ClientWatch

pytestmark = pytest.mark.timeout(30)


class Client:
    """What a server tells of a client: nothing, until it is gone."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.told = 0

    async def receive(self) -> Message:
        self.told += 1
        if self.told == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def forever(seen: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        seen.append("cancelled")


async def test_what_is_waited_for_is_cancelled_when_the_client_goes() -> None:
    client, seen = Client(), list[str]()
    watch = ClientWatch(client.receive)
    asyncio.get_running_loop().call_later(0.01, client.gone.set)
    with pytest.raises(ClientGone):
        await watch.unless_gone(forever(seen))
    assert seen == ["cancelled"]
    assert watch.is_gone
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling(), "the request itself is not cancelled"
    watch.end()


async def test_what_ends_by_itself_is_returned_and_its_errors_are_its_own() -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 7

    async def late() -> int:
        raise TimeoutError("its own")

    watch = ClientWatch(Client().receive)
    assert await watch.unless_gone(answer()) == 7
    with pytest.raises(TimeoutError, match="its own"):
        await watch.unless_gone(late())
    watch.end()


@pytest.mark.parametrize("begins_first", [True, False])
async def test_the_call_is_given_up_once_also_if_the_client_went_before_it_began(begins_first: bool) -> None:
    client, calls = Client(), list[str]()
    watch = ClientWatch(client.receive)
    if begins_first:
        watch.when_gone(lambda: calls.append("given up"))
    client.gone.set()
    while not watch.is_gone:
        await asyncio.sleep(0)
    if not begins_first:
        watch.when_gone(lambda: calls.append("given up"))
    await asyncio.sleep(0)
    assert calls == ["given up"]
    watch.end()


async def test_a_cancelled_request_stays_cancelled() -> None:
    watch = ClientWatch(Client().receive)
    asking = asyncio.create_task(watch.unless_gone(forever([])))
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    watch.end()


async def test_a_watch_that_has_ended_gives_nothing_up() -> None:
    client, calls = Client(), list[str]()
    watch = ClientWatch(client.receive)
    watch.when_gone(lambda: calls.append("given up"))
    await asyncio.sleep(0)
    watch.end()
    client.gone.set()
    await asyncio.sleep(0.01)
    assert not calls
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "client watch"]
