"""How fast raw prompts are: a batch beside vLLM and transformers without a server, a continued text beside a fresh one.

    python benchmarks/raw.py [--only batch | --only continuation | --only beams] [--rounds 7] [--write]

A whole Modelyard with a tiny Llama on real vLLM. Batch: 64 prompts to POST /api/generate-batch, to vLLM's
`LLM.generate` and to transformers' `generate`, one after the other and never at once, several rounds; greedy, 128 new
tokens each (prompts whose text would end before are not taken). vLLM's arguments and variables are those of
Modelyard's engine, read from its process. Ratios are round by round.

Continuation: the time to the first byte of a streamed text that goes on under its request id, beside the same text sent
as a prompt under a new id, and beside a text as long that the engine has never seen; in turn, medians. The engine keeps
the KV cache of texts that it knows, so only the last one is computed in full.

Beams: the time of a beam search beside that of vLLM's own (`raw_beams`).
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.server import Server

from benchmarks import raw_beams, report, tiny_yard

HERE = Path(__file__).resolve().parent
CORPUS = HERE.parent / "src" / "modelyard" / "demo" / "corpus.txt"
MODEL = "local:tiny-llama"
PROMPTS = 64
NEW_TOKENS = 128
GOAL = 0.95
ENDED = "<|end|>"
SIZES = (200, 800, 1600)
#: Texts of each size, of how many that are begun, and the tokens that are generated before they count.
TEXTS, BEGUN, GENERATED = 6, 64, 12
#: Tokens of each continuation that is timed. Few, so that the text stays as long as it is said to be.
STEP = 4
MODELYARD, VLLM, TRANSFORMERS = "POST /api/generate-batch", "vLLM, LLM.generate", "transformers, generate"
CONTINUED, FRESH, NEW = "continued by its request id", "the same text under a new id", "a new text as long"


def prompts(count: int, tokens: int | None = None, seed: int | str = 0) -> list[str]:
    """Return prompts, no two alike, from the words that the model's tokenizer was made of.

    About `tokens` tokens each, the tokenizer making some 3 of 2 of these words; between 10 and 60 words by default.
    """
    chance = random.Random(seed)
    words = CORPUS.read_text("utf-8").split()
    lengths = [chance.randint(10, 60) if tokens is None else tokens * 2 // 3 for _ in range(count)]
    return [" ".join(chance.choice(words) for _ in range(length)) for length in lengths]


class Offline:
    """A process of offline.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, batch: Sequence[str], max_tokens: int) -> dict[str, Any]:
        """Generate, and return the seconds, the texts and the tokens of each."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": batch, "max_tokens": max_tokens}), file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for a line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r} ended")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def offline(kind: str, argv: Sequence[str], variables: dict[str, str], scratch: Path) -> Iterator[Offline]:
    """Run a process of offline.py, ready to generate."""
    folder = scratch / kind
    folder.mkdir()
    env = {**variables, "VLLM_RPC_BASE_PATH": str(folder)}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "offline.py"), kind, *argv],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=folder,
        )  # fmt: skip
    try:
        found = Offline(process)
        try:
            found.answer()
        except SystemExit:
            raise SystemExit(f"{kind} did not start: {(folder / 'log').read_text('utf-8')[-2000:]}") from None
        yield found
    finally:
        # It ends with its input.
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def generate_batch(server: Server, batch: Sequence[str], name: str) -> tuple[float, list[str]]:
    """Send a batch; return the seconds and the texts.

    Raises:
        SystemExit: a text ended before its length.
    """
    body = {
        "prompts": [{"request_id": f"{name}-{number}", "prompt": prompt} for number, prompt in enumerate(batch)],
        "generation_config": {"do_sample": False, "max_new_tokens": NEW_TOKENS},
        "only_new_tokens": True,
    }
    began = time.perf_counter()
    answer = server.request("POST", "/api/generate-batch", json_body=body, timeout_s=tiny_yard.START_S)
    seconds = time.perf_counter() - began
    texts = [one["response"] for one in answer.json()] if answer.status == 206 else []
    if len(texts) != len(batch) or any(text.endswith(ENDED) for text in texts):
        raise SystemExit(f"generate-batch: {answer.status} {answer.text[:300]}")
    return seconds, texts


def measure_batch(server: Server, scratch: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of each round in each place, and the part of the texts that are as Modelyard's."""
    argv, variables = tiny_yard.engine(server)
    folder = argv[argv.index("--model") + 1]
    seconds: dict[str, list[float]] = {place: [] for place in (MODELYARD, VLLM, TRANSFORMERS)}
    alike = dict.fromkeys((VLLM, TRANSFORMERS), 0.0)
    with (
        offline("vllm", argv, variables, scratch) as vllm,
        offline("transformers", [folder], variables, scratch) as transformers,
    ):
        others = {VLLM: vllm, TRANSFORMERS: transformers}
        # Each place also does its first work here, which is slower.
        candidates = prompts(2 * PROMPTS)
        firsts = [others[place].ask(candidates, NEW_TOKENS) for place in others]
        ended = {number for found in firsts for number in range(len(candidates))
                 if found["tokens"][number] < NEW_TOKENS or found["texts"][number].endswith(ENDED)}  # fmt: skip
        batch = [prompt for number, prompt in enumerate(candidates) if number not in ended][:PROMPTS]
        if len(batch) < PROMPTS:
            raise SystemExit(f"only {len(batch)} prompts have texts of {NEW_TOKENS} tokens")
        generate_batch(server, batch, "first")
        for number in range(rounds):
            places = list(seconds)
            texts: dict[str, list[str]] = {}
            for place in places[number % 3 :] + places[: number % 3]:
                if place == MODELYARD:
                    took, texts[place] = generate_batch(server, batch, f"round-{number}")
                else:
                    found = others[place].ask(batch, NEW_TOKENS)
                    took, texts[place] = found["seconds"], found["texts"]
                seconds[place].append(took)
            for place in others:
                same = sum(mine == theirs for mine, theirs in zip(texts[MODELYARD], texts[place], strict=True))
                alike[place] += same / PROMPTS / rounds
            print(
                f"round {number + 1}: " + ", ".join(f"{place} {seconds[place][-1]:.2f} s" for place in places),
                flush=True,
            )
    return seconds, alike


def first_byte(server: Server, body: dict[str, Any]) -> tuple[float, str]:
    """Send a request for one streamed text; return the seconds to its first byte, and the text."""
    config = {"do_sample": False, "max_new_tokens": STEP}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60.0)
    sent = json.dumps({**body, "only_new_tokens": True, "generation_config": config})
    try:
        connection.connect()
        began = time.perf_counter()
        connection.request("POST", "/api/generate-one", sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        first = response.read(1)
        seconds = time.perf_counter() - began
        text = (first + response.read()).decode()
    finally:
        connection.close()
    if response.status != 200:
        raise SystemExit(f"generate-one: {response.status} {text}")
    return seconds, text


def begin(server: Server, tokens: int) -> dict[str, str]:
    """Begin texts, most of each its prompt; return each under its request id.

    Taken are those that have not ended and have no torn character, so that they are the same tokens as a prompt: texts
    of real models nearly always are, those of random numbers seldom, and the engine would not know them again.
    """

    def one(number: int) -> tuple[str, str, str]:
        name, [prompt] = f"text-{tokens}-{number}", prompts(1, tokens - GENERATED, seed=f"{tokens} {number}")
        config = {"do_sample": False, "max_new_tokens": GENERATED}
        body = {"request_id": name, "prompt": prompt, "generation_config": config, "stream_response": False}
        answer = server.request("POST", "/api/generate-one", json_body=body, timeout_s=tiny_yard.START_S)
        assert answer.status == 200, answer.text
        return name, prompt, answer.text

    with ThreadPoolExecutor(BEGUN) as pool:
        found = pool.map(one, range(BEGUN))
        taken = [(name, prompt + text) for name, prompt, text in found
                 if not text.endswith(ENDED) and "\N{REPLACEMENT CHARACTER}" not in text]  # fmt: skip
    if len(taken) < TEXTS:
        raise SystemExit(f"only {len(taken)} texts of {tokens} tokens go on")
    return dict(taken[:TEXTS])


def count_tokens(server: Server, text: str) -> int:
    """Return how many tokens a text has when it is sent as a prompt."""
    answer = server.post("/v1/tokenize", {"model": MODEL, "prompt": text})
    count: int = answer.json()["count"]
    return count


def measure_continuation(server: Server, rounds: int) -> dict[int, dict[str, list[float]]]:
    """Return the seconds to the first byte by the text's length in tokens and by how it was asked for."""
    found: dict[int, dict[str, list[float]]] = {}
    for size in SIZES:
        texts = begin(server, size)
        seconds: dict[str, list[float]] = {CONTINUED: [], FRESH: [], NEW: []}
        lengths = [count_tokens(server, text) for text in texts.values()]
        for number in range(rounds):
            for name, text in texts.items():
                if text.endswith(ENDED):
                    continue
                # Whichever comes first finds less in the engine's caches.
                ways = [CONTINUED, FRESH, NEW] if number % 2 else [NEW, FRESH, CONTINUED]
                for way in ways:
                    if way == CONTINUED:
                        took, more = first_byte(server, {"request_id": name})
                        texts[name] = text + more
                    elif way == FRESH:
                        took, _ = first_byte(server, {"request_id": f"{name}-again-{number}", "prompt": text})
                    else:
                        other = prompts(1, size, seed=f"{name} {number}")[0]
                        took, _ = first_byte(server, {"request_id": f"{name}-new-{number}", "prompt": other})
                    seconds[way].append(took)
        found[round(statistics.median(lengths))] = seconds
        print(f"{size} tokens: " + ", ".join(f"{way} {_ms(times)}" for way, times in seconds.items()), flush=True)
    return found


def batch_lines(seconds: dict[str, list[float]], alike: dict[str, float]) -> list[str]:
    """Return the section on batches."""
    rounds = len(seconds[MODELYARD])
    lines = [
        f"{PROMPTS} prompts of 10 to 60 words, {NEW_TOKENS} new tokens each, greedy, bfloat16; medians of {rounds} "
        "rounds in turn (lowest to highest). vLLM runs with the arguments of Modelyard's engine: room for LoRA "
        "adapters, as many sequences, the same threads, the plugins of Modelyard. Ratios are round by round. In "
        "bfloat16, transformers rounds otherwise than vLLM, and a text of random numbers takes another way at once.",
        "",
        "|  | tokens per second | Modelyard as a multiple of it | texts equal to Modelyard's |",
        "|---|---|---|---|",
    ]
    for place, times in seconds.items():
        speed = [PROMPTS * NEW_TOKENS / one for one in times]
        row = [place, report.spread(speed, ",.0f")]
        if place == MODELYARD:
            row += ["", ""]
        else:
            ratios = [theirs / mine for mine, theirs in zip(seconds[MODELYARD], times, strict=True)]
            goal = f", goal {GOAL}" if place == VLLM else ""
            row += [report.spread(ratios) + goal, f"{alike[place]:.0%}"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def continuation_lines(found: dict[int, dict[str, list[float]]]) -> list[str]:
    """Return the section on continuations."""
    count = len(next(iter(found.values()))[CONTINUED])
    lines = [
        f"Time to the first byte of a streamed text, one client, medians of {count} requests for each cell, in turn. "
        f"Each text is a prompt and {GENERATED} tokens or more that were generated. The engine keeps the KV cache of "
        "texts that it has seen, so the first two differ in their way to the engine only; the third is the full work.",
        "",
        f"| tokens | {CONTINUED} | {FRESH} | {NEW} | continued as a multiple of the same text |",
        "|---|---|---|---|---|",
    ]
    for size, ways in found.items():
        ratio = statistics.median(ways[CONTINUED]) / statistics.median(ways[FRESH])
        lines.append(f"| {size:,} | {_ms(ways[CONTINUED])} | {_ms(ways[FRESH])} | {_ms(ways[NEW])} | {ratio:.2f} |")
    return lines


def _ms(times: Sequence[float]) -> str:
    return f"{statistics.median(times) * 1000:.1f} ms"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["batch", "continuation", "beams"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    sections = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        tiny_yard.yard(Path(scratch), [MODEL.removeprefix("local:")]) as server,
    ):
        tiny_yard.deploy(server, MODEL)
        print("the model is in service", flush=True)
        if arguments.only in (None, "continuation"):
            sections["Continued texts"] = continuation_lines(measure_continuation(server, arguments.rounds))
        if arguments.only in (None, "beams"):
            asked = prompts((arguments.rounds + 1) * max(raw_beams.WIDTHS), seed="beams")
            sections["Beam searches"] = raw_beams.lines(raw_beams.measure(server, MODEL, asked, arguments.rounds))
        if arguments.only in (None, "batch"):
            sections["Batches of raw prompts"] = batch_lines(*measure_batch(server, Path(scratch), arguments.rounds))
    for subject, lines in sections.items():
        print("\n".join(["", subject, "", *lines]))
        if arguments.write:
            report.write(HERE / "RESULTS.md", subject, lines)


if __name__ == "__main__":
    main()
