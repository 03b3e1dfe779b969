"""REST for how the server is: /health, /ready, /metrics."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, PlainTextResponse, Response

import modelyard
from modelyard.engine.client import metrics_of
from modelyard.health.exposition import merge
from modelyard.http import documented, router, services_of
from modelyard.routing.routes import CurrentRouting

api = router(tag="Health")

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class HealthOut(BaseModel):
    """The server is alive."""

    status: Literal["ok"] = "ok"
    version: str = Field(examples=["0.1.0"])


class ReadyOut(BaseModel):
    """True if the server can do its work, and what keeps it from it."""

    ready: bool
    reasons: list[str] = Field(description="Empty when ready.", examples=[[]])


async def _registry(request: Request) -> CollectorRegistry:
    return services_of(request.scope).registry


@api.get("/health/", summary="Is the server alive")
async def get_health() -> HealthOut:
    """Answer at once, to anyone: for a supervisor or a load balancer that asks whether to restart."""
    return HealthOut(version=modelyard.__version__)


@api.get(
    "/ready/",
    summary="Can the server do its work",
    response_model=ReadyOut,
    responses={503: {"model": ReadyOut, "description": "Not ready, with the reasons."}, **documented()},
)
async def get_readiness(request: Request) -> Response:
    """Answer 200, or 503 with the reasons, within some seconds whatever hangs.

    A deployment that starts is no reason: its requests get a 503 of their own.
    """
    services = services_of(request.scope)
    reasons = [*await services.checks.reasons(), *services.complaints()]
    body = ReadyOut(ready=not reasons, reasons=reasons)
    return JSONResponse(body.model_dump(), status_code=200 if body.ready else 503)


@api.get(
    "/metrics/",
    summary="Figures for Prometheus",
    response_class=PlainTextResponse,
    responses={
        200: {"content": {"text/plain": {"example": 'modelyard_requests_total{endpoint="chat/completions"} 3.0\n'}}},
        **documented(),
    },
)
async def get_metrics(routing: CurrentRouting, registry: Annotated[CollectorRegistry, Depends(_registry)]) -> Response:
    """Return the server's own figures and those of its engines, told apart by the label `deployment`."""
    engines = await metrics_of(await routing.ready_engines())
    merged = merge(generate_latest(registry).decode(), engines)
    return Response(merged, headers={"Content-Type": METRICS_TYPE})
