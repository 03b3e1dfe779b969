"""REST for datasets: list, upload, download, report, rows, delete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, Header, Path, Query, Request
from starlette.responses import Response, StreamingResponse

from modelyard.datasets import actions, intake, reading, tokens, trainable_rows
from modelyard.datasets.mapping import parse
from modelyard.datasets.model_figures import StoredModel
from modelyard.datasets.multipart import OTHER_BYTES, FormFile
from modelyard.datasets.recognition import HEAD_BYTES
from modelyard.datasets.schemas import DatasetOut, PageOut, ReportOut, Tokens, Trains
from modelyard.errors import BadRequest, EncodingNotAllowed, ModelyardError, TooLarge
from modelyard.file_headers import content_disposition, part_of
from modelyard.http import Sessions, Settings, documented, router, services_of
from modelyard.models import actions as models
from modelyard.models import store
from modelyard.models.lost import bring_back
from modelyard.storage import Storage as ObjectStorage

api = router("/api/v1/datasets", "Datasets")

GIB = 1024**3
MIB = 1024**2
#: How long a client that was refused may go on sending.
HEAR_OUT_S = 30.0
MEDIA_TYPE = "application/jsonl"
ROW = '{"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Volga."}]}\n'
FILE: dict[str, Any] = {MEDIA_TYPE: {"schema": {"type": "string"}, "example": ROW}}
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "mapping": {
                            "type": "string",
                            "description": "Keys of the file that stand for keys of a row, as a JSON object of the "
                            "row's key and the file's (dots lead into objects). Before the file.",
                            "example": '{"prompt": "question", "completion": "answer"}',
                        },
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSONL; or a JSON array, CSV or TSV with a header, gzip or zstd of one of "
                            "these, or Parquet, which become JSONL.",
                        },
                    },
                },
                "example": {"file": ROW},
            }
        },
    }
}


async def _storage(request: Request) -> ObjectStorage:
    return services_of(request.scope).storage


async def _uploads(request: Request) -> intake.Uploads:
    return services_of(request.scope).uploads


Uploads = Annotated[intake.Uploads, Depends(_uploads)]
Storage = Annotated[ObjectStorage, Depends(_storage)]
DatasetId = Annotated[UUID, Path(description="The dataset's id.", examples=["01be6d68-f790-434b-aa6d-5bd492aef202"])]


@api.get("/", summary="List datasets", responses=documented())
async def list_datasets(sessions: Sessions) -> list[DatasetOut]:
    """Return all datasets, oldest first."""
    async with sessions.read() as session:
        return [DatasetOut.model_validate(dataset) for dataset in await actions.all_datasets(session)]


@api.post("/upload/", summary="Upload a dataset", responses=documented(400, 404, 413, 422, 503), openapi_extra=FORM)
async def upload_dataset(
    request: Request,
    sessions: Sessions,
    storage: Storage,
    settings: Settings,
    uploads: Uploads,
    description: Annotated[str | None, Query(max_length=10_000, description="A word on what it is.")] = None,
    parent_id: Annotated[UUID | None, Query(description="The dataset that this one was made from.")] = None,
    on_error: Annotated[
        intake.OnError, Query(description="skip: leave bad lines out of what is learnt from, instead of a refusal.")
    ] = "refuse",
) -> DatasetOut:
    """Upload a file of conversations, JSONL or one that becomes it, as the field `file` of a form.

    A row is `{"messages": [{"role", "content"}, ...]}`; ShareGPT's form, prompt/completion,
    instruction/input/output and text are read too. A file with lines that cannot be learnt from is refused as a whole:
    422, with the error and a `report` that has each problem as line, path and reason. Nothing of it is kept.

    A JSON array, a table (CSV, TSV) with a header, gzip and zstd of these or of JSONL, and Parquet (an extra) become
    JSONL: `converted_from` says so. The field `mapping` says which keys of the file stand for which of a row.
    """
    max_bytes = int(settings.max_dataset_gib * GIB)
    announced = request.headers.get("content-length", "")
    body = _Body(request)
    async with _hearing_out(body):
        if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
            # Only files that are compressed themselves would gain, and these are no JSONL.
            raise EncodingNotAllowed(encoding[:100], accepted="identity")
        if announced.isdecimal() and int(announced) > max_bytes + OTHER_BYTES:
            raise TooLarge(
                f"The upload is longer than the {settings.max_dataset_gib:g} GiB that a dataset may have "
                "(MODELYARD_MAX_DATASET_GIB).",
                param="file",
                code="dataset_too_large",
            )
        with uploads.one():
            form = FormFile(request.headers.get("content-type", ""), body.chunks())
            await form.open()
            mapping = parse(form.mapping) if form.mapping is not None else None
            dataset = await intake.take_in(
                sessions,
                storage,
                form.chunks(),
                name=form.name,
                description=description,
                parent_id=parent_id,
                on_error=on_error,
                max_bytes=max_bytes,
                max_line_bytes=settings.dataset_line_mib * MIB,
                head=form.head(HEAD_BYTES),
                mapping=mapping,
                scratch=settings.data_dir,
            )
    return DatasetOut.model_validate(dataset)


class _Body:
    """The body of an upload, which is read once: to its end, or up to where it is refused."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._has_ended = False

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Yield what comes.

        Raises:
            BadRequest: the client went away before the end.
        """
        while not self._has_ended:
            message = await self._request.receive()
            if message["type"] == "http.disconnect":
                self._has_ended = True
                raise BadRequest("The connection broke off within the upload.", code="upload_broken_off")
            self._has_ended = not message.get("more_body", False)
            yield message.get("body", b"")

    async def pass_over(self) -> None:
        """Read the rest and forget it. After the end nothing comes any more: that is not waited for."""
        with suppress(BadRequest):
            async for _ in self.chunks():
                pass

    @property
    def answer_closes(self) -> bool:
        """Return True if the connection ends with the answer."""
        is_old = self._request.scope["http_version"] == "1.0"
        return is_old or "close" in self._request.headers.get("connection", "").lower()


@asynccontextmanager
async def _hearing_out(body: _Body) -> AsyncGenerator[None]:
    """Let a refused client send what it still has, for a while, where the answer ends the connection.

    Closed before, it would be reset under a client that sends first and reads then (a proxy), and the answer with it.
    """
    try:
        yield
    except ModelyardError:
        if body.answer_closes:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEAR_OUT_S):
                    await body.pass_over()
        raise


@api.get("/{dataset_id:uuid}/report", summary="Get a dataset's report", responses=documented(404, 409, 422, 503))
async def get_report(
    request: Request,
    dataset_id: DatasetId,
    sessions: Sessions,
    storage: Storage,
    settings: Settings,
    model_id: Annotated[
        str | None, Query(description="A model in the store: count its tokens too.", examples=["Qwen/Qwen3-0.6B"])
    ] = None,
) -> ReportOut:
    """Return what is in a dataset: rows, turns, roles, lengths, duplicates, warnings, and the lines left out.

    With `model_id` also how long the rows are in that model's tokens, how many would be truncated, and what a training
    would learn from: the rows as the trainer renders them, and the reasons of those left out (`trains`), or the refusal
    that POST /api/v1/finetune/ and its plan would answer with. The first such
    request counts them, which takes seconds for a large dataset; the figures are kept.
    """
    async with sessions.read() as session:
        dataset = await actions.get(session, dataset_id)
        model = await models.get(session, model_id, among=models.BASES) if model_id is not None else None
        named = model
        if model is not None and model.adapter and model.base_model_id is not None:
            model = await models.get(session, model.base_model_id)  # an adapter speaks its base's tokens
    report = ReportOut.model_validate((await reading.about(storage, dataset)).report)
    if model is not None and named is not None:
        await bring_back(settings.models_dir, [model], None)
        folder = store.folder_of(settings.models_dir, model.path)
        stored = StoredModel(model.model_id, model.commit, folder, settings.dataset_line_mib * MIB)
        asked = sessions, storage, services_of(request.scope).tokenizers, dataset, stored
        report.tokens = Tokens.model_validate(await tokens.tokens_of(*asked))
        is_own = settings.trainer_python is not None
        found = await trainable_rows.trains(*asked, named=named, is_own_python=is_own)
        report.trains = Trains.model_validate(found)
    return report


@api.get("/{dataset_id:uuid}/rows", summary="Read rows", response_model=PageOut, responses=documented(404, 422, 503))
async def get_rows(
    dataset_id: DatasetId,
    sessions: Sessions,
    storage: Storage,
    settings: Settings,
    offset: Annotated[int, Query(ge=0, le=2**62, description="Rows to pass over.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="The most rows to return.")] = 20,
) -> Response:
    """Return rows as a training reads them: in the one canonical form, each with its line in the file.

    A page ends early when it gets long; `next_offset` is where the next one begins, null at the end.
    """
    async with sessions.read() as session:
        dataset = await actions.get(session, dataset_id)
    page = await reading.page(storage, dataset, offset, limit, settings.dataset_line_mib * MIB)
    return Response(page, media_type="application/json")


@api.get(
    "/{dataset_id:uuid}/",
    summary="Download a dataset",
    response_class=Response,
    responses={
        200: {"description": "The file as it is stored.", "content": FILE},
        206: {"description": "The part that `Range` asked for.", "content": FILE},
        **documented(404, 416, 422, 503),
    },
)
async def download_dataset(
    request: Request,
    dataset_id: DatasetId,
    sessions: Sessions,
    storage: Storage,
    range: Annotated[str | None, Header(description="A part of it, such as bytes=0-1023.")] = None,
    if_range: Annotated[str | None, Header(description="The ETag that `Range` is meant for.")] = None,
    if_none_match: Annotated[str | None, Header(description="The ETag that is there already.")] = None,
) -> Response:
    """Return the file byte for byte. A download that broke goes on with `Range`; the ETag is the file's SHA-256.

    With an `If-None-Match` that names it the answer is 304, without the file.
    """
    async with sessions.read() as session:
        dataset = await actions.get(session, dataset_id)
    etag = f'"{dataset.sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": content_disposition(dataset.file_name),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, no-cache",
    }
    if if_none_match is not None and (if_none_match.strip() == "*" or etag in if_none_match):
        return Response(status_code=304, headers=headers)
    part = part_of(range, dataset.size_bytes) if if_range is None or if_range.strip() == etag else None
    start, length = part or (0, dataset.size_bytes)
    headers["Content-Length"] = str(length)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{dataset.size_bytes}"
    status = 206 if part is not None else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=MEDIA_TYPE)
    blocks = storage.get(dataset.data_key, start=start, length=length)
    first = await anext(blocks, b"")  # a store that is away is an answer, not a stream that breaks
    return StreamingResponse(_rest(first, blocks), status_code=status, headers=headers, media_type=MEDIA_TYPE)


async def _rest(first: bytes, blocks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(blocks):
        yield first
        async for block in blocks:
            yield block


@api.delete("/{dataset_id:uuid}/", summary="Delete a dataset", responses=documented(404, 409, 422))
async def delete_dataset(dataset_id: DatasetId, sessions: Sessions, storage: Storage) -> DatasetOut:
    """Delete a dataset, its file included, and return what it was. 409 while it is in use."""
    return DatasetOut.model_validate(await intake.take_out(sessions, storage, dataset_id))
