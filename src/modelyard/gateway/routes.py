"""REST for models in service: OpenAI's and Anthropic's paths under /v1 and /api/v1, each passed to an engine.

`PASSAGES` is the whole list of what reaches an engine. The application must include `api` before the models room's
routes, since both answer GET /api/v1/models (see `listing`), and keep its `Services` in `app.state`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Path, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelyard.gateway import schemas
from modelyard.gateway.listing import OpenAIListRoute, openai_list, openai_model
from modelyard.gateway.relay import ANY_TASK, Endpoint
from modelyard.gateway.schemas import Json, ServedModelOut, ServedModelsOut
from modelyard.http import ANTHROPIC_PATHS, EitherSlashRoute, documented, documented_as_anthropic, router, services_of

BASES = ("/v1", "/api/v1")
#: What vLLM has at the root, where its own clients look for it.
AT_ROOT = ("tokenize", "detokenize")
PASSED_ERRORS = (400, 404, 413, 502, 503)


@dataclass(frozen=True)
class Passed:
    """A documented path that is passed to an engine."""

    endpoint: Endpoint
    summary: str
    description: str
    request: Json
    answer: Json


_CHAT = [{"role": "user", "content": "Name three rivers."}]
_CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Nile, Rhine, Amazon."}, "finish_reason": "stop"}
_TEXT = {"index": 0, "text": " the Nile.", "logprobs": None, "finish_reason": "stop"}

PASSAGES = (
    Passed(
        Endpoint("chat/completions", "/v1/chat/completions", "generate"),
        "Chat with a model",
        "Answer a conversation. Every field of OpenAI's interface that vLLM knows may be sent.",
        schemas.request_schema(
            ["messages"],
            {"model": "default", "messages": _CHAT, "max_tokens": 64, "temperature": 0.5, "stream": False},
            messages=schemas.MESSAGES, max_tokens=schemas.MAX_TOKENS, temperature=schemas.TEMPERATURE,
            stream=schemas.STREAM,
        ),
        schemas.answer_schema(
            {"id": "chatcmpl-9f2c", "object": "chat.completion", "created": 1763596800, "model": "Qwen/Qwen3-0.6B",
             "choices": [_CHOICE], "usage": schemas.USAGE},
            'data: {"id":"chatcmpl-9f2c","object":"chat.completion.chunk","choices":[{"index":0,"delta":'
            '{"content":"Nile"}}]}\n\ndata: [DONE]\n\n',
        ),
    ),
    Passed(
        Endpoint("completions", "/v1/completions", "generate"),
        "Continue a text",
        "Continue a prompt, which is text or token ids.",
        schemas.request_schema(
            ["prompt"],
            {"model": "default", "prompt": "The longest river is", "max_tokens": 16},
            prompt={"description": "Text, a list of texts, or token ids."}, max_tokens=schemas.MAX_TOKENS,
            temperature=schemas.TEMPERATURE, stream=schemas.STREAM,
        ),
        schemas.answer_schema(
            {"id": "cmpl-9f2c", "object": "text_completion", "created": 1763596800, "model": "Qwen/Qwen3-0.6B",
             "choices": [_TEXT], "usage": schemas.USAGE},
            'data: {"id":"cmpl-9f2c","object":"text_completion","choices":[{"index":0,"text":" the"}]}\n\n'
            "data: [DONE]\n\n",
        ),
    ),
    Passed(
        Endpoint("embeddings", "/v1/embeddings", "embed"),
        "Embed texts",
        "Return a vector for each text, from the embedding model in service.",
        schemas.request_schema(
            ["input"],
            {"model": "sentence-transformers/all-MiniLM-L6-v2", "input": ["a river", "a stream"]},
            input={"description": "A text, a list of texts, or token ids."},
        ),
        schemas.answer_schema(
            {"id": "embd-9f2c", "object": "list", "created": 1763596800,
             "model": "sentence-transformers/all-MiniLM-L6-v2",
             "data": [{"index": 0, "object": "embedding", "embedding": [0.12, -0.03]}],
             "usage": {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0}},
        ),
    ),
    Passed(
        Endpoint("responses", "/v1/responses", "generate"),
        "Create a response",
        "OpenAI's Responses interface. Nothing is stored: send the whole conversation.",
        schemas.request_schema(
            ["input"],
            {"model": "default", "input": "Name three rivers.", "max_output_tokens": 64},
            input={"description": "A text or a list of items. Media must be data: URLs."},
            max_output_tokens=schemas.MAX_TOKENS, stream=schemas.STREAM,
        ),
        schemas.answer_schema(
            {"id": "resp_9f2c", "object": "response", "created_at": 1763596800, "status": "completed",
             "model": "Qwen/Qwen3-0.6B",
             "output": [{"type": "message", "role": "assistant",
                         "content": [{"type": "output_text", "text": "Nile, Rhine, Amazon."}]}]},
            'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Nile"}\n\n',
        ),
    ),
    Passed(
        Endpoint("messages", "/v1/messages", "generate"),
        "Create a message",
        "Anthropic's Messages interface.",
        schemas.request_schema(
            ["messages", "max_tokens"],
            {"model": "default", "messages": _CHAT, "max_tokens": 64},
            messages=schemas.MESSAGES, max_tokens=schemas.MAX_TOKENS, stream=schemas.STREAM,
        ),
        schemas.answer_schema(
            {"id": "msg_9f2c", "type": "message", "role": "assistant", "model": "Qwen/Qwen3-0.6B",
             "content": [{"type": "text", "text": "Nile, Rhine, Amazon."}], "stop_reason": "end_turn",
             "usage": {"input_tokens": 12, "output_tokens": 8}},
            'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
            '{"type":"text_delta","text":"Nile"}}\n\n',
        ),
    ),
    Passed(
        Endpoint("messages/count_tokens", "/v1/messages/count_tokens", "generate"),
        "Count a message's tokens",
        "Return how many tokens a conversation has before it is answered, in Anthropic's interface.",
        schemas.request_schema(["messages"], {"model": "default", "messages": _CHAT}, messages=schemas.MESSAGES),
        schemas.answer_schema({"input_tokens": 12}),
    ),
    Passed(
        Endpoint("tokenize", "/tokenize", ANY_TASK),
        "Turn a text into tokens",
        "Return the token ids of a prompt or of a conversation, as the model would see them.",
        schemas.request_schema(
            [],
            {"model": "default", "prompt": "The longest river"},
            prompt={"type": "string"}, messages=schemas.MESSAGES,
        ),
        schemas.answer_schema({"count": 3, "max_model_len": 2048, "tokens": [450, 27217, 8580]}),
    ),
    Passed(
        Endpoint("detokenize", "/detokenize", ANY_TASK),
        "Turn tokens into a text",
        "Return the text of token ids.",
        schemas.request_schema(
            ["tokens"],
            {"model": "default", "tokens": [450, 27217, 8580]},
            tokens={"type": "array", "items": {"type": "integer"}},
        ),
        schemas.answer_schema({"prompt": "The longest river"}),
    ),
)  # fmt: skip

api = router(tag="Models in service")


class Forward(Response):
    """The answer to every request at a passed path: the request's passage to its engine, as plain ASGI."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.background = None
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request."""
        await services_of(scope).gateway.forward(self._endpoint, scope, receive, send)


class PassedRoute(EitherSlashRoute):
    """A documented route whose endpoint takes nothing and always returns the same response: so it is asked once.

    What FastAPI does for each request otherwise costs as much as passing on some twenty chunks.
    """

    def __init__(self, path: str, endpoint: Callable[[], Forward], **kwargs: Any) -> None:
        super().__init__(path, endpoint, **kwargs)
        self.app = endpoint()


def _add(passed: Passed, base: str) -> None:
    forward = Forward(passed.endpoint)
    path = f"{base}/{passed.endpoint.name}"
    describe = documented_as_anthropic if path in ANTHROPIC_PATHS else documented
    answers: dict[int | str, dict[str, Any]] = {200: passed.answer, **describe(*PASSED_ERRORS)}
    api.add_api_route(
        path,
        lambda: forward,
        methods=["POST"],
        summary=passed.summary,
        description=passed.description,
        name=path[1:].replace("/", "_"),
        openapi_extra={"requestBody": passed.request},
        responses=answers,
        response_class=Response,
        response_model=None,
        route_class_override=PassedRoute,
    )


for _passed in PASSAGES:
    for _base in (*BASES, *([""] if _passed.endpoint.name in AT_ROOT else [])):
        _add(_passed, _base)


@api.get("/v1/models", summary="List models in service", responses=documented())
async def list_served_models(request: Request) -> ServedModelsOut:
    """Return every name that requests may ask for: models, adapters and aliases, as OpenAI's clients read them.

    These clients get the same list at /api/v1/models, where others get the models in the store.
    """
    listing = await services_of(request.scope).gateway.routing.listing()
    return ServedModelsOut.model_validate(openai_list(listing))


@api.get("/v1/models/{name:path}", summary="Get a model in service", responses=documented(404, 422, 503))
async def get_served_model(
    name: Annotated[str, Path(description="An id or an alias.", examples=["default"])], request: Request
) -> ServedModelOut:
    """Return one name that requests may ask for."""
    routing, name = services_of(request.scope).gateway.routing, name.removesuffix("/")
    listing = await routing.listing()
    if all(served.name != name for served in listing):
        routing.expect_database(name)
    return ServedModelOut.model_validate(openai_model(listing, name))


for _path, _answer in (("/api/v1/models", list_served_models), ("/api/v1/models/{name:path}", get_served_model)):
    api.routes.append(
        OpenAIListRoute(_path, _answer, methods=["GET"], name=f"{_answer.__name__}_api", include_in_schema=False)
    )
