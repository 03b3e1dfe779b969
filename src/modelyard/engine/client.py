"""The supervisor's own requests to an engine: is it there, can it generate, what does it serve and measure.

Every request has a connection of its own and a time limit, so that open streams do not hold it up, and none of them
raises for what an engine does: an engine that does not answer is a fact like others.
Of adapters in vLLM 0.32: to unload one takes its name away and nothing else, and requests that have begun end whole.
To load one takes milliseconds, but its first request waits while all `--max-loras` slots run other adapters. All
figures are as of the engine's last step, so that they miss a request until it has given its first token or waited.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from modelyard import evidence
from modelyard.errors import is_out_of_files
from modelyard.plurals import counted

HEALTH_TIMEOUT_S = 5.0
MESSAGE_CHARACTERS = 500
#: What an engine says (400) when its answer holds NaN or infinity, which JSON cannot.
OUT_OF_RANGE = "Out of range float values"
#: vLLM's stand-in for the log probability minus infinity, which the likeliest token cannot have.
LEAST_LOGPROB = -9999.0
#: What grows in an engine that works, whether it generates or embeds.
WORK = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
_RUNNING_ADAPTERS = re.compile(r'vllm:lora_requests_info\{.*running_lora_adapters="([^"]*)".*\} ([0-9][0-9.e+]*)$')
# What vLLM wraps the words of its worker in.
_WORKER = re.compile(r"Call to \w+ method failed: Worker failed with error '(.+)', please check the stack trace.*")


class Health(StrEnum):
    """An engine's answer to the question for its health."""

    #: It answers 200.
    GOOD = "good"
    #: It answers that it is dead.
    BAD = "bad"
    #: It does not answer.
    SILENT = "silent"


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt: tokens, and how likely each was."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Prompt:
    """The prompt that a conversation becomes, and the most tokens that the engine takes with the answer."""

    token_ids: list[int]
    max_model_len: int


@dataclass(frozen=True)
class Wrong:
    """Why there is no answer. `is_final`: asking again would not help. `status`: of HTTP, 0 without an answer."""

    message: str
    is_final: bool
    status: int = 0
    #: The model computed NaN or infinity.
    is_not_finite: bool = False


class EngineClient:
    """Talks to one engine over its Unix socket; close it with `close`."""

    def __init__(self, url: str) -> None:
        # Imported with the first deployment: the server's start is a tenth shorter, and 8 MB smaller, without it.
        import aiohttp

        self._errors = (aiohttp.ClientError, TimeoutError, OSError)
        self._timeout = aiohttp.ClientTimeout
        self._http = aiohttp.ClientSession(
            base_url="http://engine",
            connector=aiohttp.UnixConnector(path=url.removeprefix("unix:"), force_close=True),
        )

    async def close(self) -> None:
        """Close the connections. Safe to repeat."""
        await self._http.close()

    async def health(self) -> Health:
        """Ask whether the engine is alive; never raises."""
        try:
            timeout = self._timeout(total=HEALTH_TIMEOUT_S)
            async with self._http.get("/health", timeout=timeout) as response:
                return Health.GOOD if response.status == 200 else Health.BAD
        except self._errors as error:
            # Without a file of our own to ask with nothing is known of the engine, and it must not be ended for that.
            return Health.GOOD if is_out_of_files(error) else Health.SILENT

    async def generates(self, name: str, task: str, timeout_s: float) -> Wrong | None:
        """Have the engine do its work once, with a short input; return what is wrong, or None if it works.

        It works if the numbers that it answers with (log probabilities, or the vector of an embedding) are finite: of
        NaN logits vLLM takes token 0 each time, and answers 200. An error of the engine's own (500) is not final.
        """
        path = "/v1/completions"
        body: dict[str, Any] = {"model": name, "prompt": "Hi", "max_tokens": 1, "temperature": 0, "logprobs": 1}
        if task == "embed":
            path, body = "/v1/embeddings", {"model": name, "input": "Hi", "encoding_format": "float"}
        found = await self._ask(path, body, timeout_s)
        if isinstance(found, Wrong):
            if found.status == 400 and OUT_OF_RANGE in found.message:
                return _not_finite(task)
            is_final = found.is_final and (found.status < 500 or found.status == 501)
            return replace(found, is_final=is_final)
        try:
            numbers = _vector(found) if task == "embed" else _logprobs(found)
        except (LookupError, TypeError, AttributeError):
            return Wrong("its answer lacks the numbers that were asked for", is_final=True, status=200)
        return None if numbers and all(map(_is_finite, numbers)) else _not_finite(task)

    async def load_adapter(self, name: str, path: Path, timeout_s: float) -> str:
        """Have the engine serve the adapter in a folder under a name; return what is wrong in one line, or ''.

        Safe to repeat: a name that serves this folder already is no error. After a timeout the engine may yet load it:
        unload it, or repeat. That it loaded does not mean that it generates: ask `generates`.
        """
        wrong = await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, timeout_s)
        if wrong.startswith("HTTP 400") and (await self._roots() or {}).get(name) == str(path):
            return ""
        return wrong

    async def unload_adapter(self, name: str, timeout_s: float) -> str:
        """Have the engine forget an adapter's name; return what is wrong in one line, or '', also if it had none such.

        Requests that it has begun end whole. The folder must stay until they have: the engine may read it again.
        """
        wrong = await self._post("/v1/unload_lora_adapter", {"lora_name": name}, timeout_s)
        return "" if wrong.startswith("HTTP 404") and "cannot be found" in wrong else wrong

    async def prompt_of(
        self, name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, timeout_s: float
    ) -> Prompt | Wrong:
        """Return the prompt that the engine makes of a conversation that awaits an answer."""
        body: dict[str, Any] = {"model": name, "messages": messages, "add_generation_prompt": True}
        return await self._tokenized(body | ({"tools": tools} if tools else {}), timeout_s)

    async def text_prompt(self, name: str, text: str, timeout_s: float) -> Prompt | Wrong:
        """Return the prompt that the engine makes of a text: every model that generates has one."""
        return await self._tokenized({"model": name, "prompt": text}, timeout_s)

    async def _tokenized(self, body: dict[str, Any], timeout_s: float) -> Prompt | Wrong:
        found = await self._ask("/tokenize", body, timeout_s)
        if isinstance(found, Wrong):
            return found
        try:
            return Prompt([int(one) for one in found["tokens"]], int(found["max_model_len"]))
        except (LookupError, TypeError, ValueError):
            return Wrong("its answer has no tokens", is_final=True)

    async def answers(
        self, name: str, prompts: list[list[int]], max_tokens: int, timeout_s: float
    ) -> list[Answer] | Wrong:
        """Return what the engine answers to prompts of token ids, always with the likeliest token."""
        body = {
            "model": name, "prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1,
            "return_token_ids": True,
        }  # fmt: skip
        found = await self._ask("/v1/completions", body, timeout_s)
        if isinstance(found, Wrong):
            return found
        try:
            choices = sorted(found["choices"], key=lambda choice: int(choice["index"]))
            answers = [
                Answer([int(one) for one in choice["token_ids"]],
                       [float(one) for one in choice["logprobs"]["token_logprobs"]])
                for choice in choices
            ]  # fmt: skip
        except (LookupError, TypeError, ValueError):
            return Wrong("its answer has no tokens with their probabilities", is_final=True)
        if len(answers) != len(prompts):
            return Wrong(
                f"it gave {counted(len(answers), 'answer')} to {counted(len(prompts), 'prompt')}", is_final=True
            )
        return answers

    async def names(self) -> list[str] | None:
        """Return what the engine serves now, its own names before its adapters'; None if it does not answer."""
        roots = await self._roots()
        return None if roots is None else list(roots)

    async def open_requests(self) -> int | None:
        """Return how many requests run or wait in the engine; None if it does not answer.

        As of its last step: a request that has just arrived may not be counted yet.
        """
        text = await self.metrics()
        counts = [total(text, "vllm:num_requests_running"), total(text, "vllm:num_requests_waiting")]
        return None if counts[0] is None else int(sum(count or 0.0 for count in counts))

    async def adapters_in_use(self) -> set[str] | None:
        """Return the adapters with requests that have given a token and not ended; None if it does not answer.

        Requests that have given none are not seen: ask again before an empty answer is believed.
        """
        text = await self.metrics()
        return newest_adapters(text) if text else None

    async def answered_requests(self) -> float | None:
        """Return a number that grows whenever the engine works on a request; None if it does not answer.

        It is the sum of its tokens read, its tokens generated and its requests ended. It starts anew with the engine.
        """
        text = await self.metrics()
        counts = [total(text, name) for name in WORK]
        return None if counts[0] is None else sum(count or 0.0 for count in counts)

    async def metrics(self) -> str:
        """Return the engine's figures in Prometheus' text format; empty if it does not answer."""
        try:
            timeout = self._timeout(total=HEALTH_TIMEOUT_S)
            async with self._http.get("/metrics", timeout=timeout) as response:
                return await response.text() if response.status == 200 else ""
        except self._errors:
            return ""

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> str:
        try:
            async with self._http.post(path, json=body, timeout=self._timeout(total=timeout_s)) as response:
                text = await response.text(errors="replace")
                return "" if response.status == 200 else f"HTTP {response.status}: {_message(text)}"
        except TimeoutError:
            return f"no answer within {timeout_s:g} s"
        except self._errors as error:
            return evidence.in_words(error)

    async def _ask(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any] | Wrong:
        try:
            async with self._http.post(path, json=body, timeout=self._timeout(total=timeout_s)) as response:
                text = await response.text(errors="replace")
                if response.status != 200:
                    is_final = response.status not in (408, 429, 503)
                    return Wrong(f"HTTP {response.status}: {_message(text)}", is_final, response.status)
        except TimeoutError:
            return Wrong(f"no answer within {timeout_s:g} s", is_final=False)
        except self._errors as error:
            return Wrong(evidence.in_words(error), is_final=False)
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else Wrong("its answer is no JSON", is_final=True)

    async def _roots(self) -> dict[str, str] | None:
        """Return what the engine serves, each name with the folder behind it."""
        try:
            async with self._http.get("/v1/models", timeout=self._timeout(total=HEALTH_TIMEOUT_S)) as response:
                if response.status != 200:
                    return None
                cards = (await response.json(content_type=None))["data"]
                return {str(card["id"]): str(card.get("root")) for card in cards}
        except (*self._errors, ValueError, LookupError, TypeError, AttributeError):
            return None


def total(text: str, name: str) -> float | None:
    """Return the sum of a metric over all its labels in Prometheus' text; None if it is not there."""
    found = None
    for line in text.splitlines():
        if not line.startswith(name) or line[len(name) : len(name) + 1] not in ("{", " "):
            continue
        # A label's value may hold spaces and brackets; behind the labels come the value and perhaps a time.
        words = line[len(name) :].rpartition("}")[2].split()
        try:
            found = (found or 0.0) + float(words[0])
        except (IndexError, ValueError):
            continue
    return found


def newest_adapters(text: str) -> set[str]:
    """Return the adapters that an engine's figures name as running.

    vLLM 0.32 leaves a line for every set of adapters that ever ran together, with the time when it last did so as its
    value: the newest is what holds. A name that is in use stands among the waiting too, whether it waits or not.
    """
    newest, found = 0.0, set[str]()
    for line in text.splitlines():
        match = _RUNNING_ADAPTERS.match(line)
        if match and float(match[2]) > newest:
            newest, found = float(match[2]), {name for name in match[1].split(",") if name}
    return found


def _logprobs(answer: dict[str, Any]) -> list[Any]:
    return list(answer["choices"][0]["logprobs"]["token_logprobs"])


def _vector(answer: dict[str, Any]) -> list[Any]:
    return list(answer["data"][0]["embedding"])


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number) and number > LEAST_LOGPROB


def _not_finite(task: str) -> Wrong:
    numbers = "embedding" if task == "embed" else "log probabilities"
    return Wrong(f"its {numbers} are NaN or infinite", is_final=True, status=200, is_not_finite=True)


def _message(text: str) -> str:
    """Return the engine's own words in one line, out of its JSON if it is that."""
    try:
        said = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        said = text
    line = " ".join(said.split())
    worker = _WORKER.fullmatch(line)
    return (worker[1] if worker else line)[:MESSAGE_CHARACTERS]


async def metrics_of(engines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return model id and figures of each engine (model id, URL), asked at the same time."""

    async def ask(url: str) -> str:
        client = EngineClient(url)
        try:
            return await client.metrics()
        finally:
            await client.close()

    texts = await asyncio.gather(*(ask(url) for _, url in engines))
    return [(model_id, text) for (model_id, _), text in zip(engines, texts, strict=True)]
