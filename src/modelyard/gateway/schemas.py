"""The passed-through interface in the OpenAPI schema: the usual fields, an example, a typical answer.

These describe and never validate: what else a request may carry is the engine's to say, and it accepts every field of
OpenAI's and vLLM's interface.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from modelyard.http import event_stream

Json = dict[str, Any]

MODEL: Json = {
    "type": "string",
    "description": "Id of a model or an adapter in service, or an alias. Left out: the current deployment.",
}
STREAM: Json = {"type": "boolean", "default": False, "description": "Answer with server-sent events, token by token."}
MAX_TOKENS: Json = {"type": "integer", "minimum": 1, "description": "Tokens after which the answer ends."}
TEMPERATURE: Json = {"type": "number", "minimum": 0, "maximum": 2, "description": "0 always takes the likeliest token."}
MESSAGES: Json = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"type": "string", "examples": ["system", "user", "assistant"]},
            "content": {"description": "Text, or a list of parts. Media must be data: URLs."},
        },
    },
}
USAGE: Json = {"prompt_tokens": 12, "total_tokens": 20, "completion_tokens": 8}


def request_schema(required: list[str], example: Json, **properties: Json) -> Json:
    """Return the `requestBody` of a route: the usual fields; more are welcome."""
    schema = {"type": "object", "required": required, "properties": {"model": MODEL, **properties}}
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


def answer_schema(example: Json, events: str | None = None) -> Json:
    """Return the documented answer of a route; `events` is an example of its stream, if it has one."""
    schema: Json = {"type": "object", "properties": {name: _type_of(value) for name, value in example.items()}}
    content: Json = {"application/json": {"schema": schema, "example": example}}
    if events is not None:
        content |= event_stream(events)
    return {"description": "The engine's answer, as it came.", "content": content}


def _type_of(value: object) -> Json:
    names: dict[type, str] = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    kind = names.get(type(value))
    return {"type": kind, "items": {}} if kind == "array" else {"type": kind} if kind else {}


class ServedModelOut(BaseModel):
    """A name under which requests find a model: its id, an adapter's, or an alias."""

    id: str = Field(description="The name to ask for.", examples=["Qwen/Qwen3-0.6B"])
    object: str = Field("model", examples=["model"])
    created: int = Field(description="Unix time, in seconds, of its deployment.", examples=[1763596800])
    owned_by: str = Field("modelyard", examples=["modelyard"])
    root: str = Field(description="What the name stands for.", examples=["Qwen/Qwen3-0.6B"])
    parent: str | None = Field(None, description="The deployed model of an adapter or an alias.", examples=[None])


class ServedModelsOut(BaseModel):
    """The models in service, as OpenAI's clients read them."""

    object: str = Field("list", examples=["list"])
    data: list[ServedModelOut]
