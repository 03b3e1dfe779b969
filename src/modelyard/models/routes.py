"""REST for models: list, get, add, delete."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Depends, Path, Query, Request

from modelyard.http import Sessions, Settings, documented, router, services_of
from modelyard.jobs.schemas import JobOut
from modelyard.models import actions, store
from modelyard.models.lost import Backups, lost_of
from modelyard.models.schemas import ModelOut

api = router("/api/v1/models", "Models")


async def _backups(request: Request) -> Backups:
    return services_of(request.scope).backups


Kept = Annotated[Backups, Depends(_backups)]
ModelId = Annotated[str, Path(description="The id, which may hold slashes.", examples=["Qwen/Qwen3-0.6B"])]


@api.get("/", summary="List models and adapters", responses=documented())
async def list_models(sessions: Sessions, settings: Settings) -> list[ModelOut]:
    """Return everything in the store, by name: what can be deployed, and what adapters can be added to it."""
    async with sessions.read() as session:
        models = await actions.all_models(session)
    lost = await lost_of(settings.models_dir, models)
    return [ModelOut.of(model, lost) for model in models]


@api.post("/add/", summary="Download a model", responses=documented(404, 409, 422))
async def add_model(
    sessions: Sessions,
    model_id: Annotated[
        str,
        Query(
            description="The id on the Hugging Face hub, or local:NAME for a folder in the import directory. A folder "
            "inside of it, such as one of several adapters, may follow: acme/adapters/law.",
            examples=["Qwen/Qwen3-0.6B"],
        ),
    ],
    revision: Annotated[
        str | None, Query(description="Branch, tag or commit; main if left out.", examples=["main"])
    ] = None,
    subfolder: Annotated[
        str | None,
        Query(
            description="The folder inside the repository; the same as after model_id and a slash.", examples=["law"]
        ),
    ] = None,
    base_model_id: Annotated[
        str | None,
        Query(
            description="The model that an adapter belongs to, whatever its own files name: they may say a path, the "
            "name in other letters, or the hub's name of an imported model. It must be in the store, or on its way; "
            "the layers are compared with that model's when the adapter is deployed.",
            examples=["local:tiny-llama"],
        ),
    ] = None,
) -> JobOut:
    """Start the job that brings a model or a LoRA adapter into the store, verified and scanned.

    While it runs, the same request returns the same job. A model that is there at that revision makes a job that
    finishes at once. GET /api/v1/jobs/{id}/status/ shows its progress in bytes, and why it failed if it did.
    """
    whole = f"{model_id}/{subfolder.strip('/')}" if subfolder and subfolder.strip("/") else model_id
    async with sessions.begin() as session:
        job = await actions.request_download(session, whole, revision, base_model_id)
    return JobOut.of(job)


@api.get("/{model_id:path}", summary="Get a model", responses=documented(404, 422))
async def get_model(model_id: ModelId, sessions: Sessions, settings: Settings) -> ModelOut:
    """Return one model or adapter in the store."""
    async with sessions.read() as session:
        model = await actions.get(session, model_id.rstrip("/"))
    return ModelOut.of(model, await lost_of(settings.models_dir, [model]))


@api.delete("/{model_id:path}", summary="Delete a model", responses=documented(404, 409, 422))
async def delete_model(model_id: ModelId, sessions: Sessions, settings: Settings, backups: Kept) -> ModelOut:
    """Delete a model or an adapter and return what it was. 409 while it is deployed or an adapter's base."""
    async with sessions.begin() as session:
        model = await actions.delete(session, model_id.rstrip("/"))
    await asyncio.to_thread(store.remove, settings.models_dir, model.model_id)
    await backups.forget(model)
    return ModelOut.model_validate(model)
