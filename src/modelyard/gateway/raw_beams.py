"""Beam searches on an engine: those of one request go step by step together, so that each step is one request to it.

A step in which many tokens of each beam are asked for (whatever may be drawn, or a whole vocabulary) is several small
requests instead: while an engine writes the answer to one, it does nothing for others.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from modelyard.gateway.beam_search import ALL, Row, Search, Shaped
from modelyard.gateway.raw_engine import Asking, together

#: vLLM takes 1,024 prompts in one request; more of them are several requests at the same time.
PROMPTS_AT_ONCE = 1024
#: Tokens with their log probabilities in the answer to one request, which the engine writes in some 50 ms.
TOKENS_IN_ANSWER = 20_000
#: As many as a large vocabulary has, for one whose size is not known.
LARGE_VOCABULARY = 150_000
REQUESTS_AT_ONCE = 4
#: More tokens are sorted in a thread, so that others get their turn meanwhile.
SORTED_AT_ONCE = 2000

Place = tuple[Search, int]


async def run(asking: Asking, searches: Sequence[Search], vocabulary: int | None) -> None:
    """Search until all have ended; `vocabulary` is how many tokens the model has, where that is known.

    Raises:
        EngineRefused, BadGateway, ClientGone: as from the engine; the searches are of no use then.
    """
    while open_searches := [search for search in searches if not search.is_over]:
        by_count: dict[int, list[Search]] = defaultdict(list)
        for search in open_searches:
            by_count[search.count].append(search)
        sizes = {count: (vocabulary or LARGE_VOCABULARY) if count == ALL else count for count in by_count}
        steps = [partial(_step, asking, count, sizes[count], some) for count, some in by_count.items()]
        await together(steps, len(steps))


async def _step(asking: Asking, count: int, size: int, searches: Sequence[Search]) -> None:
    """Have searches that ask for as many tokens take one step, or ask for more."""
    texts = [(search, number, text) for search in searches for number, text in enumerate(search.open_texts)]
    width = min(PROMPTS_AT_ONCE, max(1, TOKENS_IN_ANSWER // size))
    parts = [texts[start : start + width] for start in range(0, len(texts), width)]
    answers = await together([partial(_ask, asking, count, part) for part in parts], REQUESTS_AT_ONCE)
    shaped = iter([one for answer in answers for one in answer])
    for search in searches:
        search.advance([next(shaped) for _ in search.open_texts])


async def _ask(asking: Asking, count: int, part: Sequence[tuple[Search, int, list[int]]]) -> list[Shaped | None]:
    rows = await asking.next_tokens([text for _, _, text in part], count)
    places = [(search, number) for search, number, _ in part]
    if sum(len(row.logprobs) for row in rows) > SORTED_AT_ONCE:
        return await asyncio.to_thread(_shape, places, rows)
    return _shape(places, rows)


def _shape(places: Sequence[Place], rows: Sequence[Row]) -> list[Shaped | None]:
    return [search.shape(number, row) for (search, number), row in zip(places, rows, strict=True)]
