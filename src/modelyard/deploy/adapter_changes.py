"""Changes of the adapters of one deployment: load the wanted ones, or take the wish for a refused one back.

An adapter that the engine refuses ends only the first start of a deployment; one that has served goes on with what it
served before, and its row says what was refused (`Record.take_back`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelyard.deploy.draining import Requests
from modelyard.deploy.record import Record
from modelyard.engine import adapter_loading
from modelyard.engine.adapter_loading import Adapter, AdapterRefused
from modelyard.engine.running_engine import RunningEngine
from modelyard.jobs.runner import JobContext


class AdapterChanges:
    """Loads the adapters of one deployment into its engine."""

    def __init__(self, context: JobContext, record: Record, engine: RunningEngine, requests: Requests) -> None:
        self._context = context
        self._record = record
        self._engine = engine
        self._requests = requests

    async def load_at_start(self, adapters: Sequence[Adapter], has_served: bool) -> list[dict[str, Any]] | None:
        """Load into an engine that has none; return what it serves, or None: look again.

        Raises:
            JobFailure: one was refused, and the deployment never served.
        """
        wanted, refused = list(adapters), None
        asked = [one.adapter_id for one in adapters]
        while True:
            try:
                loaded = await self._load(wanted, [])
            except AdapterRefused as error:
                if not await self._engine.is_well():
                    return None
                if not has_served:
                    if not await self._record.wants(asked):
                        return None
                    raise error.failure from None
                refused = error
                wanted = [one for one in wanted if one.adapter_id != error.adapter_id]
            else:
                break
        if loaded is not None and refused is not None:
            await self._take_back(refused, [one.adapter_id for one in wanted], asked)
        return loaded

    async def change(self, wanted: Sequence[Adapter]) -> None:
        """Load what is wanted, name it to clients, and have what is not wanted leave when its requests have ended."""
        before = self._record.row.loaded
        try:
            loaded = await self._load(wanted, before)
        except AdapterRefused as error:
            if await self._engine.is_well():
                await self._take_back(error, [one["adapter_id"] for one in before], [one.adapter_id for one in wanted])
            return
        if loaded is None:
            return
        kept = {one["name"] for one in loaded}
        self._requests.come(kept)
        await self._record.write(loaded=loaded)
        self._requests.leave(one["name"] for one in before if one["name"] not in kept)
        served = ", ".join(one["adapter_id"] for one in loaded) or "none"
        await self._context.event(f"Adapters in service: {served}.", data={"adapters": loaded})

    async def _load(self, wanted: Sequence[Adapter], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
        engine, model_id = self._engine, self._record.row.model_id
        return await engine.answer(adapter_loading.load(engine.client, model_id, wanted, before))

    async def _take_back(self, refused: AdapterRefused, adapter_ids: list[str], asked: list[str]) -> None:
        await self._record.take_back(refused, adapter_ids, asked)
        await self._context.event(
            f"{refused.failure.message} {refused.failure.hint} What was in service before goes on.",
            level="error", data=refused.as_row(),
        )  # fmt: skip
