"""The specification of row forms: which keys make a row what it is, what each key means, and where that is written.

One table, `FORMS`, and what is common to all of them: `MARKS` (which answers are learnt), `PREFERENCES` and `MEDIA`
(rows that are refused), `ROLES` and `SPEAKERS` (names of who speaks). Upload validation, the rows of the API and the
trainer read rows by these tables alone (`row_reading`, and `forms` for the common cases at speed). A key that is not
in them means nothing here, and the report counts it (`ignored_keys`). A key whose value is null is not there: Arrow
writes every key into every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


class Form(StrEnum):
    """A way to write a row."""

    #: OpenAI's chat format, which is the canonical one.
    MESSAGES = "messages"
    #: Turns with "from" and "value".
    SHAREGPT = "sharegpt"
    #: One prompt and its completion.
    PROMPT_COMPLETION = "prompt_completion"
    #: Alpaca's instruction, input and output.
    INSTRUCTION = "instruction"
    #: A text of which every token is learnt.
    TEXT = "text"


class Meaning(StrEnum):
    """The purpose of a key's value."""

    #: A list of messages.
    MESSAGES = "messages"
    #: A list of turns.
    TURNS = "turns"
    #: What the user says.
    QUESTION = "question"
    #: More of what the user says, after a blank line.
    INPUT = "input"
    #: What the assistant answers: learnt.
    ANSWER = "answer"
    #: Earlier questions and answers as pairs: the answers are learnt too.
    HISTORY = "history"
    #: The system message, before all others.
    SYSTEM = "system"
    #: The tools that the conversation knows: functions, bare or in OpenAI's envelope, as a list or as JSON text.
    TOOLS = "tools"
    #: Text that is learnt as it is.
    TEXT = "text"
    #: Text that belongs to the question in no defined way: the row is refused.
    UNPLACED = "unplaced"


class Mark(StrEnum):
    """A key of a message, or of a whole row, that says if its answers are learnt."""

    #: true or 1, false or 0; anything else is refused.
    FLAG = "flag"
    #: 0 or 1; a fraction is refused, since answers are not weighed.
    WEIGHT = "weight"
    #: true or false; anything else (a class, a measured loss) means nothing here.
    VERDICT = "verdict"
    #: A part of a message that is learnt or not, which cannot be kept: refused.
    PARTIAL = "partial"


@dataclass(frozen=True)
class RowForm:
    """One form: the keys that it needs (one name of each), what each of its keys means, and its source."""

    form: Form
    needs: tuple[tuple[str, ...], ...]
    keys: dict[str, Meaning]
    example: str
    source: str


#: In the order in which they are looked for: a row that could be two is the first.
FORMS: tuple[RowForm, ...] = (
    RowForm(
        Form.MESSAGES,
        (("messages",),),
        {
            "messages": Meaning.MESSAGES,
            "system": Meaning.SYSTEM,
            "system_prompt": Meaning.SYSTEM,
            "tools": Meaning.TOOLS,
            "functions": Meaning.TOOLS,
            "context": Meaning.UNPLACED,
        },
        '{"messages": [{"role": ..., "content": ...}, ...]}',
        "OpenAI's fine-tuning API; tools beside messages: TRL, ms-swift; system beside messages: Anthropic, Bedrock",
    ),
    RowForm(
        Form.SHAREGPT,
        (("conversations",),),
        {
            "conversations": Meaning.TURNS,
            "system": Meaning.SYSTEM,
            "system_prompt": Meaning.SYSTEM,
            "tools": Meaning.TOOLS,
            "functions": Meaning.TOOLS,
            "context": Meaning.UNPLACED,
        },
        '{"conversations": [{"from": ..., "value": ...}, ...]}',
        "FastChat; function_call, observation, tools and system: LLaMA-Factory's data/README",
    ),
    RowForm(
        Form.PROMPT_COMPLETION,
        (("prompt",), ("completion",)),
        {
            "prompt": Meaning.QUESTION,
            "completion": Meaning.ANSWER,
            "system": Meaning.SYSTEM,
            "system_prompt": Meaning.SYSTEM,
            "history": Meaning.HISTORY,
            "tools": Meaning.TOOLS,
            "functions": Meaning.TOOLS,
            "context": Meaning.UNPLACED,
        },
        '{"prompt": ..., "completion": ...}',
        "OpenAI's first fine-tuning API; lists of messages in both, of which the completion is learnt: TRL's datasets",
    ),
    RowForm(
        Form.INSTRUCTION,
        (("instruction", "query"), ("output", "response")),
        {
            "instruction": Meaning.QUESTION,
            "query": Meaning.QUESTION,
            "input": Meaning.INPUT,
            "context": Meaning.INPUT,
            "output": Meaning.ANSWER,
            "response": Meaning.ANSWER,
            "system": Meaning.SYSTEM,
            "system_prompt": Meaning.SYSTEM,
            "history": Meaning.HISTORY,
            "tools": Meaning.TOOLS,
            "functions": Meaning.TOOLS,
        },
        '{"instruction": ..., "input": ..., "output": ...}',
        "Stanford Alpaca; history and system: LLaMA-Factory's data/README; query and response: ms-swift; "
        "context and response: databricks-dolly-15k",
    ),
    RowForm(
        Form.TEXT,
        (("text",),),
        {"text": Meaning.TEXT},
        '{"text": ...}',
        "TRL's language modeling format, LLaMA-Factory's pre-training format",
    ),
)
SPEC: dict[Form, RowForm] = {spec.form: spec for spec in FORMS}
#: What each form needs, one name of each, and all keys that it has.
NEEDED_KEYS: dict[Form, tuple[tuple[str, ...], ...]] = {spec.form: spec.needs for spec in FORMS}
KEYS_OF_FORMS: dict[Form, frozenset[str]] = {spec.form: frozenset(spec.keys) for spec in FORMS}

#: What says whether an answer is learnt, on a message or on the row.
MARKS: dict[str, Mark] = {
    "weight": Mark.WEIGHT,  # OpenAI
    "loss_weight": Mark.WEIGHT,
    "loss_scale": Mark.WEIGHT,  # ms-swift
    "train": Mark.FLAG,  # axolotl, FastChat's descendants
    "training": Mark.FLAG,  # axolotl
    "trainable": Mark.FLAG,
    "loss": Mark.VERDICT,  # ms-swift: true or false; elsewhere a measured loss
    "label": Mark.VERDICT,  # TRL's unpaired preference: false is an answer that nobody wants
    "kto_tag": Mark.VERDICT,  # LLaMA-Factory
    "train_detail": Mark.PARTIAL,  # axolotl
    "loss_mask": Mark.PARTIAL,
}

#: A row that has one of these prefers one answer to another, which supervised training cannot keep.
PREFERENCES = frozenset(
    {
        "chosen",
        "rejected",
        "chosen_messages",
        "rejected_messages",
        "chosen_response",
        "rejected_response",
        "preferred_output",
        "non_preferred_output",
    }
)
PREFERENCE_REASON = (
    "belongs to a preference row (a better answer and a worse one): supervised training learns one answer; "
    "keep the better one as the row's answer and leave the other out"
)

#: A row or message that has something in one of these is about more than its text.
MEDIA = frozenset({"images", "image", "videos", "video", "audios", "audio"})
MEDIA_REASON = "is there, but only text can be learnt"

#: The keys of a message beside `MARKS` and `MEDIA`; for the thought, its other names.
MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "function_call", "tool_call_id", "name"})
TURN_KEYS = frozenset({"from", "value", "role", "content"})
REASONING = ("reasoning_content", "reasoning", "thinking")
#: Parts of a message beside its text, by their type: a thought, or a call as JSON text (LLaMA-Factory's newer form).
PARTS = {"reasoning": REASONING[0], "tool_call": "tool_calls"}

#: How a message's role is named, and what it is: a call's content is {"name", "arguments"} as JSON text.
CALL: Literal["call"] = "call"
ROLES: dict[str, Role | Literal["call"]] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",  # OpenAI's newer name
    "function": "tool",  # OpenAI's older one, with function_call
    "tool_call": CALL,  # ms-swift
    "tool_response": "tool",
}
SPEAKERS: dict[str, Role | Literal["call"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": CALL,
    "tool_call": CALL,
}

FORMS_HINT = f"a row is {', '.join(spec.example for spec in FORMS[:-1])} or {FORMS[-1].example}"
