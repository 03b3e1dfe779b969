"""Checks of an adapter before clients may name it: does it act, and has it the tokens of its training?

An engine may take an adapter and not use it. So each one, wherever it is from, must answer otherwise than the model
does without it: other tokens, or the same with other log probabilities. The folder of one that was trained here has
`probes.json`: prompts with the token ids that the training made of them, `{"probes": [{"messages", "tools",
"token_ids"}], "template_source", "template_is_dated"}`. The engine must make the same ids of them (but for the date,
where the template has it), else it would ask for something else than was learnt. In a download, a file of that name is
a stranger's word on itself, and not read. A busy engine is waited for. Nothing is written.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.engine.client import Answer, EngineClient, Prompt
from modelyard.errors import JobFailure
from modelyard.plurals import counted

FILE = "probes.json"
MOST_BYTES = 16 * 1024**2
MOST_PROBES = 16
#: Asked besides the prompts of the training, in the engine's own rendering.
QUESTIONS = ("Name three rivers.", "What is your name?", "Write one short sentence about the sea.")
ANSWER_TOKENS = 16
#: Of an adapter that comes without probes, no more than shows whether it acts: a text as it stands, since not every
#: model has a chat template, and few tokens.
TEXTS = QUESTIONS[:2]
FEW_TOKENS = 4
#: A date and a time of day in tokens, at most.
DATE_TOKENS = 24
#: So many of the training's prompts are answered; of a longer one the end: whether an adapter acts shows there, too.
MOST_ANSWERED = 5
LONGEST_PROMPT = 256
#: All places for adapters may be taken by those that clients ask. Patience, since to wait is no fault of the adapter.
PATIENCE_S = 900.0
RETRY_S = 1.0
#: A change of a log probability is one if it is larger than this, and than so many times what the base changes by
#: itself when it is asked twice.
LEAST_CHANGE = 1e-4
TIMES_NOISE = 4.0


@dataclass(frozen=True)
class Probe:
    """A prompt, and the token ids that the training made of it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    token_ids: list[int]


@dataclass(frozen=True)
class Probes:
    """The facts in an adapter's folder about its training. `template_source`: model or default, if it is said.

    `is_dated`: the chat template puts today's date into prompts, so that some tokens are others on another day.
    """

    probes: tuple[Probe, ...]
    template_source: str
    is_dated: bool = False


def read(folder: Path) -> Probes | None:
    """Return an adapter's probes; None where there is no such file, or one of another form. Blocks."""
    try:
        with open(folder / FILE, "rb") as file:
            said = json.loads(file.read(MOST_BYTES + 1))
        probes = tuple(_probe(one) for one in said["probes"][:MOST_PROBES])
        dated = said.get("template_is_dated") is True
        return Probes(probes, str(said.get("template_source", "")), dated) if probes else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _probe(said: dict[str, Any]) -> Probe:
    messages, tools, ids = said["messages"], said.get("tools"), said["token_ids"]
    if not (isinstance(messages, list) and isinstance(ids, list) and isinstance(tools, list | None)):
        raise TypeError
    if not ids or any(type(one) is not int or one < 0 for one in ids):
        raise ValueError
    return Probe(messages, tools or None, ids)


async def check(
    client: EngineClient, adapter_id: str, name: str, base: str, probes: Probes | None, patience_s: float
) -> dict[str, Any]:
    """Ask an engine whether an adapter acts, and for what its probes tell.

    Args:
        client: The engine.
        adapter_id: What clients call the adapter.
        name: What the engine calls it.
        base: What the engine calls the model without it.
        probes: Of the adapter's folder, if it was trained here.
        patience_s: For how long a busy engine is waited for.

    Returns:
        `{"prompts", "acts", "changed_answers", "largest_logprob_change"}`, with probes `{"tokens_equal",
        "template_source"}` too.

    Raises:
        JobFailure: `tokens_differ`, `prompt_not_rendered`, `adapter_does_not_act`, `adapter_does_not_generate`, or
            `adapter_probe_timeout` where the engine had no time for it.
    """
    asking = _Asking(client, adapter_id, time.monotonic() + patience_s)
    if probes is None:
        texts = [await asking.text(base, one) for one in TEXTS]
        return await _acts(asking, adapter_id, name, base, texts, FEW_TOKENS)
    prompts = []
    for number, probe in enumerate(probes.probes, 1):
        ids = (found := await asking.prompt(base, probe.messages, probe.tools)).token_ids
        if not are_same(ids, probe.token_ids, DATE_TOKENS if probes.is_dated else 0):
            raise _differ(adapter_id, number, probe, ids)
        prompts.append(found)
    del prompts[MOST_ANSWERED:]
    prompts += [await asking.prompt(base, [{"role": "user", "content": one}], None) for one in QUESTIONS]
    found_of_acts = await _acts(asking, adapter_id, name, base, prompts, ANSWER_TOKENS)
    return {"tokens_equal": True, **found_of_acts, "template_source": probes.template_source}


async def _acts(
    asking: _Asking, adapter_id: str, name: str, base: str, prompts: list[Prompt], tokens: int
) -> dict[str, Any]:
    asked = [one.token_ids[-max(1, min(LONGEST_PROMPT, one.max_model_len - tokens)) :] for one in prompts]
    # Once for nothing: what an engine has in its cache it may work out a little differently.
    turns = (base, name, base, name, base)
    _, _, before, adapted, again = [await asking.answers(one, asked, tokens) for one in turns]
    noise = max(change(one, other) for one, other in zip(before, again, strict=True))
    steady = [ids.token_ids == other.token_ids for ids, other in zip(before, again, strict=True)]
    changed = sum(
        is_steady and one.token_ids != other.token_ids
        for is_steady, one, other in zip(steady, before, adapted, strict=True)
    )
    largest = max(change(one, other) for one, other in zip(before, adapted, strict=True))
    if not changed and largest <= max(LEAST_CHANGE, TIMES_NOISE * noise):
        raise JobFailure(
            "adapter_does_not_act",
            f"With {adapter_id} the engine answers {counted(len(prompts), 'prompt')} just as without it: no token is "
            f"another one, and log probabilities differ by {largest:.2g} at most (without it, asked twice, by "
            f"{noise:.2g}).",
            "Train it longer or with a higher learning rate, or choose a later checkpoint; if its weights are not "
            "zero, tell us: the engine does not use it.",
        )
    return {
        "prompts": len(prompts),
        "acts": True,
        "changed_answers": changed,
        "largest_logprob_change": round(largest, 6),
    }


def are_same(ids: Sequence[int], wanted: Sequence[int], most: int) -> bool:
    """True if two prompts are the same but for `most` tokens in one place, which a date may have taken."""
    if ids == wanted:
        return True
    shorter = min(len(ids), len(wanted))
    begin = next((at for at in range(shorter) if ids[at] != wanted[at]), shorter)
    end = next((at for at in range(shorter - begin) if ids[-1 - at] != wanted[-1 - at]), shorter - begin)
    return max(len(ids), len(wanted)) - begin - end <= most


def change(one: Answer, other: Answer) -> float:
    """Return the largest difference of two answers' log probabilities, as far as their tokens are the same."""
    largest = 0.0
    for token, another, logprob, other_logprob in zip(
        one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=False
    ):
        if token != another:
            break
        largest = max(largest, abs(logprob - other_logprob))
    return largest


def _differ(adapter_id: str, number: int, probe: Probe, ids: Sequence[int]) -> JobFailure:
    where = next(
        (at for at, (one, other) in enumerate(zip(ids, probe.token_ids, strict=False)) if one != other),
        min(len(ids), len(probe.token_ids)),
    )

    def at(found: Sequence[int]) -> str:
        return f"token {found[where]}" if where < len(found) else "the end"

    last = str(probe.messages[-1].get("content") if probe.messages else "")
    shown = " ".join(last.split())[:80]
    return JobFailure(
        "tokens_differ",
        f"The engine tokenises prompts otherwise than the training of {adapter_id} did: prompt {number} ('{shown}') "
        f"differs at position {where}, where the training had {at(probe.token_ids)} and the engine has {at(ids)} "
        f"({counted(len(probe.token_ids), 'token')} and {len(ids)}).",
        "Its base has another tokenizer or chat template now than when it was trained: train it again.",
    )


class _Asking:
    """Questions to an engine that may be busy, until an end of patience."""

    def __init__(self, client: EngineClient, adapter_id: str, until: float) -> None:
        self._client = client
        self._adapter_id = adapter_id
        self._until = until

    async def prompt(self, name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Prompt:
        while True:
            found = await self._client.prompt_of(name, messages, tools, self._timeout_s())
            if isinstance(found, Prompt):
                return found
            if found.is_final:
                raise JobFailure(
                    "prompt_not_rendered",
                    f"The engine makes no prompt of messages that {self._adapter_id} was trained on: {found.message}",
                    "Interrupt the deployment and deploy the model with this adapter, so that its engine starts with "
                    "the chat template of the training.",
                )
            await self._wait(found.message)

    async def text(self, name: str, text: str) -> Prompt:
        while True:
            found = await self._client.text_prompt(name, text, self._timeout_s())
            if isinstance(found, Prompt):
                return found
            if found.is_final:
                raise self._no_answers(name, found.message)
            await self._wait(found.message)

    async def answers(self, name: str, prompts: list[list[int]], tokens: int) -> list[Answer]:
        while True:
            found = await self._client.answers(name, prompts, tokens, self._timeout_s())
            if isinstance(found, list):
                return found
            if found.is_final:
                raise self._no_answers(name, found.message)
            await self._wait(found.message)

    def _no_answers(self, name: str, message: str) -> JobFailure:
        return JobFailure(
            "adapter_does_not_generate",
            f"The engine loaded {self._adapter_id}, but the prompts that check it failed with '{name}': {message}",
            "The job's log has all that the engine says.",
        )

    def _timeout_s(self) -> float:
        return max(1.0, self._until - time.monotonic())

    async def _wait(self, what: str) -> None:
        if time.monotonic() >= self._until:
            raise JobFailure(
                "adapter_probe_timeout",
                f"The engine loaded {self._adapter_id}, but had no time for the prompts that check it: {what}.",
                "Other adapters may have taken every place: deploy with a larger options.max_loras, or try again when "
                "fewer are asked.",
            )
        await asyncio.sleep(RETRY_S)
