"""Wire shapes of the finetune room: the source API's fields first, ours after them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from modelyard.finetune.tables import Finetune, FinetunePoint, OnBusy, Phase
from modelyard.jobs.schemas import JobOut, Time
from modelyard.jobs.tables import Job
from modelyard.trainer.spec import Hyperparameters

ALL_LINEAR = "all-linear"
AUTO = "auto"
#: Settings that may be left to the trainer, which knows the rows (`trainer.choices`).
CHOSEN = ("epochs", "learning_rate", "batch_size", "retention")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class HyperparametersIn(BaseModel):
    """Hyperparameters of the training. Everything may be left out."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    epochs: Annotated[float, Field(gt=0.0, le=1000.0, allow_inf_nan=False)] | Literal["auto"] | None = Field(
        default=None,
        description="How often every row is learnt from. auto, or neither this nor `max_steps`: until the rows are "
        "learnt, at most 3 times, rows of small sets more often.",
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Steps of the whole training, in place of `epochs`."
    )
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | Literal["auto"] = Field(
        default="auto",
        description="The highest that it reaches. auto: by the rows of a step, the adapter's rank and alpha, and the "
        "model's width.",
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate goes down after the warm-up."
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, le=1_000_000, description="Steps in which the learning rate goes up; 3 % if left out."
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        default="auto",
        description="Rows of one forward pass. auto: a step has as many rows as teach most, 4 of a small set to 16, in "
        "as many passes as memory asks for.",
    )
    gradient_accumulation: int = Field(default=1, ge=1, le=4096, description="Batches that make one step.")
    rank: int = Field(
        default=16, ge=1, le=512, description="The adapter's rank: MODELYARD_ENGINE_MAX_LORA_RANK at most."
    )
    alpha: float | None = Field(
        default=None, gt=0.0, le=65_536.0, allow_inf_nan=False, description="The adapter's weight; twice the rank."
    )
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, allow_inf_nan=False, description="Dropout of the adapter.")
    target_modules: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(min_length=1, max_length=100)]
        | Literal["all-linear"]
    ) = Field(
        default="all-linear",
        description="Layers that are adapted, by the ends of their names, such as q_proj. all-linear: all that text "
        "reaches and an engine serves, but the output layer.",
    )
    max_seq_len: int | None = Field(
        default=None,
        ge=16,
        le=10_000_000,
        description="Longest row in tokens; longer ones are truncated. Left out: what the model takes, 4,096 at most.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the adapter's first weights, of the rows' order.")
    packing: bool = Field(
        default=False,
        description="Put several rows into one line of a batch, each as if it were alone; the training fails where the "
        "model would answer otherwise. Without it, rows of like length share a batch.",
    )
    quantization: Literal["4bit"] | None = Field(
        default=None, description="4bit: the base is held in 4 bits, for less memory. Needs a GPU."
    )
    validation_split: float | None = Field(
        default=None,
        ge=0.0,
        le=0.5,
        allow_inf_nan=False,
        description="Part of the rows that is held back to measure by. Left out: 5 %, at least one row, none of fewer "
        "than 20.",
    )
    early_stopping: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Measurements without an improvement after which the training ends. Left out: it goes to its end.",
    )
    checkpoint_steps: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Steps between two checkpoints. Left out: a tenth of the training, or a few minutes of it.",
    )
    retention: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] | Literal["auto"] = Field(
        default="auto",
        description="How strongly the adapter is held to what the base says of ordinary texts, which are read beside "
        "the rows: the weight of the divergence from it. 0: not at all, and nothing else is read.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> HyperparametersIn:
        if self.epochs not in (None, AUTO) and self.max_steps is not None:
            raise ValueError("give epochs or max_steps, not both: each says how long the training is")
        return self

    def filled(self) -> Hyperparameters:
        """Return these settings with what they leave out."""
        values = self.model_dump()
        values["alpha"] = float(2 * self.rank if self.alpha is None else self.alpha)
        values |= {name: None for name in CHOSEN if values[name] == AUTO}
        values["target_modules"] = None if self.target_modules == ALL_LINEAR else self.target_modules
        return Hyperparameters(**values)


class PromoteIn(BaseModel):
    """The alias that is to lead to the adapter once it is in service, and on which condition."""

    model_config = ConfigDict(extra="forbid")

    alias: str = Field(
        min_length=1,
        max_length=128,
        description="One of your own: the built-in ones follow what is deployed, until something fixes them.",
        examples=["support-bot"],
    )
    condition: Literal["better", "always"] = Field(
        default="better",
        alias="if",
        description="better: only if the adapter surely is, by the rows that were held back.",
    )


class FinetuneIn(BaseModel):
    """A wish for a training. Ids are those of GET /api/v1/finetune/models/ and GET /api/v1/datasets/."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "name": "My Adapter Training",
                    "model_id": "NousResearch/Llama-2-7b-chat-hf",
                    "dataset_id": "01be6d68-f790-434b-aa6d-5bd492aef202",
                    "hyperparameters": {"rank": 16},
                    "deploy": True,
                    "promote": {"alias": "support-bot", "if": "better"},
                }
            ]
        },
    )

    name: str = Field(min_length=1, max_length=200, description="Of the training; the adapter's id is made of it.")
    model_id: str = Field(min_length=1, max_length=256, description="The model to train.")
    dataset_id: UUID = Field(description="The dataset to train on.")
    hyperparameters: HyperparametersIn = Field(default_factory=HyperparametersIn)
    deploy: bool = Field(
        default=False,
        description="Load the adapter into the running engine of its base when it is done, after checks.",
    )
    promote: PromoteIn | None = Field(default=None, description="Have an alias lead to it then. Needs `deploy`.")
    on_busy: OnBusy = Field(
        default=OnBusy.WAIT,
        description="While deployments leave no room for the training. wait: until there is. stop_deployment: drain "
        "them, train, bring them back. fail: give up.",
    )

    @field_validator("name")
    @classmethod
    def _shows_something(cls, value: str) -> str:
        if _CONTROL.search(value):
            raise ValueError("a name has no line breaks or control characters")
        if not value.strip():
            raise ValueError("a name has something in it that can be seen")
        return value.strip()

    @model_validator(mode="after")
    def _is_deployed_first(self) -> FinetuneIn:
        if self.promote is not None and not self.deploy:
            raise ValueError('promote needs "deploy": true: an alias only leads to what is in service')
        return self


#: What a request that says nothing of them gets.
_DEFAULTS: dict[str, JsonValue] = HyperparametersIn().model_dump(mode="json")


class HyperparametersOut(BaseModel):
    """The settings of a training, with what the request left out."""

    model_config = ConfigDict(
        protected_namespaces=(), json_schema_extra={"examples": [{**_DEFAULTS, "epochs": "auto", "alpha": 32.0}]}
    )

    epochs: float | Literal["auto"] | None
    max_steps: int | None
    learning_rate: float | Literal["auto"]
    lr_schedule: str
    warmup_steps: int | None
    batch_size: int | Literal["auto"]
    gradient_accumulation: int
    rank: int
    alpha: float
    dropout: float
    target_modules: list[str] | Literal["all-linear"]
    max_seq_len: int | None
    seed: int
    packing: bool
    quantization: str | None
    validation_split: float | None
    early_stopping: int | None
    checkpoint_steps: int | None
    retention: float | Literal["auto"] = 0.0

    @classmethod
    def of(cls, stored: dict[str, Any]) -> HyperparametersOut:
        """Show what a row keeps; what is left to the trainer is `auto`."""
        is_open = {name for name in CHOSEN if name in stored and stored[name] is None}
        if stored["max_steps"] is not None:
            is_open.discard("epochs")
        return cls.model_validate(
            {
                **stored,
                **dict.fromkeys(is_open, AUTO),
                "target_modules": stored["target_modules"] or ALL_LINEAR,
            }
        )


class PromoteOut(BaseModel):
    """The alias that is to lead to the adapter."""

    alias: str = Field(examples=["support-bot"])
    condition: str = Field(alias="if", examples=["better"])


class FinetuneOut(BaseModel):
    """A training with its job."""

    model_config = ConfigDict(protected_namespaces=())

    id: UUID
    name: str = Field(examples=["My Adapter Training"])
    model_id: str = Field(examples=["NousResearch/Llama-2-7b-chat-hf"])
    dataset_id: UUID
    job: JobOut
    adapter_id: str = Field(description="What the adapter is called in the store.", examples=["ft:my-adapter-training"])
    phase: Phase = Field(description="What it is at, or was at when its job ended.")
    place: int | None = Field(description="Its place in the queue, 1 is next; null once it runs.", examples=[1])
    deploy: bool
    promote: PromoteOut | None
    on_busy: OnBusy
    hyperparameters: HyperparametersOut
    checkpoint_step: int | None = Field(description="The step that it would go on from on any machine.")
    created_at: Time
    first_step_at: Time | None = Field(description="When the trainer took its first step.")
    finished_at: Time | None

    @classmethod
    def of(cls, row: Finetune, job: Job, place: int | None) -> FinetuneOut:
        """Show a row."""
        return cls.model_validate(_shown(row, job, place))


class PointOut(BaseModel):
    """The figures of one step."""

    model_config = ConfigDict(from_attributes=True)

    step: int = Field(examples=[10])
    at: Time
    epoch: float | None
    loss: float | None
    validation_loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens: int | None = Field(description="Learnt from so far.")
    tokens_per_s: float | None
    memory_bytes: int | None


class FinetuneDetailOut(FinetuneOut):
    """All that is known of a training."""

    prepared: dict[str, Any] | None = Field(
        description="What the rows turned out to be: how many, tokens, truncated, left out, held back. `chosen` has "
        "the settings that were left open, each with its value and why.",
        examples=[{"rows": 48, "held_out_rows": 2, "truncated_rows": 0, "steps": 96}],
    )
    estimate: dict[str, Any] | None = Field(
        description="What was expected before it began; `figures` is what it took.",
        examples=[{"seconds": 300.0, "memory_bytes": 2147483648, "tokens_per_s": 1800.0}],
    )
    figures: dict[str, Any] | None = Field(
        description="What it took, and its losses.", examples=[{"steps": 40, "seconds": 312.4, "tokens_per_s": 1750.2}]
    )
    evaluation: dict[str, Any] | None = Field(
        description="Base and adapter on the rows that were held back.",
        examples=[{"better": True, "verdict": "better", "why": "Better: loss per token 2.100 → 1.400."}],
    )
    checks: dict[str, Any] | None = Field(
        description="Before it was named to clients: does it act, and are prompts tokenised as in the training?"
    )
    promotion: dict[str, Any] | None = Field(description="Whether the alias moved, and why or why not.")
    stopped: list[dict[str, Any]] = Field(description="Deployments that were drained for it.", examples=[[]])
    unavailable_s: float | None = Field(description="Seconds for which a deployment was out of service for it.")
    versions: dict[str, str] | None = Field(description="Of the libraries that it was trained with.")
    curve: list[PointOut] = Field(description="Measurements by step, thinned evenly to `points` of them.")
    curve_points: int = Field(description="How many measurements there are in all.", examples=[1])

    @classmethod
    def with_curve(
        cls, row: Finetune, job: Job, place: int | None, curve: list[FinetunePoint], total: int
    ) -> FinetuneDetailOut:
        """Show a row with its measurements."""
        names = (
            "prepared", "estimate", "figures", "evaluation", "checks", "promotion", "stopped", "unavailable_s",
            "versions",
        )  # fmt: skip
        values = {name: getattr(row, name) for name in names}
        points = [PointOut.model_validate(point) for point in curve]
        return cls.model_validate({**_shown(row, job, place), **values, "curve": points, "curve_points": total})


def _shown(row: Finetune, job: Job, place: int | None) -> dict[str, Any]:
    names = (
        "id", "name", "model_id", "dataset_id", "adapter_id", "phase", "deploy", "promote", "on_busy",
        "checkpoint_step", "created_at", "first_step_at", "finished_at",
    )  # fmt: skip
    return {
        **{name: getattr(row, name) for name in names},
        "job": JobOut.of(job),
        "place": place,
        "hyperparameters": HyperparametersOut.of(row.hyperparameters),
    }
