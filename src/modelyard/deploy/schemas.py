"""Wire shapes of the deploy room: the source API's fields first, ours after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from modelyard.deploy.tables import Deployment, DeploymentState, Strategy, Wanted
from modelyard.engine.options import EngineOptions
from modelyard.jobs.schemas import JobOut, Time
from modelyard.jobs.tables import Job
from modelyard.models.chat_template import GUESSED_HINT, GUESSED_WARNING, TemplateSource


class DeployIn(BaseModel):
    """A wish to put something into service. Ids are those of GET /api/v1/models/."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra={
            "examples": [{"model_id": "openchat/openchat-3.5-0106", "adapter_ids": [], "options": {"dtype": "auto"}}]
        },
    )

    model_id: str = Field(min_length=1, max_length=256, description="The model.")
    adapter_ids: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default_factory=list, max_length=64, description="LoRA adapters of this model."
    )
    base_model_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Says that the adapters belong to this model, whatever their own files name as base: an id in "
        "other letters, a path on another machine, the hub's name of an imported model. It is kept with them. Their "
        "layers are held against the model's own. With an adapter as model_id, the model that it is deployed on.",
    )
    options: EngineOptions = Field(
        default_factory=EngineOptions,
        description="How the engine runs. The same model with the same options keeps its engine, and only its adapters "
        "change; with other options it gets another engine.",
    )
    strategy: Strategy = Field(
        default=Strategy.AUTO,
        description="How the new model takes the place of the current one. side_by_side: it is started beside it, and "
        "requests move when it has generated a token; it fails if memory is too small for both. replace: the current "
        "one ends its requests and leaves first, and requests get 503 until the new one is ready. auto: side by side "
        "where memory allows, else replace.",
    )
    keep_others: bool = Field(
        default=False, description="Leave the other deployments of this kind in service; this one becomes the current."
    )
    idle_timeout_s: float | None = Field(
        default=None,
        ge=1.0,
        le=31_536_000.0,
        allow_inf_nan=False,
        description="Seconds without a request after which the engine is ended; the next request starts it again, and "
        "waits for it. Left out: MODELYARD_ENGINE_IDLE_TIMEOUT_S, and never where that is empty.",
    )


class AdapterFailureOut(BaseModel):
    """Why the last change of adapters was taken back; what was in service before went on."""

    adapter_id: str = Field(examples=["acme/poems"])
    code: str = Field(description="Stable: programs may match it.", examples=["adapter_not_loaded"])
    message: str = Field(examples=["The engine did not load acme/poems: its weights are for another model."])
    hint: str = Field(examples=["Check that it was trained for this very model."])


_STATES = """The state right now.
STARTING: an engine is on its way, or will be when memory is free.
READY: the engine has generated a token.
BACKOFF: the engine died; the next one starts after a delay.
DRAINING: no new request reaches the engine, and those that it has are let end.
IDLE: nobody asked for a while and the engine was ended; the next request starts one.
STOPPING: nobody wants it any more, and its engine is ending.
STOPPED: nothing of it runs.
FAILED: given up; its job has the cause."""
_WANTED = """UP: in service.
DRAINED: out of service when the requests that it has have ended.
DOWN: out of service now."""


class DeployOut(BaseModel):
    """A deployment."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str = Field(examples=["openchat/openchat-3.5-0106"])
    adapter_ids: list[str] = Field(description="The adapters that are wanted.", examples=[[]])
    commit: str | None = Field(
        description="The commit of the model that it serves. A newer one in the store is served when it is deployed "
        "again.",
        examples=["c1899de289a04d12100db370d81485cdf75e47ca"],
    )
    id: UUID
    task: str = Field(description="generate or embed", examples=["generate"])
    state: DeploymentState = Field(description=_STATES)
    restarts: int = Field(description="Restarts since the engine last stood for a while.", examples=[0])
    created_at: Time
    ready_at: Time | None
    ended_at: Time | None
    job_id: UUID = Field(description="Its job, which runs for as long as the model is in service.")
    wanted: Wanted = Field(description=_WANTED)
    served_adapter_ids: list[str] = Field(description="The adapters that requests may name now.", examples=[[]])
    adapter_checks: dict[str, dict[str, Any]] = Field(
        description="What was found of adapters before requests could name them, by their ids: how many fixed prompts "
        "are answered otherwise than without the adapter, by how much the log probabilities of their tokens change at "
        "most, and for one that was trained here whether prompts are tokenised as in the training.",
        examples=[{"ft:support": {"tokens_equal": True, "prompts": 6, "acts": True, "changed_answers": 6}}],
    )
    adapter_failure: AdapterFailureOut | None
    chat_template: TemplateSource | None = Field(
        description="What renders chats: own, the model's template; mistral, Mistral's tokenizer; guessed, a default, "
        "since the model has none: its answers to chats may be poor. null for embeddings, and until it is known."
    )
    strategy: Strategy
    idle_timeout_s: float | None = Field(
        description="Seconds without a request after which the engine is ended; null: never.", examples=[None]
    )
    memory_bytes: int | None = Field(
        description="Memory that its engine was given; null while it has none.", examples=[4_294_967_296]
    )
    gpus: list[int] = Field(
        description="Its engine's GPUs, by their places in the order of the PCI bus, as nvidia-smi shows them; empty "
        "without an engine, or where nothing tells.",
        examples=[[0]],
    )

    @classmethod
    def of(cls, deployment: Deployment) -> DeployOut:
        """Show a row."""
        failure = deployment.adapter_failure
        serves = deployment.state == DeploymentState.READY
        return cls(
            model_id=deployment.model_id,
            adapter_ids=deployment.adapter_ids,
            commit=deployment.pinned["commit"] if deployment.pinned is not None else None,
            id=deployment.id,
            task=deployment.task,
            state=DeploymentState(deployment.state),
            restarts=deployment.restarts,
            created_at=deployment.created_at,
            ready_at=deployment.ready_at,
            ended_at=deployment.ended_at,
            job_id=deployment.job_id,
            wanted=Wanted(deployment.wanted),
            served_adapter_ids=[one["adapter_id"] for one in deployment.loaded] if serves else [],
            adapter_checks={
                one["adapter_id"]: one["checks"] for one in deployment.loaded if serves and "checks" in one
            },
            adapter_failure=AdapterFailureOut(**failure) if failure is not None else None,
            chat_template=TemplateSource(deployment.chat_template) if deployment.chat_template else None,
            strategy=Strategy(deployment.strategy),
            idle_timeout_s=deployment.idle_timeout_s,
            memory_bytes=deployment.memory_bytes,
            gpus=deployment.gpus,
        )


class DeployJobOut(JobOut):
    """The job of a deployment, with what whoever asked for it should know."""

    warnings: list[str] = Field(
        default_factory=list,
        description="What will be served otherwise than might be expected, such as a guessed chat template, or an "
        "adapter that carries another tokenizer than its base.",
        examples=[[]],
    )

    @classmethod
    def with_warnings(cls, job: Job, deployment: Deployment, of_adapters: Sequence[str] = ()) -> DeployJobOut:
        """Show a job's row with the warnings about its deployment's, and about its adapters."""
        warnings = list(of_adapters)
        if deployment.chat_template == TemplateSource.GUESSED:
            warnings.append(f"{GUESSED_WARNING.format(model_id=deployment.model_id)} {GUESSED_HINT}")
        return cls(**JobOut.of(job).model_dump(), warnings=warnings)


class DeployStatusOut(DeployOut):
    """The current deployment together with its job."""

    job: JobOut
