"""Beam searches on an engine: those of one request go step by step together, so that each step is one request to it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from modelyard.gateway.beam_search import Row, Search
from modelyard.gateway.raw_engine import Asking, together

#: vLLM takes 1,024 prompts in one request; more of them are several requests at the same time.
PROMPTS_AT_ONCE = 1024
#: More candidates are sorted in a thread, so that others get their turn meanwhile.
SORTED_AT_ONCE = 2000


async def run(asking: Asking, searches: Sequence[Search]) -> None:
    """Search until all have ended.

    Raises:
        EngineRefused, BadGateway, ClientGone: as from the engine; the searches are of no use then.
    """
    while open_searches := [search for search in searches if not search.is_over]:
        by_count: dict[int, list[Search]] = defaultdict(list)
        for search in open_searches:
            by_count[search.count].append(search)
        await together([partial(_step, asking, count, some) for count, some in by_count.items()], len(by_count))


async def _step(asking: Asking, count: int, searches: Sequence[Search]) -> None:
    """Have searches that ask for as many tokens take one step, or ask for more."""
    texts = [search.open_texts for search in searches]
    flat = [text for some in texts for text in some]
    parts = [flat[start : start + PROMPTS_AT_ONCE] for start in range(0, len(flat), PROMPTS_AT_ONCE)]
    answers = await together([partial(asking.next_tokens, part, count) for part in parts], len(parts))
    rows = [row for answer in answers for row in answer]
    advance = partial(_advance, searches, [len(some) for some in texts], rows)
    if sum(len(row.logprobs) for row in rows) > SORTED_AT_ONCE:
        await asyncio.to_thread(advance)
    else:
        advance()


def _advance(searches: Sequence[Search], widths: Sequence[int], rows: Sequence[Row]) -> None:
    start = 0
    for search, width in zip(searches, widths, strict=True):
        search.advance(rows[start : start + width])
        start += width
