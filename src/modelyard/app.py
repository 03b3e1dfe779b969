"""The application: everything is wired here, and only here does everyone meet.

`create_app` makes the FastAPI application of a foundation that was laid (`Foundation.lay`). Its lifespan starts the job
runner and, at the end, stops it, which ends every child in good order. Errors become answers in one place.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from sqlalchemy.exc import DataError, SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

import modelyard
from modelyard import tasks
from modelyard.auth.access import OPEN_PATHS, Access
from modelyard.capacity import reservations
from modelyard.capacity.one_shot import OneShotMemory
from modelyard.client_watch import ClientGone
from modelyard.datasets import actions as datasets
from modelyard.datasets import intake
from modelyard.datasets.routes import api as datasets_api
from modelyard.db import Sessions
from modelyard.deploy import actions as deployments
from modelyard.deploy.attempt_routes import api as attempts_api
from modelyard.deploy.deployment_routes import api as deployments_api
from modelyard.deploy.plan_routes import api as plan_api
from modelyard.deploy.routes import api as deploy_api
from modelyard.deploy.supervisor import Supervisor
from modelyard.docs.routes import add_docs
from modelyard.errors import (
    InvalidJson,
    MethodNotAllowed,
    ModelyardError,
    NotFound,
    OutOfFiles,
    TooLarge,
    Unprocessable,
    is_out_of_files,
)
from modelyard.export.routes import api as export_api
from modelyard.finetune import actions as finetunes
from modelyard.finetune.accelerator import Accelerator
from modelyard.finetune.backups import AdapterBackups
from modelyard.finetune.errands import Errands
from modelyard.finetune.plan_routes import api as finetune_plan_api
from modelyard.finetune.routes import api as finetune_api
from modelyard.finetune.stand_aside import bring_back_forgotten
from modelyard.finetune.trainings import Trainings
from modelyard.foundation import Foundation
from modelyard.gateway.limits import Limits
from modelyard.gateway.metrics import Metrics
from modelyard.gateway.raw import RawLane
from modelyard.gateway.raw_routes import api as raw_api
from modelyard.gateway.relay import Gateway
from modelyard.gateway.routes import api as gateway_api
from modelyard.gateway.upstream import Engines
from modelyard.health.checks import Checks, of_database, of_models, of_storage
from modelyard.health.routes import api as health_api
from modelyard.http import EitherSlashRoute, error_response
from modelyard.jobs.feeds import FollowerLimits
from modelyard.jobs.routes import api as jobs_api
from modelyard.jobs.runner import JobRunner
from modelyard.models import actions as models
from modelyard.models.downloads import Downloads
from modelyard.models.routes import api as models_api
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.outages import explain, first_line, is_passing
from modelyard.parameters import not_an_id
from modelyard.processes import Children
from modelyard.routing.router import Routing
from modelyard.routing.routes import api as aliases_api
from modelyard.services import Services
from modelyard.storage import Storage

log = logging.getLogger(__name__)

MIB = 1024 * 1024
#: As the gateway counts requests whose client went away.
CLIENT_GONE = 499
#: A start waits so long for adapters that are brought back from the storage.
RESTORE_PATIENCE_S = 20.0
DESCRIPTION = """Download models, put them into service with LoRA adapters on vLLM, and ask them, over REST.

Every path answers with and without its trailing slash. All errors have one form:
`{"error": {"message", "type", "param", "code"}}`. [The manual](/api/docs/guide/) says what is done with it, and why."""
TAGS = {
    "Models in service": "OpenAI's and Anthropic's interfaces: each request reaches the engine that serves its model.",
    "Raw prompts": "Text from prompts as they are, one or many at once, continued by request id.",
    "Models": "The store: what was downloaded or imported, and is verified and scanned.",
    "Datasets": "Conversations to learn from: validated while they arrive, never changed after.",
    "Fine-tuning": "Train LoRA adapters of a model on a dataset, measured, checked, and put into service.",
    "Deploy": "Put a model into service, and take it out again.",
    "Aliases": "Names of your own for what is in service, which move from one model or adapter to another at once.",
    "Jobs": "Everything that takes time is a job: follow it, read its log, interrupt it.",
    "Health": "For whatever watches over the server.",
}


async def _look_at(storage: Storage) -> None:
    """Say at the start that the storage cannot be used: else the first to learn it would be who stores something."""
    try:
        await storage.check()
    except ModelyardError as error:
        log.warning("The storage cannot be used now, and datasets and trainings need it: %s", error.message)


def create_app(foundation: Foundation) -> FastAPI:
    """Return the application; it holds what it needs from the moment its lifespan starts until that ends."""
    settings = foundation.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sessions = Sessions(foundation.url)
        engines = Engines()
        children = Children(foundation.owner_lock, settings.grace_s)
        routing = Routing(sessions, settings.engine_wake_timeout_s)
        tokenizers = TokenizerChildren()
        supervisor = Supervisor(settings, sessions, children, routing.requests, tokenizers)
        storage = foundation.storage
        accelerator = Accelerator(settings, sessions, supervisor.sharing_memory)
        runner = JobRunner(
            sessions,
            {
                models.DOWNLOAD: Downloads(sessions, children, settings, tokenizers).run,
                deployments.KIND: supervisor.serve,
                finetunes.KIND: Trainings(settings, sessions, storage, children, accelerator, tokenizers).run,
            },
            {models.DOWNLOAD: settings.max_downloads, finetunes.KIND: settings.max_finetunes},
            settings.jobs_dir,
            {finetunes.KIND: finetunes.ended, deployments.KIND: deployments.ended},
            FollowerLimits(settings.max_job_followers, settings.max_followers),
        )
        memory = OneShotMemory(sessions, supervisor.sharing_memory, settings.engine_memory_gib)
        errands = Errands(settings, children, memory)
        registry = _registry()
        limits = Limits.of(settings)
        gateway = Gateway(routing, engines, Metrics(registry), settings.max_body_mib * MIB, limits)
        raw_lane = RawLane(gateway, sessions, settings)
        await raw_lane.kept.learn()
        await runner.end_deadly()
        async with sessions.begin() as session:
            await deployments.reconcile(session)
            await reservations.release_one_shot_runs(session)
            in_use = await deployments.folders_in_use(session) | await finetunes.folders_in_use(session)
            await models.sweep(session, settings.models_dir, await finetunes.unpublished(session), in_use)
            await bring_back_forgotten(session)
            forgotten = await datasets.leftovers(session)
        keep = await runner.folders_in_use()
        await children.end_strays(keep)
        await errands.sweep()
        await supervisor.check_before_serving()
        backups = AdapterBackups(settings.models_dir, sessions, storage)
        # Engines that start would do without a lost one; but a store that is away keeps no server from starting.
        restoring = tasks.spawn("lost adapters", backups.restore_lost())
        await asyncio.wait({restoring}, timeout=RESTORE_PATIENCE_S)
        storing = tasks.spawn("adapters that are not stored", backups.store_missing())
        task = tasks.spawn(
            "job runner", runner.run(), eternal=True, on_end=lambda: foundation.fail("The job runner ended.")
        )
        checks = Checks([of_database(foundation.url), of_storage(storage), of_models(sessions, settings.models_dir)])
        app.state.services = Services(
            settings=settings,
            sessions=sessions,
            storage=storage,
            runner=runner,
            tokenizers=tokenizers,
            backups=backups,
            uploads=intake.Uploads(settings.max_uploads),
            routing=routing,
            gateway=gateway,
            raw_lane=raw_lane,
            errands=errands,
            checks=checks,
            registry=registry,
            complaints=lambda: [
                *foundation.complaints(),
                *(["The job runner has stopped; the server is ending."] if task.done() else []),
            ],
        )
        follower = tasks.spawn("routing", routing.follow())
        # Not waited for: a store that is away must not keep the server from starting.
        sweep = tasks.spawn("sweep of datasets", intake.sweep(sessions, storage, forgotten))
        look = tasks.spawn("look at the storage", _look_at(storage))
        try:
            yield
        finally:
            await errands.close()
            await tasks.end(task, sweep, look, follower, restoring, storing)
            await raw_lane.kept.close()
            await routing.close()
            await checks.close()
            await engines.close()
            await storage.close()
            await sessions.close()

    app = FastAPI(
        title="Modelyard",
        version=modelyard.__version__,
        description=DESCRIPTION,
        openapi_tags=[{"name": name, "description": text} for name, text in TAGS.items()],
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    # The gateway comes first: it answers OpenAI's clients at an address that the models room has too. An export's path
    # would be a model's.
    apis = (
        gateway_api, raw_api, export_api, models_api, datasets_api, deploy_api, plan_api, deployments_api, attempts_api,
        aliases_api, finetune_api, finetune_plan_api, jobs_api, health_api,
    )  # fmt: skip
    for api in apis:
        app.include_router(api)
    add_docs(app, OPEN_PATHS)
    app.add_middleware(Access, settings=settings)
    app.add_exception_handler(ModelyardError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(SQLAlchemyError, _answer_database)
    app.add_exception_handler(OSError, _answer_os_error)
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unexpected)
    return app


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, ModelyardError)
    return error_response(error, request.url.path)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(describe_invalid(error.errors()), request.url.path)


#: How pydantic names the forms that a value may have, as parts of its place.
_FORMS = ("constrained-", "literal[", "list[constrained-")
#: What pydantic says in words of its own.
_REASONS = {
    "extra_forbidden": "There is no such field; /api/docs shows those that there are",
    "model_attributes_type": "Input should be a JSON object",
}


def _where(fault: Any) -> str:
    """Return the place of a fault in its source, without the names that pydantic gives to the forms of a union."""
    return ".".join(str(part) for part in fault["loc"][1:] if not str(part).startswith(_FORMS))


def describe_invalid(faults: Any) -> ModelyardError:
    """Return the error for a request that pydantic refused: where, what, and how many more."""
    first = faults[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return InvalidJson(f"The body is not JSON: {reason} (at character {first['loc'][-1]}).")
    source, *path = first["loc"]
    if isinstance(first.get("input"), bytes) and not path:
        return Unprocessable("The body is not JSON by its type: send the header 'Content-Type: application/json'.")
    where = _where(first) or source
    if first["type"].startswith("uuid_") and path:
        return not_an_id(source, where, first.get("input"))
    # A value that may be of several forms has a fault for each of them, and they are all of one place.
    others = len({_where(fault) for fault in faults} - {_where(first)})
    more = f" (and {others} more)" if others else ""
    reason = _REASONS.get(first["type"], first["msg"].removeprefix("Value error, "))
    for fault in faults[1:]:
        if path and _where(fault) == where and fault["type"] == "literal_error":
            reason += f", or {fault['ctx']['expected']}"
    if first["type"] == "missing" and not path:
        reason = "there is none: send JSON, with the header 'Content-Type: application/json'"
    return Unprocessable(f"{source} {where}: {reason}{more}." if path else f"{source}: {reason}{more}.", param=where)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        meant = _path_meant(request)
        routes = [route for route in request.app.routes if isinstance(route, EitherSlashRoute)]
        if meant is None and (wrong := next(filter(None, (route.malformed_id(path) for route in routes)), None)):
            return error_response(wrong, path)
        instead = f": the right path is {meant}" if meant is not None else ""
        nothing = NotFound(f"There is nothing at {path}{instead}. GET /api/docs shows all paths.", code="no_such_path")
        return error_response(nothing, path)
    if error.status_code == 405:
        allowed = _methods_at(request)
        answer = error_response(
            MethodNotAllowed(f"{request.method} is not possible at {path}, but {' and '.join(allowed)}."), path
        )
        answer.headers["Allow"] = ", ".join(
            [*allowed, *(["HEAD"] if "GET" in allowed and "HEAD" not in allowed else [])]
        )
        return answer
    if error.status_code == TooLarge.status:
        return error_response(TooLarge(error.detail), path)
    # FastAPI could not read the body, for another reason than its grammar.
    return error_response(InvalidJson(f"The body is not JSON: {error.__cause__ or error.detail}."), path)


def _path_meant(request: Request) -> str | None:
    """Return the path that a client means whose base address has a slash, or a `/v1`, too many or too few."""
    path = request.url.path
    single = re.sub("/{2,}", "/", path)
    outer = re.sub(r"^((?:/api)?/v1)(?:(?:/api)?/v1)+(?=/)", r"\1", single)
    inner = re.sub(r"^/v1(?=/api/v1/)", "", single)
    found = [single, inner, outer, f"/v1{single}", f"/api{single}", f"/api/v1{single}"]
    for one in dict.fromkeys(found):
        scope = {**request.scope, "path": one, "root_path": request.scope.get("app_root_path", "")}
        if one != path and any(route.matches(scope)[0] is not Match.NONE for route in request.app.routes):
            return one
    return None


def _methods_at(request: Request) -> list[str]:
    """Return what all routes of a path take together; starlette knows only those of the first one."""
    found: set[str] = set()
    # A mounted application has taken its part off the path.
    scope = {**request.scope, "root_path": request.scope.get("app_root_path", "")}
    for route in request.app.routes:
        match, _ = route.matches(scope)
        if match is not Match.NONE:
            found |= (route.methods or set()) if isinstance(route, Route) else {"GET", "HEAD"}
    return sorted(found)


async def _answer_database(request: Request, error: Exception) -> Response:
    """Tell a database that is away (it may come back) from a value that it cannot hold (which the client sent)."""
    path = request.url.path
    if isinstance(error, DataError):
        return error_response(Unprocessable(f"A value is not one that can be kept: {first_line(error)}."), path)
    if is_passing(error):
        log.error("the database did not answer %s %s: %s", request.method, path, first_line(error))
        return error_response(explain(error), path)
    raise error


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    # What was done for a client was given up when it went away: there is nobody who could read of it.
    return Response(status_code=CLIENT_GONE)


async def _answer_os_error(request: Request, error: Exception) -> Response:
    if not is_out_of_files(error):
        raise error
    log.error("no file could be opened for %s %s: %s", request.method, request.url.path, error)
    return error_response(OutOfFiles(), request.url.path)


async def _answer_unexpected(request: Request, _error: Exception) -> Response:
    # The cause is in the log already: starlette hands it on to the server after this answer.
    message = f"Something failed inside the server itself while it answered {request.url.path}; its log has the cause."
    return error_response(ModelyardError(message), request.url.path)
