"""Completions of the imitation engine in tokens: texts that it recites from any point on, in vLLM 0.32's form.

A token is a byte, or one of the special tokens BEGIN and END, so that a text may stop inside a character. What is
recited is in the plan (`recites`): from tokens that end with a part of it, its next tokens follow, as from a model that
always takes the likeliest token. Detokenizing is vLLM's, with what it does wrong: the first piece of a stream that
begins inside a character holds the whole text so far.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

BEGIN, END = 256, 257
SPECIAL = {BEGIN: "<s>", END: "</s>"}
TORN = "\N{REPLACEMENT CHARACTER}"
TOKENS = 258

Json = dict[str, Any]


class Invalid(Exception):
    """A request that vLLM would answer with 400."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


def tokenize(text: str, *, has_begin: bool) -> list[int]:
    """Return the tokens of a text."""
    own = [END] if text == SPECIAL[END] else text.encode()
    return [*([BEGIN] if has_begin else []), *own]


def decode(ids: list[int]) -> str:
    """Return the text of tokens, special ones included, as transformers would."""
    text, run = "", bytearray()
    for token in ids:
        if token in SPECIAL:
            text += run.decode("utf-8", "replace") + SPECIAL[token]
            run.clear()
        else:
            run.append(token)
    return text + run.decode("utf-8", "replace")


class Stream:
    """The pieces of a text as its tokens come: the algorithm of `tokenizers.decoders.DecodeStream`."""

    def __init__(self, ids: list[int]) -> None:
        self._ids, self._prefix, self._read = list(ids), "", 0

    def step(self, token: int) -> str:
        """Return what a token adds; nothing while it leaves a character unfinished."""
        if not self._prefix and self._ids:
            prefix = decode(self._ids)
            if not prefix.endswith(TORN):
                self._prefix, self._read = prefix, len(self._ids)
        self._ids.append(token)
        text = decode(self._ids)
        if len(text) <= len(self._prefix) or text.endswith(TORN):
            return ""
        piece = text[len(self._prefix) :]
        read = len(self._ids) - self._read
        self._ids = self._ids[self._read :]
        self._prefix, self._read = decode(self._ids), read
        return piece


@dataclass
class Part:
    """One prompt of a request and the tokens that follow it."""

    prompt_ids: list[int]
    ids: list[int]
    reason: str
    pieces: list[str]

    def choice(self, index: int) -> Json:
        return {"index": index, "text": "".join(self.pieces), "logprobs": None, "finish_reason": self.reason,
                "stop_reason": None, "prompt_token_ids": self.prompt_ids, "token_ids": self.ids}  # fmt: skip


def logprobs(part: Part, count: int, *, has_adapter: bool = False) -> Json:
    """Return log probabilities of the tokens of a part: the recital is sure of its text, and no others are alike.

    -1 is all of them. Names are vLLM's for `return_tokens_as_token_ids`. With an adapter it is a little less sure: one
    that changes nothing would be refused.
    """
    sure = -0.02 if has_adapter else -0.01
    tops = []
    for right in part.ids:
        others = [token for token in range(TOKENS) if token != right]
        told = [(right, sure), *((token, -5.0 - 0.1 * number) for number, token in enumerate(others))]
        tops.append({f"token_id:{token}": value for token, value in told[: count if count >= 0 else None]})
    return {"token_logprobs": [sure] * len(part.ids), "top_logprobs": tops}


def check(request: Json, max_model_len: int) -> None:
    """Refuse what vLLM refuses before it looks at the prompts.

    Raises:
        Invalid: with vLLM's reason.
    """
    for field, least, most in (("temperature", 0, 2), ("top_p", 1e-9, 1), ("top_k", -1, float("inf")),
                               ("repetition_penalty", 1e-9, float("inf"))):  # fmt: skip
        if not least <= (request.get(field) or least) <= most:
            raise Invalid(f"{field} must be in [{least}, {most}], got {request[field]}.", field)
    if (request.get("logprobs") or 0) > TOKENS:
        asked = request["logprobs"]
        raise Invalid(f"Requested sample logprobs of {asked}, which is greater than max allowed: {TOKENS}", "logprobs")
    if request["max_tokens"] > max_model_len:
        raise Invalid(
            f"max_tokens={request['max_tokens']} cannot be greater than max_model_len={max_model_len}. Please request "
            "fewer output tokens.", "max_tokens",
        )  # fmt: skip


def parts_of(request: Json, recites: dict[str, str], max_model_len: int) -> list[Part]:
    """Return what follows each prompt of a request.

    Raises:
        Invalid: a prompt that is empty or too long, or a list of both texts and tokens.
    """
    prompts = request["prompt"]
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    if len({type(prompt) for prompt in prompts}) > 1:
        raise Invalid("Input should be a valid list of strings or of lists of integers", "prompt")
    return [_part(prompt, request, recites, max_model_len) for prompt in prompts]


def _part(prompt: str | list[int], request: Json, recites: dict[str, str], max_model_len: int) -> Part:
    ids = tokenize(prompt, has_begin=True) if isinstance(prompt, str) else prompt
    if not ids:
        raise Invalid("The decoder prompt cannot be empty", "prompt")
    if len(ids) > max_model_len:
        raise Invalid(
            f"This model's maximum context length is {max_model_len} tokens. However, your request has {len(ids)} "
            "input tokens. Please reduce the length of the input messages.", "input_tokens",
        )  # fmt: skip
    limit = min(request["max_tokens"], max_model_len - len(ids))
    if limit < 1:
        raise Invalid(f"max_tokens must be at least 1, got {limit}.", "max_tokens")
    shown = decode(ids)
    text = next(text for name, text in recites.items() if name in shown)
    whole = [*text.encode(), END]
    known = max((n for n in range(1, len(whole)) if ids[-n:] == whole[:n]), default=0)
    new = whole[known : known + limit]
    has_end = request.get("include_stop_str_in_output") and request.get("skip_special_tokens") is False
    stream = Stream(ids)
    pieces = [stream.step(token) if token != END or has_end else "" for token in new]
    return Part(ids, new, "stop" if new[-1] == END else "length", pieces)


def events(base: Json, parts: list[Part], step: int) -> list[bytes]:
    """Return the events of a streamed answer after its `step`-th token (0 is the first), one for each prompt."""
    found = []
    for index, part in enumerate(parts):
        if step < len(part.ids):
            choice: Json = {"index": index, "text": part.pieces[step], "logprobs": None,
                            "finish_reason": part.reason if step == len(part.ids) - 1 else None, "stop_reason": None,
                            "token_ids": [part.ids[step]]}  # fmt: skip
            if step == 0:
                choice["prompt_token_ids"] = part.prompt_ids
            found.append(f"data: {json.dumps({**base, 'choices': [choice]}, separators=(',', ':'))}\n\n".encode())
    return found
