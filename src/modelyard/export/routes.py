"""REST for taking a model or an adapter away. Its path lies in the models room's: it must be registered before that."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Annotated, Any

from fastapi import Header, Query, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from modelyard.client_watch import unless_gone
from modelyard.export import archive, exports
from modelyard.file_headers import content_disposition
from modelyard.finetune.plan_routes import Errands
from modelyard.http import Sessions, Settings, documented, router
from modelyard.models import actions as models
from modelyard.models import store
from modelyard.models.lost import bring_back
from modelyard.models.routes import Kept, ModelId

api = router("/api/v1/models", "Models")

MEDIA_TYPE = "application/zip"
ZIP: dict[str, Any] = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}, "example": "PK..."}}


@api.get(
    "/{model_id:path}/export",
    summary="Export a model or an adapter",
    response_class=Response,
    responses={200: {"description": "The files, as a zip.", "content": ZIP}, **documented(404, 409, 422, 502, 503)},
)
async def export_model(
    request: Request,
    model_id: ModelId,
    sessions: Sessions,
    settings: Settings,
    errands: Errands,
    backups: Kept,
    merged: Annotated[bool, Query(description="Of an adapter: put it into its base, and export that.")] = False,
    if_none_match: Annotated[str | None, Header(description="The ETag that is there already.")] = None,
) -> Response:
    """Return a model or an adapter as a zip of its files, which transformers or PEFT load as they are elsewhere.

    With `merged` an adapter is put into its base first, in the base's number format: that takes the memory and, for as
    long as the zip is sent, the disk space of the whole base, and some minutes for a large one. One merge runs at a
    time, others wait; a client that goes away ends its own.
    """
    async with sessions.read() as session:
        model = await models.get(session, model_id.rstrip("/"))
        base = await exports.base_of(session, model) if merged else None
    await bring_back(settings.models_dir, [model, *([base] if base is not None else [])], backups)
    tag = exports.etag(model, base)
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    known = (if_none_match or "").strip()
    if known == "*" or tag.removeprefix("W/") in known:
        return Response(status_code=304, headers=headers)
    async with AsyncExitStack() as stack:
        if base is None:
            found = await exports.archive(model, store.folder_of(settings.models_dir, model.path))
        else:
            merging = stack.enter_async_context(exports.merged(errands, settings, model, base))
            found = await unless_gone(request.receive, merging)
        headers["Content-Length"] = str(found.length)
        headers["Content-Disposition"] = content_disposition(exports.file_name(model.model_id, is_merged=merged))
        return _Zip(archive.stream(found.entries), headers, stack.pop_all())


class _Zip(StreamingResponse):
    """Sends an archive, and ends what it was made from whether or not all of it was sent."""

    def __init__(self, blocks: AsyncGenerator[bytes], headers: dict[str, str], made_from: AsyncExitStack) -> None:
        super().__init__(blocks, headers=headers, media_type=MEDIA_TYPE)
        self._blocks = blocks
        self._made_from = made_from

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._made_from, aclosing(self._blocks):
            await super().__call__(scope, receive, send)
