"""Adapters of a running engine: loaded under a versioned name, probed, checked, named to clients, unloaded.

An engine knows an adapter as `<adapter id>@<n>`, so that a changed adapter never takes the name of the one before it,
whose requests still run: replacing in place has vLLM keep answers of the old one. What is checked of an adapter is
`adapter_probes`'. The supervisor names it to clients; nothing here writes to the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.engine import adapter_probes
from modelyard.engine.client import EngineClient
from modelyard.errors import JobFailure
from modelyard.models.ids import is_trained

LOAD_TIMEOUT_S = 120.0
UNLOAD_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Adapter:
    """An adapter that is wanted, and the folder that it is in."""

    adapter_id: str
    path: Path

    def is_loaded(self, loaded: Sequence[dict[str, Any]]) -> bool:
        """True if this very folder is what an engine serves."""
        return any(one["adapter_id"] == self.adapter_id and one["path"] == str(self.path) for one in loaded)


class AdapterRefused(Exception):
    """An adapter was not loaded, or does not generate; the engine is as it was."""

    def __init__(self, adapter_id: str, failure: JobFailure) -> None:
        super().__init__(failure.message)
        self.adapter_id = adapter_id
        self.failure = failure

    def as_row(self) -> dict[str, str]:
        """Return it as a deployment's row keeps it."""
        return {
            "adapter_id": self.adapter_id,
            "code": self.failure.code,
            "message": self.failure.message,
            "hint": self.failure.hint,
        }


async def load(
    client: EngineClient, base: str, wanted: Sequence[Adapter], loaded: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Have an engine serve what is wanted besides what it has; return the adapters that are wanted as a row keeps them.

    What is loaded but not wanted is left alone. When one fails, those that were loaded before it are unloaded again.
    `base` is the engine's name for its model.

    Raises:
        AdapterRefused: the engine does not load one, or that one does not generate, or does not pass its checks.
    """
    fresh: list[dict[str, Any]] = []
    # An engine that is silent for a moment must not be given a name twice: it would refuse the adapter.
    names = [*(await client.names() or []), *(one["name"] for one in loaded)]
    try:
        for adapter in wanted:
            if adapter.is_loaded(loaded):
                continue
            name = _next_name(adapter.adapter_id, names)
            names.append(name)
            fresh.append({"adapter_id": adapter.adapter_id, "name": name, "path": str(adapter.path)})
            # Only a training here writes them: a file of that name in a download is a stranger's word on itself.
            trained_here = is_trained(adapter.adapter_id)
            probes = await asyncio.to_thread(adapter_probes.read, adapter.path) if trained_here else None
            patience_s = PROBE_TIMEOUT_S if probes is None else adapter_probes.PATIENCE_S
            await _load_one(client, adapter, name, patience_s)
            fresh[-1]["checks"] = await _check(client, adapter, name, base, probes, patience_s)
    except BaseException:
        for one in fresh:
            await client.unload_adapter(one["name"], UNLOAD_TIMEOUT_S)
        raise
    by_id = {one["adapter_id"]: one for one in [*loaded, *fresh]}
    return [by_id[adapter.adapter_id] for adapter in wanted]


async def _load_one(client: EngineClient, adapter: Adapter, name: str, probe_timeout_s: float) -> None:
    wrong = await client.load_adapter(name, adapter.path, LOAD_TIMEOUT_S)
    if wrong:
        raise AdapterRefused(
            adapter.adapter_id,
            JobFailure(
                "adapter_not_loaded",
                f"The engine did not load {adapter.adapter_id}: {wrong}",
                "Check that it was trained for this very model; the job's log has all that the engine says.",
            ),
        )
    # vLLM answers 200 to some adapters with which every request then fails.
    failed = await client.generates(name, "generate", probe_timeout_s)
    if failed is None:
        return
    if failed.message.startswith("no answer"):
        raise AdapterRefused(
            adapter.adapter_id,
            JobFailure(
                "adapter_probe_timeout",
                f"The engine loaded {adapter.adapter_id}, but gave {failed.message}.",
                "Other adapters may have taken every place: deploy with a larger options.max_loras, or try again when "
                "fewer are asked.",
            ),
        )
    if failed.is_not_finite:
        raise AdapterRefused(
            adapter.adapter_id,
            JobFailure(
                "adapter_not_finite",
                f"The engine loaded {adapter.adapter_id}, but with it the model computes NaN or infinity.",
                "Its weights are damaged or its training diverged: add it again, or train it with a lower "
                "learning_rate.",
            ),
        )
    raise AdapterRefused(
        adapter.adapter_id,
        JobFailure(
            "adapter_does_not_generate",
            f"The engine loaded {adapter.adapter_id}, but a prompt of one word failed with it: {failed.message}",
            "Check that it was trained for this very model; the job's log has all that the engine says.",
        ),
    )


async def _check(
    client: EngineClient,
    adapter: Adapter,
    name: str,
    base: str,
    probes: adapter_probes.Probes | None,
    patience_s: float,
) -> dict[str, Any]:
    try:
        return await adapter_probes.check(client, adapter.adapter_id, name, base, probes, patience_s)
    except JobFailure as failure:
        raise AdapterRefused(adapter.adapter_id, failure) from None


def _next_name(adapter_id: str, names: Sequence[str]) -> str:
    used = [name.removeprefix(f"{adapter_id}@") for name in names if name.startswith(f"{adapter_id}@")]
    return f"{adapter_id}@{max((int(number) for number in used if number.isdecimal()), default=0) + 1}"
