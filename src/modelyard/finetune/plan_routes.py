"""REST for looking before training: what a training would take."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from modelyard.client_watch import unless_gone
from modelyard.datasets.routes import Storage
from modelyard.finetune.errands import Errands as ErrandRunner
from modelyard.finetune.plan_schemas import FinetunePlanOut
from modelyard.finetune.planning import plan
from modelyard.finetune.request_checks import check
from modelyard.finetune.schemas import FinetuneIn
from modelyard.http import Sessions, Settings, documented, router, services_of

api = router("/api/v1/finetune", "Fine-tuning")


async def _errands(request: Request) -> ErrandRunner:
    return services_of(request.scope).errands


Errands = Annotated[ErrandRunner, Depends(_errands)]


@api.post("/plan/", summary="Plan a training", responses=documented(400, 404, 409, 413, 422, 502, 503))
async def plan_finetune(
    request: Request, wanted: FinetuneIn, sessions: Sessions, settings: Settings, storage: Storage, errands: Errands
) -> FinetunePlanOut:
    """Say what POST /api/v1/finetune/ with this body would take: rows, tokens, steps, minutes, memory.

    All rows are prepared as the training would, and a few steps are measured where no training of the same model and
    settings tells what they take: count on some ten seconds to a minute. What the training would be refused for is
    refused here too. Nothing is kept; one plan is made at a time, and a client that goes away ends its own.
    """
    await check(wanted, sessions, settings)
    tokenizers = services_of(request.scope).tokenizers
    found = await unless_gone(request.receive, plan(sessions, settings, storage, errands, tokenizers, wanted))
    return FinetunePlanOut.model_validate(found)
