"""Admission check for deploys: models of a kind that is not served, and adapters that cannot be served, are refused
before anything is written, so that the client gets a 422 instead of a job that fails later.

It reads the store, the model's files and the command of the engine that would be changed in place. It writes nothing
but an adapter's facts, where its row has none, and what it carries otherwise than its base.
What only an engine knows shows when it loads the model or the adapter.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession

from modelyard.db import Sessions
from modelyard.deploy import actions, succession
from modelyard.deploy.schemas import DeployIn
from modelyard.deploy.tables import Deployment
from modelyard.engine import adapter_support, attempts
from modelyard.engine.model_files import model_files, servable_files
from modelyard.engine.options import EngineOptions
from modelyard.errors import JobFailure, ModelyardError, Unprocessable
from modelyard.models import adapter_rendering
from modelyard.models.adapter_checks import check_facts, smallest_max_rank
from modelyard.models.lost import Backups, bring_back
from modelyard.models.stored_adapters import StoredAdapter, with_facts
from modelyard.models.tables import Model
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.settings import Settings


def wish_of(wanted: DeployIn, settings: Settings) -> actions.Wish:
    """Return what a request wants, with what it leaves to the settings."""
    idle_timeout_s = wanted.idle_timeout_s
    base, adapter_ids, params = wanted.base_model_id or wanted.model_id, wanted.adapter_ids, {}
    if base != wanted.model_id:  # an adapter is asked for, with the base that it belongs to
        params = {"model_id": "base_model_id"} | ({} if adapter_ids else {"adapter_ids": "model_id"})
        adapter_ids = [wanted.model_id, *adapter_ids]
    return actions.Wish(
        model_id=base,
        adapter_ids=adapter_ids,
        names_base=wanted.base_model_id is not None,
        params=params,
        options=wanted.options.model_dump(exclude_none=True),
        strategy=wanted.strategy,
        keep_others=wanted.keep_others,
        idle_timeout_s=settings.engine_idle_timeout_s if idle_timeout_s is None else idle_timeout_s,
    )


async def warnings_of(
    sessions: Sessions, settings: Settings, wish: actions.Wish, tokenizers: TokenizerChildren
) -> dict[str, str]:
    """Return what is said of adapters that carry another chat template or tokenizer than their base; after `check`."""
    if not wish.adapter_ids:
        return {}
    async with sessions.read() as session:
        model, adapters = await actions.wanted_models(session, wish.model_id, wish.adapter_ids, wish.names_base)
    return await adapter_rendering.compare(sessions, settings.models_dir, tokenizers, model, adapters)


async def check(sessions: Sessions, settings: Settings, wish: actions.Wish, backups: Backups | None = None) -> None:
    """Refuse a model of a kind that is not served, and adapters that cannot be served on it, or not by its engine.

    Raises:
        ModelNotFound: the store lacks the model or an adapter.
        Unprocessable: param is the field that the request names it in; the message says what to do.
        ModelLost: the files of one are gone, and cannot be had back from where they are kept.
    """
    try:
        await _check(sessions, settings, wish, backups)
    except ModelyardError as error:
        error.param = wish.params.get(error.param or "", error.param)
        raise


async def _check(sessions: Sessions, settings: Settings, wish: actions.Wish, backups: Backups | None) -> None:
    async with sessions.read() as session:
        model, adapters = await actions.wanted_models(session, wish.model_id, wish.adapter_ids, wish.names_base)
        running = await _running(session, wish, model.path)
    await bring_back(settings.models_dir, [model, *adapters], backups)
    await asyncio.to_thread(_check_kind, settings, model)
    if not wish.adapter_ids:
        return
    if EngineOptions(**wish.options).over(settings).max_loras == 0:
        where = "options.max_loras" if wish.options.get("max_loras") == 0 else "MODELYARD_ENGINE_MAX_LORAS"
        raise Unprocessable(
            f"{where} is 0, which leaves no room for adapters: deploy with options.max_loras {len(adapters)}.",
            param="adapter_ids",
        )
    stored = await with_facts(sessions, settings.models_dir, adapters)
    ranks = await asyncio.to_thread(_ranks, settings, model, stored, running)
    room = await asyncio.to_thread(_rank_of_engine, settings, running) if running is not None and ranks else None
    for adapter_id, rank in ranks.items():
        if room is not None and rank > room:
            raise Unprocessable(
                f"The adapter '{adapter_id}' has rank {rank}, and the engine of '{model.model_id}' was started for "
                f"ranks up to {room}: deploy with options.max_lora_rank {smallest_max_rank(ranks.values())}, which "
                "starts another engine beside it.",
                param="adapter_ids",
            )


def _check_kind(settings: Settings, model: Model) -> None:
    """Refuse a model for whose kind there is no path here. Files that cannot be read are the job's to tell."""
    try:
        servable_files(settings, model)
    except JobFailure as failure:
        if failure.code == "unsupported_kind":
            raise Unprocessable(f"{failure.message} {failure.hint}", param="model_id", code=failure.code) from failure


async def _running(session: AsyncSession, wish: actions.Wish, path: str) -> Deployment | None:
    """Return the deployment with an engine that the wish would change in place."""
    for one in await succession.live(session):
        if wish.is_met_by(one, path) and one.engine_url and await actions.is_wanted(session, one):
            return one
    return None


def _ranks(
    settings: Settings, model: Model, adapters: Sequence[StoredAdapter], running: Deployment | None
) -> dict[str, int]:
    """Return the rank of each adapter that the engine does not serve already, after holding it against its base."""
    try:
        files = model_files(settings, model)
    except JobFailure as failure:
        raise Unprocessable(f"{failure.message} {failure.hint}", param="model_id", code=failure.code) from failure
    if adapters and files.is_mistral_format:
        raise Unprocessable(
            f"The weights of '{model.model_id}' are in Mistral's own format, by whose names no adapter can be checked: "
            "deploy it without adapters, or add a repository of the model in the format of transformers.",
            param="adapter_ids",
            code="adapters_unsupported",
        )
    if adapters and (fault := adapter_support.fault(files.config)) is not None:
        raise Unprocessable(
            f"'{model.model_id}' {fault}. Deploy it without adapters (and with options.max_loras 0). "
            f"{adapter_support.remedy(adapters[0].adapter_id)}",
            param="adapter_ids",
            code="adapters_unsupported",
        )
    loaded = {one["path"] for one in running.loaded} if running is not None else set()
    ranks = {}
    for adapter in adapters:
        if str(adapter.path) not in loaded:
            check_facts(adapter.facts, files.config, adapter_id=adapter.adapter_id, base_folder=files.path)
            ranks[adapter.adapter_id] = adapter.facts.rank
    return ranks


def _rank_of_engine(settings: Settings, running: Deployment) -> int | None:
    """Return the highest rank that a deployment's engine takes, by its command; None if there is no command yet."""
    folder: Path | None = attempts.newest(settings.jobs_dir / str(running.job_id))
    try:
        argv = json.loads((folder / "spec.json").read_text("utf-8"))["argv"] if folder is not None else []
        return int(argv[argv.index("--max-lora-rank") + 1])
    except (FileNotFoundError, ValueError):
        return None
