"""Wire shapes of a training's plan."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from modelyard.finetune.tables import OnBusy

EXAMPLE: dict[str, Any] = {
    "model_id": "Qwen/Qwen3-0.6B",
    "dataset_id": "01be6d68-f790-434b-aa6d-5bd492aef202",
    "prepared": {
        "rows": 1900, "held_out_rows": 100, "left_out_rows": 3, "truncated_rows": 12, "tokens": 812_000,
        "learnt_tokens": 304_000, "longest": 4096, "steps": 357, "rows_per_step": 16,
    },
    "chosen": {
        "batch_size": {
            "value": 16,
            "why": "1900 rows make 119 steps of 16 an epoch: more rows in a step would not make it steadier by much.",
        },
    },
    "estimate": {"seconds": 1353.0, "memory_bytes": 5_690_831_667, "tokens_per_s": 1800.0, "basis": "measured"},
    "seconds": {
        "loading": 14.2, "tokenizing": 3.1, "training": 1353.0, "validation": 31.0, "evaluation": 95.4, "total": 1496.7,
    },
    "minutes": 24.95,
    "batch_size": 8,
    "device": "NVIDIA H200",
    "dtype": "bfloat16",
    "memory_bytes": 5_690_831_667,
    "memory_available_bytes": 140_000_000_000,
    "fits": True,
    "failure": None,
    "on_busy": "wait",
    "accelerator": {
        "busy": False, "needed_bytes": 5_690_831_667, "free_bytes": 140_000_000_000, "held_by": [], "would_stop": [],
        "message": "The training wants about 5.3 GiB; 130.4 GiB is free, and held by: nobody.",
    },
}  # fmt: skip


class ChosenOut(BaseModel):
    """A setting that the request left open."""

    value: float = Field(description="What the training would have it be; of batch_size, the rows of a step.")
    why: str


class FinetunePlanOut(BaseModel):
    """The cost of a training, and whether there is room for it now."""

    model_config = ConfigDict(protected_namespaces=(), json_schema_extra={"examples": [EXAMPLE]})

    model_id: str
    dataset_id: UUID
    prepared: dict[str, Any] = Field(
        description="The rows as the training would have them: how many, tokens, truncated, held back, left out (the "
        "first with line and reason), the steps that they make, and `notes` on what was asked for and cannot act."
    )
    chosen: dict[str, ChosenOut] = Field(
        description="`batch_size`, `epochs`, `learning_rate` and `retention` where they were left open (auto): what is "
        "chosen and why. Send the values with the training to have the same again, whatever becomes of the rule; but "
        "`epochs`, which are the most that it takes: given, it takes them all."
    )
    estimate: dict[str, Any] | None = Field(
        description="Seconds of the steps, memory, tokens a second, and whether that was measured now or is what the "
        "last such training took (history). null: `failure` or `accelerator` says why."
    )
    seconds: dict[str, float] | None = Field(description="What the time is spent on, and its total.")
    minutes: float | None = Field(description="The total in minutes, from its turn to the scores.")
    batch_size: int | None = Field(description="Rows of a forward pass that fit.")
    device: str = Field(description="What it would run on.")
    dtype: str = Field(description="The number format of the frozen base.")
    memory_bytes: int = Field(description="Memory that it wants; by arithmetic where there is no estimate.")
    memory_available_bytes: int = Field(description="Memory that it could have had at this moment.")
    fits: bool | None = Field(description="Whether it would; null where nothing was measured.")
    failure: dict[str, Any] | None = Field(description="Why it does not fit, and which settings would.")
    on_busy: OnBusy
    accelerator: dict[str, Any] = Field(
        description="Whether it is taken, by whom, and which deployments `stop_deployment` would drain."
    )
