"""Adapters in the store with their facts, from their rows: to deploy one opens none of its files.

An adapter's files are read here only where its row has no facts that hold: it was added before rows had them, or with
another version of the rules, or its weights have another size by now. What is read then is written to the row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelyard.db import Sessions
from modelyard.models import actions, adapter_facts, store
from modelyard.models.adapter_facts import AdapterFacts
from modelyard.models.lost import is_lost
from modelyard.models.tables import Model


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter, the folder that it is in, and its facts."""

    adapter_id: str
    path: Path
    facts: AdapterFacts


async def with_facts(sessions: Sessions, models_dir: Path, adapters: Sequence[Model]) -> list[StoredAdapter]:
    """Return adapters with their facts, in the same order."""
    if not adapters:
        return []
    async with sessions.read() as session:
        kept = await actions.adapter_facts_of(session, adapters)
    found = []
    for one in adapters:
        folder, facts = store.folder_of(models_dir, one.path), kept.get(one.path)
        if facts is None or not await asyncio.to_thread(facts.are_of, folder):
            facts = await asyncio.to_thread(adapter_facts.read, folder)
            # What is said of a folder that is not whole must not outlive its coming back.
            if not await asyncio.to_thread(is_lost, models_dir, one):
                async with sessions.begin() as session:
                    await actions.keep_adapter_facts(session, one, facts)
        found.append(StoredAdapter(one.model_id, folder, facts))
    return found
