"""REST for raw prompts: POST /api/generate-one and POST /api/generate-batch. `raw` answers them, plainly as ASGI.

What is described here is what `raw_schemas` reads. The application must keep its `Services` in `app.state`.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelyard.gateway.raw_schemas import RANGES_OF_BEAMS, Range
from modelyard.gateway.routes import PassedRoute
from modelyard.gateway.schemas import MODEL, Json
from modelyard.http import documented_in_plain_text, router, services_of

PASSED_ERRORS = (400, 404, 413, 502, 503)
REQUEST_ID: Json = {
    "type": "string",
    "minLength": 1,
    "description": "Your name for the text. If one of this name stopped before its end, it goes on where it stopped.",
}
PROMPT: Json = {
    "type": "string",
    "description": "The raw prompt: no chat template is put around it. Ignored where a kept text goes on.",
}
ONLY_NEW_TOKENS: Json = {
    "type": "boolean", "default": True,
    "description": "false: the whole text, with the prompt and its special tokens. What is no boolean counts as true.",
}  # fmt: skip
STREAM_RESPONSE: Json = {
    "type": "boolean", "default": True,
    "description": "Send the text as it is generated. Not possible with beams. What is no boolean counts as true.",
}  # fmt: skip
MEANINGS = {
    "num_beams": "Beams of a beam search, as transformers defines it; 1 is none. With do_sample they are drawn.",
    "do_sample": "Draw each token by its probability. false: always the likeliest.",
    "temperature": "How much chance there is in the drawing; 0 is none. At most 2 without beams.",
    "top_p": "Draw among the likeliest tokens that have this probability together. Without beams above 0, at most 1.",
    "top_k": "Draw among so many of the likeliest tokens; 0 or -1: among all.",
    "max_new_tokens": "Tokens after which the text stops; at most the model's length.",
    "repetition_penalty": "Above 1 makes tokens that were there already less likely. 0.01 to 100 without beams.",
    "length_penalty": "Above 1 has a beam search prefer long texts, below 1 short ones.",
}
EXAMPLE_CONFIG: Json = {
    "num_beams": 1, "do_sample": True, "temperature": 1, "top_p": 1, "top_k": 50, "max_new_tokens": 2048,
    "repetition_penalty": 1, "length_penalty": 1,
}  # fmt: skip
CATS, DOGS = "[INST] Write a short poem about cats [/INST]\n\n", "[INST] Write a short poem about dogs [/INST]\n\n"
IDS = ("YmFzZTY0", "rFERfgE")
TEXTS = ("Soft paws at dawn,\nthe house is theirs.</s>", "A wag, a leap,\nthe door flies open.</s>")


def _limits(range_: Range) -> Json:
    kind = "integer" if range_.kind is int else "number"
    least = "exclusiveMinimum" if range_.is_above else "minimum"
    return {"type": kind, least: range_.least, "maximum": range_.most}


GENERATION_CONFIG: Json = {
    "type": "object",
    "description": "How to generate. What is left out comes from the server's settings; of a kept text that goes on, "
    "from how it was generated so far, if the whole object is left out.",
    "properties": {
        name: {
            **(_limits(RANGES_OF_BEAMS[name]) if name in RANGES_OF_BEAMS else {"type": "boolean"}),
            "description": meaning,
        }
        for name, meaning in MEANINGS.items()
    },
}


def _request(required: list[str], example: Json, **properties: Json) -> Json:
    fields = {**properties, "generation_config": GENERATION_CONFIG, "model": MODEL}
    schema = {"type": "object", "required": required, "properties": fields}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


def _texts(description: str, texts: tuple[str, str]) -> Json:
    text: Json = {"type": "string"}
    fields = {
        "request_id": text,
        "prompt": {**text, "description": "With its special tokens; only where only_new_tokens is false."},
        "response": {**text, "description": "Ends with the model's ending token, if the model ended it."},
    }
    schema = {
        "type": "array",
        "items": {"type": "object", "required": ["request_id", "response"], "properties": fields},
    }
    example = [{"request_id": name, "response": said} for name, said in zip(IDS, texts, strict=True)]
    return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}


class Answered(Response):
    """The answer to every request of a route: the lane's, as plain ASGI."""

    def __init__(self, name: str) -> None:
        self.background = None
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        await getattr(services_of(scope).raw_lane, self._name)(scope, receive, send)


api = router(tag="Raw prompts")


def _add(path: str, name: str, summary: str, description: str, request: Json, answers: dict[int | str, Any]) -> None:
    answered = Answered(name)
    api.add_api_route(
        path,
        lambda: answered,
        methods=["POST"],
        summary=summary,
        description=description,
        name=path.rpartition("/")[2].replace("-", "_"),
        openapi_extra=request,
        responses={**answers, **documented_in_plain_text(*PASSED_ERRORS)},
        response_class=Response,
        response_model=None,
        route_class_override=PassedRoute,
    )


_add(
    "/api/generate-one",
    "one",
    "Generate a text from a raw prompt",
    "Answer with the text alone, as it is generated. It ends with the model's ending token if the model ended it; "
    "without one it stopped at its length, and the same request_id continues it. Errors are a line of text; after the "
    "first byte, a transfer that breaks off.",
    _request(
        ["request_id"],
        {"request_id": IDS[0], "prompt": CATS, "only_new_tokens": True, "stream_response": True,
         "generation_config": EXAMPLE_CONFIG},
        request_id=REQUEST_ID, prompt=PROMPT, only_new_tokens=ONLY_NEW_TOKENS, stream_response=STREAM_RESPONSE,
    ),
    {
        200: {
            "description": "The text.",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": TEXTS[0]}},
        }
    },
)  # fmt: skip
_add(
    "/api/generate-batch",
    "batch",
    "Generate texts from raw prompts",
    "Answer with one text per prompt, in the order of the prompts, when all are there: the engine works on them at the "
    "same time. The same request_ids in the same order continue those that stopped at their length. Errors are a line "
    "of text.",
    _request(
        ["prompts"],
        {"prompts": [{"request_id": IDS[0], "prompt": CATS}, {"request_id": IDS[1], "prompt": DOGS}],
         "only_new_tokens": True, "generation_config": {**EXAMPLE_CONFIG, "max_new_tokens": 100}},
        prompts={
            "type": "array", "minItems": 1, "description": "Every request_id is there once.",
            "items": {"type": "object", "required": ["request_id"],
                      "properties": {"request_id": REQUEST_ID, "prompt": PROMPT}},
        },
        only_new_tokens=ONLY_NEW_TOKENS,
    ),
    {
        200: _texts("The model ended every text.", TEXTS),
        206: _texts("At least one text stopped at its length before the model ended it.", ("Soft paws at", TEXTS[1])),
    },
)  # fmt: skip
