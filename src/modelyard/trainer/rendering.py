"""A conversation as the text that the model's chat template makes of it, and which parts of that text are learnt.

Learnt is what the model has to say when it is asked: for each turn of the assistant, all that follows the prompt that
the engine would render at that place, up to and with the stop token. Where the renderings of all turns are parts of
one text, a row is one piece; where they are not (a template that drops earlier thoughts), each turn is a piece by
itself, as it will be asked. What a template leaves out of a row, or does not take, makes the row refused with a
reason. Messages and tools are handed to the template as the engine does it; transformers runs templates in a sandbox
that can neither reach the machine nor change its input.

A template that puts no stop token after a turn: the next turn's first token is learnt if it is one that the engine
stops at (as GLM's are), else the tokenizer's end-of-text is put there. A template whose prompt begins a thought that
the row does not have: an empty thought is closed before the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from modelyard.errors import JobFailure
from modelyard.trainer.model_files import PLAIN_TEMPLATE

#: The engine hands content over as a list of parts when the template goes through it as one.
_LOOPS_OVER_CONTENT = re.compile(
    r"\{%-?\s*for\s+\w+\s+in\s+(?:content|\w+(?:\.content|\[['\"]content['\"]\]))\s*(?:if\b|-?%\})"
)
#: Characters of a text that are not found in another's by accident.
TELLING = 24
_THOUGHT = re.compile(r"(?<!\s)\s*<think>(.*?)</think>(\s*)", re.DOTALL)
#: Appended to a text to see whether a rendering depends on it.
_MARK = " qzvjx"

Message = dict[str, Any]


class Refused(Exception):
    """A row cannot be learnt from with this model; the message says why."""


@dataclass(frozen=True)
class Piece:
    """A text to learn from: `spans` are the characters [start, end) that are learnt, each ending with a stop token.

    `turn` is the message that the last span is.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    turn: int


@dataclass(frozen=True)
class _Turn:
    at: int
    prompt: str
    completion: str


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    `stop_ids` are what the engine stops at beside the tokenizer's own end (`stop_ids_of`); `now` is what a template
    that asks for the date is told, so that a row is the same whenever it is rendered; `default` gives the template of
    a model that has none (`default_template`). `template_source` is 'model', or 'default' in that case, where the
    engine has to be given the one in `template` as well.

    Raises:
        JobFailure: `no_stop_token`, or `bad_chat_template` where the templates have no default one.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Iterable[int] = (),
        now: datetime | None = None,
        default: Callable[[], str] = lambda: PLAIN_TEMPLATE.replace("{BOS}", ""),
    ) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.stop_ids = frozenset({*stop_ids, *([] if own is None else [own])})
        if not self.stop_ids:
            raise JobFailure(
                "no_stop_token",
                "The model names no token that ends an answer, so that it could not learn to stop.",
                "Set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json.",
            )
        self._stops = [str(text) for text in tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)) if text]
        one_stop = f"(?:{'|'.join(map(re.escape, self._stops))})"
        self._ending = re.compile(rf"({one_stop})\s*(?:{one_stop}\s*)*\Z")
        self.stop_text = str(tokenizer.eos_token) if own is not None else self._stops[0]
        self._now = (now or datetime.now()).strftime
        self.template_source = "model" if tokenizer.chat_template else "default"
        self._named: dict[bool, str] = {}
        if not tokenizer.chat_template:
            self._named = dict.fromkeys((False, True), default())
        else:
            try:
                self._named = {
                    False: tokenizer.get_chat_template(None, None),
                    True: tokenizer.get_chat_template(None, [{}]),
                }
            except ValueError as error:
                raise JobFailure(
                    "bad_chat_template", f"The model's chat templates cannot be used: {str(error)[:200]}"
                ) from None
        #: The one for conversations without tools.
        self.template = self._named[False]
        #: Whether prompts change with the date.
        self.is_dated = any("strftime_now" in template for template in self._named.values())
        self._in_parts = {key: bool(_LOOPS_OVER_CONTENT.search(text)) for key, text in self._named.items()}

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """Return the prompt that the engine makes of a request. Raises Refused where the template does."""
        said = [self._as_engine(message, bool(tools)) for message in messages]
        return self._render(said, _as_engine_tools(tools), asks=True)

    def pieces(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[Piece]:
        """Return what is learnt of a canonical conversation: one piece, or one per turn of the assistant.

        Not learnt are turns of weight 0, empty ones, and what the assistant says before anybody spoke to it.

        Raises:
            Refused: the template does not take it, or leaves out what it says; nothing of it can be learnt.
        """
        learnt = _learnt_turns(messages)
        if not learnt:
            raise Refused("nothing to learn: no answer of the assistant to a message, of weight 1 and not empty")
        said = [self._as_engine(message, bool(tools)) for message in messages[: learnt[-1] + 1]]
        given = _as_engine_tools(tools)
        turns = [self._turn(said, given, at) for at in learnt]
        self._check_context(said, given, turns[-1])
        whole = turns[-1].prompt + turns[-1].completion
        spans = tuple((len(turn.prompt), len(turn.prompt) + len(turn.completion)) for turn in turns)
        if all(whole.startswith(turn.prompt + turn.completion) for turn in turns[:-1]):
            return [Piece(whole, spans, learnt[-1])]
        return [Piece(turn.prompt + turn.completion, (span,), turn.at) for turn, span in zip(turns, spans, strict=True)]

    def _render(self, said: Sequence[Message], tools: list[Any] | None, *, asks: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                said,
                tools=tools,
                chat_template=self._named[bool(tools)],
                tokenize=False,
                add_generation_prompt=asks,
                strftime_now=self._now,
            )
        except Exception as error:  # noqa: BLE001  # a template is a program, and may raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise Refused(f"the chat template does not take it: {reason}") from None
        return str(text)

    def _turn(self, said: Sequence[Message], tools: list[Any] | None, at: int) -> _Turn:
        prompt = self._render(said[:at], tools, asks=True)
        answered = self._render(said[: at + 1], tools)
        content, calls = _text(said[at]), said[at].get("tool_calls")
        anchor = content.strip() or (calls[0]["function"]["name"] if calls else "")
        completion = _completion(prompt, answered, content, (_text(said[at - 1]), anchor))
        thought = _THOUGHT.match(content)
        answer = content[thought.end() :].strip() if thought else content.strip()

        def depends_on(change: Message) -> bool:
            return self._differs([*said[:at], {**said[at], **change}], tools, answered)

        is_there = answer in completion and not (answer and calls and len(answer) < TELLING)
        if not is_there and not depends_on({"content": self._marked(said[at])}):
            raise Refused(f"the chat template leaves out the content of message {at + 1}, which is to be learnt")
        if calls and not _has_calls(calls, completion, depends_on):
            raise Refused(f"the chat template leaves out the tool calls of message {at + 1}, which are to be learnt")
        if ending := self._ending.search(completion):
            # What the template puts after the first stop token is never asked for.
            return _Turn(at, prompt, completion[: ending.end(1)])
        follower = self._follower(said[: at + 1], tools, answered)
        return _Turn(at, prompt, completion + follower if follower else completion.rstrip() + self.stop_text)

    def _follower(self, said: Sequence[Message], tools: list[Any] | None, answered: str) -> str | None:
        """Return the stop token that the template puts before whatever follows the last turn, if it does."""
        calls = said[-1].get("tool_calls")
        following: Message = {"role": "user", "content": self._content("x", bool(tools))}
        if calls:
            name = calls[0]["function"]["name"]
            following = {"role": "tool", "content": "x", "name": name, "tool_call_id": calls[0].get("id")}
        try:
            more = self._render([*said, following], tools)
        except Refused:
            return None
        if not more.startswith(answered):
            return None
        return next((stop for stop in self._stops if more.startswith(stop, len(answered))), None)

    def _check_context(self, said: Sequence[Message], tools: list[Any] | None, turn: _Turn) -> None:
        """Raise Refused if the last prompt lacks a message or a tool that the row has."""
        for number, message in enumerate(said[: turn.at]):

            def depends_on(change: Message, number: int = number, message: Message = message) -> bool:
                changed = [*said[:number], {**message, **change}, *said[number + 1 : turn.at]]
                return self._differs(changed, tools, turn.prompt, asks=True)

            text = _text(message)
            if thought := _THOUGHT.match(text):
                text = text[thought.end() :]
            text, role = text.strip(), message["role"]
            # A short one may be there by accident, in another's text.
            is_telling = not text or len(text) >= TELLING or role not in ("system", "tool")
            if not (is_telling and text in turn.prompt) and not depends_on({"content": self._marked(message)}):
                raise Refused(f"the chat template leaves out message {number + 1}, whose role is {role}")
            calls = message.get("tool_calls")
            if calls and not _has_calls(calls, turn.prompt, depends_on):
                raise Refused(f"the chat template leaves out the tool calls of message {number + 1}")
        if tools and not self._differs(said[: turn.at], None, turn.prompt, asks=True):
            raise Refused("the chat template leaves out the tools")

    def _differs(self, said: Sequence[Message], tools: list[Any] | None, text: str, *, asks: bool = False) -> bool:
        try:
            return self._render(said, tools, asks=asks) != text
        except Refused:
            return True

    def _as_engine(self, message: Mapping[str, Any], with_tools: bool) -> Message:
        """Return a message as the engine hands it to the template: no null content, arguments as objects."""
        role, text = message["role"], message.get("content")
        said: Message = {"role": role, "content": text or ""}
        if role != "tool" and self._in_parts[with_tools]:
            said["content"] = [] if text is None else [{"type": "text", "text": text}]
        if message.get("tool_calls"):
            said["tool_calls"] = [_as_engine_call(call) for call in message["tool_calls"]]
        for key in ("tool_call_id", "name"):
            if message.get(key) is not None:
                said[key] = message[key]
        return said

    def _content(self, text: str, with_tools: bool) -> Any:
        return [{"type": "text", "text": text}] if self._in_parts[with_tools] else text

    @staticmethod
    def _marked(message: Message) -> Any:
        if isinstance(message["content"], list):
            return [{"type": "text", "text": _text(message) + _MARK}]
        return message["content"] + _MARK


def _learnt_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    spoken, turns = False, []
    for number, message in enumerate(messages):
        if message["role"] in ("user", "tool"):
            spoken = True
        elif message["role"] == "assistant" and spoken and message.get("weight") != 0:
            content = message.get("content")
            if message.get("tool_calls") or (content and not content.isspace()):
                turns.append(number)
    return turns


def _completion(prompt: str, answered: str, content: str, around: tuple[str, str]) -> str:
    """Return what the model has to say after the prompt, by the rendering of the conversation with its answer.

    `around` are a text before the answer, and one at its beginning.
    """
    thought = _THOUGHT.match(content)
    if answered.startswith(prompt):
        rest, opening = answered[len(prompt) :], ""
        if not thought or "</think>" in rest:
            return rest
        body = "<think>" + thought[1]
    else:
        shared = _shared(prompt, answered)
        rest, opening = answered[shared:], prompt[shared:]
        if not opening.strip():
            return rest
        if opening.strip() != "<think>" or "</think>" in rest:
            # A template may word the last message differently, or put something before it: its end is the same.
            found = _after_the_same_end(prompt, answered, *around)
            if found is not None:
                return found
            raise Refused(
                f"the chat template's prompt for an answer ends with {opening[-40:]!r}, which is not how it renders "
                f"the answer ({rest[:40]!r})"
            )
        body = thought[1] if thought else "\n"
        if thought and opening.endswith("\n"):
            body = body.removeprefix("\n")
    gap = thought[2] if thought else "\n\n"
    return f"{body}</think>{'' if rest[:1].isspace() else gap}{rest}"


def _after_the_same_end(prompt: str, answered: str, question: str, answer: str) -> str | None:
    """Return what follows in `answered` on the end of the prompt, if that end has the question in it."""
    ahead = answered.rfind(answer) if answer else -1
    best, length = 0, 0
    for at in range(ahead, max(ahead - 100, 0), -1):
        same = _shared(prompt[::-1], answered[at - 1 :: -1])
        if same > length:
            best, length = at, same
    return answered[best:] if length and question.strip() in prompt[len(prompt) - length :] else None


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with together."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (this, that) in pairs if this != that), min(len(one), len(other)))


def _has_calls(calls: Sequence[Mapping[str, Any]], text: str, depends_on: Any) -> bool:
    """Whether all of the calls are in the text, or at least make a difference to it."""
    for number, call in enumerate(calls):
        function = call["function"]
        name, arguments = function["name"], function["arguments"]
        if (
            arguments
            and name in text
            and any(json.dumps(arguments, ensure_ascii=ascii_only) in text for ascii_only in (False, True))
        ):
            continue
        for change in ({"name": name + _MARK.strip()}, {"arguments": {**arguments, _MARK.strip(): _MARK}}):
            changed = {**call, "function": {**function, **change}}
            if not depends_on({"tool_calls": [*calls[:number], changed, *calls[number + 1 :]]}):
                return False
    return True


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else str(content)


def _as_engine_call(call: Mapping[str, Any]) -> Message:
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {**call, "function": {**call["function"], "arguments": arguments or {}}}


def _as_engine_tools(tools: Sequence[Any] | None) -> list[Any] | None:
    """Return tools with the fields, and in the order, that the engine gives them: templates print them as JSON."""
    if not tools:
        return None
    given = []
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Refused(f'tool {number + 1} is not {{"type": "function", "function": {{"name": ...}}}}')
        known: Message = {key: function.get(key) for key in ("name", "description", "parameters")}
        if function.get("strict") is not None:
            known["strict"] = function["strict"]
        given.append({"type": "function", "function": known})
    return given
