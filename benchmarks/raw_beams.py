"""What Modelyard's beam search costs beside vLLM's own, on the same engine. Run by `raw.py`.

Both are asked over HTTP and through the gateway: POST /api/generate-batch with `num_beams` (the search is in the
gateway, a step of all beams being one request to the engine), and POST /v1/completions with `use_beam_search` and as
many beams (the search is in the engine's own server). Prompts, beams and tokens are the same, the texts need not be:
vLLM divides scores by another length. The engine ends no text here that both must wait for; what was generated is
counted by what came back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tests.server import Server

from benchmarks import report, tiny_yard

BEAMS, NEW_TOKENS = 4, 32
#: Prompts at the same time.
WIDTHS = (1, 8)
OURS, VLLMS = "POST /api/generate-batch, num_beams", "POST /v1/completions, use_beam_search"


def search(server: Server, place: str, model: str, batch: Sequence[str], name: str) -> float:
    """Have a batch searched; return the seconds.

    Raises:
        SystemExit: it was refused.
    """
    body: dict[str, Any]
    if place == OURS:
        body = {
            "model": model,
            "prompts": [{"request_id": f"{name}-{number}", "prompt": prompt} for number, prompt in enumerate(batch)],
            "generation_config": {"num_beams": BEAMS, "do_sample": False, "max_new_tokens": NEW_TOKENS},
        }
    else:
        body = {"model": model, "prompt": list(batch), "use_beam_search": True, "n": BEAMS, "temperature": 0,
                "max_tokens": NEW_TOKENS}  # fmt: skip
    path = "/api/generate-batch" if place == OURS else "/v1/completions"
    began = time.perf_counter()
    answer = server.request("POST", path, json_body=body, timeout_s=tiny_yard.START_S)
    seconds = time.perf_counter() - began
    if answer.status not in (200, 206):
        raise SystemExit(f"{path}: {answer.status} {answer.text[:300]}")
    return seconds


def measure(server: Server, model: str, prompts: Sequence[str], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Return the seconds of each round by the number of prompts and by who searches."""
    found: dict[int, dict[str, list[float]]] = {width: {OURS: [], VLLMS: []} for width in WIDTHS}
    for number in range(-1, rounds):
        for width, seconds in found.items():
            # In turn, and each time with other prompts, of which the engine has cached nothing.
            batch = prompts[(number + 1) * max(WIDTHS) :][:width]
            for place in (OURS, VLLMS) if number % 2 else (VLLMS, OURS):
                took = search(server, place, model, [f"{place[:6]} {prompt}" for prompt in batch], f"beams-{number}")
                if number >= 0:  # the first one warms up
                    seconds[place].append(took)
        told = (f"{width} prompts {seconds[OURS][-1:]} {seconds[VLLMS][-1:]}" for width, seconds in found.items())
        print(f"round {number + 1}: " + ", ".join(told), flush=True)
    return found


def lines(found: dict[int, dict[str, list[float]]]) -> list[str]:
    """Return the section on beams."""
    rounds = len(next(iter(found.values()))[OURS])
    said = [
        f"{BEAMS} beams, up to {NEW_TOKENS} new tokens, prompts of 10 to 60 words at the same time; medians of "
        f"{rounds} rounds in turn (lowest to highest), both through the gateway, on the same engine. Modelyard's "
        "search is that of transformers and takes a request to the engine at every token; vLLM's runs within the "
        "engine's server. Ratios are round by round.",
        "",
        f"| prompts | {OURS} | {VLLMS} | Modelyard's as a multiple of vLLM's time |",
        "|---|---|---|---|",
    ]
    for width, seconds in found.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds[OURS], seconds[VLLMS], strict=True)]
        cells = [report.spread(times, unit=" s") for times in (seconds[OURS], seconds[VLLMS])]
        said.append(f"| {width} | {' | '.join(cells)} | {report.spread(ratios)} |")
    return said
