"""Odd requests beside others: what an engine answers a request alone, it answers it in company, and stands.

Requests that share a step of the engine share its work, and what is harmless alone may be fatal beside another: it was
so with the log probabilities of a prompt, on an engine with room for adapters on a CPU. So every request of the
comparison with vLLM, and some that are odd in other ways, is sent twice at the same time beside a stream.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.clients.service import LLAMA, Service
from tests.clients.test_against_vllm import CASES, Case, _chat, _text
from tests.server import Answer

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

HEADERS = {"Content-Type": "application/json"}
STREAM = {"model": LLAMA, "prompt": "Hi", "max_tokens": 1900, "ignore_eos": True, "stream": True, "temperature": 1}
#: Longer than what one step of the engine takes, so that its prompt is worked on in parts.
LONG_IDS = [300 + number % 1500 for number in range(1500)]

ODD = [
    *(case for case in CASES if case.task == "generate"),
    _text("two prompts, echo, log-probabilities", prompt=[[300, 301, 302, 303], [305, 306]], echo=True, logprobs=1),
    _text("many prompts, echo, log-probabilities", prompt=[[300 + n] * (n + 1) for n in range(9)], echo=True,
          logprobs=5, max_tokens=1),
    _text("echo, log-probabilities, streamed", echo=True, logprobs=1, stream=True),
    _text("echo of a long prompt", prompt=LONG_IDS, echo=True, logprobs=1, max_tokens=1),
    _text("echo of one token", prompt=[300], echo=True, logprobs=1, max_tokens=1),
    _text("echo and nothing else", echo=True, logprobs=1, max_tokens=0),
    _text("echo, several choices", echo=True, logprobs=1, n=3, temperature=1, max_tokens=2),
    _text("log-probabilities of a prompt, none of others", prompt_logprobs=0),
    _text("log-probabilities of all tokens", prompt_logprobs=-1, max_tokens=1),
    _chat("log-probabilities of the prompt", prompt_logprobs=2),
    _text("chosen tokens alone", allowed_token_ids=[300, 301, 302]),
    _text("biased tokens", logit_bias={"300": 50, "301": -100}),
    _text("forbidden words", bad_words=["river", "the"]),
    _text("at least so many", min_tokens=5, stop=["a", "e", "i"]),
    _text("a regular expression", structured_outputs={"regex": "[ab]{4}"}, max_tokens=20),
    _text("a choice", structured_outputs={"choice": ["large", "small"]}, max_tokens=20),
    _text("penalties of all kinds", repetition_penalty=1.3, presence_penalty=1, frequency_penalty=1, temperature=1,
          min_p=0.05, top_k=3, top_p=0.9, seed=5),
    _text("the prompt cut", prompt=LONG_IDS, truncate_prompt_tokens=7, echo=True, logprobs=1, max_tokens=1),
]  # fmt: skip


class Company:
    """Streams that follow one another for as long as they are wanted; each must end whole."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._is_wanted = True
        self.problems: list[str] = []
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self.begun.wait(60), self.problems

    def _read(self) -> None:
        while self._is_wanted and not self.problems:
            try:
                with self._service.server.opened("POST", "/v1/completions", json_body=STREAM) as response:
                    lines = []
                    for line in response:
                        self.begun.set()
                        lines.append(line)
                        if b'"error"' in line:
                            self.problems.append(line.decode())
                        if not self._is_wanted:
                            return
                    if not any(line.startswith(b"data: [DONE]") for line in lines):
                        self.problems.append("a stream ended early")
            except OSError as error:
                self.problems.append(f"{type(error).__name__}: {error}")
            finally:
                self.begun.set()

    def leave(self) -> None:
        self._is_wanted = False
        self._thread.join(60)


@pytest.fixture(scope="module")
def company(service: Service) -> Iterator[Company]:
    engines = set(service.server.processes())
    found = Company(service)
    yield found
    found.leave()
    assert found.problems == []
    assert set(service.server.processes()) == engines, "an engine was ended and started again"


@pytest.mark.parametrize("case", ODD, ids=lambda case: case.name)
def test_an_odd_request_beside_a_stream_and_its_like_is_answered_as_alone(
    service: Service, company: Company, case: Case
) -> None:
    path = case.path if case.path.startswith("/v1") else f"/v1{case.path}"
    headers = {"Content-Type": case.kind} if case.kind else {}

    def ask(_: int = 0) -> int:
        return service.ask(path, case.body, headers).status

    status = ask()
    assert status < 500
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == [status, status]
    assert company.problems == []


def test_log_probabilities_of_prompts_are_the_same_in_company(service: Service, company: Company) -> None:
    prompts = [LONG_IDS[n : n + 3 + 2 * n] for n in range(8)]
    alone = [logprobs(service.ask_engine("generate", "/v1/completions", asked(one), HEADERS)) for one in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda one: logprobs(service.ask("/v1/completions", asked(one), HEADERS)), prompts))
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, abs=0.2)  # bfloat16, and sums in another order
    assert company.problems == []


def asked(prompt: list[int]) -> dict[str, Any]:
    return {"model": LLAMA, "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0}


def logprobs(answer: Answer) -> list[float]:
    found: list[float] = json.loads(answer.body)["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    return found
