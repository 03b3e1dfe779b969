"""Wire shape of a plan: what a deploy would take and do."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from modelyard.deploy.plan import Plan
from modelyard.jobs.schemas import FailureOut

GIB = 1024**3


class PlannedMemory(BaseModel):
    """Memory of the engine in bytes, of the GPUs where there are any. null: the model's configuration does not tell."""

    weights_bytes: int = Field(examples=[16 * GIB])
    processes_bytes: int = Field(description="The engine itself, without model and cache.", examples=[2 * GIB])
    adapters_bytes: int | None = Field(description="Room for adapters.", examples=[GIB // 2])
    kv_cache_bytes: int | None = Field(examples=[4 * GIB])
    kv_cache_tokens: int | None = Field(
        description="Tokens, of prompts and answers together, that the cache holds.", examples=[32_640]
    )
    request_tokens: int | None = Field(description="Longest prompt plus answer of one request.", examples=[8192])
    full_length_requests: float | None = Field(
        description="Requests of that length that can be worked on at the same time.", examples=[3.98]
    )
    total_bytes: int = Field(description="All of this; a GPU gives its whole part to the engine.", examples=[23 * GIB])
    gpus: list[int] = Field(
        description="The GPUs that it would get now, by their places in the order of the PCI bus; empty without, or "
        "where nothing tells.",
        examples=[[0]],
    )
    free_bytes: int | None = Field(
        description="What engines may take now, beside those that run; null: nothing tells.", examples=[50 * GIB]
    )
    free_after_bytes: int | None = Field(
        description="What is left when this engine runs and those have left that leave for it.", examples=[27 * GIB]
    )


class PlannedDisk(BaseModel):
    """Space on disk, in bytes. Model and adapters are there already: a deploy takes no more."""

    model_bytes: int = Field(examples=[16 * GIB])
    adapters_bytes: int = Field(examples=[84_000_000])
    free_bytes: int = Field(examples=[200 * GIB])


class LeavingOut(BaseModel):
    """A deployment that would leave."""

    model_config = ConfigDict(protected_namespaces=())

    deployment_id: UUID
    model_id: str = Field(examples=["openchat/openchat-3.5-0106"])
    memory_bytes: int = Field(description="What its engine was given.", examples=[23 * GIB])
    leaves: Literal["before", "after"] = Field(
        description="before the new engine starts, or after it has generated a token.", examples=["after"]
    )


class PlanOut(BaseModel):
    """The plan of a deploy with this body."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str = Field(examples=["openchat/openchat-3.5-0106"])
    adapter_ids: list[str] = Field(examples=[[]])
    fits: bool = Field(description="Whether the engine would start, as far as memory and configuration tell.")
    fits_beside: bool = Field(description="Whether it would beside all that runs now.")
    strategy: Literal["in_place", "side_by_side", "replace"] = Field(
        description="in_place: the engine that runs serves it, and at most its adapters change. side_by_side: a new "
        "engine is started beside those that run. replace: those that it replaces leave first."
    )
    leaving: list[LeavingOut] = Field(description="The deployments that would leave for it.")
    message: str = Field(description="The numbers in one sentence.", examples=["acme/chat needs 16.0 GiB for ..."])
    hints: list[str] = Field(
        description="What would make it fit; each value has been tried.",
        examples=[["Set max_model_len to at most 8192."]],
    )
    failure: FailureOut | None = Field(
        description="How the deploy's job would end; null where nothing speaks against it."
    )
    memory: PlannedMemory | None = Field(description="null: the model's files cannot be read.")
    disk: PlannedDisk

    @classmethod
    def of(cls, plan: Plan) -> PlanOut:
        """Show a plan."""
        fit, failure = plan.fit, plan.failure
        memory = None
        if fit is not None:
            requests = None
            if fit.kv_cache_tokens is not None and fit.sequence_tokens:
                requests = round(fit.kv_cache_tokens / fit.sequence_tokens, 2)
            memory = PlannedMemory(
                weights_bytes=fit.weights_bytes,
                processes_bytes=fit.processes_bytes,
                adapters_bytes=fit.adapters_bytes,
                kv_cache_bytes=fit.kv_cache_bytes,
                kv_cache_tokens=fit.kv_cache_tokens,
                request_tokens=fit.sequence_tokens,
                full_length_requests=requests,
                total_bytes=fit.total_bytes,
                gpus=list(fit.gpus),
                free_bytes=plan.free_bytes,
                free_after_bytes=plan.free_after_bytes,
            )
        return cls(
            model_id=plan.model.model_id,
            adapter_ids=[one.model_id for one in plan.adapters],
            fits=plan.fits,
            fits_beside=plan.fits_beside,
            strategy=plan.way,
            leaving=[
                LeavingOut(
                    deployment_id=one.deployment_id,
                    model_id=one.model_id,
                    memory_bytes=one.memory_bytes,
                    leaves="before" if one.first else "after",
                )
                for one in plan.leaving
            ],
            message=fit.message if fit is not None else failure.message if failure is not None else "",
            hints=list(fit.hints) if fit is not None else [],
            failure=FailureOut(
                code=failure.code, message=failure.message, hint=failure.hint, evidence=list(failure.evidence)
            )
            if failure is not None
            else None,
            memory=memory,
            disk=PlannedDisk(
                model_bytes=plan.model.size_bytes,
                adapters_bytes=sum(one.size_bytes for one in plan.adapters),
                free_bytes=plan.disk_free_bytes,
            ),
        )
