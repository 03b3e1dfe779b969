"""A conversation as the text that the model's chat template makes of it, and which parts of that text are learnt.

Learnt is what the model has to say when it is asked: for each turn of the assistant, all that follows the prompt that
the engine would render at that place, up to and with the stop token. Where the renderings of all turns are parts of
one text, a row is one piece; where they are not (a template that drops earlier thoughts), each turn is a piece by
itself, as it will be asked. What a template leaves out of a row, or does not take, makes the row refused with a
reason. Messages and tools are handed to the template as the engine does it; transformers runs templates in a sandbox
that can neither reach the machine nor change its input.

A template that puts no stop token after a turn: the next turn's first token is learnt if it is one that the engine
stops at (as GLM's are), else the tokenizer's end-of-text is put there. What follows on a prompt that ends otherwise
than answers are rendered is `completions`' to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from modelyard.datasets import conversations
from modelyard.errors import JobFailure
from modelyard.evidence import in_words
from modelyard.trainer.completions import (
    MARK,
    THOUGHT,
    NoCompletionError,
    Opening,
    completion,
    has_calls,
    shared,
    shared_end,
)
from modelyard.trainer.content_format import loops_over_content
from modelyard.trainer.engine_messages import Message, Refused, as_engine_call, as_engine_tools, text_of
from modelyard.trainer.messages import split_thought
from modelyard.trainer.model_files import PLAIN_TEMPLATE
from modelyard.trainer.text_parts import Joiner, PartsError, Said

#: Characters of a text that are not found in another's by accident.
TELLING = 24
#: As `MARK`, for a message that follows.
_NEXT = "jxqzv"
#: Where the engine hands over what a client names `reasoning`.
_REASONING = ("reasoning", "reasoning_content")


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
        # The longest first: one may be the beginning of another.
        one_stop = f"(?:{'|'.join(map(re.escape, sorted(self._stops, key=len, reverse=True)))})"
        self._stop = re.compile(one_stop)
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
        self._takes_thoughts = {key: _REASONING[1] in text for key, text in self._named.items()}
        self._in_parts = {key: loops_over_content(text) for key, text in self._named.items()}
        self._joiners = {key: Joiner(in_parts) for key, in_parts in self._in_parts.items()}

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """Return the prompt that the engine makes of a request. Raises Refused where the template does."""
        messages = self._joined(messages, tools)
        said = [self._as_engine(message, bool(tools)) for message in messages]
        return self._render(said, as_engine_tools(tools), asks=True)

    def pieces(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[Piece]:
        """Return what is learnt of a canonical conversation: one piece, or one per turn of the assistant.

        Not learnt are turns of weight 0, empty ones, and what the assistant says before anybody spoke to it.

        Raises:
            Refused: the template does not take it, or leaves out what it says; nothing of it can be learnt.
        """
        learnt = learnt_turns(messages)
        if not learnt:
            raise Refused("nothing to learn: no answer of the assistant to a message, of weight 1 and not empty")
        messages = self._joined(messages[: learnt[-1] + 1], tools)
        said = [self._as_engine(message, bool(tools)) for message in messages]
        given = as_engine_tools(tools)
        turns = [self._turn(said, given, at) for at in learnt]
        self._check_context(said, given, turns[-1])
        whole = turns[-1].prompt + turns[-1].completion
        spans = tuple((len(turn.prompt), len(turn.prompt) + len(turn.completion)) for turn in turns)
        if all(whole.startswith(turn.prompt + turn.completion) for turn in turns[:-1]):
            return [Piece(whole, spans, learnt[-1])]
        return [Piece(turn.prompt + turn.completion, (span,), turn.at) for turn, span in zip(turns, spans, strict=True)]

    def _joined(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> Sequence[Mapping[str, Any]]:
        """Return messages whose contents are text: parts put together as the engine's template does it."""
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        given = as_engine_tools(tools)

        def rendered(said: Said) -> str:
            return self._render([self._as_engine(message, bool(tools)) for message in said], given)

        try:
            return self._joiners[bool(tools)].joined(messages, rendered)
        except PartsError as error:
            raise Refused(str(error)) from None

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
            raise Refused(f"the chat template does not take it: {in_words(error)}") from None
        return str(text)

    def _turn(self, said: Sequence[Message], tools: list[Any] | None, at: int) -> _Turn:
        prompt = self._render(said[:at], tools, asks=True)
        thought = said[at].get(_REASONING[0])
        if thought is not None:
            found = self._completion(said, tools, at, prompt)
            if thought in found:
                return _Turn(at, prompt, found)
            # The template drops thoughts that it is given beside the answer: it may keep them in front of it.
            said = [*said[:at], self._with_thought_inside(said[at], bool(tools))]
        return _Turn(at, prompt, self._completion(said, tools, at, prompt))

    def _completion(self, said: Sequence[Message], tools: list[Any] | None, at: int, prompt: str) -> str:
        """Return what is to be said after the prompt, up to and with the first stop token after it."""
        message, number = said[at], at + 1
        content, calls = text_of(message), message.get("tool_calls")
        answered = self._render(said[: at + 1], tools)
        thought = THOUGHT.match(content)
        answer = content[thought.end() :].strip() if thought else content.strip()

        def depends_on(change: Message) -> bool:
            return self._differs([*said[:at], {**message, **change}], tools, answered)

        is_there, is_short = answer in answered, bool(answer and calls) and len(answer) < TELLING
        if not is_there or is_short:
            if not depends_on({"content": self._marked(message)}):
                raise Refused(f"the chat template leaves out the content of message {number}, which is to be learnt")
            if not is_there:
                raise self._changed(number)
        anchor = answer or (calls[0]["function"]["name"] if calls else "")
        try:
            found = completion(
                prompt,
                answered,
                content,
                (text_of(said[at - 1]), anchor),
                lambda: self._opening(said, tools, at, prompt),
            )
        except NoCompletionError as error:
            raise Refused(str(error)) from None
        found = self._ended(said[: at + 1], tools, answered, found)
        if calls and not has_calls(calls, found, depends_on):
            raise Refused(f"the chat template leaves out the tool calls of message {number}, which are to be learnt")
        if thought and found.count("<think>") > content.count("<think>"):
            raise Refused(
                f"the chat template writes a thought of its own before message {number}, which has one: leave the "
                "thoughts out of the dataset"
            )
        for text in (answer, thought[1].strip() if thought else ""):
            # It may begin with the prompt's own opening.
            opening = None if text in found else self._opening(said, tools, at, prompt)
            if text not in found and (opening is None or text not in answered[opening.base :]):
                raise self._changed(number)
        return found

    @staticmethod
    def _changed(number: int) -> Refused:
        return Refused(
            f"the chat template does not render the content of message {number}, which is to be learnt, as it is: a "
            "tag in it, such as </think>, may be one of the template's own"
        )

    def _opening(self, said: Sequence[Message], tools: list[Any] | None, at: int, prompt: str) -> Opening | None:
        """Compare how a prompt ends with how an answer of one word is rendered; None where that cannot be seen."""
        word = MARK.strip()
        asked, before = said[at - 1], list(said[: at - 1])
        try:
            answered = self._render(
                [*said[:at], {"role": "assistant", "content": self._content(word, bool(tools))}], tools
            )
            other = self._render([*before, {**asked, "content": self._marked(asked)}], tools, asks=True)
        except Refused:
            return None
        start, base = answered.find(word), shared(prompt, answered)
        if not base <= start:
            return None
        fixed = len(shared_end(prompt, other))
        return Opening(base, prompt[base:], answered[base:start], is_fixed=len(prompt) - base <= fixed)

    def _ended(self, said: Sequence[Message], tools: list[Any] | None, answered: str, found: str) -> str:
        """Return a completion up to and with its first stop token, which is put there where the template has none.

        What the template writes after that is never asked for: the end of a turn, or the beginning of the next one.
        """
        ending = self._ending.search(found)
        if ending and self._stop.search(found, 0, ending.start()) is None:
            return found[: ending.end(1)]
        marked = [*said[:-1], self._marked_at_its_end(said[-1])]
        tail = self._after_the_mark(marked, tools) or ""
        tail = tail if found.endswith(tail) else ""
        if first := self._stop.search(found, len(found) - len(tail)):
            return found[: first.end()]
        # No stop token: it may belong to whatever comes next, as the next role's token does.
        more = self._after_the_mark([*marked, self._next(marked[-1], tools)], tools) or ""
        first = self._stop.search(more.partition(_NEXT)[0])
        if first and "".join(more[: first.start()].split()) == "".join(tail.split()):
            return found[: len(found) - len(tail)] + more[: first.end()]
        return found.rstrip() + self.stop_text

    def _after_the_mark(self, said: Sequence[Message], tools: list[Any] | None) -> str | None:
        """Return what a rendering has after the last mark in it."""
        try:
            _, mark, after = self._render(said, tools).rpartition(MARK.strip())
        except Refused:
            return None
        return after if mark else None

    def _next(self, message: Message, tools: list[Any] | None) -> Message:
        """Return a message that may follow one of the assistant."""
        calls = message.get("tool_calls")
        if not calls:
            return {"role": "user", "content": self._content(_NEXT, bool(tools))}
        name = calls[0]["function"]["name"]
        return {"role": "tool", "content": _NEXT, "name": name, "tool_call_id": calls[0].get("id")}

    def _check_context(self, said: Sequence[Message], tools: list[Any] | None, turn: _Turn) -> None:
        """Raise Refused if the last prompt lacks a message or a tool that the row has."""
        for number, message in enumerate(said[: turn.at]):

            def depends_on(change: Message, number: int = number, message: Message = message) -> bool:
                changed = [*said[:number], {**message, **change}, *said[number + 1 : turn.at]]
                return self._differs(changed, tools, turn.prompt, asks=True)

            text = text_of(message)
            if thought := THOUGHT.match(text):
                text = text[thought.end() :]
            text, role = text.strip(), message["role"]
            # A short one may be there by accident, in another's text.
            is_telling = not text or len(text) >= TELLING or role not in ("system", "tool")
            if not (is_telling and text in turn.prompt) and not depends_on({"content": self._marked(message)}):
                raise Refused(f"the chat template leaves out message {number + 1}, whose role is {role}")
            calls = message.get("tool_calls")
            if calls and not has_calls(calls, turn.prompt, depends_on):
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
        if role == "assistant" and self.takes_thoughts(with_tools):
            inside, text = split_thought(text)
            thought = message.get(_REASONING[0], inside)
            said["content"] = text or ""
            said.update({} if thought is None else dict.fromkeys(_REASONING, thought))
        if role != "tool" and self._in_parts[with_tools] and not isinstance(text, list):
            said["content"] = [] if text is None else [{"type": "text", "text": text}]
        if message.get("tool_calls"):
            said["tool_calls"] = [as_engine_call(call) for call in message["tool_calls"]]
        for key in ("tool_call_id", "name"):
            if message.get(key) is not None:
                said[key] = message[key]
        return said

    def _content(self, text: str, with_tools: bool) -> Any:
        return [{"type": "text", "text": text}] if self._in_parts[with_tools] else text

    def takes_thoughts(self, with_tools: bool) -> bool:
        """Return True if thoughts are handed to the template beside the content, as the engine does it."""
        return self._takes_thoughts[with_tools]

    def _with_thought_inside(self, message: Message, with_tools: bool) -> Message:
        text = f"<think>\n{message[_REASONING[0]]}\n</think>\n\n{text_of(message)}"
        kept = {key: value for key, value in message.items() if key not in _REASONING}
        return {**kept, "content": self._content(text, with_tools)}

    def _marked_at_its_end(self, message: Message) -> Message:
        """Return an answer with a mark in whatever it ends with: its text, its last call, or both."""
        if not (calls := message.get("tool_calls")):
            return {**message, "content": self._marked(message)}
        function = calls[-1]["function"]
        changed = {
            "name": function["name"] + MARK.strip(),
            "arguments": {**function["arguments"], MARK.strip(): MARK},
        }
        marked = {**message, "tool_calls": [*calls[:-1], {**calls[-1], "function": {**function, **changed}}]}
        return {**marked, "content": self._marked(message)} if text_of(message) else marked

    @staticmethod
    def _marked(message: Message) -> Any:
        if isinstance(message["content"], list):
            return [{"type": "text", "text": text_of(message) + MARK}]
        return message["content"] + MARK


def learnt_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the messages that are learnt: answers that are not empty, of weight 1, after somebody spoke."""
    return conversations.learnt_turns(
        (
            message["role"],
            message.get("weight") != 0
            and bool(message.get("tool_calls") or not conversations.is_blank(message.get("content"))),
        )
        for message in messages
    )
